"""Checkpoints: a mapping from logical names to full tensors; every file format is a view of it."""
