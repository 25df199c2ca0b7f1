"""Sampling: the next token is a function of the logits, the request and the place in its answer, and of nothing else."""

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from accessory.config import MADE, Bounds, Count, NonNegative, Positive, Share
from accessory.infer.grammar import Grammar

TopK = Annotated[int, Bounds(least=-1)]
TopP = Annotated[float, Bounds(above=0, most=1)]
Penalty = Annotated[float, Bounds(least=-2, most=2)]
Bias = Annotated[float, Bounds(least=-100, most=100)]
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its answer, by the names of vLLM and OpenAI; ``config.from_mapping`` checks it."""

    max_tokens: Count = 512
    temperature: NonNegative = 0.0  # 0: the likeliest token
    top_k: TopK = 0  # choose among the k likeliest; 0, or -1 as vLLM's clients say it: all
    top_p: TopP = 1.0  # choose among the likeliest tokens whose probabilities add up to this
    min_p: Share = 0.0  # choose among tokens with at least this share of the likeliest one's probability
    repetition_penalty: Positive = 1.0  # divides (negative: multiplies) the logit of what is in the prompt or the answer
    presence_penalty: Penalty = 0.0  # subtracted from the logit of each token in the answer
    frequency_penalty: Penalty = 0.0  # the same, once for each time that it occurs
    logit_bias: dict[int, Bias] = field(default_factory=dict)  # added to the logits of tokens
    seed: int | None = None  # any number; None: another one each time
    stop: tuple[str, ...] = ()  # texts, or names of special tokens, that end the answer and are cut off
    joined: bool = field(default=False, metadata=MADE)  # keep the space with which the text may continue the prompt
    shown: tuple[str, ...] = field(default=(), metadata=MADE)  # special tokens that the text shows by name
    logprobs: Annotated[int, Bounds(least=0, most=MOST_LOGPROBS)] | None = None  # of each token, and of the n likeliest
    grammar: Grammar | None = field(default=None, metadata=MADE)  # what the answer must be
    expert_load: bool = False  # count how many of the request's tokens went to each expert of each layer

    @property
    def takes_likeliest(self) -> bool:
        """Whether this is plain greedy decoding: the argmax of the unchanged logits."""
        bent = self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return self.temperature == 0 and not bent

    def stopping_at(self, stops: Sequence[str]) -> "Sampling":
        """The same with further stops."""
        return replace(self, stop=(*self.stop, *stops))

    def seeded(self, sample: int = 0) -> "Sampling":
        """The same with a seed for one of several samples: the request's (or a random one) plus the sample's number."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return replace(self, seed=seed + sample)


@dataclass(frozen=True)
class TokenChoice:
    """A chosen token, with its log-probability and the likeliest (token, log-probability) if these are asked for."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    how: Sequence[Sampling],
    allowed: Sequence[Tensor | None],
) -> list[TokenChoice]:
    """The next token of each of n answers.

    Args:
        logits: [n, V]. prompts, answers: tokens so far. how: with seeds. allowed: [V] bool of each; None: all are.
    """
    chosen = logits.argmax(-1)
    others = [n for n, sampling in enumerate(how) if allowed[n] is not None or not sampling.takes_likeliest]
    if others:
        asked = [(prompts[n], answers[n], how[n], allowed[n]) for n in others]
        chosen[others] = _choose_bent(logits[others].double(), asked)
    return [_told(logits[n], token, how[n].logprobs) for n, token in enumerate(chosen.tolist())]


def _choose_bent(scores: Tensor, asked: Sequence[tuple[Sequence[int], Sequence[int], Sampling, Tensor | None]]) -> Tensor:
    """[n] tokens from ``scores`` [n, V], changed in place; ``asked``: each one's prompt, answer, sampling, ``allowed``."""
    for row, (prompt, answer, sampling, possible) in zip(scores, asked, strict=True):
        _adjust(row, prompt, answer, sampling)
        if possible is not None:
            row.masked_fill_(~possible.to(row.device), -math.inf)
    _, answers, how, _ = zip(*asked, strict=True)
    chosen = scores.argmax(-1)
    drawn = [n for n, sampling in enumerate(how) if sampling.temperature > 0]
    if drawn:
        places = [_uniform(how[n].seed, len(answers[n])) for n in drawn]
        chosen[drawn] = _draw(scores[drawn], places, [how[n] for n in drawn])
    return chosen


def _adjust(row: Tensor, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> None:
    """Apply bias and penalties to a row of logits, in place."""
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=row.device)
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        seen, times = torch.tensor([list(counts), list(counts.values())], device=row.device)
        row[seen] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _draw(scores: Tensor, places: Sequence[float], how: Sequence[Sampling]) -> Tensor:
    """[n] tokens drawn from ``scores`` [n, V] after temperature, top-k, top-p and min-p. ``places`` in [0, 1) say where in
    each cumulative distribution, the likeliest token first."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

    size = scores.shape[1]
    # no temperature is so low that this overflows
    scaled = (scores - scores.amax(-1, keepdim=True)) / column([sampling.temperature for sampling in how])
    probs, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(size, device=scores.device)
    probs = probs.masked_fill(ranks >= column([sampling.top_k if sampling.top_k > 0 else size for sampling in how]), 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    out = (before >= column([sampling.top_p for sampling in how])) | (
        probs < column([sampling.min_p for sampling in how]) * probs[:, :1]
    )
    out[:, 0] = False
    sums = probs.masked_fill(out, 0.0).cumsum(-1)
    at = (sums <= column(places) * sums[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, at).squeeze(1)


def _uniform(seed: int | None, place: int) -> float:
    """A uniform number in [0, 1), a function of the seed and the place in the answer."""
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _told(logits: Tensor, token: int, wanted: int | None) -> TokenChoice:
    if wanted is None:
        return TokenChoice(token)
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(min(wanted, len(logprobs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenChoice(token, logprobs[token].item(), likeliest)
