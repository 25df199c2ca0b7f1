"""The problem that every cell solves: a model, its initial weights, data and optimiser, as functions of a seed."""

import base64
import functools
import io
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from accessory.data.placement import PLACE
from accessory.data.store import Sample
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.build import RandomWeights
from accessory.model.logical import LogicalModel
from accessory.model.visual import PRESETS, EncoderArgs, PresetName, VisualArgs
from accessory.parallel.mesh import Axis
from accessory.settings import LoraSection, OptimSection, QuantiseSection, TuningSection
from accessory.tuning.spec import Tuning, resolve
from accessory.visual.vision import RandomEncoders, Vision, make_vision

# Sizes that a mistake could exchange differ, and there are more than two of everything: experts of a token, micro-batches,
# windows of a sequence, chunks of the cross-entropy.
SMALL = ModelArgs(
    dim=32,
    hidden_dim=24,
    head_dim=4,
    n_layers=2,
    n_heads=16,
    n_kv_heads=2,
    vocab_size=64,
    rope_theta=1e4,
    rope_scaling=0.5,
    sliding_window=9,
    max_seq_len=160,
    moe=MoEArgs(num_experts=16, num_experts_per_tok=3),
    load_balancing_weight=0.1,
)
WIDE = replace(SMALL, dim=128, hidden_dim=96, head_dim=16, max_seq_len=1024, moe=MoEArgs(8, num_experts_per_tok=3))
"""For bf16: rows are long enough for rounding to average out, and positions go beyond the integers that bf16 can hold."""

# Clipping is active in every step; the rate rises through two steps and falls through the others. A large eps, because
# AdamW divides each gradient by its own size: with a small one what should be zero (K's bias changes no attention) would
# come out as rounding noise times the learning rate.
OPTIM = OptimSection(lr=1e-2, min_lr=1e-3, warmup_epochs=1.5, weight_decay=0.1, clip_grad=0.5, betas=(0.9, 0.95), eps=1e-3)
Z_WEIGHT = 0.01
TUNINGS = {
    "full": TuningSection(),
    "lora": TuningSection(
        lora=LoraSection(rank=3, alpha=2.0, targets=("attention", "experts", "router", "embeddings", "output")),
        bias=True,
        train=("norms",),
    ),
}
SERVED = {
    "first": replace(TUNINGS["lora"], train=()),
    "second": TuningSection(lora=LoraSection(rank=2, alpha=5.0, targets=("experts", "router", "output"))),
}
"""Adapters that are served side by side."""
ENCODERS = {
    "clip": EncoderArgs("clip", 28, 14, 16, 24, 2, 4, out_dim=12),
    "dinov2": EncoderArgs("dinov2", 28, 14, 20, 16, 2, 4, positions=3),
    "eva": EncoderArgs("eva", 28, 14, 12, 20, 2, 2),
    "qformer": EncoderArgs("qformer", dim=10, hidden_dim=14, layers=3, heads=2, tokens=3),
    "convnext": EncoderArgs("convnext", 64, 32, 4, depths=(1, 1, 2, 1)),
    "siglip": EncoderArgs("siglip", 30, 14, 16, 24, 3, 4),
}
"""The encoders of a small visual model."""
BATCHES = (9, 9, 9, 5)  # sequences in the global batch of each step, each an epoch of its own; the last is not full
LONGEST = 150  # tokens of a sequence
PACKED_WIDTH = 2 * LONGEST


