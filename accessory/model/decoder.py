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
    """The input of a forward pass: a micro-batch of documents.

    Attributes:
        tokens: [T] ids.
        documents: where each document lies among them. Each gets the results that it would get alone.
        cache: keys and values of the documents' earlier tokens, to which those of ``tokens`` are added.
        dropout_keys: [documents] seeds of the adapters' dropout; None: no dropout.
        members: [documents] which of several adapters each uses (see ``LogicalModel.member``); None: none uses one.
        images: a visual model's encoded images; None: there are none.
    """

    tokens: Tensor
    documents: Documents
    cache: CacheView | None = None
    dropout_keys: Tensor | None = None
    members: Tensor | None = None
    images: Images | None = None


class Block(nn.Module):
    """Pre-norm transformer block. Its modules are named as in LLaMA2-Accessory's checkpoints."""

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
        """``x`` [T, D] -> the output [T, D] and the routing. The other arguments are those of ``Attention``."""
        singles = cache.of_singles if self.few_rows and cache is not None and len(x) <= FEW else None
        if self.few_rows and singles and not any(map(adapters.reach, self.adapters)):
            x, routing = few_rows_block(self.few_rows, x, rotation, *singles)
            return x, Routing(*routing)
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache, adapters)
        y, routing = self.feed_forward(self.ffn_norm(x), adapters)
        return x + y, routing

    def pack(self, dtype: torch.dtype) -> None:
        """For inference, after the matrices are packed: let few_rows.c run the whole block where it can."""
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

    Attributes:
        logical: the model's tensors and adapters. cuts: how each tensor is cut over model-parallel ranks.
        holdings: what this rank holds of each tensor; set by ``build_model`` once the model is sharded.
        recompute: what each block recomputes in backward.
        vision: a visual model's encoders, pixels -> features. They never train, so they are not part of the module.
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
        """The tensors of offloaded experts, in host memory or on disk."""
        for name, layer in self.layers.named_modules():
            if isinstance(layer, GroupedExperts) and layer.offloaded:
                yield from ((f"layers.{name}.{part}", tensor) for part, tensor in layer.offloaded.tensors().items())

    @property
    def sight(self) -> VisualArgs | None:
        """How the model sees images; None: it reads text only, or was loaded without encoders."""
        return self.args.visual if self.vision else None

    @property
    def offloaded(self) -> list[OffloadedExperts]:
        """Each layer's offloaded experts; empty: all experts are on the device."""
        found = (module.offloaded for module in self.modules() if isinstance(module, GroupedExperts))
        return [experts for experts in found if experts]

    def pack(self) -> None:
        """For inference on a CPU: lay the matrices out for fast products, where there are such products in their dtype.

        A packed model can no longer be trained, saved or filled.
        """
        if can_pack(self.norm.weight.dtype, self.norm.weight.device):
            packs = ColumnParallelLinear | RowParallelLinear | Router | GroupedExperts | Attention | RMSNorm | Block
            for module in reversed(list(self.modules())):  # a block behind its matrices
                if isinstance(module, packs):
                    module.pack(self.norm.weight.dtype)

    def make_cache(self, pages: int, page_size: int) -> PagedCache:
        """A cache for this rank's keys and values of ``pages`` x ``page_size`` tokens."""
        args = self.args
        kv_heads = max(1, args.n_kv_heads // self.mesh.mp.size)
        return PagedCache(
            args.n_layers, pages + 1, page_size, kv_heads, args.head_dim, args.sliding_window, like=self.norm.weight
        )

    def forward(self, inputs: Inputs, head: Head) -> tuple[Tensor, RouterStats]:
        """The result of ``head``, and the router statistics."""
        documents, cache = inputs.documents, inputs.cache
        adapters = self._token_adapters(inputs)
        x = self.tok_embeddings(inputs.tokens, adapters)
        args, images = self.args, inputs.images
        if self.connector is not None and args.visual:
            # also without images: a rank that has none must still take part in the connector's collectives
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
        """What adapters need to know of each token, from its document's entry in the inputs."""

        def of_tokens(numbers: Tensor) -> Tensor:
            return F.pad(numbers, (1, 0))[inputs.documents.document_of]

        dropout_draw, member = None, None
        if inputs.dropout_keys is not None and any(adapter.dropout for adapter in self.logical.adapters.values()):
            dropout_draw = dropout_draws(of_tokens(inputs.dropout_keys), inputs.documents.positions)
        if inputs.members is not None:
            member = of_tokens(inputs.members)
        return TokenAdapters(dropout_draw, member)
