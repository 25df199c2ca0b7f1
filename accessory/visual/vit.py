"""One vision transformer for CLIP, DINOv2, BLIP-2's EVA and SigLIP; ``STYLES`` holds the differences.

LLaMA2-Accessory takes each of them from another library, so their names in its checkpoints differ. Here they are one module,
and ``reference_name`` gives those names. LLaMA2-Accessory has no SigLIP; its names here are like transformers'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dtypes import at_least_fp32
from accessory.model.visual import EncoderArgs


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "swiglu": _swiglu,
}


@dataclass(frozen=True)
class Style:
    """The options of one kind of ViT, and the reference's names of its parts.

    Attributes:
        eps: of its norms. bordered: its class token and position table have leading dimensions of 1.
        classed: whether it has a class token, before the patches.
        patch_bias, pre_norm, scaled: whether it has a bias of patches, a norm before the first block, and LayerScale.
        names: own name -> reference's name; parts of a block also get ``block`` and its number in front.
    """

    eps: float
    prefix: str
    block: str
    names: dict[str, str]
    bordered: bool = True
    classed: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    scaled: bool = False
    activation: str = "gelu"


STYLES = {
    "clip": Style(
        1e-5,
        "clip.visual.",
        "transformer.resblocks.",
        {
            "cls": "class_embedding",
            "positions": "positional_embedding",
            "patches": "conv1",
            "pre_norm": "ln_pre",
            "post_norm": "ln_post",
            "proj": "proj",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "qkv.weight": "attn.in_proj_weight",
            "qkv.bias": "attn.in_proj_bias",
            "out": "attn.out_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        bordered=False,
        patch_bias=False,
        pre_norm=True,
    ),
    "dinov2": Style(
        1e-6,
        "dinov2_vitg14.",
        "blocks.",
        {
            "cls": "cls_token",
            "positions": "pos_embed",
            "patches": "patch_embed.proj",
            "post_norm": "norm",
            "norm1": "norm1",
            "norm2": "norm2",
            "qkv": "attn.qkv",
            "out": "attn.proj",
            "scale1": "ls1.gamma",
            "scale2": "ls2.gamma",
            "up": "mlp.w12",
            "down": "mlp.w3",
        },
        scaled=True,
        activation="swiglu",
    ),
    "eva": Style(
        1e-6,
        "qformer.vision_model.",
        "encoder.layers.",
        {
            "cls": "embeddings.class_embedding",
            "positions": "embeddings.position_embedding",
            "patches": "embeddings.patch_embedding",
            "post_norm": "post_layernorm",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "qkv": "self_attn.qkv",
            "out": "self_attn.projection",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
    ),
    "siglip": Style(
        1e-6,
        "siglip.",
        "encoder.layers.",
        {
            "positions": "embeddings.position_embedding.weight",
            "patches": "embeddings.patch_embedding",
            "post_norm": "post_layernorm",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "qkv.weight": "self_attn.in_proj_weight",
            "qkv.bias": "self_attn.in_proj_bias",
            "out": "self_attn.out_proj",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        bordered=False,
        classed=False,
        activation="gelu_tanh",
    ),
}


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP."""

    scale1: Tensor | None
    scale2: Tensor | None

    def __init__(self, args: EncoderArgs, style: Style, dim: int, heads: int, hidden_dim: int):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[args.activation or style.activation]
        self.norm1, self.norm2 = nn.LayerNorm(dim, style.eps), nn.LayerNorm(dim, style.eps)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        gated = self.activation is _swiglu
        self.up, self.down = nn.Linear(dim, hidden_dim * (2 if gated else 1)), nn.Linear(hidden_dim, dim)
        for scale in ("scale1", "scale2"):
            self.register_parameter(scale, nn.Parameter(torch.ones(dim)) if style.scaled else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self._scaled(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), self.scale1)
        return x + self._scaled(self.down(self.activation(self.up(self.norm2(x)))), self.scale2)

    def _scaled(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        return branch if scale is None else branch * scale


class ViT(nn.Module):
    """[n, 3, size, size] -> [n, 1 + patches, dim]: the class token (SigLIP has none), then patches row by row, after the
    last norm.

    Args:
        before_last: return the input of the last block instead, without the norm (for LLaVA).
    """

    cls: Tensor | None
    proj: Tensor | None

    def __init__(self, args: EncoderArgs, before_last: bool = False):
        super().__init__()
        assert args.size and args.patch and args.dim and args.layers and args.heads and args.hidden_dim
        style, dim = STYLES[args.kind], args.dim
        self.style, self.before_last = style, before_last
        one = (1, 1) if style.bordered else ()
        cells = args.positions or args.size // args.patch
        self.register_parameter("cls", nn.Parameter(torch.empty(*one, dim)) if style.classed else None)
        self.positions = nn.Parameter(torch.empty(*one[:1], cells**2 + style.classed, dim))
        self.patches = nn.Conv2d(3, dim, args.patch, args.patch, bias=style.patch_bias)
        self.pre_norm = nn.LayerNorm(dim, style.eps) if style.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(args, style, dim, args.heads, args.hidden_dim) for _ in range(args.layers))
        self.post_norm = nn.LayerNorm(dim, style.eps)
        self.register_parameter("proj", nn.Parameter(torch.empty(dim, args.out_dim)) if args.out_dim else None)

    def forward(self, pixels: Tensor) -> Tensor:
        y = self.patches(pixels)
        side, y = y.shape[-1], y.flatten(2).mT
        if self.cls is not None:
            y = torch.cat([self.cls.expand(len(y), 1, -1), y], 1)
        y = self.pre_norm(y + self._positions(side))
        for block in self.blocks[:-1] if self.before_last else self.blocks:
            y = block(y)
        return y if self.before_last else self.post_norm(y)

    def projected(self, tokens: Tensor) -> Tensor:
        """Tokens after CLIP's projection into the space shared with texts, if there is one."""
        return tokens if self.proj is None else tokens @ self.proj

    def _positions(self, side: int) -> Tensor:
        """[1 + side x side, dim]: the table, interpolated as in DINOv2's own code, with its offset of 0.1."""
        table = self.positions.flatten(0, -2)
        cells = math.isqrt(len(table) - self.style.classed)
        if cells == side:
            return table
        grid = at_least_fp32(table[1:]).T.unflatten(1, (cells, cells)).unsqueeze(0)
        factor = (side + 0.1) / cells
        stretched = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([table[:1], stretched.flatten(2)[0].T.to(table.dtype)])

    def reference_name(self, own: str) -> str:
        """A parameter's name in LLaMA2-Accessory's checkpoints."""
        names, style = self.style.names, self.style
        before = ""
        if own.startswith("blocks."):
            _, number, own = own.split(".", 2)
            before = f"{style.block}{number}."
        part, _, rest = own.partition(".")
        return style.prefix + before + (names.get(own) or ".".join(filter(None, (names[part], rest))))
