"""The training step, and what surrounds it."""
