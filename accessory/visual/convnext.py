"""ConvNeXt (Liu et al. 2022), as in the trunk of open_clip's convnext_xxlarge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.visual import EncoderArgs

EPS = 1e-5


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [n, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """A depthwise 7 x 7 convolution, and an MLP over the channels of each cell."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](y)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class ConvStage(nn.Module):
    """Downsampling to half the side, then blocks of one width."""

    def __init__(self, before: int, dim: int, depth: int):
        super().__init__()
        first = before == dim
        self.downsample = nn.Identity() if first else nn.Sequential(ChannelNorm(before, EPS), nn.Conv2d(before, dim, 2, 2))
        self.blocks = nn.Sequential(*(ConvBlock(dim) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.downsample(x))
        return y


class ConvNeXt(nn.Module):
    """[n, 3, size, size] -> [n, 1 + cells, C]: the mean over cells of 32 x 32 pixels, then each of them row by row.

    The head's norm is applied to each cell, as in the reference.
    """

    def __init__(self, args: EncoderArgs):
        super().__init__()
        assert args.dim
        widths = [args.dim * 2**stage for stage in range(len(args.depths))]
        self.stem = nn.Sequential(nn.Conv2d(3, args.dim, 4, 4), ChannelNorm(args.dim, EPS))
        befores = [args.dim, *widths[:-1]]
        self.stages = nn.Sequential(*(ConvStage(*sizes) for sizes in zip(befores, widths, args.depths, strict=True)))
        self.head = nn.ModuleDict({"norm": ChannelNorm(widths[-1], EPS)})

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.head["norm"](self.stages(self.stem(pixels))).flatten(2).mT
        return torch.cat([cells.mean(1, keepdim=True), cells], 1)

    def reference_name(self, own: str) -> str:
        """A parameter's name in LLaMA2-Accessory's checkpoints."""
        return f"openclip_convnext_xxl.{own}"
