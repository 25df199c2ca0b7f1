"""``accessory plan``: which way to train a model on which GPUs, found without one: what fits, and what takes the time.

What a step computes, sends and keeps is counted on the real step (``planned_step``); only times are estimates, of what such
cards were seen to reach.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from accessory.checkpoint.description import load_args, own_config
from accessory.console import progress
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import check_divides
from accessory.model.memory import footprint
from accessory.model.moe.kernels.grouped import grouped_runs
from accessory.model.moe.layouts import SPARSE
from accessory.parallel.mesh import plan_mesh
from accessory.settings import LayoutName, LoraSection, ParallelSection, QuantiseSection, Recompute, TuningSection
from accessory.train.answers import answers_table
from accessory.train.cards import Card, card_called
from accessory.train.measure import measured_here
from accessory.train.planned_step import PlannedRun, planned_job
from accessory.train.trace import PEAK, STATE, Collective, Figure, Figures, total
from accessory.tuning.spec import resolve
from accessory.visual.vision import count_of_encoders

TUNINGS = {"full": TuningSection(), "lora": TuningSection(lora=LoraSection()), "qlora": TuningSection(lora=LoraSection())}
OVERHEAD_BYTES = 3e9
"""Of CUDA, its libraries and NCCL."""
FRAGMENTATION = 0.05
"""Of what comes and goes in a step: memory that lies between blocks."""
ATTENTION = 0.6
"""What attention reaches of what long products do."""
LAUNCH_S, COLLECTIVE_S = 6e-6, 20e-6
HIDDEN = 0.85
"""How much of the gathering and reducing runs beside products, at most."""
IMBALANCE = 1.35
"""How much more than its share the busiest rank computes where ranks have whole experts."""
STRAGGLER = 0.007
"""Standard deviation of the ranks' times, of a step."""
FAR_TOO_MUCH = 1.15
"""What a formula says of so many times the card's memory is not traced."""
TIME_ERROR = "times are estimates, +-20 %; counts of FLOPs, bytes and memory are exact, of the real step at full size"


@dataclass(frozen=True)
class Choice:
    """A way to cut a run, and what its step would take.

    Attributes:
        figures: of a step of the first rank; of one that does not fit by far, only its memory, by a formula.
        seconds: by term; their sum is the step's.
    """

    run: PlannedRun
    figures: Figures
    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory(self) -> dict[str, float]:
        """Bytes, by kind: of weights, moments and frozen weights, encoders' too; of what comes and goes; of the rest."""
        state, peak = self.figures[STATE], self.figures[PEAK]
        passing = peak - state
        state += torch.bfloat16.itemsize * count_of_encoders(self.run.args.visual)
        return {"state": state, "step": passing, "overhead": OVERHEAD_BYTES + FRAGMENTATION * passing}

    def fits(self, card: Card) -> bool:
        return sum(self.memory.values()) <= card.gib * 2**30


def step_seconds(figures: Figures, run: PlannedRun, card: Card, per_node: int, world: int) -> dict[str, float]:
    """Seconds of each term of a step that has these ``figures``, with nodes of ``per_node`` cards."""
    attention = sum(value for name, value in figures.items() if name.what == "flops" and "attn" in str(name.of))
    products = total(figures, "flops") - attention
    experts = sum(value for name, value in figures.items() if name.what == "flops" and "grouped" in str(name.of))
    mp = run.parallel.model_parallel
    if run.layout == "mixtral" and mp > 1:
        products += (IMBALANCE - 1) * experts
    seconds = {
        "products": products / (card.products * card.flops),
        "attention": attention / (ATTENTION * card.products * card.flops),
        "elementwise": figures[Figure("moved")] / (card.elementwise * card.memory_rate),
    }
    computed = sum(seconds.values())
    times: dict[bool, float] = {True: 0.0, False: 0.0}  # within a layer, which waits; and of parameters and gradients
    for name, count in figures.items():
        if name.what == "collectives" and isinstance(name.of, Collective):
            waits = name.of.ranks == mp and name.of.stride == 1
            sent = figures[Figure("sent", name.of)]
            times[waits] += count * COLLECTIVE_S + sent / link_rate(name.of, card, per_node)
    # what is gathered and reduced once a step has one micro-batch's products to hide behind
    beside = computed if run.parallel.data_parallel == "fsdp" else computed / run.accumulation
    seconds["model parallel"] = times[True]
    seconds["data parallel"] = max((1 - HIDDEN) * times[False], times[False] - HIDDEN * beside)
    seconds["launches"] = max(0.0, figures[Figure("launches")] * LAUNCH_S - sum(seconds.values()))
    seconds["stragglers"] = sum(seconds.values()) * STRAGGLER * math.sqrt(2 * math.log(world)) if world > 1 else 0.0
    return seconds


