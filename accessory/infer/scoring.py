"""Scoring: the log-probabilities that a model gives to texts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.data.placement import PLACE
from accessory.errors import UserError
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Means, Predictions, Targets

MOST_TOKENS = 8192
"""In a forward, unless one document alone has more."""


class ScorePlan(NamedTuple):
    """Whole documents that a model's ranks run together, and the tokens to be scored in them.

    Attributes:
        lengths: of the documents. tokens: of all documents, one after the other.
        rows, targets: places among ``tokens``, and the token to be scored behind each; places may repeat. If empty, the mean
            of each document's hidden states is wanted.
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
        """[2, n] the result of ``Predictions`` for the targets; without targets [documents, D], that of ``Means``."""
        device = model.norm.weight.device
        documents = Documents.of(self.lengths).to(device)
        inputs = Inputs(torch.tensor(self.tokens, device=device), documents)
        if not self.rows:
            return model(inputs, Means(documents))[0]
        targets = Targets(torch.tensor(self.rows), torch.tensor(self.targets)).to(device)
        return model(inputs, Predictions(targets))[0]


class Score(NamedTuple):
    """A continuation's log-probability, and whether greedy decoding would write it."""

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


def scored_from(examples: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]] | None) -> list[int]:
    """Where the part of each example begins that is scored: behind its context, its images and the first token.

    Raises:
        UserError: an example does not begin with its context, or has nothing to score.
    """
    if contexts is not None and len(contexts) != len(examples):
        raise UserError(f"{len(examples)} examples but {len(contexts)} contexts")
    starts = []
    for number, example in enumerate(examples):
        context = contexts[number] if contexts is not None else ()
        if list(example[: len(context)]) != list(context):
            raise UserError(f"example {number} does not begin with the tokens of its context")
        images = max((place + 1 for place, token in enumerate(example) if token == PLACE), default=0)
        starts.append(max(1, len(context), images))
        if len(example) <= starts[-1]:
            raise UserError(f"example {number} has no token to score after its context")
    return starts


def score_example(tokens: Sequence[int], logits: Tensor) -> dict[str, Any]:
    """The scores of LLaMA2-Accessory's ``evaluate_examples``, of the ``tokens`` predicted by ``logits`` [n, V]."""
    labels = torch.tensor(tokens, device=logits.device)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return {
        "log_likelihood": -losses.sum().item(),
        "ppl": losses.mean().exp().item(),
        "max_equal": bool((logits.argmax(-1) == labels).all()),
        "non_context_logits": logits,
    }


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
