"""Router health: what the routers did, how far they have moved from the base model, and when to worry.

docs/metrics.md says what every figure means.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.console import listed, say
from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.model.head import Nothing
from accessory.model.moe.router import Router, Routing
from accessory.settings import AlarmSection

PROBE_FILE = "routing_probe.safetensors"  # in the run directory
STARVED = 0.01  # of its fair share: an expert that gets less hardly learns


@dataclass(frozen=True)
class RouterHealth:
    """What the routers did in some steps of the whole job; real tokens only.

    Attributes:
        counts: [L, E] int64: rows routed to each expert.
        entropy: [L] entropy of the router's probabilities in nats, mean over tokens.
        parts: of a model that sees, the same of the tokens of its images alone, and of those of text.
    """

    counts: Tensor
    entropy: Tensor
    parts: Mapping[str, "RouterHealth"] = field(default_factory=dict)

    @classmethod
    def of_sums(cls, counts: Tensor, entropy: Tensor, tokens: int, of_images: Tensor) -> "RouterHealth":
        """Of sums over ``tokens``; ``of_images`` [L, E + 1]: what of counts and entropy is images', or [L, 0]."""
        parts = {}
        if of_images.numel():
            seen, entropy_seen = of_images[:, :-1].round().long(), of_images[:, -1]
            images = round(tokens * int(seen[0].sum()) / max(1, int(counts[0].sum())))
            parts = {
                "image": cls(seen, entropy_seen / max(1, images)),
                "text": cls(counts - seen, (entropy - entropy_seen) / max(1, tokens - images)),
            }
        return cls(counts, entropy / max(1, tokens), parts)

    @property
    def load(self) -> Tensor:
        """[L, E] rows of each expert in fair shares: 1 where all get the same, E / K where every token goes to one."""
        return self.counts.double() * self.counts.shape[1] / self.counts.sum(1, keepdim=True).clamp(min=1)

    @property
    def entropy_share(self) -> Tensor:
        """[L] of log E, the entropy of a router that prefers nothing."""
        experts = self.counts.shape[1]
        return self.entropy / math.log(experts) if experts > 1 else torch.ones_like(self.entropy)

    def metrics(self) -> dict[str, Any]:
        """Numbers of the model, and lists with a number for each layer."""
        load, share, starved = self.load, self.entropy_share, (self.load < STARVED).sum(1)
        return {
            "load_max": load.max().item(),
            "load_min": load.min().item(),
            "starved": int(starved.sum()),
            "entropy": self.entropy.mean().item(),
            "entropy_share": share.mean().item(),
            "entropy_share_min": share.min().item(),
            "layer_load_max": load.amax(1).tolist(),
            "layer_starved": starved.tolist(),
            "layer_entropy": self.entropy.tolist(),
            "layer_entropy_share": share.tolist(),
            "loads": self.counts.tolist(),
            **{f"{part}_{name}": value for part, health in self.parts.items() for name, value in health.metrics().items()},
        }

    def line(self) -> str:
        """For the console."""
        lines = [self._line("router"), *(health._line(f"of {part} tokens") for part, health in self.parts.items())]
        return "\n            ".join(lines)

    def _line(self, of: str) -> str:
        load, share = self.load, self.entropy_share
        (low_layer, low), (high_layer, high) = (divmod(int(at), load.shape[1]) for at in (load.argmin(), load.argmax()))
        return (
            f"{of}: expert load {load.min():.2f} (layer {low_layer} expert {low}) to {load.max():.2f} "
            f"(layer {high_layer} expert {high})  starved {int((load < STARVED).sum())}  "
            f"entropy {share.mean():.1%} of log E (least {share.min():.1%}, layer {int(share.argmin())})"
        )


def probe_documents(order: np.ndarray, lengths: np.ndarray, tokens: int) -> np.ndarray:
    """The first samples of ``order`` that have ``tokens`` tokens together at most; one at least."""
    return order[: max(1, int(lengths[order].cumsum().searchsorted(tokens, side="right")))]


