"""From the run's ``tuning`` section to the adapters that are added and the parameters that train, by logical name."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from accessory.config import nearest
from accessory.console import listed
from accessory.errors import UserError
from accessory.model.adapter import Adapter
from accessory.model.args import ModelArgs
from accessory.model.logical import SCORE, Adapters, LogicalModel, is_buffer
from accessory.settings import LoraSection, TuningSection

PRESETS = {
    "embeddings": r"^tok_embeddings\.",
    "attention": r"\.attention\.",
    "router": r"\.gate\.",
    "experts": r"\.experts\.",
    "norms": r"^(?!connector\.).*norm\.weight$",
    "output": r"^(output|score)\.",
    "connector": r"^connector\.",
}
BIASED = ("attention", "experts")


@dataclass(frozen=True)
class Tuning:
    """A run's model with its adapters, and the names of all tensors that train, including those of adapters."""

    logical: LogicalModel
    trains: frozenset[str]


def resolve(section: TuningSection, args: ModelArgs, seed: int = 0, given: Adapters = MappingProxyType({})) -> Tuning:
    """Apply the settings to a model's logical names.

    Args:
        seed: of the run; dropout depends on it. given: the checkpoint's adapters; tied ones stay tied.

    Raises:
        UserError: an entry matches nothing or changes nothing, or the settings contradict each other.
    """
    plain = LogicalModel(args)
    names = [name for name in plain.dense if not is_buffer(name)]
    adapters = _adapters(section, plain.matrices, seed)
    for name in adapters.keys() & given.keys():
        first = adapters.get(f"{name[:-2]}w1")
        if given[name].tied and first:  # one A, and so one dropout of its input
            adapters[name] = replace(adapters[name], tied=True, seed=first.seed)
    full = not (section.lora or section.bias or section.train)
    chosen = set(names) if full else set().union(*(_matching(entry, names, "tuning.train") for entry in section.train))
    chosen |= {SCORE} & set(names)  # a new classifier's head must train for anything else to learn
    frozen: set[str] = set()
    for entry in section.freeze:
        matched = _matching(entry, names, "tuning.freeze")
        if not matched & chosen:
            raise UserError(f"tuning.freeze: '{entry}' does not train anyway; take it out")
        frozen |= matched
    for entry in section.train:
        if not _matching(entry, names, "tuning.train") - frozen:
            raise UserError(f"tuning.train: all of '{entry}' is frozen by tuning.freeze; take one of them out")
    trains = chosen - frozen
    if both := sorted(name for name in trains if name in adapters and adapters[name].rank):
        raise UserError(f"tuning: {listed(both)} would train both itself and by LoRA: take it out of train or lora.targets")
    if args.quantise and (packed := sorted(trains & plain.codecs.keys())):
        raise UserError(
            f"tuning would train {listed(packed)}, which are held quantised: train adapters on them (tuning.lora), or leave "
            "model.quantise out"
        )
    logical = LogicalModel(args, adapters)
    trains |= logical.added
    if not trains:
        raise UserError("tuning.freeze leaves nothing to train")
    return Tuning(logical, frozenset(trains))


def _adapters(section: TuningSection, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Adapter]:
    """The adapters to add. ``shapes``: of the matrices that can have one."""
    lora, matrices = section.lora, list(shapes)
    with_lora = set().union(*(_matching(t, matrices, "tuning.lora.targets") for t in lora.targets)) if lora else set()
    if lora and not with_lora:
        raise UserError("tuning.lora.targets is empty: name what gets an adapter, e.g. [attention, experts]")
    largest = max((min(shapes[name][-2:]) for name in with_lora), default=0)
    if lora and lora.rank > largest:
        raise UserError(
            f"tuning.lora.rank {lora.rank} lies above {largest}, the greatest rank that a matrix of tuning.lora.targets has "
            "itself: lower it, or train these whole (tuning.train)"
        )
    with_bias = set().union(*(_matching(preset, matrices, "tuning.bias") for preset in BIASED)) if section.bias else set()
    adapters = {}
    for name in matrices:
        rank, scaling, dropout = (lora.rank, _scaling(lora), lora.dropout) if lora and name in with_lora else (0, 1.0, 0.0)
        if rank or name in with_bias:
            number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
            adapters[name] = Adapter(rank, scaling, dropout, name in with_bias, number)
    return adapters


def _scaling(lora: LoraSection) -> float:
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def matches(entry: str, name: str) -> bool:
    """Whether a preset's pattern, or a regular expression, is found in a logical name."""
    return re.search(PRESETS.get(entry, entry), name) is not None


def _matching(entry: str, names: Sequence[str], where: str) -> set[str]:
    """The ``names`` that a preset or a regular expression is found in."""
    try:
        found = {name for name in names if matches(entry, name)}
    except re.error as error:
        raise UserError(f"{where}: '{entry}' is not a regular expression: {error}") from error
    if not found:
        hint = "" if entry in PRESETS else nearest(entry, list(PRESETS))
        raise UserError(f"{where}: '{entry}' matches none of the model's tensors here{hint}")
    return found


def check_goes_on(given: Adapters, changed: Sequence[str], tuning: Tuning, keeps_base: bool) -> None:
    """Refuse to continue training on a base with adapters if the run's saves would lose some of the earlier training.

    Args:
        given: the checkpoint's adapters. changed: the base's own tensors that were trained with them.
        keeps_base: the run saves only what it trains, for use with the same base.
    """
    wanted = tuning.logical.adapters
    if keeps_base and (lost := sorted(set(changed) - tuning.trains)):
        raise UserError(
            f"model.checkpoint brings {listed(lost)} trained beside its base, and this run would not save them: "
            "let tuning train them too, or merge them first (accessory merge)"
        )

    def described(adapters: Adapters) -> dict[str, tuple[int, float, bool]]:
        return {name: (a.rank, a.scaling, a.bias) for name, a in adapters.items()}

    if given and described(given) != described(wanted):
        kinds = sorted({(a.rank, a.scaling, a.bias) for a in given.values()})
        raise UserError(
            f"model.checkpoint has adapters on {len(given)} matrices with (rank, scaling, bias) {kinds}, tuning asks for "
            f"others, on {len(wanted)}: set tuning to go on with the same, or merge them first (accessory merge)"
        )
