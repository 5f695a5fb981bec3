"""Pictures of routing. Matplotlib is imported when a plot is drawn."""
