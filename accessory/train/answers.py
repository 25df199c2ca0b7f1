"""What answers take of a card: ``accessory plan --tuning none``, and what a benchmark computes of recorded routings."""

from collections.abc import Iterator
from dataclasses import replace

from accessory.checkpoint.quantise import in_words
from accessory.errors import UserError
from accessory.model.answering import Fit, fits_of
from accessory.model.args import ModelArgs
from accessory.model.logical import check_divides
from accessory.model.moe.layouts import SPARSE
from accessory.train.cards import Card
from accessory.visual.vision import count_of_encoders

OVERHEAD_BYTES = 0.7e9
"""Of CUDA and its libraries, of one process."""


def answers_table(args: ModelArgs, name: str, card: Card, ranks: int, tokens: int) -> Iterator[str]:
    """Lines: each way to hold a model over so many cards, with experts offloaded where they do not all fit.

    Raises:
        UserError: the model cannot be cut into so many parts.
    """
    check_divides(args, SPARSE, ranks)
    memory = card.gib * 2**30 - OVERHEAD_BYTES
    if memory <= 0:
        raise UserError(f"{name}: no memory is left beside CUDA")
    yield (
        f"answers of one request, {tokens:,} tokens of keys and values, on {ranks} x {name}, with --offload "
        f"device_memory={memory / 1e9:.1f}GB: of each layer's experts those on the card, and its memory by kind"
    )
    for fit in fits_of(args, SPARSE, ranks, memory, tokens, count_of_encoders(args.visual)):
        yield f"  {in_words(fit.quantise):<42}{fit}{_seconds(fit, args, card, ranks)}"
    yield (
        "seconds of a token are computed, not measured: as if each expert were as likely as another, and what is not on the "
        f"card came at {card.host / 1e9:g} GB/s and was waited for"
    )


def _seconds(fit: Fit, args: ModelArgs, card: Card, ranks: int) -> str:
    if fit.plan is None:
        return ""
    args = replace(args, quantise=fit.quantise)
    expert = fit.plan.host_bytes / (args.n_layers * fit.plan.of)
    misses = args.n_layers * args.moe.num_experts_per_tok * (1 - fit.plan.slots / fit.plan.of)
    return f"; {seconds_of_token(args, card, expert, misses, 0.0, ranks):.3f} s a token"


def seconds_of_token(args: ModelArgs, card: Card, expert: float, misses: float, guessed: float, ranks: int = 1) -> float:
    """Computed, of one request: what is waited for, and the longer of the step's own reading and what guesses bring.

    Args:
        expert: bytes of one that a rank has. misses, guessed: how many a token waits for, and how many guesses bring it.
    """
    made = 2 * 2 * 3 * args.dim * args.hidden_dim / ranks if args.quantise else 0.0  # the numbers are written, and read
    attention = 2 * args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads) / ranks
    step = args.n_layers * (args.moe.num_experts_per_tok * (expert + made) + attention) / card.memory_rate
    return misses * expert / card.host + max(step, guessed * expert / card.host)
