"""What brings the encoders' tokens into the decoder: the part of a model's sight that trains."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.visual import PRESETS, Images, VisualArgs


class Connector(nn.Module):
    """The words of images, written over the places of a micro-batch that are theirs; whole on every rank.

    Its modules have LLaMA2-Accessory's names; of llava, transformers'.
    """

    start_img: nn.Parameter
    end_img: nn.Parameter

    def __init__(self, args: VisualArgs, dim: int):
        super().__init__()
        self.args, self.preset = args, PRESETS[args.preset]
        for name, (_, width) in zip(self.preset.names, args.groups, strict=True):
            linear, norm = nn.Linear(width, dim), nn.LayerNorm(dim)
            if args.preset == "clip":
                self.add_module(name, linear)
                self.add_module(f"{name}_norm", norm)
            elif self.preset.llava:
                self.add_module(name, TwoLayers(linear, nn.Linear(dim, dim)))
            else:
                self.add_module(name, nn.Sequential(linear, norm))
        if self.preset.tags:
            self.start_img, self.end_img = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))

    def forward(self, x: Tensor, images: Images) -> Tensor:
        """``x`` [T, D] -> [T, D]."""
        words = [
            self._projected(name, features.to(x.dtype))
            for name, features in zip(self.preset.names, images.features, strict=True)
        ]
        if self.preset.tags:
            n, views = words[0].shape[:2]
            start, end = (tag.to(x.dtype).expand(n, views, 1, -1) for tag in (self.start_img, self.end_img))
            words = [start, *words, end]
        flat = torch.cat(words, 2).flatten(0, 2)
        return x.index_copy(0, images.rows, flat if images.words is None else flat[images.words])

    def _projected(self, name: str, features: Tensor) -> Tensor:
        """[n, views, tokens, width] -> [n, views, tokens, D]."""
        projected: Tensor = self.get_submodule(name)(features)
        return self.get_submodule(f"{name}_norm")(projected) if self.args.preset == "clip" else projected


class TwoLayers(nn.Module):
    """LLaVA's projector."""

    def __init__(self, linear_1: nn.Linear, linear_2: nn.Linear):
        super().__init__()
        self.linear_1, self.linear_2 = linear_1, linear_2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return y
