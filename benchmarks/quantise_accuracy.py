"""The accuracy cost of quantisation: rounding to nearest next to calibrated rounding, with routers kept or quantised.

    make quickstart     # or any trained model, and a mix that marks what is held out
    python benchmarks/quantise_accuracy.py runs/quickstart/model/epoch5 runs/quickstart/data/first.yaml
    python benchmarks/quantise_accuracy.py MIXTRAL-8x7B MIX.yaml --precision bf16 --layers 0 15 31

Experts and attention are quantised. Measured on the held-out part of the mix: the KL divergence from the original model's
next-token distribution to the quantised one's, in nats, and the perplexity, both over trained tokens; the share of tokens,
over all layers, that get other experts; and for each matrix, each expert's by itself, the relative error of its outputs (on
the original model's inputs). Calibration samples come from the training part, drawn anew for each of several seeds. "Mixed"
is what rounding inputs in turn could gain at the same step size: the root of the geometric over the arithmetic mean of the
spectrum of x.T x. The verdicts at the end are those of docs/quantisation.md.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import environment, pick_device
from torch import Tensor

from accessory.checkpoint.calibrate import LEAST_ROWS, STAGES, Calibrated, calibration_batches
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.quantise import Dequantised, Quantising
from accessory.data.loader import Batch, BatchPlan
from accessory.data.mix import load_mix
from accessory.data.packing import Rows
from accessory.data.tokenizer import Tokenizer
from accessory.dtypes import get_dtype
from accessory.model.build import build_model
from accessory.model.codecs import get_codec
from accessory.model.decoder import Decoder
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel, Overlaid, Region, Source, whole_region
from accessory.model.moe.layouts import EXPERT
from accessory.settings import QuantiseSection

Grams = dict[str, list[tuple[Tensor, int]]]
"""For each matrix, one for each expert: x.T @ x of its input rows x, and the number of rows."""


class Held:
    """Tensors in memory, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def read(self, name: str, region: Region) -> Tensor:
        return self.tensors[name][region]


class RoundedRouters:
    """A source whose routers are rounded to nearest by ``codec``."""

    def __init__(self, source: Source, codec: str):
        self.source, self.codec = source, get_codec(codec)

    def read(self, name: str, region: Region) -> Tensor:
        value = self.source.read(name, region)
        return self.codec.decode(self.codec.encode(value), torch.float32) if name.endswith("gate.weight") else value


@dataclass
class Told:
    """A model's results on held-out tokens: [n, V] log-probabilities, and each layer's experts [L, T, K]."""

    log_probs: Tensor
    targets: Tensor
    experts: Tensor

    @property
    def perplexity(self) -> float:
        return self.log_probs.gather(1, self.targets[:, None]).mean().neg().exp().item()

    def kl(self, other: "Told") -> float:
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(1).mean().item()

    def rerouted(self, other: "Told") -> float:
        return (self.experts != other.experts).any(-1).float().mean().item()


def held_out(checkpoint: Checkpoint, mix: Path, tokens: int) -> list[Batch]:
    data = load_mix(mix, Tokenizer(checkpoint.tokenizer), 2048, seed=0)
    lengths = data.validation.lengths
    order = np.random.default_rng(0).permutation(len(lengths))
    order = order[: int(lengths[order].cumsum().searchsorted(tokens)) + 1]
    rows = Rows.packed(order, lengths, max(4096, int(lengths.max())))
    return [batch for (batch,) in BatchPlan(1, 1, 0, 1).epoch(data.validation, rows)]


@torch.no_grad()
def ask(model: Decoder, batches: list[Batch]) -> Told:
    experts: list[list[Tensor]] = [[] for _ in model.layers]
    log_probs, targets = [], []
    hooks = [
        layer.feed_forward.gate.register_forward_hook(
            lambda _, __, routing, seen=seen: seen.append(routing.experts.sort(-1).values.cpu())
        )
        for layer, seen in zip(model.layers, experts, strict=True)
    ]
    for batch in batches:
        batch = batch.to(model.norm.weight.device)
        log_probs.append(model(batch.inputs(), Logits(batch.targets.rows))[0].log_softmax(-1).cpu())
        targets.append(batch.targets.ids.cpu())
    for hook in hooks:
        hook.remove()
    return Told(torch.cat(log_probs), torch.cat(targets), torch.stack([torch.cat(seen) for seen in experts]))


