"""Tensors that are forgotten on the CPU, and would be missed on the first GPU."""

from faults.fault import Fault

RUNS = "tests/test_pretend_gpu.py::test_every_command_runs"

FAULTS = (
    Fault(
        "the angles of positions stay on the CPU",
        "accessory/model/rope.py",
        "torch.arange(0, head_dim, 2, device=positions.device,",
        "torch.arange(0, head_dim, 2,",
        RUNS,
    ),
    Fault(
        "the places of a step's tokens in the cache stay on the CPU",
        "accessory/model/cache.py",
        "functools.partial(torch.tensor, device=documents.positions.device)",
        "torch.tensor",
        RUNS,
    ),
    Fault(
        "the rows of images stay on the CPU",
        "accessory/data/loader.py",
        "            images=self.images and self.images.to(device),\n",
        "",
        RUNS,
    ),
)
