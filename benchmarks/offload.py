"""The estimated cost of keeping few of a model's experts on the device: a recorded routing, replayed with every policy.

    python benchmarks/offload.py                                        # the recorded one that is here
    python benchmarks/offload.py --record runs/quickstart/model/epoch5 --ask runs/quickstart/data/first_held_out.jsonl

``--record`` lets a model answer questions, one and several at a time, and notes which experts each step and layer used, and
which ones had been guessed. A replay makes the same decisions as the program (``accessory/model/moe/offload/slots.py``)
without moving data. Seconds are computed from bytes and speeds, not measured on a GPU.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, start_one_process

from accessory.errors import UserError
from accessory.infer.meta import MetaModel
from accessory.infer.sampling import Sampling
from accessory.model.answering import plan_answers
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT
from accessory.model.moe.offload.loads import read_loads
from accessory.model.moe.offload.slots import Policy, Slots, Tally, in_turn
from accessory.settings import OffloadSection, QuantiseSection
from accessory.train.answers import seconds_of_token
from accessory.train.cards import CARDS

HERE = Path(__file__).parent
TRACE = HERE / "results/offload_trace.json"
LOADS = HERE / "results/offload_loads.jsonl"
"""Expert loads of the run that trained the recorded model, summed."""
MIXTRAL = HERE.parent / "configs/model/mixtral-8x7b.json"
WAYS: dict[str, tuple[Policy, bool]] = {
    "lru": ("lru", False),
    "frequency": ("frequency", False),
    "lru, guessed ahead": ("lru", True),
    "frequency, guessed ahead": ("frequency", True),
}
Step = list[tuple[list[int], list[int]]]
"""For each layer, the experts that were used, and those that had been guessed (for the first layer none)."""


MEMORY = {"t4": "15GB", "rtx-4090": "24GB", "h100-pcie": "80GB"}


def record(directory: Path, questions: Sequence[str]) -> list[Step]:
    """Record the experts that a model's layers use while it answers ``questions`` one by one, then four at a time."""
    experts = json.loads((directory / "config.json").read_text()).get("moe", {}).get("num_experts", 8)
    model = MetaModel.from_pretrained(directory, dtype=torch.float32, max_seq_len=256, offload=f"experts={experts}")
    layers, steps = model.llma.offloaded, list[Step]()
    for number, layer in enumerate(layers):
        _listen(layer.slots, number, len(layers), steps)
    groups = [[question] for question in questions] + [list(questions[n : n + 4]) for n in range(0, len(questions), 4)]
    for group in groups:
        for question in group:
            prompt, stops = model.asked(question)
            model.engine.submit(prompt.tokens, Sampling(max_tokens=40, stop=stops))
        for _ in model.engine.run():
            pass
    return steps


def _listen(slots: Slots, number: int, layers: int, steps: list[Step]) -> None:
    """Note the calls to a layer's slots."""
    judge, guess = slots.judge, slots.guess

    def judged(used: list[int]) -> None:
        if number == 0:
            steps.append([([], []) for _ in range(layers)])
        steps[-1][number] = (sorted(used), steps[-1][number][1])
        judge(used)

    def guessed(experts: object) -> object:
        named = sorted(experts)  # type: ignore[call-overload]
        steps[-1][number] = ([], named)
        return guess(named)

    slots.judge, slots.guess = judged, guessed  # type: ignore[method-assign, assignment]


def replay(steps: Sequence[Step], count: int, policy: Policy, guesses: bool, loads: Sequence[Sequence[float]] = ()) -> Tally:
    """Replay with ``count`` slots for each layer; ``loads``: each layer's expert loads, to fill the slots at the start."""
    layers = [Slots(count, policy) for _ in steps[0]]
    for slots, of_layer in zip(layers, loads, strict=False):
        slots.place(of_layer)
    for step in steps:
        for number, (used, _) in enumerate(step):

            def guess(following: int = number + 1, step: Step = step) -> None:
                if guesses and following < len(layers):
                    layers[following].guess(step[following][1])

            layers[number].judge(used)
            for _ in in_turn(layers[number], used, lambda _: None, guess):
                pass
    return sum((slots.tally for slots in layers), Tally())


def beginnings(steps: Sequence[Step]) -> None:
    """Print the gain from starting with the experts that training used most, with default settings."""
    args = replace(ModelArgs.load(MIXTRAL), n_layers=len(steps[0]))
    loads = read_loads(LOADS, args)
    print("\nbegun with the experts that training used most; 4 slots, frequency, guessed ahead")
    for first in (20, len(steps)):
        for name, begun_with in (("nothing", ()), ("its loads", loads)):
            tally = replay(steps[:first], 4, "frequency", True, begun_with)
            print(f"first {first:3} steps, {name:10}{tally.hit_rate:8.1%} hits, {tally.moved / tally.used:6.1%} moved")


