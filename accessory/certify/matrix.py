"""The cells of the certificate, chosen so that all settings meet each other."""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from accessory.certify.problem import TUNINGS, Problem
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import check_divides
from accessory.model.moe.kernels import KERNELS, pick_kernel
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.triton_here import is_interpreted
from accessory.model.visual import PresetName
from accessory.settings import ParallelSection, QuantiseSection, Recompute

Mode = Literal["fsdp", "sdp", "ddp", "hsdp"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
BALANCES: tuple[Literal["global", "document"], ...] = ("global", "document")


@dataclass(frozen=True)
class Cell:
    """One way to partition and run the training steps."""

    world: int
    model_parallel: int
    data_parallel: Mode
    layout: str
    accumulation: int
    packing: bool
    masks: bool
    recompute: Recompute
    tuning: str  # of problem.TUNINGS
    balance: Literal["global", "document"]

    def settings(self) -> dict[str, str]:
        """The settings by their names in a table."""
        return {
            **partition(self),
            "packing": _tick(self.packing),
            "masks": _tick(self.masks),
            "recompute": self.recompute,
            "tuning": self.tuning,
            "balance over": self.balance,
        }


class ClassifierCell(Cell):
    """The same for a classifier."""

    def settings(self) -> dict[str, str]:
        return {"learns": "labels"} | super().settings()


@dataclass(frozen=True)
class QuantisedCell(Cell):
    """The same with experts and attention quantised on reading."""

    quantise: QuantiseSection

    def settings(self) -> dict[str, str]:
        held = {matrices: name or "-" for matrices, name in vars(self.quantise).items()}
        return held | super().settings() | {"tuning": f"q{self.tuning}"}


@dataclass(frozen=True)
class OffloadedCell(QuantisedCell):
    """The same with experts off the device, except for ``slots`` of each layer."""

    slots: int

    def settings(self) -> dict[str, str]:
        return {"slots": str(self.slots)} | super().settings()


@dataclass(frozen=True)
class KernelCell(Cell):
    """The same with an experts' kernel that "auto" does not pick here."""

    kernel: str

    def settings(self) -> dict[str, str]:
        return {"kernel": self.kernel} | super().settings()


@dataclass(frozen=True)
class SeeingCell(Cell):
    """The same for a visual model, with images in some of the sequences."""

    preset: PresetName

    def settings(self) -> dict[str, str]:
        return {"sees": self.preset} | super().settings()


@dataclass(frozen=True)
class FileCell:
    """Load a checkpoint ``given`` in a format at ``size`` into a layout, save it there, and convert that to hf."""

    given: str
    size: int
    world: int
    model_parallel: int
    layout: str

    def settings(self) -> dict[str, str]:
        return {
            "given": self.given,
            "parts": str(self.size),
            "world": str(self.world),
            "mp": str(self.model_parallel),
            "layout": self.layout,
        }


@dataclass(frozen=True)
class CacheCell:
    """Run sequences through a cache in chunks of any length and single tokens, on ``world`` model-parallel ranks."""

    world: int
    layout: str

    def settings(self) -> dict[str, str]:
        return {"cached on mp": str(self.world), "layout": self.layout}


def posed_by(problem: Problem, cell: Cell) -> Problem:
    """The problem that a training cell solves."""
    if isinstance(cell, ClassifierCell):
        return problem.of_labels()
    if isinstance(cell, SeeingCell):
        return problem.seeing(cell.preset)
    return problem.quantised(cell.quantise) if isinstance(cell, QuantisedCell) else problem


def partition(cell: Any) -> dict[str, str]:
    """The partition of a training cell, by its names in a table."""
    return {
        "world": str(cell.world),
        "mp": str(cell.model_parallel),
        "dp": cell.data_parallel if cell.model_parallel < cell.world else "-",
        "layout": cell.layout,
        "accum": str(cell.accumulation),
    }


def _tick(value: bool) -> str:
    return "yes" if value else "-"


def training_cells(worlds: Sequence[int], strength: int) -> list[Cell]:
    """Cells in which every ``strength`` settings meet in every possible combination (a covering array).

    Settings meet where both have an effect: a layout needs several model-parallel ranks, a mode several data-parallel ranks.
    World size and model-parallel size count as one setting, the mesh; mesh, layout and tuning always meet in full.
    """
    flags = (True, False)
    every = [
        Cell(world, size, mode, layout, accumulation, packing, masks, recompute, tuning, balance)
        for world in worlds
        for size in model_parallel_sizes(world)
        for mode in modes(world // size)
        for layout in LAYOUTS
        for accumulation, packing, masks, recompute in itertools.product((3, 1), flags, flags, RECOMPUTES)
        for tuning in TUNINGS
        for balance in BALANCES
    ]
    meetings = {cell: _meetings(cell, strength) for cell in every}
    left = set().union(*meetings.values())
    chosen = []
    while left:
        best = max(every, key=lambda cell: len(meetings[cell] & left))
        left -= meetings[best]
        chosen.append(best)
    return sorted(chosen, key=every.index)


def _meetings(cell: Cell, strength: int) -> set[frozenset[tuple[str, object]]]:
    """The combinations of settings that a cell covers."""
    mesh = ("mesh", (cell.world, cell.model_parallel))
    acting = {name: value for name, value in vars(cell).items() if name not in ("world", "model_parallel")}
    if cell.model_parallel == cell.world:
        del acting["data_parallel"]
    always = frozenset((mesh, ("layout", cell.layout), ("tuning", cell.tuning)))
    if cell.model_parallel == 1:
        del acting["layout"]
    return {always} | {frozenset(some) for some in itertools.combinations((mesh, *acting.items()), strength)}


def classifier_cells(worlds: Sequence[int]) -> list[ClassifierCell]:
    """Both layouts on every mesh, one trained in full and one by adapters."""
    return [ClassifierCell(**vars(cell)) for cell in _by_turns(worlds)]


def quantised_cells(args: ModelArgs, worlds: Sequence[int]) -> list[QuantisedCell]:
    """Adapters beside quantised matrices: both layouts on every mesh of several ranks."""
    row_part = args.n_heads * args.head_dim // worlds[-1]
    block = math.gcd(args.dim, args.hidden_dim // worlds[-1], row_part, 64)
    ways = [QuantiseSection("int8", "int8")]
    if block > 1:  # two values fill a byte, and eight of three bits fill three bytes
        other = "int3-8" if math.gcd(args.dim, row_part) % 8 == 0 else f"nf4-{block}"
        ways = [QuantiseSection(f"nf4-{block}", f"int4-{block}"), QuantiseSection("int8", other)]
    return [
        QuantisedCell(**vars(cell) | {"tuning": "lora", "quantise": way})
        for cell in _by_turns(worlds)
        if cell.world > 1
        for way in (ways if cell.model_parallel > 1 else ways[:1])
    ]


def seeing_cells(worlds: Sequence[int]) -> list[SeeingCell]:
    """Both layouts on every mesh, each with another preset, one trained in full and one by adapters and the connector.

    On a mesh with both kinds of ranks there are also cells with images among the text (LLaVA), with settings that the other
    cells lack.
    """
    presets: dict[str, PresetName] = {"mixtral": "ens5", "mixtral_sparse": "clip"}
    inline: dict[str, PresetName] = {"mixtral": "llava", "mixtral_sparse": "llava_siglip"}
    cells = [SeeingCell(**vars(cell), preset=presets[cell.layout]) for cell in _by_turns(worlds)]
    both = (cell for cell in cells if 1 < cell.model_parallel < cell.world)
    others: list[SeeingCell] = [
        replace(cell, preset=inline[cell.layout], accumulation=1, packing=not cell.packing, masks=True, recompute="block")
        for cell in both
    ]
    return cells + others


def offloaded_cells(args: ModelArgs, worlds: Sequence[int]) -> list[OffloadedCell]:
    """Cells on the meshes of the largest world; as many experts are on the device as a token takes, or one more, in turn."""
    cells = quantised_cells(args, worlds[-1:])[::2]
    least = args.moe.num_experts_per_tok
    return [OffloadedCell(**vars(cell), slots=least + number % 2) for number, cell in enumerate(cells)]


def _by_turns(worlds: Sequence[int]) -> list[Cell]:
    """For every mesh both layouts, one trained in full and one by adapters; the other settings take turns."""
    meshes = [(world, size) for world in worlds for size in model_parallel_sizes(world)]
    cells = []
    for number, (world, size) in enumerate(meshes):
        possible, odd = modes(world // size), number % 2
        tunings = TUNINGS if odd else reversed(TUNINGS)
        for layout, mode, packing, tuning in zip(LAYOUTS, (possible[0], possible[-1]), (not odd, odd), tunings, strict=True):
            cell = Cell(
                world,
                size,
                mode,
                layout,
                accumulation=3,
                packing=bool(packing),
                masks=False,
                recompute=RECOMPUTES[number % len(RECOMPUTES)],
                tuning=tuning,
                balance=BALANCES[odd],
            )
            cells.append(cell)
    return cells


def kernel_cells(worlds: Sequence[int], kernels: Sequence[str]) -> list[KernelCell]:
    """Each of ``kernels`` trained in full in one process, and by adapters in slices of every expert."""
    return [
        KernelCell(world, world, "fsdp", layout, 1, False, False, "none", tuning, "document", kernel)
        for kernel in kernels
        for world, layout, tuning in ((worlds[0], "mixtral", "full"), (worlds[-1], "mixtral_sparse", "lora"))
    ]


def other_kernels(args: ModelArgs, dtype: torch.dtype, device: str, most_ranks: int, asked: Sequence[str]) -> list[str]:
    """Kernels other than the one that "auto" picks that can compute the model's experts, and their slices on ``most_ranks``.

    Kernels that run in Triton's interpreter take minutes and are included only if ``asked``.
    """
    row = torch.empty(1, args.dim, dtype=dtype, device=device)
    found: list[str] = []
    for name, kernel in KERNELS.items():
        if kernel.by_triton and is_interpreted() and name not in asked:
            continue
        with suppress(UserError):  # the kernel does not support it, or is not installed
            kernels = {pick_kernel(name, row, width).name for width in (args.hidden_dim, args.hidden_dim // most_ranks)}
            found += kernels - {pick_kernel("auto", row, args.hidden_dim).name}
    return found


def file_cells(worlds: Sequence[int]) -> list[FileCell]:
    """For every world size each format into each layout, at varying model-parallel sizes."""
    cells = []
    for world in worlds:
        sizes = model_parallel_sizes(world)
        for number, (given, layout) in enumerate(itertools.product(("hf", "mixtral", "mixtral_sparse"), LAYOUTS)):
            size = 1 if given == "hf" else sizes[-1 - number % len(sizes)]
            cells.append(FileCell(given, size, world, sizes[-1 - (number + 1) // 2 % len(sizes)], layout))
    return cells


def cache_cells(worlds: Sequence[int]) -> list[CacheCell]:
    return [CacheCell(world, layout) for world in worlds for layout in LAYOUTS]


def modes(data_parallel: int) -> tuple[Mode, ...]:
    """The modes for this number of data-parallel ranks; "hsdp" is fsdp in groups of two, with copies across groups."""
    if data_parallel == 1:
        return ("fsdp",)
    return ("fsdp", "sdp", "ddp", "hsdp") if data_parallel >= 4 else ("fsdp", "sdp", "ddp")


def mode_settings(mode: Mode) -> ParallelSection:
    """The settings of a run for a mode."""
    return ParallelSection(data_parallel="fsdp", shard_size=2) if mode == "hsdp" else ParallelSection(data_parallel=mode)


def model_parallel_sizes(world: int) -> list[int]:
    return [size for size in range(1, world + 1) if world % size == 0]


def check_fits(args: ModelArgs, worlds: Sequence[int], where: str) -> None:
    """Raise UserError if a model-parallel size of the matrix does not divide the model."""
    for layout in LAYOUTS.values():
        for world in worlds:
            for size in model_parallel_sizes(world):
                check_divides(args, layout, size, f"{where}, --world {world}, ")