@torch.no_grad()
def grams_of(model: Decoder, batches: list[Batch], layers: list[int]) -> Grams:
    grams: Grams = {}
    hooks = []
    for n in layers:
        for layer, rows_of, names in STAGES:

            def note(module, arguments, rows_of=rows_of, names=names, n=n):
                for e, x in enumerate(rows_of(module, arguments[0])):
                    x = x.float()
                    for name in names:
                        of_matrix = grams.setdefault(f"layers.{n}.{name}", [])
                        gram, count = of_matrix[e] if e < len(of_matrix) else (0, 0)
                        of_matrix[e : e + 1] = [(gram + x.T @ x, count + len(x))]

            hooks.append(model.layers[n].get_submodule(layer).register_forward_pre_hook(note))
    ask(model, batches)
    for hook in hooks:
        hook.remove()
    return grams


def errors(original: Source, numbers: Source, grams: Grams, logical: LogicalModel) -> Iterator[tuple[str, float]]:
    """The relative error of each matrix's products (each expert's), in order."""
    for name, of_experts in grams.items():
        region = whole_region(logical.dense[name])
        w, rounded = (source.read(name, region).float().to(of_experts[0][0].device) for source in (original, numbers))
        matrices, lost = (stack.reshape(len(of_experts), -1, w.shape[-1]) for stack in (w, rounded - w))
        for matrix, off, (gram, _) in zip(matrices, lost, of_experts, strict=True):
            squares = [(m @ gram * m).sum() for m in (off, matrix)]
            yield name, float((squares[0] / squares[1].clamp(min=1e-30)).clamp(min=0).sqrt())


def mixed(gram: Tensor) -> float:
    """The share of the error that is left by rounding inputs in turn, if all of them end up with equal cost."""
    spectrum = torch.linalg.eigvalsh(gram.double()).clamp(min=1e-30)
    return float((spectrum.log().mean().exp() / spectrum.mean()).sqrt())