@dataclass(frozen=True)
class Problem:
    """The model and the precision it is trained in; all else follows."""

    args: ModelArgs = SMALL
    dtype: torch.dtype = torch.float64
    seed: int = 333  # chosen from hundreds: its closest routing decision is clear enough for fp32 to agree with fp64

    def of_labels(self) -> "Problem":
        """The same with a label to learn for each sequence."""
        return replace(self, args=replace(self.args, labels=("no", "so", "yes")))

    def quantised(self, quantise: QuantiseSection) -> "Problem":
        """The same with matrices quantised in this way."""
        return replace(self, args=replace(self.args, quantise=quantise))

    def seeing(self, preset: PresetName) -> "Problem":
        """The same with images in some sequences."""
        token = self.args.vocab_size - 1 if PRESETS[preset].llava else None
        visual = VisualArgs(preset, tuple(ENCODERS[kind] for kind in VisualArgs(preset).kinds), image_token=token)
        return replace(self, args=replace(self.args, visual=visual))

    def vision(self, mp: Axis, device: torch.device) -> Vision | None:
        """The encoders of a visual model."""
        visual = self.args.visual
        return make_vision(visual, RandomEncoders(visual, self.seed), mp, self.dtype, device) if visual else None

    @functools.cache  # noqa: B019  (one problem a process)
    def tuning(self, name: str) -> Tuning:
        section = (TUNINGS | SERVED)[name]
        if section.lora and self.args.labels:  # whose score is trained whole
            targets = tuple(target for target in section.lora.targets if target != "output")
            section = replace(section, lora=replace(section.lora, targets=targets))
        if section.lora and self.args.visual:
            section = replace(section, train=(*section.train, "connector"))
        return resolve(section, self.args, self.seed)

    def weights(self, tuning: str = "full") -> dict[str, Tensor]:
        """Logical tensors in fp64, including a tuning's adapters, not quantised; fp32 can hold their values exactly.

        They are large enough that attention and routing are far from uniform, and no adapter is zero. Otherwise a wrong
        term could go unnoticed.
        """
        logical = LogicalModel(replace(self.args, quantise=None), self.tuning(tuning).logical.adapters)
        source = RandomWeights(logical, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        result = {}
        for name, shape in logical.shapes.items():
            tensor = source.read(name, logical.whole(name))
            if name.endswith(("lora_b", "bias")):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif tensor.dim() > 1:
                tensor *= 1.1 / (RandomWeights.STD * math.sqrt(shape[-1]))
            result[name] = tensor.double()
        return result

    def batches(self, masks: bool) -> list[list[Sample]]:
        """A global batch for each step; with ``masks``, a prompt of random length in each sequence is not trained."""
        rng = random.Random(self.seed)
        batches = [[self._sample(rng, 3, LONGEST, masks) for _ in range(count)] for count in BATCHES]
        visual = self.args.visual
        return [[_showing(rng, sample, visual) for sample in batch] for batch in batches] if visual else batches

    def long_then_short(self) -> list[list[Sample]]:
        """Global batches for 31 steps: one of long sequences, then three others in turn, which can be memorised."""
        rng = random.Random(self.seed)
        long = [self._sample(rng, 300, 600, masks=True) for _ in range(3)]
        short = [[self._sample(rng, 20, 80, masks=True) for _ in range(2)] for _ in range(3)]
        return [long, *short * 10]

    def _sample(self, rng: random.Random, shortest: int, longest: int, masks: bool) -> Sample:
        longest = min(longest, self.args.max_seq_len)
        length = rng.randint(min(shortest, longest), longest)
        prompt = rng.randint(1, length - 1)
        tokens = [rng.randrange(self.args.vocab_size) for _ in range(length)]
        trained = [not masks or place >= prompt for place in range(length)]
        return Sample(np.array(tokens), np.array(trained), label=tokens[0] % 3 if self.args.labels else None)


def _showing(rng: random.Random, sample: Sample, visual: VisualArgs) -> Sample:
    """The sample with no, one or two images of noise at random places, possibly before the first token."""
    tokens = [0 if token == visual.image_token else token for token in sample.tokens.tolist()]
    trained, images = list(sample.trained), list[str]()
    for _ in range(rng.choice((0, 0, 1, 2))):
        place = rng.choice([n for n, token in enumerate(tokens) if token != PLACE])
        tokens[place:place], trained[place:place] = [PLACE] * visual.words, [False] * visual.words
        noise = np.frombuffer(rng.randbytes(3 * visual.size**2), np.uint8).reshape(visual.size, visual.size, 3)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        images.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return replace(sample, tokens=np.array(tokens), trained=np.array(trained), images=tuple(images))
