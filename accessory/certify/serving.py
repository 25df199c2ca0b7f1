"""Requests that join and leave a running batch, each compared with the same request answered alone."""

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accessory.certify import reference
from accessory.certify.harness import Tensors
from accessory.certify.problem import SERVED, Problem
from accessory.checkpoint.side_by_side import SideBySide
from accessory.infer.engine import Engine
from accessory.infer.request import Running
from accessory.infer.sampling import Sampling
from accessory.model.build import build_model
from accessory.model.decoder import Decoder
from accessory.model.logical import Source
from accessory.model.moe.layouts import LAYOUTS, get_layout
from accessory.parallel.mesh import make_mesh
from accessory.tuning.spec import Tuning

LONGEST, REQUESTS = 100, 16
SEVERAL = "several"
EVERY: tuple[dict[str, Any], ...] = (  # each kind of setting, and all together
    {},
    {"temperature": 1.3},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.2},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {
        "temperature": 1.1,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 3.0, 9: -2.0},
    },
)


@dataclass(frozen=True)
class ServingCell:
    """The engine on ``world`` model-parallel ranks."""

    world: int
    layout: str
    tuning: str  # of problem.TUNINGS, or SEVERAL: each request has one of two adapters, or none
    packed: bool = False  # always in fp32, whose products differ from those of fp64 (model/few_rows.py)

    def settings(self) -> dict[str, str]:
        form = "packed fp32" if self.packed else "plain"
        return {"served on mp": str(self.world), "layout": self.layout, "tuning": self.tuning, "weights": form}


def serving_cells(worlds: Sequence[int]) -> list[ServingCell]:
    tunings = ("full", "lora")
    return [
        ServingCell(world, layout, tuning, packed)
        for i, world in enumerate(worlds)
        for j, layout in enumerate(LAYOUTS)
        for tuning, packed in ((tunings[(i + j) % 2], False), (SEVERAL, False), ("full", True))
    ]


class Numbers:
    """A tokenizer for a model that has none: a text is the list of its tokens' numbers."""

    eos_id = -1
    special: dict[str, int] = {}

    def __init__(self, n_words: int):
        self.n_words = n_words

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in ids)


def run_serving(problem: Problem, cell: ServingCell, device: torch.device) -> dict[str, Any]:
    """Answer requests in a cache that is too small for all, as one of the cell's ranks.

    Returns:
        requests: on the first rank: prompt, sampling, adapter, answer and finish_reason of each. leaked: pages that were not
        freed. shared: prompt tokens that were not computed, thanks to prefix caching.
    """
    model = served_model(problem, cell, device)
    model.pack()
    engine = Engine(model, Numbers(problem.args.vocab_size), max_seq_len=LONGEST, cache_tokens=3 * LONGEST, chunk_tokens=23)
    if model.mesh.mp.rank:
        engine.follow()
        return {}
    rng = random.Random(problem.seed)
    beginning = [rng.randrange(problem.args.vocab_size) for _ in range(40)]
    waiting = [(*_request(rng, problem.args.vocab_size, beginning, n), _adapter(model, n)) for n in range(REQUESTS)]
    requests: list[Running] = []
    while waiting or not engine.is_idle:
        for asked in [waiting.pop() for _ in range(min(len(waiting), rng.choice((0, 0, 1, 3))))]:
            requests.append(engine.submit(*asked))
        engine.step()
        if rng.random() < 0.1:
            engine.cancel(rng.choice(requests))
    engine.close()
    told = [
        {
            "prompt": request.prompt,
            "sampling": asdict(request.sampling),
            "adapter": request.adapter,
            "answer": request.answer,
            "finish_reason": request.finish_reason,
        }
        for request in requests
    ]
    return {"requests": told, "leaked": engine.pool.count - engine.pool.free, "shared": engine.shared_tokens}


def _request(rng: random.Random, vocabulary: int, beginning: list[int], number: int) -> tuple[list[int], Sampling]:
    own = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 50))]
    short = own if number % 2 else own[:6]  # short enough for a window to reach the pages of a shared beginning
    prompt = beginning + short if number % 3 else own
    return prompt, Sampling(max_tokens=rng.randint(1, 30), seed=rng.randrange(-(2**40), 2**40), **EVERY[number % len(EVERY)])


def served_model(problem: Problem, cell: ServingCell, device: torch.device) -> Decoder:
    """The model of the cell's engine, on this rank."""
    if cell.tuning == SEVERAL:
        adapters = {name: _served(problem, name) for name in SERVED}
        given = {name: (tuning.logical.adapters, Tensors(weights)) for name, (tuning, weights) in adapters.items()}
        source: Source = (both := SideBySide(problem.args, Tensors(problem.weights()), given))
        logical = both.logical
    else:
        source, logical = Tensors(problem.weights(cell.tuning)), problem.tuning(cell.tuning).logical
    return build_model(
        logical,
        get_layout(cell.layout),
        source,
        mesh=make_mesh(cell.world),
        dtype=torch.float32 if cell.packed else problem.dtype,
        device=device,
        trains=frozenset(),
    )


@functools.cache
def _served(problem: Problem, adapter: str) -> tuple[Tuning, dict[str, Tensor]]:
    """An adapter's tuning, and its tensors."""
    other = replace(problem, seed=problem.seed + 1 + list(SERVED).index(adapter))  # its own random numbers
    tuning, weights = other.tuning(adapter), other.weights(adapter)
    return tuning, {name: weights[name] for name in tuning.logical.added}


def _adapter(model: Decoder, number: int) -> str | None:
    """The adapter of request ``number``; each adapter gets both kinds of prompt."""
    choice = (None, *model.logical.members)
    return choice[number // 3 % len(choice)]


def _models(problem: Problem, tuning: str) -> dict[str | None, tuple[Tuning, dict[str, Tensor]]]:
    """The models that answer a cell's requests alone, by adapter."""
    if tuning != SEVERAL:
        return {None: (problem.tuning(tuning), problem.weights(tuning))}
    base = problem.weights()
    models: dict[str | None, tuple[Tuning, dict[str, Tensor]]] = {None: (problem.tuning("full"), base)}
    for name in SERVED:
        spec, added = _served(problem, name)
        models[name] = spec, base | added
    return models


def wrong_tokens(problem: Problem, cell: ServingCell, told: dict[str, Any]) -> float:
    """The number of tokens that differ from the reference, which runs each request alone, and of wrong finish_reasons."""
    wrong, models = 0, _models(problem, cell.tuning)
    for request in told["requests"]:
        prompt, answer, how = request["prompt"], request["answer"], request["sampling"]
        tuning, weights = models[request["adapter"]]
        scaling = next((adapter.scaling for adapter in tuning.logical.adapters.values()), 1.0)
        logits = reference.forward(weights, problem.args, torch.tensor(prompt + answer), scaling)[0][len(prompt) - 1 :]
        right = [reference.next_token(logits[n], prompt, answer[:n], how) for n in range(len(answer))]
        wrong += sum(ours != other for ours, other in zip(answer, right, strict=True))
        whole = len(answer) == min(how["max_tokens"], LONGEST - len(prompt))
        wrong += whole != (request["finish_reason"] == "length")
    return float(wrong)
