"""The frozen encoders of a visual model: from pixels to the features for its connector."""

import functools
import hashlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.dtypes import at_least
from accessory.model.logical import Region, Shape, Source, whole_region
from accessory.model.visual import PRESETS, EncoderKind, Images, VisualArgs
from accessory.parallel.mesh import Axis
from accessory.parallel.watchdog import progressed
from accessory.visual.convnext import ConvNeXt
from accessory.visual.qformer import QFormer
from accessory.visual.views import CLIP_MEAN, CLIP_STD, cut_views, normalised
from accessory.visual.vit import ViT

CHUNK = 16  # views that go through the encoders at once
NORMALISED = {"dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
"""Mean and standard deviation with which an encoder normalises colours, if they are not CLIP's."""
Colour = tuple[float, float, float]
Encoder = ViT | ConvNeXt | QFormer


class Vision:
    """The encoders, whole on every rank. They are not part of the decoder: not trained, not sharded, not saved with it.

    Each model-parallel rank encodes a share of a micro-batch's images, and all ranks get all features, bitwise the same.

    Attributes:
        names: each parameter's name in a checkpoint.
    """

    def __init__(self, args: VisualArgs, mp: Axis):
        self.args, self.mp = args, mp
        self.encoders = nn.ModuleDict({kind: _encoder(args, kind) for kind in args.kinds})
        self.encoders.requires_grad_(False)
        self.names = {
            f"{kind}.{own}": self._encoder(kind).reference_name(own)
            for kind in args.kinds
            for own, _ in self._encoder(kind).named_parameters()
        }

    @torch.no_grad()
    def __call__(self, images: Images) -> Images:
        """Replace pixels by features (a collective of the model-parallel ranks, if there are images)."""
        assert images.pixels is not None
        count = len(images.pixels)
        share = -(-count // self.mp.size)
        mine = images.pixels[self.mp.rank * share : (self.mp.rank + 1) * share]
        own = [self._features(chunk) for chunk in mine.split(max(1, CHUNK // self.args.views))]
        features = tuple(self._gathered(torch.cat(parts), share)[:count] for parts in zip(*own, strict=True))
        return Images(images.rows, features=features, words=images.words)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The encoders' tensors, with their names in a checkpoint."""
        for own, parameter in self.encoders.named_parameters():
            yield self.names[own], parameter.detach()

    def _gathered(self, features: Tensor, share: int) -> Tensor:
        """The features of all model-parallel ranks, each of which has ``share`` or fewer."""
        if self.mp.size == 1 or not share:
            return features
        padded = features.new_zeros(share, *features.shape[1:])
        padded[: len(features)] = features
        parts = [torch.empty_like(padded) for _ in range(self.mp.size)]
        dist.all_gather(parts, padded, group=self.mp.group)
        return torch.cat(parts)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """uint8 [n, 3, size, size] -> for each group of encoders [n, views, tokens, width]."""
        dtype, preset, args = next(self.encoders.parameters()).dtype, PRESETS[self.args.preset], self.args
        x = normalised(pixels, at_least(dtype))
        rounding = torch.float16 if args.exact and len(preset.groups) > 1 else None

        @functools.cache
        def views(size: int) -> Tensor:
            return cut_views(x, args.views, size, rounding).flatten(0, 1)

        def tokens(kind: EncoderKind) -> Tensor:
            size, encoder = args.encoder("eva" if kind == "qformer" else kind).size, self._encoder(kind)
            assert size
            squares = views(size)
            if kind in NORMALISED:
                squares = _normalised_as(squares, *NORMALISED[kind])
            squares = squares.to(dtype)
            if kind == "qformer":
                squares = self._encoder("eva")(squares)
            found: Tensor = encoder(squares)
            if preset.llava:
                return found if kind == "siglip" else found[:, 1:]
            return encoder.projected(found) if args.preset == "clip" and isinstance(encoder, ViT) else found

        groups = (torch.cat([tokens(kind) for kind in group], -1) for group in preset.groups)
        return [group.unflatten(0, (len(pixels), args.views)) for group in groups]

    def _encoder(self, kind: EncoderKind) -> Encoder:
        encoder = self.encoders[kind]
        assert isinstance(encoder, Encoder)
        return encoder


def _encoder(args: VisualArgs, kind: EncoderKind) -> Encoder:
    sizes = args.encoder(kind)
    if kind == "convnext":
        return ConvNeXt(sizes)
    if kind == "qformer":
        seen = args.encoder("eva").dim
        assert seen
        return QFormer(sizes, seen)
    return ViT(sizes, before_last=PRESETS[args.preset].llava)


def _normalised_as(x: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Renormalise pixels that were normalised for CLIP with another mean and standard deviation."""
    of_clip, own = (
        [torch.tensor(some, dtype=x.dtype, device=x.device).view(3, 1, 1) for some in both]
        for both in ((CLIP_MEAN, CLIP_STD), (mean, std))
    )
    return (x * of_clip[1] + of_clip[0] - own[0]) / own[1]


@functools.cache
def vision_shapes(args: VisualArgs) -> dict[str, Shape]:
    """The shapes of a model's encoders, by their names in LLaMA2-Accessory's checkpoints."""
    with torch.device("meta"):
        vision = Vision(args, Axis())
    return {vision.names[name]: tuple(parameter.shape) for name, parameter in vision.encoders.named_parameters()}


def count_of_encoders(args: VisualArgs | None) -> int:
    """The number of parameters of a model's encoders; each rank has all of them."""
    return sum(map(math.prod, vision_shapes(args).values())) if args else 0


@torch.no_grad()
def make_vision(args: VisualArgs, source: Source, mp: Axis, dtype: torch.dtype, device: torch.device) -> Vision:
    """A model's encoders with weights from ``source``."""
    with torch.device("meta"):
        vision = Vision(args, mp)
    vision.encoders.to(dtype).to_empty(device=device)
    for name, parameter in vision.encoders.named_parameters():
        parameter.copy_(source.read(vision.names[name], whole_region(parameter.shape)))
        progressed()
    return vision


class RandomEncoders:
    """Random initial weights of encoders, as a function of (seed, name), if no checkpoint has any.

    Matrices and convolutions are normal with variance 1 / inputs, so that a block's output depends on its input. Tables of
    tokens and positions are normal with standard deviation 0.02, norms and scales are one, and biases zero.
    """

    def __init__(self, args: VisualArgs, seed: int):
        self.shapes, self.seed = vision_shapes(args), seed

    def read(self, name: str, region: Region) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)[region]
        is_table = "embedding" in name.rpartition("patch_embedding")[2] or name.endswith(("_token", "_tokens", "_embed"))
        if len(shape) == 1 and not is_table:
            return torch.ones(shape)[region]
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        inputs = shape[0] if name.endswith(".proj") else math.prod(shape[1:])
        return torch.empty(shape).normal_(0.0, 0.02 if is_table else inputs**-0.5, generator=generator)[region]
