"""Images that prompts show: known by a number made of their pixels, encoded once, and kept while there is room."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from accessory.data.placement import PLACE
from accessory.infer.prompts import check_places
from accessory.model.decoder import Decoder
from accessory.model.visual import Images

MOST_BYTES = 2**30
"""Of features that are kept."""


def image_number(pixels: Tensor) -> int:
    """A number above 0 that stands for an image."""
    return 1 + int.from_bytes(hashlib.blake2b(pixels.numpy().tobytes(), digest_size=7).digest(), "big")


class SeenImages:
    """The features of images, on every model-parallel rank the same: all do the same with them, in the same order."""

    def __init__(self, model: Decoder, most_bytes: int = MOST_BYTES):
        self._model, self._most_bytes = model, most_bytes
        self._device = model.norm.weight.device
        self._features: OrderedDict[int, tuple[Tensor, ...]] = OrderedDict()  # the oldest first

    def numbered(self, prompt: Sequence[int], images: Sequence[Tensor]) -> tuple[list[int], dict[int, Tensor]]:
        """The tokens of a prompt with an image's number, negative, in each of its places; the images' pixels by that.

        Raises:
            UserError: there are not as many places as the images need, or the model cannot see.
        """
        visual = self._model.sight
        check_places(prompt, len(images), visual)
        if not images or not visual:
            return list(prompt), {}
        pixels = {image_number(image): image for image in images}
        numbers = itertools.chain.from_iterable([image_number(image)] * visual.words for image in images)
        return [-next(numbers) if token == PLACE else token for token in prompt], pixels

    def missing(self, tokens: Iterable[Sequence[int]]) -> list[int]:
        """The images among some documents' tokens of which nothing is kept; the others are the newest from now on."""
        lacking = []
        for number in _numbers(tokens):
            if number in self._features:
                self._features.move_to_end(number)
            else:
                lacking.append(number)
        return lacking

    def receive(self, tokens: Sequence[Sequence[int]], new: Sequence[int], pixels: Mapping[int, Tensor]) -> None:
        """Encode the ``new`` ones among some documents' images, whose ``pixels`` the first rank has (a collective)."""
        self.missing(tokens)  # on all ranks in one order
        if not new:
            return
        visual, mp = self._model.args.visual, self._model.mesh.mp
        assert visual and self._model.vision
        if mp.rank:
            told = torch.empty(len(new), 3, visual.size, visual.size, dtype=torch.uint8)
        else:
            told = torch.stack([pixels[number] for number in new])
        told = mp.broadcast(told.to(self._device))
        seen = self._model.vision(Images(torch.zeros(0, dtype=torch.int64, device=self._device), told))
        for place, number in enumerate(new):
            self._features[number] = tuple(group[place].clone() for group in seen.features)
        needed, kept = set(_numbers(tokens)), 0
        for number, features in reversed([*self._features.items()]):
            kept += sum(group.nbytes for group in features)
            if kept > self._most_bytes and number not in needed:
                del self._features[number]

    def shown(self, tokens: Sequence[Sequence[int]], past: Sequence[int]) -> tuple[list[int], Images | None]:
        """The tokens of some documents, one behind the other, with 0 in the places of images, and what stands there.

        Args:
            past: places that each document has had before these tokens.
        """
        flat = list(itertools.chain.from_iterable(tokens))
        rows = [row for row, token in enumerate(flat) if token < 0]
        if not rows:
            return flat, None
        visual = self._model.args.visual
        assert visual
        order = {number: place for place, number in enumerate(_numbers(tokens))}
        taken = []
        for some, before in zip(tokens, past, strict=True):
            own = [token for token in some if token < 0]
            # images are whole, so that their words go around in each document
            taken += [order[-token] * visual.words + (before + n) % visual.words for n, token in enumerate(own)]
        for row in rows:
            flat[row] = 0
        features = tuple(torch.stack(group) for group in zip(*(self._features[number] for number in order), strict=True))
        rows_here, words = (torch.tensor(some, device=self._device) for some in (rows, taken))
        return flat, Images(rows_here, features=features, words=words)


def _numbers(tokens: Iterable[Sequence[int]]) -> list[int]:
    """The images in some documents, each once, in the order of their first place."""
    return list(dict.fromkeys(-token for some in tokens for token in some if token < 0))
