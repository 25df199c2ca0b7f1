"""One thread per process: several test processes share the machine, and OpenMP threads that wait would spin against them."""

import torch

torch.set_num_threads(1)
