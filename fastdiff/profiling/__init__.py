"""Measuring: how long things take here, and against what."""
