"""The decoder: embedding, blocks of attention and MoE, norm, output."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.adapter import Adaptable, TokenAdapters, dropout_draws
from accessory.model.args import ModelArgs
from accessory.model.attention import Attention
from accessory.model.cache import CacheView, LayerCache, PagedCache
from accessory.model.connector import Connector
from accessory.model.documents import Documents
from accessory.model.few_rows import FEW, BlockWeights, address, few_rows_block, lies_in_panels
from accessory.model.head import Head
from accessory.model.holdings import Holding
from accessory.model.linear import ColumnParallelLinear, ParallelEmbedding, Quantisable, RowParallelLinear
from accessory.model.logical import LogicalModel
from accessory.model.moe import MoE
from accessory.model.moe.experts import GroupedExperts
from accessory.model.moe.layouts import Layout
from accessory.model.moe.offload.experts import OffloadedExperts
from accessory.model.moe.router import Router, RouterStats, Routing, router_stats
from accessory.model.norm import RMSNorm
from accessory.model.packed import can_pack
from accessory.model.recompute import run_block
from accessory.model.rope import rotations
from accessory.model.visual import Images, VisualArgs, no_images
from accessory.parallel.mesh import Axis, Mesh
from accessory.settings import Recompute


@dataclass(frozen=True)
class Inputs:
    """What a decoder runs over.

    Attributes:
        tokens: [T] ids.
        documents: where they lie; the results of each are those it would have alone.
        cache: what their tokens of before left there; these are added to it.
        dropout_keys: [documents] a number for each, of which its adapters' dropout is made; None: nothing is dropped.
        members: [documents] which of several adapters each has (see ``LogicalModel.member``); None: none has one.
        images: what a visual model sees among them, encoded; None: nothing.
    """

    tokens: Tensor
    documents: Documents
    cache: CacheView | None = None
    dropout_keys: Tensor | None = None
    members: Tensor | None = None
    images: Images | None = None


class Block(nn.Module):
    """Pre-norm transformer block; the names are those of the reference's checkpoints."""

    few_rows: BlockWeights | None = None

    def __init__(self, args: ModelArgs, layout: Layout, mp: Axis, kernel: str):
        super().__init__()
        self.mp = mp
        self.attention = Attention(args, mp)
        self.feed_forward = MoE(args, layout, mp, kernel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, rotation: Tensor, documents: Documents, cache: LayerCache | None, adapters: TokenAdapters
    ) -> tuple[Tensor, Routing]:
        """``x`` [T, D] -> [T, D], and which experts made it; the rest is as ``Attention`` takes it."""
        singles = cache.of_singles if self.few_rows and cache is not None and len(x) <= FEW else None
        if self.few_rows and singles and not any(map(adapters.reach, self.adapters)):
            x, routing = few_rows_block(self.few_rows, x, rotation, *singles)
            return x, Routing(*routing)
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache, adapters)
        y, routing = self.feed_forward(self.ffn_norm(x), adapters)
        return x + y, routing

    def pack(self, dtype: torch.dtype) -> None:
        """For a model that no longer trains, whose matrices are packed: few_rows.c may run it whole."""
        attention, gate, experts = self.attention, self.feed_forward.gate, self.feed_forward.experts
        linears = attention.wq, attention.wk, attention.wv, attention.wo
        self.adapters = {*(layer.adapter for layer in (*linears, gate)), *experts.adapters.values()}
        biased = any(adapter.bias for adapter in self.adapters)
        if self.mp.size > 1 or biased or any(layer.codec for layer in linears) or experts.places is None:
            return
        matrices, bias = [layer.weight for layer in (*linears, gate)], gate.score_bias
        if all(lies_in_panels(matrix.shape, matrix.dtype) for matrix in matrices):
            heads, shared = (len(matrix) // attention.head_dim for matrix in matrices[:2])
            self.few_rows = BlockWeights(
                *(norm.weight.data_ptr() for norm in (self.attention_norm, self.ffn_norm)),
                *map(address, matrices),
                None if bias is None else bias.data_ptr(),
                *experts.places,
                self.ffn_norm.eps,
                *(matrices[0].shape[1], heads, shared, attention.head_dim),
                *(experts.num_local, gate.top_k, experts.packed["w1"].shape[1]),
            )


class Decoder(nn.Module):
    """A Mixtral-class language model or classifier, cut over the model-parallel ranks of ``mesh`` as ``layout`` says.

    ``recompute``: what of each block is made again in backward.

    Attributes:
        logical: its tensors and adapters. cuts: what of each tensor a model-parallel rank has.
        holdings: what this rank has of each; ``build_model`` finds out, once the model is sharded.
        vision: makes features of pixels, where the model sees; no part of the module, for nothing of it trains.
    """

    vision: Callable[[Images], Images] | None = None

    def __init__(
        self, logical: LogicalModel, layout: Layout, mesh: Mesh, kernel: str = "auto", recompute: Recompute = "none"
    ):
        super().__init__()
        args, mp = logical.args, mesh.mp
        self.logical, self.args, self.layout, self.mesh, self.recompute = logical, args, layout, mesh, recompute
        self.cuts = logical.cuts(layout)
        self.holdings: dict[str, Holding] = {}
        self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim, mp)
        self.layers = nn.ModuleList(Block(args, layout, mp, kernel) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if args.labels:
            self.score = ColumnParallelLinear(args.dim, len(args.labels), Axis())  # so small that each rank has it whole
        else:
            self.output = ColumnParallelLinear(args.dim, args.vocab_size, mp)
        self.connector = Connector(args.visual, args.dim) if args.visual else None
        for name, adapter in logical.adapters.items():
            owner, matrix = name.rsplit(".", 1)
            layer = self.get_submodule(owner)
            assert isinstance(layer, Adaptable | GroupedExperts)
            layer.adapt(matrix, adapter)
        for name, codec in logical.codecs.items():
            owner, matrix = name.rsplit(".", 1)
            layer = self.get_submodule(owner)
            assert isinstance(layer, Quantisable | GroupedExperts)
            layer.quantise(matrix, codec)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, buffers and what is offloaded: the model's logical tensors, as this rank holds them."""
        yield from self.named_parameters()
        yield from self.named_buffers()
        yield from self.offloaded_tensors()

    def offloaded_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of experts that lie elsewhere than on the device, where they lie."""
        for name, layer in self.layers.named_modules():
            if isinstance(layer, GroupedExperts) and layer.offloaded:
                yield from ((f"layers.{name}.{part}", tensor) for part, tensor in layer.offloaded.tensors().items())

    @property
    def sight(self) -> VisualArgs | None:
        """How it sees; None: it reads text only, or has no encoders."""
        return self.args.visual if self.vision else None

    @property
    def offloaded(self) -> list[OffloadedExperts]:
        """Of each layer; empty: all experts are on the device."""
        found = (module.offloaded for module in self.modules() if isinstance(module, GroupedExperts))
        return [experts for experts in found if experts]

    def pack(self) -> None:
        """For one that is only used, on a CPU: lay its matrices out for fast products, if there are such in its dtype.

        After it, this model can be neither trained nor saved nor filled.
        """
        if can_pack(self.norm.weight.dtype, self.norm.weight.device):
            packs = ColumnParallelLinear | RowParallelLinear | Router | GroupedExperts | Attention | RMSNorm | Block
            for module in reversed(list(self.modules())):  # a block behind its matrices
                if isinstance(module, packs):
                    module.pack(self.norm.weight.dtype)

    def make_cache(self, pages: int, page_size: int) -> PagedCache:
        """Room for the keys and values of ``pages`` x ``page_size`` tokens, as far as they are this rank's."""
        args = self.args
        kv_heads = max(1, args.n_kv_heads // self.mesh.mp.size)
        return PagedCache(
            args.n_layers, pages + 1, page_size, kv_heads, args.head_dim, args.sliding_window, like=self.norm.weight
        )

    def forward(self, inputs: Inputs, head: Head) -> tuple[Tensor, RouterStats]:
        """What ``head`` makes of the inputs, and the router statistics."""
        documents, cache = inputs.documents, inputs.cache
        adapters = self._token_adapters(inputs)
        x = self.tok_embeddings(inputs.tokens, adapters)
        args, images = self.args, inputs.images
        if self.connector is not None and args.visual:
            # without an image it runs on nothing: else a rank that has none would miss the others' collectives
            images = images or no_images(args.visual, x)
            x = self.connector(x, images)
        rotation = rotations(documents.positions, args.head_dim, args.rope_theta, args.rope_scaling, x.dtype)
        routings = []
        for index, layer in enumerate(self.layers):
            arguments = (x, rotation, documents, cache.layer(index) if cache else None, adapters)
            x, routing = run_block(layer, arguments, self.recompute)
            routings.append(routing)
        stats = router_stats(routings, documents, images.rows if images else None)
        return head(x, self.norm, self.score if args.labels else self.output, adapters), stats

    def _token_adapters(self, inputs: Inputs) -> TokenAdapters:
        """Of each token what its document says."""

        def of_tokens(numbers: Tensor) -> Tensor:
            return F.pad(numbers, (1, 0))[inputs.documents.document_of]

        dropout_draw, member = None, None
        if inputs.dropout_keys is not None and any(adapter.dropout for adapter in self.logical.adapters.values()):
            dropout_draw = dropout_draws(of_tokens(inputs.dropout_keys), inputs.documents.positions)
        if inputs.members is not None:
            member = of_tokens(inputs.members)
        return TokenAdapters(dropout_draw, member)
