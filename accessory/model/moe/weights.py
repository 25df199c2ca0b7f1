"""The experts' weights, as kernels see them. Shape suffixes are as in ``accessory.model.moe``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from accessory.model.few_rows import addresses, lies_in_panels
from accessory.model.packed import PackedCodes, plain


class ExpertWeights(Protocol):
    """One matrix of each of this rank's experts, [e, out, in] in the dtype of the rows that it multiplies.

    The matrices may be quantised or offloaded until a kernel asks for them. So a kernel does not ask for experts without
    rows, unless it needs all experts as one tensor; and one with hand-written gradients asks again in its backward pass
    rather than keep a matrix.
    """

    @property
    def shape(self) -> torch.Size:
        """(e, out, in)."""
        ...

    @property
    def trained(self) -> Tensor | None:
        """The tensor [e, out, in] whose gradient is wanted; None: these weights are frozen."""
        ...

    @property
    def at_once(self) -> int:
        """Of how many experts at most a kernel that has the choice should ask for the matrices at once."""
        ...

    def __getitem__(self, experts: slice) -> Tensor:
        """The matrices of ``experts``, [k, out, in]; the caller must not change them."""
        ...

    def prefetch(self, experts: slice) -> None:
        """Announce that these will be asked for, after those announced before, so that what takes time can begin."""
        ...


class PlainWeights:
    """Weights in one tensor [e, out, in], or a view of one. They train if the tensor requires a gradient."""

    def __init__(self, matrices: Tensor):
        self.matrices, self.shape, self.at_once = matrices, matrices.shape, len(matrices)
        self.trained = matrices if matrices.requires_grad and torch.is_grad_enabled() else None

    def __getitem__(self, experts: slice) -> Tensor:
        return self.matrices if experts == slice(None) else self.matrices[experts]  # a slice's gradient is a copy

    def prefetch(self, experts: slice) -> None:
        pass


class PackedWeights:
    """Weights for inference on a CPU, each expert's matrix [out, in] packed by itself (``accessory.model.packed``)."""

    trained = None

    def __init__(self, matrices: Sequence[Tensor | PackedCodes]):
        self.matrices, self.shape = matrices, torch.Size((len(matrices), *matrices[0].shape))
        self.at_once = len(matrices)
        numbers = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        in_panels = numbers and lies_in_panels(numbers[0].shape, numbers[0].dtype)
        self.places = addresses(numbers) if in_panels else None  # for few_rows.c

    def __getitem__(self, experts: slice) -> Tensor:
        numbers = [plain(matrix) for matrix in self.matrices[experts] if isinstance(matrix, Tensor)]
        assert numbers, "codes are multiplied by, and not made numbers"
        return torch.stack(numbers)

    def prefetch(self, experts: slice) -> None:
        pass


class Added(NamedTuple):
    """What an adapter adds to the products of each expert's matrix: ``scaling * B A x + bias``, or a part of it."""

    a: Tensor | None  # [e, R, in]
    b: Tensor | None  # [e, out, R]
    bias: Tensor | None  # [e, out]
    scaling: float


NOTHING_ADDED = Added(None, None, None, 1.0)


@dataclass(frozen=True)
class AdaptedWeights:
    """Weights and their adapter (see ``Kernel.adapted``)."""

    weights: ExpertWeights
    added: Added


MaybeAdapted = ExpertWeights | AdaptedWeights
