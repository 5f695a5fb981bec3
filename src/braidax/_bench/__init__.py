"""Measuring: our layer against its peers, interleaved in one process."""
