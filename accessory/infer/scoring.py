"""How likely texts are to a model."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Predictions, Targets

MOST_TOKENS = 8192
"""In a forward, unless one document alone has more."""


class ScorePlan(NamedTuple):
    """Documents that a model's ranks run together, each from its beginning, and which tokens are asked for there.

    Attributes:
        lengths: of the documents. tokens: theirs, one behind the other.
        rows, targets: places among ``tokens``, and the tokens that are to follow there; a place can stand several times.
    """

    lengths: list[int]
    tokens: list[int]
    rows: list[int]
    targets: list[int]

    def to_numbers(self) -> list[int]:
        """The first is negative: that tells it from a step's plan."""
        return [-len(self.lengths), len(self.rows), *self.lengths, *self.tokens, *self.rows, *self.targets]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "ScorePlan":
        left = iter(numbers[2:])
        lengths = list(islice(left, -numbers[0]))
        return cls(lengths, *(list(islice(left, count)) for count in (sum(lengths), numbers[1], numbers[1])))

    @torch.inference_mode()
    def run(self, model: Decoder) -> Tensor:
        """[2, n] as ``Predictions`` has it, of each of the targets."""
        device = model.norm.weight.device
        inputs = Inputs(torch.tensor(self.tokens, device=device), Documents.of(self.lengths).to(device))
        targets = Targets(torch.tensor(self.rows), torch.tensor(self.targets)).to(device)
        return model(inputs, Predictions(targets))[0]


class Score(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, and whether each is the likeliest."""

    log_prob: float
    is_greedy: bool


def score(
    asked: Sequence[tuple[Sequence[int], Sequence[int]]], run: Callable[[ScorePlan], Tensor], most_tokens: int = MOST_TOKENS
) -> Iterator[tuple[int, Score]]:
    """Yield (number, score) of each context and continuation, tokens both and neither empty, the longest first.

    Those that differ in their last token alone, as one-letter answers to a question do, are run once.
    """
    documents: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(asked):
        documents.setdefault((*context, *continuation[:-1]), []).append(number)
    for together in _batches(sorted(documents, key=len, reverse=True), most_tokens):
        plan, numbers, sizes = ScorePlan([], [], [], []), [], []
        for document in together:
            plan.lengths.append(len(document))
            plan.tokens.extend(document)
            end = len(plan.tokens)
            for number in documents[document]:
                continuation = asked[number][1]
                plan.rows.extend(range(end - len(continuation), end))
                plan.targets.extend(continuation)
                numbers.append(number)
                sizes.append(len(continuation))
        for number, (log_probs, likeliest) in zip(numbers, run(plan).double().cpu().split(sizes, 1), strict=True):
            yield number, Score(log_probs.sum().item(), bool(likeliest.all()))


def _batches(documents: Sequence[tuple[int, ...]], most_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """In their order, as many at a time as have so many tokens together; one at least."""
    batch: list[tuple[int, ...]] = []
    total = 0
    for document in documents:
        if batch and total + len(document) > most_tokens:
            yield batch
            batch, total = [], 0
        batch.append(document)
        total += len(document)
    if batch:
        yield batch
