"""A request to the engine, and its state while it is answered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from accessory.infer.grammar import Matcher
from accessory.infer.pages import Key
from accessory.infer.sampling import Sampling, TokenChoice
from accessory.infer.text import TextStream

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass
class Running:
    """A request, and its state while it is answered.

    Attributes:
        prompt, answer: token ids; in the places of an image, its number, negated. images: their pixels, by number.
        text: the answer's text so far. choices: the answer's tokens, with their log-probabilities if these are asked for.
        adapter: the name of the adapter that answers; None: the base alone.
        finish_reason: None while the answer goes on; "error": its grammar could not be followed.
        expert_load: [L, E] int64 how many of its tokens each expert has run, if ``sampling`` asks for it.
        admitted: when it joined the running batch, by ``time.monotonic``; None: it still waits.
        in_cache: how many of its tokens are in the cache. pages, begin: where they are (see ``PagedCache.at``).
        keys: the keys of its full pages; at first of those that its prompt fills. promised: pages that it may still take.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    stream: TextStream
    matcher: Matcher | None
    adapter: str | None = None
    images: Mapping[int, Tensor] = field(default_factory=dict)
    answer: list[int] = field(default_factory=list)
    choices: list[TokenChoice] = field(default_factory=list)
    finish_reason: Reason | None = None
    in_cache: int = 0
    pages: list[int] = field(default_factory=list)
    begin: int = 0
    keys: list[Key] = field(default_factory=list)
    promised: int = 0
    expert_load: Tensor | None = None
    admitted: float | None = None

    @property
    def text(self) -> str:
        return self.stream.text

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def places_behind(self) -> int:
        """How many of the tokens in the cache are places of images."""
        return sum(token < 0 for token in self.prompt[: self.in_cache]) if self.images else 0

    @property
    def root(self) -> Key:
        """The key before its first page. It names the adapter, since with another one the same tokens have other keys and
        values."""
        return repr(self.adapter).encode()


class Progress(NamedTuple):
    """What a step added to a request: a token (None: the answer ended), and new text, which can lag behind the tokens."""

    request: Running
    text: str
    choice: TokenChoice | None