def least_moved(steps: Sequence[Step], count: int) -> int:
    """What an optimal policy that knows the future would move: it keeps the experts that are used soonest."""
    moved = 0
    for batches in zip(*([set(used) for used, _ in step] for step in steps), strict=True):
        used_next, next_use = list[dict[int, int]](), dict[int, int]()
        for number, used in reversed(list(enumerate(batches))):
            used_next.append(dict(next_use))
            next_use |= dict.fromkeys(used, number)
        there = set[int]()
        for used, soon in zip(batches, reversed(used_next), strict=True):
            moved += len(used - there)
            # all that a batch uses can be there together, or else come one by one
            kept = sorted(there | used, key=lambda e: (len(used) <= count and e not in used, soon.get(e, len(steps))))
            there = set(kept[:count])
    return moved


def replays(steps: Sequence[Step]) -> None:
    experts = 1 + max(expert for step in steps for used, _ in step for expert in used)
    none = sum(len(used) for step in steps for used, _ in step)
    print(f"{len(steps)} steps of {len(steps[0])} layers with {experts} experts; {none:,} uses, each moved without a cache")
    print(f"{'slots':>5}  {'':26}{'hits':>8}{'by guess':>10}{'guess right':>13}{'moved, of none':>16}")
    for count in (2, 3, 4, 5, 6):
        for name, (policy, guesses) in WAYS.items():
            tally = replay(steps, count, policy, guesses)
            right = f"{tally.recall:.1%}" if tally.foretold else "-"
            by_guess = f"{tally.guessed_hits / tally.used:.1%}"
            print(f"{count:5}  {name:26}{tally.hit_rate:8.1%}{by_guess:>10}{right:>13}{tally.moved / none:16.1%}")
        least = least_moved(steps, count)
        print(f"{count:5}  {'if the future were known':26}{1 - least / none:8.1%}{'':>10}{'':>13}{least / none:16.1%}")


def estimates(steps: Sequence[Step]) -> None:
    """Print estimates for Mixtral 8x7B, assuming that it routes like the recorded model."""
    base = ModelArgs.load(MIXTRAL)
    a_token = base.n_layers * base.moe.num_experts_per_tok
    print("\ncomputed, not measured: Mixtral 8x7B, a sequence of 4096 tokens, seconds of a token of one request")
    print(f"{'card':12}{'held':>6}{'slots':>7}" + "".join(f"{name:>26}" for name in ("no cache", *WAYS)))
    for name, memory in MEMORY.items():
        for held in ("nf4", "int8", "bf16"):
            args = replace(base, quantise=None if held == "bf16" else QuantiseSection(held, held))
            section = OffloadSection(device_memory=memory)
            try:
                plan = plan_answers(section, LogicalModel(args), EXPERT, 1, torch.bfloat16, 4096)
            except UserError:
                print(f"{name:12}{held:>6}{'-':>7}")
                continue
            if plan.slots == plan.of:
                print(f"{name:12}{held:>6}{plan.slots:>7}  all experts are on the device")
                continue
            expert = plan.host_bytes / (args.n_layers * plan.of)
            line = f"{name:12}{held:>6}{plan.slots:>7}{seconds_of_token(args, CARDS[name], expert, a_token, 0.0):26.3f}"
            for how in WAYS.values():
                tally = replay(steps, plan.slots, *how)
                misses, share = tally.used - tally.hits, a_token / tally.used
                told = misses * share, (tally.moved - misses) * share
                line += f"{seconds_of_token(args, CARDS[name], expert, *told):26.3f}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--record", type=Path, metavar="DIR", help="a model: write its trace")
    parser.add_argument("--ask", type=Path, metavar="FILE", help="questions: lines of JSON, as the quickstart's")
    arguments = parser.parse_args()
    print(environment())
    if arguments.record:
        start_one_process()
        lines = [json.loads(line) for line in arguments.ask.read_text().splitlines()]
        steps = record(arguments.record, [str(line["instruction"]) for line in lines][:24])
        arguments.trace.write_text(json.dumps(steps, separators=(",", ":")) + "\n")
    steps = json.loads(arguments.trace.read_text())
    replays(steps)
    beginnings(steps)
    estimates(steps)


if __name__ == "__main__":
    main()