class Study:
    """One model, and its held-out samples."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device = arguments, pick_device()
        self.original = Checkpoint(arguments.model)
        self.args = self.original.args
        self.batches = held_out(self.original, arguments.mix, arguments.tokens)
        base = self.build(self.original)
        self.base = ask(base, self.batches)
        layers = arguments.layers or list(range(self.args.n_layers))
        self.grams = grams_of(base, self.batches, layers)
        grams = [each for of_experts in self.grams.values() for each in of_experts]
        self.rows, self.mixed = [count for _, count in grams], [mixed(gram) for gram, _ in grams]

    def build(self, source: Source) -> Decoder:
        logical = LogicalModel(replace(self.args, quantise=None))
        dtype = get_dtype(self.arguments.precision)
        return build_model(logical, EXPERT, source, dtype=dtype, device=self.device, trains=frozenset())

    def quantised(self, codec: str, draw: int | None) -> Source:
        """The dequantised matrices: rounded to nearest, or calibrated on a draw of the mix."""
        logical = LogicalModel(replace(self.args, quantise=QuantiseSection(codec, codec)))
        if draw is None:
            return Dequantised(Quantising(self.original, logical), logical)
        batches = calibration_batches(self.original, self.arguments.mix, self.arguments.calibrate, draw)
        made = Calibrated(self.original, logical, batches)
        parts = Held({name: made.read(name, logical.whole(name)) for name in logical.parts})
        return Dequantised(Overlaid(self.original, parts, logical.parts), logical)

    def measure(self, numbers: Source) -> tuple[float, float, float]:
        """KL divergence, perplexity, and the share of tokens that get other experts."""
        told = ask(self.build(numbers), self.batches)
        return self.base.kl(told), told.perplexity, self.base.rerouted(told)


def spread(values: list[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if len(values) == 1 else f"{low} .. {high}"


def compare(study: Study, codec: str, draws: list[int]) -> dict[str, bool]:
    """Print a table of one codec; returns the verdicts of the protocol."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    off: dict[str, list[list[float]]] = {"nearest": [], "calibrated": []}
    kinds: list[str] = []
    for how, seeds in (("nearest", [None]), ("calibrated", draws)):
        for seed in seeds:
            numbers = study.quantised(codec, seed)
            found.setdefault(f"{how}, routers kept", []).append(study.measure(numbers))
            found.setdefault(f"{how}, routers quantised", []).append(study.measure(RoundedRouters(numbers, codec)))
            measured = list(errors(study.original, numbers, study.grams, LogicalModel(study.args)))
            kinds = [name.removesuffix(".weight").rpartition(".")[2] for name, _ in measured]
            off[how].append([error for _, error in measured])
    print(f"\n{codec:30s}{'KL, nats':>20s}{'perplexity':>20s}{'other experts, %':>20s}")
    for name, values in found.items():
        kl, perplexity, rerouted = (list(column) for column in zip(*values, strict=True))
        cells = spread(kl, ".5f"), spread(perplexity, ".3f"), spread([100 * share for share in rerouted], ".1f")
        print(f"{name:30s}" + "".join(f"{cell:>20s}" for cell in cells))
    heads = {"matrices": 10, "nearest": 10, "calibrated": 12, "ratio": 8, "at most": 9, "over 0.6": 10, "mixed": 8}
    print(f"\n{'output error, %':15s}" + "".join(f"{head:>{wide}s}" for head, wide in heads.items()))
    (nearest,) = off["nearest"]
    ratios = [max(run[n] for run in off["calibrated"]) / nearest[n] for n in range(len(nearest))]
    for kind in dict.fromkeys(kinds):
        those = [n for n, other in enumerate(kinds) if other == kind]
        mean = [100 * sum(run[n] for run in runs for n in those) / len(those) / len(runs) for runs in off.values()]
        over, most = sum(ratios[n] > 0.6 for n in those), max(those, key=ratios.__getitem__)
        cells = (
            f"{mean[0]:10.2f}{mean[1]:12.2f}{mean[1] / mean[0]:8.2f}{ratios[most]:9.2f}{over:10d}{study.mixed[most]:8.2f}"
        )
        print(f"{kind:15s}{len(those):10d}{cells}")
    kl = {name: [value[0] for value in values] for name, values in found.items()}
    kept, rounded = kl["calibrated, routers kept"], kl["calibrated, routers quantised"]
    enough = [ratio for ratio, rows in zip(ratios, study.rows, strict=True) if rows >= LEAST_ROWS]
    return {
        f"output error at most 0.6 of the nearest's, each of {len(enough)} matrices, every draw": max(enough) <= 0.6,
        f"KL below the nearest's in {len(draws)} of {len(draws)} draws": max(kept) < kl["nearest, routers kept"][0],
        f"KL with routers kept below routers quantised in {len(draws)} of {len(draws)} draws": all(
            map(float.__lt__, kept, rounded)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a trained model, in any format")
    parser.add_argument("mix", type=Path, help="a mix that marks what is held out")
    parser.add_argument("--codecs", nargs="+", default=["int4", "nf4", "int3", "int8"])
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(5)), help="their seeds")
    parser.add_argument("--tokens", type=int, default=64 * 256, help="held out")
    parser.add_argument("--calibrate", type=int, default=131072, help="tokens, as `accessory quantise --tokens`")
    parser.add_argument("--layers", type=int, nargs="+", help="whose matrices' outputs are compared; default: all")
    parser.add_argument("--precision", default="fp32", choices=["bf16", "fp32"])
    arguments = parser.parse_args()
    print(environment())
    study = Study(arguments)
    tokens = sum(batch.real_tokens for batch in study.batches)
    print(f"whole: perplexity {study.base.perplexity:.3f} over {len(study.base.targets):,} of {tokens:,} held-out tokens")
    print(f"rows of an expert: {min(study.rows)} at least; draws {', '.join(map(str, arguments.draws))}")
    for codec in arguments.codecs:
        for asked, met in compare(study, codec, arguments.draws).items():
            print(f"{'yes' if met else 'NO ':4s}{codec}: {asked}", flush=True)


if __name__ == "__main__":
    main()
