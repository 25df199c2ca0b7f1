"""Planted faults: slips that a person could make, by room of the house, each with the check that must catch it.

``make faults`` plants them one by one (``python -m faults --help``); ``tests/test_faults.py`` sees that they still apply.
"""

from faults import (
    adapters,
    attention,
    balance,
    classify,
    data,
    descriptions,
    evaluation,
    experts,
    formats,
    generation,
    images,
    kernels,
    loss,
    offload,
    optimiser,
    parallel,
    places,
    precision,
    quantised,
    recompute,
    router,
    serving,
    side_by_side,
    state,
    vision,
)
from faults.fault import Fault

_MODULES = (
    router,
    experts,
    kernels,
    attention,
    adapters,
    parallel,
    places,
    recompute,
    loss,
    balance,
    classify,
    optimiser,
    data,
    state,
    formats,
    descriptions,
    generation,
    side_by_side,
    serving,
    evaluation,
    precision,
    quantised,
    vision,
    images,
    offload,
)
ROOMS: dict[str, tuple[Fault, ...]] = {module.__name__.rpartition(".")[2]: module.FAULTS for module in _MODULES}
EVERY = [fault for faults in ROOMS.values() for fault in faults]
EIGHT = (
    "the gradients of all but the last micro-batch are not reduced over fsdp's ranks",
    "the partial gradients of the experts' adapters are not summed",
    "there is no warm-up",
    "the third choice is dropped from a token's sum",
    "the third and later micro-batches count half",
    "blocks beyond the third see only themselves",
    "every chunk of rows has the first one's targets",
    "the router's product is in bf16",
)
"""Names of those that are caught though all of them are planted together (``--together``)."""
