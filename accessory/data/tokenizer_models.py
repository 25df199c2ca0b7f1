"""Encoding with the two kinds of tokenizer file: SentencePiece's and Hugging Face's."""

import re
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from accessory.errors import UserError

BOS, EOS = "<bos>", "<eos>"
"""Templates' names for the tokens that begin and end a text, whatever a tokenizer calls them."""


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text; ``trained``: the model learns to write it."""

    text: str
    trained: bool
    special: bool = False  # the text is the name of one special token
    apart: bool = False  # encoded by itself, not as the continuation of the text before it
    joined: bool = False  # after a special token, without the space that SentencePiece puts before a text


class Model(Protocol):
    """The interface of a kind of tokenizer."""

    size: int
    bos_id: int
    eos_id: int
    special: dict[str, int]

    def __init__(self, path: Path, settings: dict[str, Any]): ...

    def written(self, segment: Segment) -> str:
        """The text that represents a segment in the text of its run."""

    def encode(self, run: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Token ids, and where each ends in the text of the run."""

    def decode(self, ids: list[int]) -> str: ...

    def pieces(self) -> list[bytes]:
        """The bytes of each token, empty for special ones."""


class SentencePiece:
    def __init__(self, path: Path, settings: dict[str, Any]):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        special = (n for n in range(self.size) if self._model.is_control(n) or self._model.is_unknown(n))
        self.special: dict[str, int] = {self._model.id_to_piece(number): number for number in special}
        self._ids = self.special | {BOS: self.bos_id, EOS: self.eos_id}

    def written(self, segment: Segment) -> str:
        return segment.text

    def encode(self, run: Sequence[Segment]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        for special, group in groupby(run, attrgetter("special")):
            segments = list(group)
            for text in [s.text for s in segments] if special else ["".join(s.text for s in segments)]:
                if special:
                    ids.append(self._ids[text])
                    ends.append(start + len(text))
                else:
                    found, offsets = self._text(text, joined=segments[0].joined and start > 0)
                    ids += found
                    # where a character is written as bytes, only the last byte has a width
                    ends += [start + (end if end > begin else begin + 1) for begin, end in offsets]
                start += len(text)
        return ids, ends

    def _text(self, text: str, joined: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and offsets of a text; ``joined``: without the space that SentencePiece puts before it."""
        if not joined:
            encoded = self._model.encode(text, out_type="offset_mapping")
            return encoded["ids"], encoded["offsets"]
        encoded = self._model.encode(f"\n{text}", out_type="offset_mapping")  # no piece crosses a line break
        first = sum(end <= 1 for _, end in encoded["offsets"])
        return encoded["ids"][first:], [(begin - 1, end - 1) for begin, end in encoded["offsets"][first:]]

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def pieces(self) -> list[bytes]:
        special = set(self.special.values())
        return [b"" if n in special else _written(self._model.id_to_piece(n)) for n in range(self.size)]


class HuggingFace:
    """A tokenizer.json. Names of special tokens in a text stay text. A template's own special tokens are written under
    private names, which no text can hold, so that a whole run is encoded at once as Hugging Face's tokenizers do.

    Where a tokenizer puts SentencePiece's space before the first text only (Metaspace, prepend_scheme "first"), a space is
    also put before each text that follows a special token: this gives the tokens of the tokenizer.model it was made from.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
        self._model.no_truncation()
        self._model.no_padding()
        self.size = max(self._model.get_vocab().values()) + 1
        names = special_names(settings) if settings else {"bos_token": "<s>", "eos_token": "</s>"}
        self.bos_id, self.eos_id = self._id(names.get("bos_token")), self._id(names.get("eos_token"))
        if self.eos_id < 0:
            raise UserError(f"{path}: which token ends a text? Put the tokenizer_config.json with its eos_token beside it")
        self._model.add_special_tokens([name for name in names.values() if self._id(name) >= 0])
        self._model.encode_special_tokens = True  # that is, as text
        added = self._model.get_added_tokens_decoder().values()
        special = [token for token in added if token.special or token.content in names.values()]
        self.special = {token.content: self._id(token.content) for token in special}
        secret = secrets.token_hex(8)
        self._private = {token.content: f"\0{secret}{token.content}\0" for token in special}
        for t in special:
            private = tokenizers.AddedToken(self._private[t.content], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            self._model.add_tokens([private])
        self._public = {self._id(private): self.special[name] for name, private in self._private.items()}
        self._lacks_blank = self._puts_blank_once()
        for alias, key in ((BOS, "bos_token"), (EOS, "eos_token")):
            if names.get(key) in self._private:
                self._private[alias] = self._private[names[key]]

    def _id(self, name: str | None) -> int:
        found = None if name is None else self._model.token_to_id(name)
        return -1 if found is None else found

    def written(self, segment: Segment) -> str:
        return self._private[segment.text] if segment.special else segment.text

    def encode(self, run: Sequence[Segment]) -> tuple[list[int], list[int]]:
        text, blanks = "", list[int]()  # the places of the spaces that are added here
        begins = True
        for segment in run:
            if self._lacks_blank and begins and segment.text and not (segment.special or segment.joined):
                blanks.append(len(text))
                text += " "
            begins = segment.special or (begins and not segment.text)
            text += self.written(segment)
        encoded = self._model.encode(text, add_special_tokens=False)
        ids, offsets = encoded.ids, encoded.offsets
        ends = [max(end, begin + 2) if begin in blanks else end for begin, end in offsets]  # a space belongs to its text
        if any(segment.special for segment in run):
            for index, number in enumerate(ids):
                if number in self._public:
                    ids[index] = self._public[number]
                    # some special tokens take in the spaces around them; this must not move them into another segment
                    ends[index] = text.index("\0", text.index("\0", offsets[index][0]) + 1) + 1
        return ids, [end - bisect_left(blanks, end) for end in ends]

    def _puts_blank_once(self) -> bool:
        mark = next(iter(self._private.values()))
        texts = "x", f"{mark}x", f"{mark} x"
        first, behind, blank = (self._model.encode(text, add_special_tokens=False).ids[-1] for text in texts)
        return bool(first != behind and first == blank)

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def pieces(self) -> list[bytes]:
        special, added = set(self.special.values()), self._model.get_added_tokens_decoder()
        of_bytes = "ByteLevel" in repr(self._model.decoder)
        pieces = []
        for number in range(self.size):
            piece = self._model.id_to_token(number)
            if piece is None or number in special:
                pieces.append(b"")
            elif number in added:
                pieces.append(piece.encode())
            else:
                pieces.append(bytes(_BYTES[letter] for letter in piece) if of_bytes else _written(piece))
        return pieces


def _written(piece: str) -> bytes:
    """The bytes of a piece in SentencePiece's notation."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode()


_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_INVISIBLE = sorted({*range(0x100)} - {*_VISIBLE})
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + n): byte for n, byte in enumerate(_INVISIBLE)}
"""The letter for each byte in a byte-level tokenizer such as GPT-2's."""


def special_names(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json by key (``eos_token``); additional ones by their own names."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        more = settings.get(key) or ()
        tokens = more.values() if isinstance(more, dict) else more
        named |= {str(t): t for t in tokens if not isinstance(t, dict) or t.get("special", True)}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
