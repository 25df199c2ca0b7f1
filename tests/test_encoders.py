"""Each encoder against transformers with the same weights; what goes into them, and in which order their tokens come."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import run_ranks
from seeing import ENCODERS, seeing, visual

from accessory.checkpoint.encoders import in_transformers as tower_tiles
from accessory.model.connector import Connector
from accessory.model.logical import region_shape, whole_region
from accessory.model.visual import Images, VisualArgs
from accessory.parallel.mesh import Axis, make_mesh
from accessory.visual.views import CLIP_MEAN, CLIP_STD
from accessory.visual.vision import Vision, make_vision, vision_shapes

CPU = torch.device("cpu")
ENCODERS_BUT_CLIP = [sizes for sizes in visual("ens").encoders if sizes.kind != "clip"]
PREFIXES = {
    "clip": "clip.visual.",
    "dinov2": "dinov2_vitg14.",
    "eva": "qformer.vision_model.",
    "qformer": "qformer.",
    "convnext": "openclip_convnext_xxl.",
}


class Weights:
    """Of all encoders, under the reference's names, no two values alike."""

    def __init__(self, args):
        generator = torch.Generator().manual_seed(1)
        shapes = vision_shapes(args)
        self.tensors = {name: torch.randn(shapes[name], generator=generator) * 0.3 for name in sorted(shapes)}

    def read(self, name, region):
        return self.tensors[name][region]

    def of(self, kind):
        """An encoder's, without its prefix."""
        prefix, nested = PREFIXES[kind], PREFIXES["eva"] if kind == "qformer" else "nothing"
        found = {n: t.clone() for n, t in self.tensors.items() if n.startswith(prefix) and not n.startswith(nested)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def encoder(args, kind, source=None):
    return make_vision(args, source or Weights(args), Axis(), torch.float32, CPU).encoders[kind]


def squares(size):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def in_transformers(model, found, names, stacked=()):
    """``model`` with the tensors ``found``; ``stacked``: (ending, the matrices that stand one above the other there)."""
    for name in list(found):
        for ending, parts in stacked:
            stem, _, part = name.rpartition(ending)
            if stem and part in ("weight", "bias"):
                cut = found.pop(name).chunk(len(parts))
                found |= {f"{stem}{one}.{part}": tensor for one, tensor in zip(parts, cut, strict=True)}
    result = {}
    for name, tensor in found.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        result[name] = tensor
    model.load_state_dict(result, strict=True)
    return model.eval()


class Theirs:
    """The weights of a vision tower of transformers, as its checkpoints are read."""

    def __init__(self, model, args, **others):
        state = {**model.state_dict(), **others}
        assert set(state) - {tile.key for tile in tower_tiles(args)} <= {name for name in state if name.startswith("head.")}
        self.tensors = {name: torch.full(shape, torch.nan) for name, shape in vision_shapes(args).items()}
        for tile in tower_tiles(args):
            self.tensors[tile.name][tile.region] = tile.read(state[tile.key], whole_region(region_shape(tile.region)))

    def read(self, name, region):
        return self.tensors[name][region]


def tower(model_class, sizes, **options):
    """A vision tower of transformers with random weights."""
    model = model_class(
        model_class.config_class(
            hidden_size=sizes.dim,
            intermediate_size=sizes.hidden_dim,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            image_size=sizes.size,
            patch_size=sizes.patch,
            **options,
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def check(ours, theirs, bound=1e-6):
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error <= bound, f"{error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("exact", [None, "reference"])
def test_clip_is_that_of_transformers_with_the_last_norm(exact):
    args, x = visual("clip", exact=exact), squares(28)
    sizes = args.encoder("clip")
    assert sizes.activation == ("gelu" if exact else "quick_gelu")
    model, proj = tower(transformers.CLIPVisionModel, sizes, hidden_act=sizes.activation), Weights(args).of("clip")["proj"]
    last = model.post_layernorm(model(x).last_hidden_state)
    ours = encoder(args, "clip", Theirs(model, args, proj=proj))
    check(ours(x), last)
    check(ours.projected(ours(x)), last @ proj)


@torch.no_grad()
def test_llava_takes_what_goes_into_the_last_block():
    args, x = visual("llava"), squares(28)
    model = tower(transformers.CLIPVisionModel, args.encoder("clip"), hidden_act="quick_gelu")
    theirs = model(x, output_hidden_states=True).hidden_states[-2]
    check(encoder(args, "clip", Theirs(model, args))(x), theirs)


@torch.no_grad()
def test_siglip_is_that_of_transformers_without_its_head():
    """Of images in whose rows and columns patches leave a rest; colours are normalised as it has learnt them."""
    args = visual("llava_siglip")
    model = tower(transformers.SiglipVisionModel, args.encoder("siglip"))
    for parameter in model.embeddings.parameters():
        parameter.data *= 1e-3  # so that the eps of the first norm shows
    vision = make_vision(args, Theirs(model, args), Axis(), torch.float32, CPU)
    ours, pixels = vision.encoders["siglip"], torch.arange(3 * 30 * 30).view(1, 3, 30, 30) % 251
    x = (pixels / 255 - 0.5) / 0.5
    theirs = model(x, output_hidden_states=True)
    assert theirs.hidden_states[-2].shape == (1, args.words, 16) and args.words == 4
    (features,) = vision(Images(torch.zeros(0, dtype=torch.int64), pixels.to(torch.uint8))).features
    check(features[:, 0], theirs.hidden_states[-2], 2e-6)  # normalised for CLIP, and then for it
    check(ours(x), theirs.hidden_states[-2])
    ours.before_last = False
    check(ours(x), theirs.last_hidden_state)


@torch.no_grad()
def test_dinov2_is_that_of_transformers_at_its_own_size():
    sizes = replace(ENCODERS["dinov2"], positions=2)
    args = VisualArgs("ens", (sizes, *(one for one in visual("ens").encoders if one.kind != "dinov2")))
    config = transformers.Dinov2Config(
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        use_swiglu_ffn=True,
        mlp_ratio=1,
        layer_norm_eps=1e-6,
    )
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.o_proj",
        "attn.": "attention.",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "w3": "down_proj",
    }
    found, x = Weights(args).of("dinov2"), squares(28)
    found = {f"layer{name}" if name.startswith("norm.") else name: tensor for name, tensor in found.items()}
    stacked = [("qkv.", ["q_proj", "k_proj", "v_proj"]), ("w12.", ["gate_proj", "up_proj"])]
    model = in_transformers(
        transformers.Dinov2Model(config), found | {"embeddings.mask_token": torch.zeros(1, 20)}, names, stacked
    )
    check(encoder(args, "dinov2")(x), model(x).last_hidden_state)


@torch.no_grad()
def test_dinov2_stretches_its_table_as_its_own_code_does():
    args = visual("ens")
    model, side, cells = encoder(args, "dinov2"), 2, 3
    table = Weights(args).of("dinov2")["pos_embed"][0].double().numpy()
    grid, scale = table[1:].reshape(cells, cells, -1), (side + 0.1) / cells

    def weights(place):  # Keys' cubic, a = -0.75
        def weight(t):
            t, a = abs(t), -0.75
            if t <= 1:
                return (a + 2) * t**3 - (a + 3) * t**2 + 1
            return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

        at = (place + 0.5) / scale - 0.5
        result = np.zeros(cells)
        for near in range(math.floor(at) - 1, math.floor(at) + 3):
            result[min(max(near, 0), cells - 1)] += weight(at - near)
        return result

    mix = np.stack([weights(place) for place in range(side)])
    expected = np.einsum("yr,xc,rcd->yxd", mix, mix, grid).reshape(side * side, -1)
    check(model._positions(side), torch.from_numpy(np.concatenate([table[:1], expected])).float())


@torch.no_grad()
def test_eva_and_the_q_former_are_those_of_transformers():
    args, x = visual("qformer"), squares(28)
    eva, sizes = ENCODERS["eva"], ENCODERS["qformer"]
    vision = transformers.Blip2VisionConfig(
        hidden_size=eva.dim,
        intermediate_size=eva.hidden_dim,
        num_hidden_layers=eva.layers,
        num_attention_heads=eva.heads,
        image_size=28,
        patch_size=14,
    )
    model = in_transformers(transformers.Blip2VisionModel(vision), Weights(args).of("eva"), {})
    image = model(x).last_hidden_state
    check(encoder(args, "eva")(x), image)
    config = transformers.Blip2QFormerConfig(
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        encoder_hidden_size=eva.dim,
    )
    found = Weights(args).of("qformer")
    queries = found.pop("query_tokens").expand(3, -1, -1)
    found = {name.removeprefix("qformer."): tensor for name, tensor in found.items()}
    former = in_transformers(transformers.Blip2QFormerModel(config), found, {})
    theirs = former(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    check(encoder(args, "qformer")(image), theirs, 2e-6)


@torch.no_grad()
def test_convnext_is_that_of_transformers_with_its_head_norm_on_every_cell():
    args, x = visual("ens"), squares(64)
    config = transformers.ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1])
    names = {
        "stem.0": "embeddings.patch_embeddings",
        "stem.1": "embeddings.layernorm",
        "stages.": "encoder.stages.",
        ".blocks.": ".layers.",
        "conv_dw": "dwconv",
        ".norm.": ".layernorm.",
        "mlp.fc": "pwconv",
        "gamma": "layer_scale_parameter",
        "downsample": "downsampling_layer",
    }
    found = Weights(args).of("convnext")
    norm = [found.pop(f"head.norm.{part}") for part in ("weight", "bias")]
    found |= {"layernorm.weight": torch.ones(32), "layernorm.bias": torch.zeros(32)}
    model = in_transformers(transformers.ConvNextModel(config), found, names)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5  # timm's
    cells = F.layer_norm(model(x).last_hidden_state.permute(0, 2, 3, 1), (32,), *norm, eps=1e-5).flatten(1, 2)
    check(encoder(args, "convnext")(x), torch.cat([cells.mean(1, keepdim=True), cells], 1))


class Stub(torch.nn.Module):
    """Tells in five channels of each token: which encoder made it, its place, and the image's grey at two places."""

    def __init__(self, kind, tokens, width):
        super().__init__()
        self.kind, self.tokens, self.width = kind, tokens, width
        self.like = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        if x.dim() == 4:  # of a Q-Former, what its ViT told
            near, far = (x[:, :, place, place] for place in (x.shape[-1] // 4, 3 * x.shape[-1] // 4))
            mean, std = IMAGENET if self.kind == "dinov2" else (CLIP_MEAN, CLIP_STD)
            greys = [(at * torch.tensor(std) + torch.tensor(mean)).mean(1) * 255 for at in (near, far)]
        else:
            greys = [x[:, 0, 3], x[:, 0, 4]]
        told = x.new_zeros(len(x), self.tokens, self.width)
        told[..., 0], told[..., 1] = KINDS.index(self.kind), torch.arange(self.tokens)
        told[..., 3], told[..., 4] = (grey[:, None] for grey in greys)
        return told


KINDS = ["eva", "qformer", "clip", "convnext", "dinov2"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREYS = torch.arange(12).view(3, 2, 2) * 20
"""Of the quarters of three images."""


def told_by_stubs(preset, mp):
    """What the connector is given of three images."""
    args = visual(preset)
    with torch.device("meta"):
        vision = Vision(args, make_mesh(mp).mp if mp > 1 else Axis())
    widths = {"clip": 16, "dinov2": 20, "convnext": 32, "qformer": 10, "eva": 12}
    for kind in args.kinds:
        vision.encoders[kind] = Stub(kind, 3 if kind == "qformer" else 5, widths[kind])
    pixels = GREYS.to(torch.uint8).repeat_interleave(args.size // 2, 1).repeat_interleave(args.size // 2, 2)
    vision._encoder = vision.encoders.get_submodule
    return vision(Images(torch.arange(3 * args.words), pixels.unsqueeze(1).expand(-1, 3, -1, -1))).features


@pytest.mark.parametrize(("preset", "mp"), [("ens", 1), ("ens5", 1), ("ens5", 2)])
def test_tokens_come_in_the_references_order(preset, mp):
    (features, *others) = run_ranks(mp, told_by_stubs, preset, mp) if mp > 1 else [told_by_stubs(preset, 1)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(features, other, strict=True))
    args = seeing(preset)
    views = args.visual.views
    corners = [[(0, 0), (1, 1)]] + [[(r, c)] * 2 for r in (0, 1) for c in (0, 1)]
    expected = []
    for image in range(3):
        for near, far in corners[:views]:
            tokens = [(1, place) for place in range(3)] + [(2, place) for place in range(5)]
            greys = (GREYS[image][near].item(), GREYS[image][far].item())
            expected += [("start",), *((kind, place, *greys) for kind, place in tokens), ("end",)]

    connector = Connector(args.visual, args.dim).double()
    connector.qformer_proj = connector.visual_proj = FirstChannels(args.dim)
    with torch.no_grad():
        connector.start_img.fill_(-1), connector.end_img.fill_(-2)
    words = 3 * args.visual.words
    out = connector(torch.zeros(words, args.dim, dtype=torch.float64), Images(torch.arange(words), features=features))
    ends = {-1: ("start",), -2: ("end",)}
    found = [ends.get(row[0]) or (row[0], row[1], *row[3:5]) for row in out[:, :5].round().int().tolist()]
    assert found == expected
    kinds = [features[1][..., first].unique().tolist() for first in (0, 16, 48)]
    assert kinds == [[2], [3], [4]]  # clip, convnext and dinov2 side by side
    for first in (0, 16, 48):
        assert torch.allclose(features[1][..., first + 1 : first + 5], features[1][..., 1:5], atol=1e-4)


class FirstChannels(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return F.pad(x[..., :10], (0, self.dim - 10))


@torch.no_grad()
def test_an_image_alone_is_what_it_is_among_others_and_none_is_none():
    args = visual("ens5", exact="reference")
    vision = make_vision(args, Weights(args), Axis(), torch.float64, CPU)
    pixels = torch.randint(0, 256, (5, 3, args.size, args.size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    together = vision(Images(torch.arange(5), pixels)).features
    alone = vision(Images(torch.arange(1), pixels[3:4])).features
    for many, one, (tokens, width) in zip(together, alone, args.groups, strict=True):
        assert many.shape == (5, 5, tokens, width)
        check(many[3:4], one, 1e-12)
    nothing = vision(Images(torch.arange(0), pixels[:0])).features
    assert [one.shape for one in nothing] == [(0, 5, tokens, width) for tokens, width in args.groups]


@torch.no_grad()
def test_the_references_rounding_is_there_if_asked_for():
    """To fp16, before and after images are resized; it shows, and is small."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = []
    for exact in (None, "reference"):
        args = replace(
            visual("ens", exact=exact), encoders=(*ENCODERS_BUT_CLIP, replace(ENCODERS["clip"], activation="gelu"))
        )
        vision = make_vision(args, Weights(args), Axis(), torch.float64, CPU)
        found.append(torch.cat([group.flatten() for group in vision(Images(torch.arange(0), pixels)).features]))
    difference = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert 1e-6 < difference < 1e-2
