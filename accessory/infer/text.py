"""Incremental detokenisation: whole characters only, no text behind a stop string, and no answer decoded all over again."""

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"


class Vocabulary(Protocol):
    """What generation needs of a tokenizer."""

    n_words: int
    eos_id: int
    special: dict[str, int]

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text of a growing answer.

    Attributes:
        text: what has been returned so far. stopped: whether a stop string has ended it.

    Args:
        shown: special tokens that the text shows by name; others write nothing.
        joined: keep the space of the first token, which SentencePiece drops at the beginning of a text.
    """

    def __init__(self, tokenizer: Vocabulary, stops: Sequence[str] = (), shown: Sequence[str] = (), joined: bool = False):
        self.text, self.stopped, self._joined = "", False, joined
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._shown = {tokenizer.special[name]: name for name in shown if name in tokenizer.special}
        self._ids: list[int] = []
        # the ids from _begin to _decoded are context: how a token is written depends on those before
        self._begin = self._decoded = 0
        self._held = ""  # decoded, but it could become a stop string

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self._shown:
            before = self._decode(last=True)
            self._ids, self._begin, self._decoded = [], 0, 0
            return self._give(before + self._shown[token], last=False)
        if self._joined and not self._ids:
            self._ids, self._decoded = [token], 1  # as if it followed a token, here itself
        self._ids.append(token)
        return self._give(self._decode(), last=False)

    def finish(self) -> str:
        """The rest of the text, at the answer's end."""
        return self._give(self._decode(last=True), last=True)

    def _decode(self, last: bool = False) -> str:
        """The text of the tokens not decoded yet; empty while it may end in an incomplete character."""
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if len(text) <= len(before) or (text.endswith(BROKEN) and not last):
            return ""
        self._begin, self._decoded = self._decoded, len(self._ids)
        return text[len(before) :]

    def _give(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        if found := [held.index(stop) for stop in self._stops if stop in held]:
            self.stopped, held, rest = True, held[: min(found)], ""
        else:
            keep = 0 if last else max((overlap(held, stop) for stop in self._stops), default=0)
            held, rest = held[: len(held) - keep], held[len(held) - keep :]
        self._held = rest
        self.text += held
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
