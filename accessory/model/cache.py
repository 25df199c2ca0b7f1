"""Keys and values of tokens that came before, in pages that any sequence can have."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.dtypes import at_least_fp32
from accessory.model.documents import Documents
from accessory.model.few_rows import Kept, Places


class PagedCache:
    """Of all layers. Page 0 is nobody's, and nobody sees what is in it: where one table of pages is shorter than others, it
    stands in, and what nobody asked for is kept there.

    Attributes:
        keys, values: of each layer [pages, page_size, local kv heads, head_dim].
        window: how many tokens a query sees, its own among them; None: all.
    """

    def __init__(
        self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, window: int | None, like: Tensor
    ):
        """``kv_heads``: this rank's; ``like``: has the dtype and the device."""
        shape = (pages, page_size, kv_heads, head_dim)
        self.page_size, self.window = page_size, window
        self.keys, self.values = (
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)] for _ in range(2)
        )

    @property
    def page_bytes(self) -> int:
        return sum(tensor[0].nbytes for tensor in (*self.keys, *self.values))

    def place(self, pages: Sequence[int], at: int) -> int:
        """Where token number ``at`` of those in a document's ``pages`` goes, counted over all pages."""
        return pages[at // self.page_size] * self.page_size + at % self.page_size

    def at(self, documents: Documents, pages: Sequence[Sequence[int]], begins: Sequence[int] | None = None) -> "CacheView":
        """The cache as the documents of a micro-batch see it.

        Args:
            pages: of each document, in order, enough for its tokens of before and of now.
            begins: how many tokens of each lie before its first page, since no query will see them any more; None: 0.
        """
        past = [all_past - begin for all_past, begin in zip(documents.past, begins or [0] * len(pages), strict=True)]
        spans = list(zip(documents.lengths, past, strict=True))
        places = [
            self.place(own, at)
            for (length, before), own in zip(spans, pages, strict=True)
            for at in range(before, before + length)
        ]
        longest = max(map(len, pages))
        starts = [sum(documents.lengths[:n]) for n in range(len(spans))]
        numbers = functools.partial(torch.tensor, device=documents.positions.device)
        return CacheView(
            self,
            documents,
            places=numbers(places, dtype=torch.int64),
            table=numbers([[*own, *[0] * (longest - len(own))] for own in pages], dtype=torch.int32),
            used=numbers([before + length for length, before in spans], dtype=torch.int32),
            chunks=[Chunk(starts[n], length, n, before) for n, (length, before) in enumerate(spans) if length > 1],
            singles=numbers([n for n, length in enumerate(documents.lengths) if length == 1], dtype=torch.int64),
            continues=any(documents.past),
        )


class Chunk(NamedTuple):
    """Several tokens of one document: rows ``start`` to ``start + length``, behind ``past`` others in its pages."""

    start: int
    length: int
    document: int
    past: int


@dataclass(frozen=True)
class CacheView:
    """A cache as the documents of a micro-batch see it; made once, for all layers.

    Attributes:
        places: [T] where each token's key goes, counted over all pages.
        table: [documents, most pages] int32 the pages of each, then zeros.
        used: [documents] int32 tokens in them, those of now too.
        chunks: the documents of several tokens. singles: [n] the numbers of those that have one.
        continues: whether some document has tokens of before.
    """

    cache: PagedCache
    documents: Documents
    places: Tensor
    table: Tensor
    used: Tensor
    chunks: list[Chunk]
    singles: Tensor
    continues: bool

    @functools.cached_property
    def single_rows(self) -> Tensor:
        """[n] where the one token of each of the ``singles`` stands."""
        return self.documents.borders[self.singles].long()

    @functools.cached_property
    def single_table(self) -> Tensor:
        """[n, most pages] their pages."""
        return self.table[self.singles].long()

    @functools.cached_property
    def single_unseen(self) -> Tensor:
        """[n, 1, 1, most pages * page_size] whether it does not see what is kept there."""
        kept = torch.arange(self.table.shape[1] * self.cache.page_size, device=self.table.device)
        behind = self.used[self.singles].unsqueeze(1) - 1 - kept
        return ~_seen(behind, self.cache.window)[:, None, None]

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self, self.cache.keys[index], self.cache.values[index])


@dataclass(frozen=True)
class LayerCache:
    """Of one layer: ``keys`` and ``values`` [pages, page_size, local kv heads, head_dim]."""

    view: CacheView
    keys: Tensor
    values: Tensor

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Add ``k``, ``v`` [T, H_kv, head_dim]."""
        self.keys.flatten(0, 1).index_copy_(0, self.view.places, k)
        self.values.flatten(0, 1).index_copy_(0, self.view.places, v)

    def attend(self, q: Tensor) -> Tensor:
        """Attend ``q`` [T, H, head_dim], whose keys are kept already, over them and what came before."""
        if not self.view.chunks:
            return self._attend_singles(q)
        out = torch.empty_like(q)
        for chunk in self.view.chunks:
            own = slice(chunk.start, chunk.start + chunk.length)
            out[own] = self._attend_chunk(q[own], chunk)
        if len(self.view.singles):
            rows = self.view.single_rows
            out[rows] = self._attend_singles(q[rows])
        return out

    @property
    def of_singles(self) -> tuple[Kept, Places, int | None] | None:
        """As few_rows.c takes it; None: some document has several new tokens."""
        view = self.view
        if view.chunks:
            return None
        return (self.keys, self.values), (view.places, view.table, view.used), view.cache.window

    def _attend_singles(self, q: Tensor) -> Tensor:
        """One token of each of n documents, together: ``q`` [n, H, head_dim]."""
        table = self.view.single_table
        keys, values = (at_least_fp32(x[table].flatten(1, 2)).transpose(1, 2) for x in (self.keys, self.values))
        # by hand: kernels made for many queries take several times as long for one
        shared = at_least_fp32(q).unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
        weights = (shared @ keys.mT).masked_fill_(self.view.single_unseen, -torch.inf).softmax(-1)
        return (weights @ values).flatten(1, 2).to(q.dtype)

    def _attend_chunk(self, q: Tensor, chunk: Chunk) -> Tensor:
        """Several tokens of one document: ``q`` [n, H, head_dim]."""
        window = self.view.cache.window
        stop = chunk.past + chunk.length
        first = max(0, chunk.past - window + 1) if window else 0
        table = self.view.table[chunk.document]
        keys, values = (x[table].flatten(0, 1)[first:stop].transpose(0, 1) for x in (self.keys, self.values))
        places = torch.arange(first, stop, device=q.device)
        seen = _seen(places[chunk.past - first :, None] - places, window)
        q = q.transpose(0, 1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True).transpose(0, 1)


def _seen(behind: Tensor, window: int | None) -> Tensor:
    """Whether a key is seen that is so many tokens ``behind`` its query."""
    return (behind >= 0) & (behind < window) if window else behind >= 0