class RoutingProbe:
    """Which experts some fixed tokens take, now and in the base model.

    Attributes:
        places: [t] where this data-parallel rank's tokens stand among the probe's T, which are numbered by sample.
        samples: their numbers, in order.
        base: [L, T, K] the base model's choices, the same on every rank; None until ``record`` or ``load``.
    """

    def __init__(self, samples: np.ndarray, lengths: np.ndarray, batches: Sequence[Batch], device: torch.device):
        """``samples``: the probe's; ``lengths``: of every sample; ``batches``: this rank's, whose keys are the samples."""
        self.batches = [batch.to(device) for batch in batches]
        chosen = np.sort(samples)
        ends = lengths[chosen].cumsum()
        numbers, starts = (torch.from_numpy(x).to(device) for x in (chosen, ends - lengths[chosen]))
        places = [torch.zeros(0, dtype=torch.int64, device=device)]
        for batch in self.batches:
            documents = batch.documents
            start = starts[torch.searchsorted(numbers, batch.sample_keys)]
            if documents.count:
                places.append(start[documents.document_of - 1] + documents.positions)
        self.places, self.tokens, self.samples = torch.cat(places), int(ends[-1]), torch.from_numpy(chosen)
        self.base: Tensor | None = None

    def record(self, model: Decoder) -> None:
        """Let ``model`` be the base (a collective)."""
        mine = self._choices(model)
        base = mine.new_zeros(len(mine), self.tokens, mine.shape[2])
        base[:, self.places] = mine
        self.base = model.mesh.dp.all_reduce(base)

    def change(self, model: Decoder) -> Tensor:
        """[L] share of the (token, choice) pairs of the base model that ``model`` chooses no more (a collective)."""
        assert self.base is not None, "record comes first"
        before = self.base[:, self.places]
        kept = (before.unsqueeze(-1) == self._choices(model).unsqueeze(-2)).any(-1).sum((1, 2))
        return 1 - model.mesh.dp.all_reduce(kept).cpu().double() / (self.tokens * before.shape[2])

    def save(self, path: Path) -> None:
        """Keep the base model's choices, for a run that is resumed with other weights. Only one rank calls this."""
        assert self.base is not None, "record comes first"
        unfinished = path.with_suffix(".tmp")
        save_file({"base": self.base.cpu(), "samples": self.samples}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> bool:
        """Take them from there; whether they are there, and of the same samples."""
        kept = load_file(path) if path.is_file() else {}
        if not kept or kept["base"].shape[1] != self.tokens or not torch.equal(kept["samples"], self.samples):
            return False
        self.base = kept["base"].to(self.places.device)
        return True

    @torch.no_grad()
    def _choices(self, model: Decoder) -> Tensor:
        """[L, t, K] int32: the experts of this rank's tokens; no output layer, no dropout."""
        seen: list[Tensor] = []

        def keep(_: Any, __: Any, routing: Routing) -> None:
            seen.append(routing.experts.int())

        routers = [module for module in model.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(keep) for router in routers]
        parts = []
        try:
            for batch in self.batches:
                seen.clear()
                model(batch.inputs(), Nothing())
                parts.append(torch.stack(seen)[:, : batch.real_tokens])
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(parts, 1)


RULES = {  # a metric: when it rings, and what to do
    "load_min": ("below", "an expert without tokens does not learn: raise load_balancing_weight, or lower optim.lr"),
    "load_max": ("above", "few experts do the work of all: raise load_balancing_weight, or lower optim.lr"),
    "entropy_share": ("below", "the router weighs no other expert any more: lower optim.lr, or set train.z_loss_weight"),
    "routing_change": ("above", "tokens no longer reach the base model's experts: lower optim.lr, or freeze the router"),
}


class Alarms:
    """Says when a layer passes a threshold of ``log.alarms``, once, and when it no longer does.

    Of a model that sees, the tokens of images and those of text are judged apart, too.
    """

    def __init__(self, thresholds: AlarmSection):
        self.thresholds = thresholds
        self._holding: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}  # name, part: layer: what is wrong

    def check(self, step: int, health: RouterHealth) -> None:
        """Judge load and entropy; load only where a starved expert's share is a row at least, or chance would ring."""
        for part, judged in {"": health, **health.parts}.items():
            rows, load = judged.counts.sum(1).min(), judged.load
            if rows * STARVED >= load.shape[1]:
                self._judge(step, "load_min", load, part)
                self._judge(step, "load_max", load, part)
            if rows:  # a step may have no image
                self._judge(step, "entropy_share", judged.entropy_share, part)

    def check_change(self, step: int, change: Tensor) -> None:
        """Judge how much of each layer's routing has changed, [L]."""
        self._judge(step, "routing_change", change)

    def metrics(self) -> dict[str, Any]:
        """What holds now."""
        return {"alarms": [event for layers in self._holding.values() for event in layers.values()]}

    def _judge(self, step: int, name: str, values: Tensor, part: str = "") -> None:
        """``values``: [L], or [L, E] if they are the experts' own; of all tokens, or a ``part`` of them."""
        limit = getattr(self.thresholds, name)
        if limit is None:
            return
        word, advice = RULES[name]
        passed = values < limit if word == "below" else values > limit
        before, now = self._holding.get((name, part), {}), {}
        of = {"tokens": part} if part else {}
        for layer, (hit, value) in enumerate(zip(passed, values, strict=True)):
            if hit.any():
                experts = {"experts": hit.nonzero().flatten().tolist()} if hit.dim() else {}
                worst = value.min() if word == "below" else value.max()
                now[layer] = {"alarm": name, **of, "layer": layer, **experts, "value": worst.item()}
        self._holding[name, part] = now
        called = f"{name} of {part} tokens" if part else name
        if new := [event for layer, event in now.items() if layer not in before]:
            places = listed([_place(event) for event in new], separator="; ")
            say(f"ALARM at step {step}: {called} {word} {limit:g} in {places}: {advice}")
        if over := [f"layer {layer}" for layer in before if layer not in now]:
            places = listed(over, separator="; ")
            say(f"alarm over at step {step}: {called} no longer {word} {limit:g} in {places}")


def _place(event: dict[str, Any]) -> str:
    experts = event.get("experts", [])
    words = f" expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}" if experts else ""
    return f"layer {event['layer']}{words} ({event['value']:.2f})"
