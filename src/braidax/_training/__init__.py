"""Training helpers that sit on top of the layer."""
