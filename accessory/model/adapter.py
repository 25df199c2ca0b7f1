"""Adapters, LoRA and biases, on a matrix W that does not train: ``y = W x + scaling * B (A dropout(x)) + bias``.

A [R, in] is cut over model-parallel ranks if W is cut along its input; B [out, R] and the bias [out] if W is cut along its
output. The other of A and B is whole on every rank, but each rank uses it for another part of the computation, so its
gradient is partial on each rank. It therefore enters through ``copy_to_model_parallel_region``, which sums the gradients.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accessory.dtypes import at_least


@dataclass(frozen=True)
class Adapter:
    """The adapter of one matrix.

    Attributes:
        rank: of LoRA; 0: no LoRA, only a bias.
        seed: makes the dropout of this matrix differ from that of others.
        tied: of the experts' w3: it has no A but uses that of w1, whose gradient is then the sum of both uses (as in PEFT).
        members: several adapters stacked into one, of which each token uses one or none; empty: all tokens use this one.
            Their A are stacked by rows and their B by columns, so ``rank`` is the sum of their ranks, and each token keeps
            only its own member's part of A x. A member's bias is a column of B whose row of A is zero.
    """

    rank: int = 0
    scaling: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    seed: int = 0
    tied: bool = False
    members: tuple["Adapter", ...] = ()

    @classmethod
    def side_by_side(cls, members: Sequence["Adapter"]) -> "Adapter":
        """``members`` as one adapter; ``Adapter()`` stands for a member that does not adapt this matrix."""
        rank = sum(member.rank + member.bias for member in members)
        return cls(rank=-(-rank // 8) * 8, members=tuple(members))  # grouped products on a GPU need rows of 16 bytes

    def shapes(self, matrix: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, for a ``matrix`` [..., out, in]."""
        *groups, out, inner = matrix
        shapes = {"bias": (*groups, out)} if self.bias else {}
        if self.rank:
            shapes |= {} if self.tied else {"lora_a": (*groups, self.rank, inner)}
            shapes |= {"lora_b": (*groups, out, self.rank)}
        return shapes


@dataclass(frozen=True)
class TokenAdapters:
    """What adapters need to know of each of n tokens.

    Attributes:
        dropout_draw: [n] int64 the random numbers of its dropout, from ``dropout_draws``; None: no dropout.
        member: [n] int64 which of ``Adapter.members`` it uses, from 1; 0: none; None: no token uses one.
    """

    dropout_draw: Tensor | None = None
    member: Tensor | None = None

    def of(self, tokens: Tensor | slice) -> "TokenAdapters":
        """The same for some of the tokens."""
        return TokenAdapters(*(None if x is None else x[tokens] for x in (self.dropout_draw, self.member)))

    def reach(self, adapter: Adapter) -> bool:
        """Whether any token uses this adapter's LoRA."""
        return adapter.rank > 0 and (not adapter.members or self.member is not None)


ONE_ADAPTER = TokenAdapters()
"""All tokens use a matrix' one adapter, if it has one, without dropout."""


def scaled(low: Tensor, adapter: Adapter, tokens: TokenAdapters, bias_share: Tensor | float = 1.0) -> Tensor:
    """The input of B: ``low`` = A x [n, R], scaled. Of several adapters, each token keeps only its own member's columns.

    Args:
        bias_share: the share of its member's bias that each token gets, a number or [n, 1].
    """
    if not adapter.members:
        return low * adapter.scaling
    scalings, biases = _of_members(adapter, at_least(low.dtype), low.device)
    own = low * scalings[tokens.member]
    if any(member.bias for member in adapter.members):
        own = own + biases[tokens.member] * bias_share
    return own.to(low.dtype)


