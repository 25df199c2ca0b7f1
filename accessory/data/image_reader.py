"""The pixels of samples' images, decoded by threads: Pillow releases Python's global lock."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from accessory.console import say
from accessory.data.store import Sample
from accessory.errors import UserError
from accessory.parallel.launch import own_cores
from accessory.visual.images import ImageError, open_image
from accessory.visual.views import padded_resize

T = TypeVar("T")


class ImageReader:
    """Reads images as squares of ``size`` x ``size`` pixels.

    ``skips_bad``: if an image cannot be read, warn and learn nothing from its sample; otherwise the run ends.
    """

    def __init__(self, size: int, skips_bad: bool = False):
        self.size, self._skips_bad = size, skips_bad
        self._threads = ThreadPoolExecutor(own_cores(), "images")

    def read(self, samples: Sequence[Sample], places: Sequence[str]) -> tuple[list[Sample], Tensor]:
        """The samples, and the pixels of all their images [n, 3, size, size] uint8. A skipped sample has no trained token.

        Args:
            places: file and line of each sample's record, for messages.
        """
        read, pixels = list[Sample](), [torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)]
        for number, (sample, found) in enumerate(zip(samples, self._threads.map(self._of_sample, samples), strict=True)):
            if isinstance(found, ImageError):
                if not self._skips_bad or sample.label is not None:
                    raise UserError(f"{places[number]}: {found}") from found
                say(f"warning: {places[number]}: {found}; nothing is learnt of this record")
                sample = replace(sample, trained=np.zeros_like(sample.trained))
                found = [pixels[0].new_zeros(len(sample.images), *pixels[0].shape[1:])]
            read.append(sample)
            pixels += found
        return read, torch.cat(pixels)

    def _of_sample(self, sample: Sample) -> list[Tensor] | ImageError:
        try:
            return [padded_resize(open_image(name), self.size)[None] for name in sample.images]
        except ImageError as error:
            return error


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while one is in use."""
    left = iter(items)
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, left, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, left, None)
            yield item
