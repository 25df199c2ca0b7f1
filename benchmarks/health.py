"""The cost of router health: the training step with and without it, and its parts alone.

    python benchmarks/health.py

With it, every step computes the entropies of the router's probabilities, and every tenth step the reduction over steps and
ranks, the figures and the alarms. Without it there is none of these; only the counts of rows stay, which the balance loss
needs. Steps of both kinds take turns. Whole steps are too noisy to show less than a percent, so the parts are also timed
alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from unittest import mock

import torch
from common import environment, pick_device, start_one_process, time_in_turn
from train_step import OPTIM, SHAPE

from accessory.data.loader import collate
from accessory.data.mix import Sample
from accessory.model import decoder
from accessory.model.build import RandomWeights, build_model
from accessory.model.documents import Documents
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT
from accessory.model.moe.router import RouterStats, Routing, router_stats
from accessory.settings import AlarmSection
from accessory.train.balance import RouterLosses
from accessory.train.health import Alarms, RouterHealth, RoutingProbe
from accessory.train.metrics import Window
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step

EVERY = 10  # steps between two log lines


def entropies(probs: torch.Tensor, number: torch.Tensor, documents: int) -> torch.Tensor:
    """The work of ``router_stats`` for the entropies of one layer."""
    return probs.new_zeros(documents + 1).index_add(0, number, torch.special.entr(probs).sum(-1))


def without_entropy(layers: Sequence[Routing], documents: Documents, image_rows: None) -> RouterStats:
    """``router_stats`` without the entropies."""
    with mock.patch("torch.special.entr", lambda probs: probs[..., :0]):
        return router_stats(layers, documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens; default: %(default)s")
    parser.add_argument("--layers", type=int, default=SHAPE.n_layers, help="default: %(default)s")
    arguments = parser.parse_args()
    shape = dataclasses.replace(SHAPE, n_layers=arguments.layers)
    start_one_process()
    device = pick_device()
    logical = LogicalModel(shape)
    model = build_model(logical, EXPERT, RandomWeights(logical, seed=0), dtype=torch.float32, device=device)
    optimizer = make_optimizer(model, OPTIM)
    tokens = torch.randint(3, shape.vocab_size, (arguments.rows, 512), generator=torch.Generator().manual_seed(0))
    samples = [Sample(row.numpy(), (row > 0).numpy()) for row in tokens]
    batch = collate(samples).to(device)
    probe = RoutingProbe(torch.arange(len(samples)).numpy(), (tokens > 0).sum(1).numpy(), [batch], device)
    probe.record(model)
    alarms = Alarms(AlarmSection(load_min=None, load_max=None))
    window = Window(NextToken())

    def with_health() -> None:
        window.add(train_step(model, optimizer, [batch], NextToken(), RouterLosses("global"), clip_grad=OPTIM.clip_grad))

    def without() -> None:
        with mock.patch.object(decoder, "router_stats", without_entropy):
            with_health()

    with_health()
    steps = window.steps * EVERY
    probs = torch.rand(tokens.numel(), shape.moe.num_experts, device=device).softmax(-1)
    number = batch.documents.document_of
    found: list[RouterHealth] = []

    def log() -> None:
        window.steps = list(steps)
        found[:] = [window.reduce(model.mesh.dp)[2]]
        found[0].metrics()
        found[0].line()
        alarms.check(0, found[0])

    def entropy() -> None:
        for _ in range(shape.n_layers):
            entropies(probs, number, batch.documents.count)

    bodies = {"with": with_health, "without": without, "entropy": entropy, "log": log}
    seconds = time_in_turn(bodies | {"probe": lambda: probe.change(model)}, arguments.rounds, device)
    step = seconds["without"]
    cost = seconds["entropy"] + seconds["log"] / EVERY
    print(environment())
    print(f"{shape.n_layers} layers, {shape.moe.num_experts} experts, {tokens.numel()} tokens a step, fp32")
    print(f"step without health        {step * 1e3:10.2f} ms")
    print(f"step with it               {seconds['with'] * 1e3:10.2f} ms   {seconds['with'] / step:.4f} x")
    print(f"entropies alone            {seconds['entropy'] * 1e3:10.2f} ms")
    print(f"a log line alone           {seconds['log'] * 1e3:10.2f} ms   every {EVERY} steps")
    print(f"parts alone, of the step   {cost / step:10.3%}")
    print(f"a probe of {probe.tokens:5d} tokens    {seconds['probe'] * 1e3:10.2f} ms   {seconds['probe'] / step:.2f} steps")


if __name__ == "__main__":
    main()
