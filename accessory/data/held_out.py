"""The held-out part of a mix: whole records, so that no part of a held-out record is trained on."""

from collections.abc import Sequence

import numpy as np

from accessory.data.order import permute
from accessory.data.store import Store


def hold_out(stores: Sequence[Store], share: float, seed: int) -> np.ndarray:
    """The sorted sample numbers, over all stores, of held-out records. Records are taken in an order that ``seed`` makes,
    until they are nearest to ``share`` of the samples: at least one record, and never all."""
    counts = [len(store.borders()) - 1 for store in stores]  # borders are found again below: of 10 M records, 80 MB
    wanted = max(1, round(share * sum(len(store) for store in stores)))
    # a record has at least one sample, so ``wanted`` records are always enough
    drawn = permute(np.arange(min(wanted, sum(counts) - 1)), sum(counts), f"{seed}/validation")
    if not len(drawn):
        return drawn
    begins, ends = np.empty_like(drawn), np.empty_like(drawn)
    ordered = np.argsort(drawn)
    record = sample = 0
    for store, count in zip(stores, counts, strict=True):
        low, high = np.searchsorted(drawn, (record, record + count), sorter=ordered)
        if low < high:
            mine = ordered[low:high]
            borders, numbers = store.borders(), drawn[mine] - record
            begins[mine], ends[mine] = borders[numbers] + sample, borders[numbers + 1] + sample
        record, sample = record + count, sample + len(store)
    sizes = ends - begins
    taken = int(np.abs(np.cumsum(sizes) - wanted).argmin()) + 1
    sizes, ends = sizes[:taken], ends[:taken]
    return np.sort(np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(sizes.sum()))
