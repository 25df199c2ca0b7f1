"""The decoder and its parts; readable without knowing the parallelism."""
