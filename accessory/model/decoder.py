"""The decoder: embedding, blocks of attention and MoE, norm, output."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.dtypes import at_least_fp32
from accessory.model.args import ModelArgs
from accessory.model.attention import Attention, KVCache
from accessory.model.documents import Documents
from accessory.model.logical import Adapters
from accessory.model.moe import MoE
from accessory.model.moe.experts import GroupedExperts
from accessory.model.moe.layouts import Layout
from accessory.model.moe.router import RouterStats
from accessory.model.norm import RMSNorm
from accessory.model.rope import rotations
from accessory.parallel.adapter import Adaptable, Adapter, draws
from accessory.parallel.cross_entropy import linear_cross_entropy
from accessory.parallel.tensor import (
    ColumnParallelLinear,
    ParallelEmbedding,
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
)


class Targets(NamedTuple):
    """Where a target stands in a batch: the hidden state of row ``rows[i]`` of [B * S] must predict ``ids[i]``."""

    rows: Tensor  # [n] int64
    ids: Tensor  # [n] int64


class Block(nn.Module):
    """Pre-norm transformer block; the names are those of the reference's checkpoints."""

    def __init__(self, args: ModelArgs, layout: Layout, kernel: str):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = MoE(args, layout, kernel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        documents: Documents,
        cache: KVCache | None,
        positions: Tensor | None,
        draw: Tensor | None,
    ) -> tuple[Tensor, RouterStats]:
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache, positions, draw)
        y, stats = self.feed_forward(self.ffn_norm(x), documents, draw)
        return x + y, stats


class Decoder(nn.Module):
    """A Mixtral-class language model, cut over the model-parallel group as ``layout`` says.

    ``recompute`` drops the activations inside each block and computes them again in backward.

    Attributes:
        adapters: by the logical name of their matrix; ``adapt`` puts them there.
    """

    def __init__(self, args: ModelArgs, layout: Layout, kernel: str = "auto", recompute: bool = False):
        super().__init__()
        self.args, self.layout, self.recompute = args, layout, recompute
        self.adapters: dict[str, Adapter] = {}
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layout, kernel) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size)

    def adapt(self, adapters: Adapters) -> None:
        """Put an adapter on each matrix named; its parameters are made empty, like the others."""
        self.adapters |= adapters
        for name, adapter in adapters.items():
            owner, matrix = name.rsplit(".", 1)
            layer = self.get_submodule(owner)
            assert isinstance(layer, Adaptable | GroupedExperts)
            layer.adapt(matrix, adapter)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers: the model's logical tensors, as this rank holds them."""
        yield from self.named_parameters()
        yield from self.named_buffers()

    def forward(
        self,
        tokens: Tensor,
        documents: Documents,
        targets: Targets | None = None,
        rows: Tensor | None = None,
        caches: list[KVCache] | None = None,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats]:
        """Run the model over rows of documents.

        Args:
            tokens: [B, S] token ids; padding is ignored.
            documents: where they lie; the results of each are those it would have alone.
            targets: if given, the result is the sum of cross-entropy over them; else it is logits,
            rows: of these rows of [B * S] only, if given.
            caches: one per layer, for generation; ``positions`` [B, S] then says where each token stands.
            keys: [documents] a number for each, of which its adapters' dropout is made; None: nothing is dropped.

        Returns:
            The loss sum (a scalar), or logits [B, S, V] or [rows, V], in at least fp32; and the router statistics, with a
            first dimension of L layers.
        """
        x = self.tok_embeddings(tokens)
        where = documents.positions if positions is None else positions
        rotation = rotations(where, self.args.head_dim, self.args.rope_theta, self.args.rope_scaling, x.dtype)
        drops = any(adapter.dropout for adapter in self.adapters.values())
        draw = None
        if drops and keys is not None:
            draw = draws(F.pad(keys, (1, 0))[documents.number], documents.positions)
        stats = []
        for number, layer in enumerate(self.layers):
            inputs = (x, rotation, documents, caches[number] if caches else None, positions, draw)
            if self.recompute and torch.is_grad_enabled():
                x, layer_stats = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, layer_stats = layer(*inputs)
            stats.append(layer_stats)
        router = RouterStats.stacked(stats)
        if targets is not None:
            rows = targets.rows
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
            draw = None if draw is None else draw.flatten()[rows]
        hidden = copy_to_model_parallel_region(self.norm(x))
        if targets is not None:
            low = self.output.low_rank(hidden, draw)
            factors = [(hidden, self.output.weight)] + ([] if low is None else [(low, self.output.lora_b)])
            return linear_cross_entropy(factors, targets.ids), router
        return at_least_fp32(gather_from_model_parallel_region(self.output(hidden, draw))), router
