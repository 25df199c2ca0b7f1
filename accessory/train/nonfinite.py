"""Which records were in a step whose loss or gradient is not finite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from accessory.config import write_json
from accessory.console import is_main, listed
from accessory.data.loader import Batch
from accessory.data.mix import Samples
from accessory.errors import UserError

SHOWN = 4  # records in the sentence; all are in the file


class NotFinite(UserError):
    """The loss or its gradient is not finite. Raised on all ranks together, before any weight has changed.

    Attributes:
        finite: whether the loss of each of this rank's micro-batches is.
    """

    def __init__(self, finite: list[bool]):
        super().__init__(
            "the loss or its gradient is not finite; no weight was changed. Lower optim.lr, or look at the data"
        )
        self.finite = finite


def blame(
    finite: list[bool], micro_batches: Sequence[Batch], samples: Samples, path: Path, step: int, data_rank: int
) -> str:
    """What can be said of the records of a step that is not finite; rank 0 writes them all to ``path``. A collective.

    A micro-batch is the smallest unit with a loss of its own, so its records stand or fall together.

    Args:
        finite: of ``NotFinite``, this rank's. data_rank: its place among the data-parallel ranks.
    """
    own = [
        (data_rank, number, fine, [samples.where(key % len(samples)) for key in batch.sample_keys.tolist()])
        for number, (fine, batch) in enumerate(zip(finite, micro_batches, strict=True))
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    # model-parallel ranks share their micro-batches: one with a bad slice of the weights may be alone in what it sees
    parts: dict[tuple[int, int], dict[str, Any]] = {}
    for rank, theirs in enumerate(everyone):
        for data_rank, number, fine, records in theirs:
            new = {"ranks": [], "micro_batch": number, "loss_is_finite": True, "records": records}
            part = parts.setdefault((data_rank, number), new)
            part["ranks"].append(rank)
            part["loss_is_finite"] &= fine
    if is_main():
        write_json(path, {"step": step, "micro_batches": list(parts.values())})
    full = [part for part in parts.values() if part["records"]]
    bad = [part for part in full if not part["loss_is_finite"]]
    records = [record for part in bad for record in part["records"]]
    if not bad:
        return (
            "every loss is finite, but the gradient is not finite; no weight was changed. Lower optim.lr, or look at the "
            f"step's records, listed in {path}"
        )
    if len(bad) == len(full) > 1:
        return (
            f"the loss of all {len(full)} micro-batches is not finite; no weight was changed. Hardly a record is to blame: "
            f"lower optim.lr, or start from weights that are finite; the step's records are listed in {path}"
        )
    return (
        f"the loss of {len(bad)} of {len(full)} micro-batches is not finite; no weight was changed. Look at their records "
        f"({listed(records, SHOWN)}; all are in {path}), or lower optim.lr"
    )
