"""How a model sees: an image is a known number of places in a sample, where a small module writes what encoders made of it.

``visual`` of config.json names a preset (``PRESETS``):

    clip      LLaMA2-Accessory's ``with_visual``: 257 CLIP tokens before <s>
    qformer   32 tokens of BLIP-2's Q-Former, between tags
    ens       SPHINX-MoE: those 32, and 257 of CLIP, ConvNeXt and DINOv2 side by side, between tags
    ens5      the same of the whole image and of its four quarters
    llava     transformers' LlavaForConditionalGeneration: CLIP's patches, where <image> stands
    llava_siglip  the same with SigLIP's
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from accessory.config import Bounds, Count, nearest
from accessory.errors import UserError

EncoderKind = Literal["clip", "dinov2", "eva", "qformer", "convnext", "siglip"]
PresetName = Literal["clip", "qformer", "ens", "ens5", "llava", "llava_siglip"]
Place = Literal["before_bos", "after_bos", "inline"]


@dataclass(frozen=True)
class EncoderArgs:
    """The sizes of one encoder; what is None is as in the model that LLaMA2-Accessory takes (``FULL_SIZE``).

    Attributes:
        kind: which; ``eva`` is the Q-Former's own ViT.
        size: side of the square that it sees, in pixels. patch: of one patch of it.
        dim: width of its tokens; of ConvNeXt, of its first stage. hidden_dim: of its MLPs (DINOv2: of w3's input).
        layers, heads: of a transformer. depths: blocks in each stage of ConvNeXt, each twice as wide as the one before.
        tokens: queries of the Q-Former. positions: side of DINOv2's table of positions, which is stretched to the patches.
        out_dim: width of CLIP's projection; None: ``dim``.
        activation: of CLIP's MLPs.
    """

    kind: EncoderKind
    size: Count | None = None
    patch: Count | None = None
    dim: Count | None = None
    hidden_dim: Count | None = None
    layers: Annotated[int, Bounds(least=1, below=1000)] | None = None
    heads: Count | None = None
    depths: tuple[Count, ...] = ()
    tokens: Count | None = None
    positions: Count | None = None
    out_dim: Count | None = None
    activation: Literal["quick_gelu", "gelu"] | None = None


FULL_SIZE = {
    "clip": EncoderArgs("clip", 224, 14, 1024, 4096, 24, 16, out_dim=768),
    "dinov2": EncoderArgs("dinov2", 224, 14, 1536, 4096, 40, 24, positions=37),
    "eva": EncoderArgs("eva", 224, 14, 1408, 6144, 39, 16),
    "qformer": EncoderArgs("qformer", dim=768, hidden_dim=3072, layers=12, heads=12, tokens=32),
    "convnext": EncoderArgs("convnext", 512, 32, 384, depths=(3, 4, 30, 3)),
    "siglip": EncoderArgs("siglip", 384, 14, 1152, 4304, 27, 16),  # so400m
}


@dataclass(frozen=True)
class Preset:
    """What a preset fixes.

    Attributes:
        groups: kinds of encoders, those of one group side by side in a token.
        names: of the connector's modules, one a group.
        place: where an image stands whose text says it nowhere. tags: it stands between two learnt vectors.
        views: squares of an image that are looked at: the whole, or that and its quarters.
        llava: it sees as LLaVA does: patches on their way into the encoder's last block, through two layers.
        sizes: where its encoders differ from ``FULL_SIZE``.
    """

    groups: tuple[tuple[EncoderKind, ...], ...]
    names: tuple[str, ...]
    place: Place
    tags: bool = False
    views: int = 1
    llava: bool = False
    sizes: tuple[EncoderArgs, ...] = ()


_ENSEMBLE = Preset((("qformer",), ("clip", "convnext", "dinov2")), ("qformer_proj", "visual_proj"), "after_bos", tags=True)
_LLAVA = Preset((("clip",),), ("multi_modal_projector",), "inline", llava=True)
PRESETS: dict[PresetName, Preset] = {
    "clip": Preset((("clip",),), ("clip_proj",), "before_bos"),
    "qformer": Preset((("qformer",),), ("qformer_proj",), "after_bos", tags=True),
    "ens": _ENSEMBLE,
    "ens5": replace(_ENSEMBLE, views=5),
    "llava": replace(_LLAVA, sizes=(EncoderArgs("clip", size=336),)),
    "llava_siglip": replace(_LLAVA, groups=(("siglip",),)),
}


@dataclass(frozen=True)
class VisualArgs:
    """How a model sees.

    Attributes:
        preset: see above.
        encoders: the sizes of its encoders, where they are not the preset's.
        exact: "reference": with the rounding to fp16 and the GELU that LLaMA2-Accessory loads CLIP with, where its weights
            were trained with quick_gelu.
        image_token: of llava, the id that stands for an image's places in transformers' hands.
    """

    preset: PresetName
    encoders: tuple[EncoderArgs, ...] = ()
    exact: Literal["reference"] | None = None
    image_token: Annotated[int, Bounds(least=0)] | None = None

    def __post_init__(self) -> None:
        kinds = self.kinds
        for given in self.encoders:
            if given.kind not in kinds:
                raise UserError(f"encoders: the preset {self.preset} has no {given.kind}{nearest(given.kind, kinds)}")
        for kind in kinds:
            encoder = self.encoder(kind)
            if encoder.size and encoder.patch and encoder.size % encoder.patch and kind != "siglip":  # so400m leaves a rest
                raise UserError(f"encoders: {kind}: patch {encoder.patch} must divide size {encoder.size}")
            if encoder.dim and encoder.heads and encoder.dim % encoder.heads:
                raise UserError(f"encoders: {kind}: heads {encoder.heads} must divide dim {encoder.dim}")
        for group in PRESETS[self.preset].groups:
            counts = {kind: self._tokens(kind) for kind in group}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{kind} {count}" for kind, count in counts.items())
                raise UserError(f"encoders: tokens stand side by side, and there must be as many of each: {told}")

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it: what is said, no more."""
        encoders = [{name: value for name, value in vars(one).items() if value not in (None, ())} for one in self.encoders]
        values = vars(self) | {"encoders": encoders}
        return {name: value for name, value in values.items() if value not in (None, [])}

    @property
    def kinds(self) -> list[EncoderKind]:
        """Its encoders, in the order of their tokens."""
        found: list[EncoderKind] = []
        for group in PRESETS[self.preset].groups:
            for kind in group:
                found += ["eva", kind] if kind == "qformer" else [kind]
        return found

    def encoder(self, kind: EncoderKind) -> EncoderArgs:
        """All sizes of an encoder."""
        full = FULL_SIZE[kind]
        for given in (*PRESETS[self.preset].sizes, *self.encoders):
            if given.kind == kind:
                said = {field.name: getattr(given, field.name) for field in fields(given)}
                full = replace(full, **{name: value for name, value in said.items() if value not in (None, ())})
        if kind == "clip" and full.activation is None:
            full = replace(full, activation="gelu" if self.exact else "quick_gelu")
        return replace(full, out_dim=None) if PRESETS[self.preset].llava else full

    @property
    def place(self) -> Place:
        """Where an image stands whose text says it nowhere: before <s>, after it, or where <image> must say it."""
        return PRESETS[self.preset].place

    @property
    def views(self) -> int:
        """Squares of an image that the encoders see: the whole; or that, and its quarters from the top left."""
        return PRESETS[self.preset].views

    @property
    def size(self) -> int:
        """Side of the square that an image comes as, in pixels: quarters of it are as large as encoders see."""
        seen = max(size for kind in self.kinds if (size := self.encoder(kind).size))
        return seen * (2 if self.views > 1 else 1)

    @property
    def words(self) -> int:
        """Places of a sample that one image takes."""
        return self.views * (sum(tokens for tokens, _ in self.groups) + 2 * PRESETS[self.preset].tags)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Of each group of encoders the tokens of one view, and their width."""
        return [(self._tokens(group[0]), sum(map(self._width, group))) for group in PRESETS[self.preset].groups]

    def _tokens(self, kind: EncoderKind) -> int:
        encoder = self.encoder(kind)
        if kind == "qformer":
            assert encoder.tokens
            return encoder.tokens
        assert encoder.size and encoder.patch
        patches = (encoder.size // encoder.patch) ** 2
        return patches if PRESETS[self.preset].llava else patches + 1  # one for all of it

    def _width(self, kind: EncoderKind) -> int:
        encoder = self.encoder(kind)
        assert encoder.dim
        if kind == "convnext":
            return int(encoder.dim * 2 ** (len(encoder.depths) - 1))
        return (encoder.out_dim or encoder.dim) if self.preset == "clip" else encoder.dim


@dataclass(frozen=True)
class Images:
    """The n images of a micro-batch, and where they stand in it; their places hold any valid token.

    Attributes:
        rows: [m] int64: places of the micro-batch that are the images', in the order of what stands there.
        pixels: [n, 3, size, size] uint8, or None where they are encoded already.
        features: of each group of encoders [n, views, tokens, width].
        words: [m] int64: which of the n x words image words stand at ``rows``; None: all, one after the other.
    """

    rows: Tensor
    pixels: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    words: Tensor | None = None

    def to(self, device: torch.device) -> "Images":
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        features = tuple(x.to(device, non_blocking=True) for x in self.features)
        return Images(self.rows.to(device, non_blocking=True), moved(self.pixels), features, moved(self.words))


def no_images(args: VisualArgs, like: Tensor) -> Images:
    """What a micro-batch without an image has."""
    features = tuple(like.new_empty(0, args.views, tokens, width) for tokens, width in args.groups)
    return Images(like.new_empty(0, dtype=torch.int64), features=features)