@functools.cache
def _of_members(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factor and the summand of each column of A x, for no member (row 0) and for each member: [members + 1, R]."""
    scalings, biases = torch.zeros(2, len(adapter.members) + 1, adapter.rank, dtype=dtype)
    first = 0
    for number, member in enumerate(adapter.members, 1):
        scalings[number, first : first + member.rank] = member.scaling
        first += member.rank
        biases[number, first : first + member.bias] = 1.0
        first += member.bias
    return scalings.to(device), biases.to(device)


def adapter_cut_dims(dims: int, cut: int | None) -> dict[str, int | None]:
    """The dimension along which each adapter tensor is cut, if its matrix [..., out, in] of ``dims`` dimensions is along
    ``cut``; None: it is whole."""
    out, inner = dims - 2, dims - 1
    with_output = None if cut == inner else cut
    return {"bias": with_output, "lora_a": None if cut == out else cut, "lora_b": with_output}


def adapter_name(matrix: str, part: str) -> str:
    """``wq.weight`` -> ``wq.lora_a``; a matrix that is not called weight keeps its name: ``experts.w1_lora_a``."""
    return matrix.removesuffix("weight") + part if matrix.endswith("weight") else f"{matrix}_{part}"


def name_of_a(matrix: str, adapter: Adapter) -> str:
    """The name of the A that the matrix' adapter uses."""
    return adapter_name(matrix.removesuffix("w3") + "w1" if adapter.tied else matrix, "lora_a")


def add_parameters(layer: nn.Module, matrix: str, adapter: Adapter, shape: Sequence[int]) -> None:
    """Give ``layer`` the adapter's parameters for its ``matrix`` of ``shape`` [out, in].

    Adapters of several matrices, [groups, out, in], are stacked by rows: ``lora_a`` [groups * R, in].
    """
    for part, part_shape in adapter.shapes(shape).items():
        stacked = torch.empty(part_shape).flatten(0, len(shape) - 2)
        layer.register_parameter(adapter_name(matrix, part), nn.Parameter(stacked))


class Adaptable(nn.Module):
    """A layer whose one matrix, ``weight`` [out, in], can be given an adapter."""

    adapter = Adapter()
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    def adapt(self, matrix: str, adapter: Adapter) -> None:
        self.adapter = adapter
        add_parameters(self, matrix, adapter, self.weight.shape)


def dropped(x: Tensor, adapter: Adapter, dropout_draw: Tensor | None, first_column: int = 0) -> Tensor:
    """``x`` [..., in] with entries dropped at random and the others scaled up; as it is where ``dropout_draw`` is None.

    Whether an entry is dropped is a function of the adapter's seed, its row's draw and its column, so that it does not
    depend on which rank asks, in which order, or how often (recompute).

    Args:
        dropout_draw: [...] int64 from ``dropout_draws``, one per row.
        first_column: where the columns of ``x`` begin among those of the whole matrix.
    """
    if dropout_draw is None or not adapter.dropout:
        return x
    columns = torch.arange(first_column, first_column + x.shape[-1], device=x.device)
    column_bits = _scramble(_scramble(columns) ^ (adapter.seed & _BITS))
    keep = torch.empty_like(x, dtype=torch.bool)
    for kept, draws in zip(*(rows.split(max(1, HASHED // x.shape[-1])) for rows in (keep, dropout_draw)), strict=True):
        torch.ge(_scramble(draws.unsqueeze(-1) ^ column_bits), adapter.dropout * 2**32, out=kept)
    return x * keep / (1 - adapter.dropout)


def dropout_draws(keys: Tensor, positions: Tensor) -> Tensor:
    """The random numbers of each token's dropout, [...]: a function of its document's key and its position in it."""
    return _scramble(_scramble(keys & _BITS) ^ _scramble(positions))


_BITS = 2**32 - 1
HASHED = 2**22
"""Entries whose dropout is drawn at a time: a hash takes 8 bytes an entry, gigabytes for all rows of a batch at once."""


def _scramble(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers held in int64 (the finaliser of MurmurHash3): each bit of the input moves every other."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)
