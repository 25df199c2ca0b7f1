"""What the engine answers: a request, and how far it has come."""

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
    """A request, and how far it has come.

    Attributes:
        prompt, answer: token ids; of an image, whose pixels are in ``images``, its number, negative, in each of its places.
        text: the answer's. choices: its tokens, with what is told of them.
        adapter: the name of the one that answers; None: the base alone.
        finish_reason: None while it goes on; "error": its grammar could not be followed.
        expert_load: [L, E] int64, its tokens that were run by each expert, if ``sampling`` asks for it.
        admitted: when it was let in, by ``time.monotonic``.
        in_cache: how many of its tokens the cache has. pages, begin: where (see ``PagedCache.at``).
        keys: of its full pages, the prompt's at first. promised: pages that it may still take.
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
        """How many places of images the cache has."""
        return sum(token < 0 for token in self.prompt[: self.in_cache]) if self.images else 0

    @property
    def root(self) -> Key:
        """What stands before its first page: under another adapter, the same tokens have other keys and values."""
        return repr(self.adapter).encode()


class Progress(NamedTuple):
    """What a step added to a request: a token, unless it ended the answer, and text, which can lag behind."""

    request: Running
    text: str
    choice: TokenChoice | None
