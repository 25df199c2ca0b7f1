"""What a kernel needs to know of the experts' weights. Shape suffixes are as in ``accessory.model.moe``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from accessory.model.few_rows import addresses, lies_in_panels
from accessory.model.packed import PackedCodes, plain


class ExpertWeights(Protocol):
    """One matrix of each of this rank's experts, [e, out, in] in the dtype of the rows that it multiplies.

    They may be packed, or lie elsewhere, until a kernel asks for them. So it asks for no expert that has no rows, unless it
    can only take all of them as one tensor, and one whose gradients are written by hand keeps no matrix for its backward
    pass but asks again.
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
        """Of how many experts to ask for the matrices together at most, where there is a choice."""
        ...

    def __getitem__(self, experts: slice) -> Tensor:
        """The matrices of ``experts``, [k, out, in]; not to be changed."""
        ...

    def prefetch(self, experts: slice) -> None:
        """These are asked for soon, after those announced before: what takes time may begin."""
        ...


class PlainWeights:
    """Weights that are a tensor [e, out, in], or a view of one; they train where autograd wants its gradient."""

    def __init__(self, matrices: Tensor):
        self.matrices, self.shape, self.at_once = matrices, matrices.shape, len(matrices)
        self.trained = matrices if matrices.requires_grad and torch.is_grad_enabled() else None

    def __getitem__(self, experts: slice) -> Tensor:
        return self.matrices if experts == slice(None) else self.matrices[experts]  # a slice's gradient is a copy

    def prefetch(self, experts: slice) -> None:
        pass


class PackedWeights:
    """Weights of a model that no longer trains, each expert's matrix [out, in] packed by itself."""

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
    """What is added to the products of each expert's matrix: ``scaling * B A x + bias``; what there is of it."""

    a: Tensor | None  # [e, R, in]
    b: Tensor | None  # [e, out, R]
    bias: Tensor | None  # [e, out]
    scaling: float


NOTHING_ADDED = Added(None, None, None, 1.0)


@dataclass(frozen=True)
class AdaptedWeights:
    """Weights with what an adapter adds to their products (see ``Kernel.adapted``)."""

    weights: ExpertWeights
    added: Added


MaybeAdapted = ExpertWeights | AdaptedWeights
