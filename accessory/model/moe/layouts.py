"""The two placements of the experts over model-parallel ranks. Both do the same maths on the same logical tensors.

One MoE layer owns three logical expert tensors, ``w1, w3 [E, F, D]`` and ``w2 [E, D, F]``. With E = 8 on 4 ranks:

    expert layout ("mixtral")            sparse layout ("mixtral_sparse")
    cut along E: whole experts           cut along F: a slice of every expert

    rank 0  e0 e1        all of F        rank 0  e0 .. e7   F[0 : F/4]
    rank 1  e2 e3        all of F        rank 1  e0 .. e7   F[F/4 : F/2]
    rank 2  e4 e5        all of F        rank 2  e0 .. e7   F[F/2 : 3F/4]
    rank 3  e6 e7        all of F        rank 3  e0 .. e7   F[3F/4 : F]

    tokens are on every rank; a rank computes

    the rows routed to its experts       its slice of every routed row

    and what it lacks is in the other ranks' partial outputs: one all-reduce sums them.

Nothing else in the code asks which layout it runs in.
"""

from typing import Protocol

from accessory.config import nearest
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.moe.dispatch import Dispatcher, Replicated
from accessory.parallel.mesh import Axis


class Layout(Protocol):
    """Which slice of each expert tensor a rank holds, and how tokens get to it."""

    name: str
    cut_dims: dict[str, int]
    """The dimension of each logical tensor that is cut."""

    def cut_size(self, args: ModelArgs) -> dict[str, int]:
        """The size that the model-parallel size must divide, by its name for error messages."""
        ...

    def local_hidden_dim(self, hidden_dim: int, mp: Axis) -> int:
        """This rank's share of the experts' width F."""
        ...

    def dispatcher(self, num_experts: int, mp: Axis) -> Dispatcher:
        """The dispatcher that brings tokens to this rank's experts, and their outputs back."""
        ...


class ExpertLayout:
    """Whole experts: rank r holds experts [r * E/mp, (r + 1) * E/mp)."""

    name = "mixtral"
    cut_dims: dict[str, int] = {"w1": 0, "w2": 0, "w3": 0}

    def cut_size(self, args: ModelArgs) -> dict[str, int]:
        return {"moe.num_experts": args.moe.num_experts}

    def local_hidden_dim(self, hidden_dim: int, mp: Axis) -> int:
        return hidden_dim

    def dispatcher(self, num_experts: int, mp: Axis) -> Dispatcher:
        each = num_experts // mp.size
        return Replicated(range(mp.rank * each, (mp.rank + 1) * each), num_experts, mp)


class SparseLayout:
    """A slice of every expert: rank r holds columns [r * F/mp, (r + 1) * F/mp) of each expert's FFN width."""

    name = "mixtral_sparse"
    cut_dims: dict[str, int] = {"w1": 1, "w2": 2, "w3": 1}

    def cut_size(self, args: ModelArgs) -> dict[str, int]:
        return {"hidden_dim": args.hidden_dim}

    def local_hidden_dim(self, hidden_dim: int, mp: Axis) -> int:
        return hidden_dim // mp.size

    def dispatcher(self, num_experts: int, mp: Axis) -> Dispatcher:
        return Replicated(range(num_experts), num_experts, mp)


EXPERT, SPARSE = ExpertLayout(), SparseLayout()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (EXPERT, SPARSE)}


ALIASES = {
    "mixtral_peft": "mixtral",
    "mixtral_sparse_ens": "mixtral_sparse",
    "mixtral_sparse_ens5": "mixtral_sparse",
}
"""LLaMA2-Accessory's names for models with adapters or encoders. Here adapters belong to the run and encoders to the model,
in either layout."""


def get_layout(name: str) -> Layout:
    """The layout called ``name`` (``llama_type`` in meta.json)."""
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise UserError(f"unknown layout '{name}'{nearest(name, list(LAYOUTS))}")
    return LAYOUTS[name]
