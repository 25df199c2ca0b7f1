"""Process groups, tensor parallelism, FSDP: everything that knows about other processes, but for the two layouts."""