def link_rate(collective: Collective, card: Card, per_node: int) -> float:
    """Bytes a second that a rank sends in a ring: it leaves a node once for all of the node's ranks in it."""
    if collective.ranks * collective.stride <= per_node:
        return card.link
    in_node = max(1, per_node // collective.stride)
    return min(card.link, card.network * in_node)


def choices(args: ModelArgs, tuning: str, world: int, card: Card, per_node: int, rows: int, width: int) -> Iterator[Choice]:
    """Every way to train ``rows`` rows of ``width`` tokens a step, with the most rows at a time that fit, or one.

    Of the expert layout only the time is its own: with even loads a rank has as many rows x widths of experts as in the
    sparse one, and loads are not even.
    """
    trained = resolve(TUNINGS[tuning], args)
    for parallel in cuts(args, world, per_node):
        mesh = plan_mesh(world, parallel.model_parallel, parallel.dp_shard())
        mine = rows // mesh.dp.size
        row = torch.empty(1, args.dim, dtype=torch.bfloat16)
        takes_all = not args.quantise and grouped_runs(row, SPARSE.local_hidden_dim(args.hidden_dim, mesh.mp))
        kernel = "grouped" if takes_all else "looped"
        layout: LayoutName = "mixtral_sparse" if mesh.mp.size > 1 else "mixtral"  # the same on one rank
        for batch_size in (size for size in (4, 2, 1) if mine % size == 0):
            accumulation = mine // batch_size
            if parallel.data_parallel == "sdp" and accumulation == 1:
                continue  # the same as fsdp but for its memory
            run = PlannedRun(args, TUNINGS[tuning], layout, parallel, batch_size, accumulation, width, kernel)
            told = footprint(
                trained.logical,
                SPARSE,
                mesh,
                parallel,
                compute=torch.bfloat16,
                trains=trained.trains,
                tokens=batch_size * width,
                accumulation=accumulation,
                device_type="cuda",
            )
            if told.total > FAR_TOO_MUCH * card.gib * 2**30:
                if batch_size == 1:
                    yield Choice(run, Figures({STATE: told.weights + told.moments, PEAK: told.total}), {})
                continue
            figures = run.figures()
            choice = Choice(run, figures, step_seconds(figures, run, card, per_node, world))
            if choice.fits(card) or batch_size == 1:
                yield choice
                if parallel.model_parallel > 1 and args.moe.num_experts % parallel.model_parallel == 0:
                    whole = dataclasses.replace(run, layout="mixtral")
                    yield Choice(whole, figures, step_seconds(figures, whole, card, per_node, world))
                break


def cuts(args: ModelArgs, world: int, per_node: int) -> Iterator[ParallelSection]:
    """The parallel settings that divide the model and the ranks."""
    recomputes: tuple[Recompute, ...] = ("none", "norms_and_experts", "block")
    for mp in (size for size in range(1, min(world, per_node) + 1) if world % size == 0 and per_node % size == 0):
        try:
            check_divides(args, SPARSE, mp)
        except UserError:
            continue
        dp = world // mp
        modes = [ParallelSection(model_parallel=mp)]
        if dp > 1:
            modes.append(ParallelSection(model_parallel=mp, data_parallel="sdp"))
        if dp > per_node // mp > 1:
            modes.append(ParallelSection(model_parallel=mp, shard_size=per_node // mp))
        yield from (dataclasses.replace(mode, recompute=recompute) for mode in modes for recompute in recomputes)


def run_plan(arguments: argparse.Namespace) -> None:
    """The ``plan`` verb."""
    path = arguments.model
    args = load_args(own_config(path) if path.is_dir() else path)
    if arguments.tuning == "qlora" and not args.quantise:
        args = dataclasses.replace(args, quantise=QuantiseSection.read("nf4"))
    card = card_called(arguments.card) if arguments.card else None
    if arguments.measure:
        card = measured_here(card)
    if card is None:
        raise UserError("name the card (--card a100-80), or let this machine be measured (--measure)")
    world, width = arguments.gpus, arguments.seq_len or min(4096, args.max_seq_len)
    if arguments.tuning == "none":
        print("\n".join(answers_table(args, arguments.card or "this machine", card, world, width)))
        return
    per_node = min(world, arguments.per_node)
    rows = arguments.rows or max(world, 128)
    if rows % world:
        raise UserError(f"--rows {rows} is no multiple of --gpus {world}: each rank takes as many rows as the others")
    with planned_job(world):
        found = choices(args, arguments.tuning, world, card, per_node, rows, width)
        ways = list(progress(found, unit="way"))
    flops = args.train_flops_per_token(width, 1.0 if arguments.tuning == "full" else 0.0) * rows * width / world
    print("\n".join(_table(ways, card, flops, rows * width)))


def _table(ways: list[Choice], card: Card, flops: float, tokens: int) -> Iterator[str]:
    fitting = sorted((way for way in ways if way.fits(card)), key=lambda way: way.step_s)
    others = sorted((way for way in ways if not way.fits(card)), key=lambda way: sum(way.memory.values()))
    yield f"{len(ways)} ways, {len(fitting)} fit into {card.gib:,.0f} GiB; {TIME_ERROR}"
    yield "  mp layout          dp    shards  recompute          rows  acc   GiB  state   step  fits  s/step  MFU   tokens/s"
    for way in (*fitting, *others):
        yield _line_of(way, card, flops, tokens)
    if not fitting:
        yield f"nothing fits: the least that is needed is {sum(others[0].memory.values()) / 2**30:,.1f} GiB"
    for number, way in enumerate(fitting[:3], 1):
        parallel = way.run.parallel
        yield f"\n{number}. " + ", ".join(f"{name} {part:,.2f} s" for name, part in way.seconds.items())
        yield f"   model: {{layout: {way.run.layout}}}"
        shard = f", shard_size: {parallel.shard_size}" if parallel.shard_size else ""
        yield (
            f"   parallel: {{model_parallel: {parallel.model_parallel}, data_parallel: {parallel.data_parallel}{shard}, "
            f"recompute: {parallel.recompute}}}"
        )
        yield f"   train: {{batch_size: {way.run.batch_size}, accumulation: {way.run.accumulation}}}"


def _line_of(way: Choice, card: Card, flops: float, tokens: int) -> str:
    run, parallel, memory = way.run, way.run.parallel, way.memory
    line = (
        f"  {parallel.model_parallel:<2} {run.layout:14}  {parallel.data_parallel:4}  {parallel.shard_size or 'all'!s:6}  "
        f"{parallel.recompute:17}  {run.batch_size:4}  {run.accumulation:3}  {sum(memory.values()) / 2**30:4.0f}  "
        f"{memory['state'] / 2**30:5.1f}  {memory['step'] / 2**30:5.1f}  {'yes' if way.fits(card) else '-':4}"
    )
    if not way.seconds:
        return f"{line}  by far not"
    return f"{line}  {way.step_s:6.2f}  {flops / card.flops / way.step_s:4.0%}  {tokens / way.step_s:8,.0f}"
