"""BLIP-2's Q-Former (Li et al. 2023): learnt queries with cross-attention to an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.visual import EncoderArgs

EPS = 1e-12
CROSS_EVERY = 2  # every second layer has cross-attention to the image


class QueryAttention(nn.Module):
    """Post-norm attention of queries to ``seen``."""

    def __init__(self, dim: int, heads: int, seen: int):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {"query": nn.Linear(dim, dim), "key": nn.Linear(seen, dim), "value": nn.Linear(seen, dim)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": nn.LayerNorm(dim, EPS)})

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            self.attention[name](of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, of in (("query", x), ("key", seen), ("value", seen))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z: Tensor = self.output["LayerNorm"](self.output["dense"](y) + x)
        return z


class QueryLayer(nn.Module):
    """Self-attention of the queries, in some layers cross-attention to the image, and an MLP."""

    def __init__(self, dim: int, heads: int, hidden_dim: int, seen: int | None):
        super().__init__()
        self.attention = QueryAttention(dim, heads, dim)
        self.crossattention = QueryAttention(dim, heads, seen) if seen else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(dim, hidden_dim)})
        self.output_query = nn.ModuleDict({"dense": nn.Linear(hidden_dim, dim), "LayerNorm": nn.LayerNorm(dim, EPS)})

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image)
        y = self.output_query["dense"](F.gelu(self.intermediate_query["dense"](x)))
        z: Tensor = self.output_query["LayerNorm"](y + x)
        return z


class QFormer(nn.Module):
    """[n, patches, seen] from the ViT -> [n, tokens, dim]."""

    def __init__(self, args: EncoderArgs, seen: int):
        super().__init__()
        assert args.dim and args.tokens and args.layers and args.heads and args.hidden_dim
        self.query_tokens = nn.Parameter(torch.empty(1, args.tokens, args.dim))
        layers = [
            QueryLayer(args.dim, args.heads, args.hidden_dim, None if n % CROSS_EVERY else seen) for n in range(args.layers)
        ]
        encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.qformer = nn.ModuleDict({"layernorm": nn.LayerNorm(args.dim, EPS), "encoder": encoder})

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.qformer["layernorm"](self.query_tokens.expand(len(image), -1, -1))
        for layer in self.qformer.get_submodule("encoder.layer").children():
            x = layer(x, image)
        return x

    def reference_name(self, own: str) -> str:
        """A parameter's name in LLaMA2-Accessory's checkpoints."""
        return f"qformer.{own}"
