"""Answers that must be of a form: JSON of a schema, or what a regular expression matches. llguidance says which tokens may
come next."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError, extra, needs


class Grammar:
    """A form, compiled for a tokenizer; any number of answers can be held to it."""

    def __init__(self, begin: Any):
        self._begin = begin

    def matcher(self) -> "Matcher":
        return Matcher(self._begin.deep_copy())


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, state: Any):
        self._state = state

    def allowed(self, vocabulary: int) -> Tensor:
        """[vocabulary] bool: the tokens that may come next, those that end the answer among them where it may end."""
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[:vocabulary]).bool()

    def add(self, token: int) -> None:
        self._state.consume_token(token)

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow, be it that it has failed."""
        stopped: bool = self._state.is_stopped()
        return stopped

    @property
    def has_failed(self) -> bool:
        """Whether the grammar is too large to be followed any further."""
        failed: bool = self._state.is_error()
        return failed


class Grammars:
    """Makes grammars for a tokenizer.

    Args:
        ends: tokens that end an answer beside the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int] = ()):
        with needs("an answer of a given form", extra("serve")):
            import llguidance
        self._compiler = llguidance.LLMatcher
        words = llguidance.TokenizerWrapper(_Words(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(words, tokenizer.n_words, [tokenizer.eos_id, *ends])

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that ``schema`` allows, without blanks between its parts: a model that may write blanks can do so for ever.

        Raises:
            UserError: it is not a schema, or says what is not supported.
        """
        try:
            text = self._compiler.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a JSON schema that can be followed: {error}") from error
        return self._grammar(text, "JSON schema")

    def regex(self, pattern: str) -> Grammar:
        """What ``pattern`` matches as a whole.

        Raises:
            UserError: it is not a regular expression, or says what is not supported.
        """
        return self._grammar(self._compiler.grammar_from_regex(pattern), "regular expression")

    def _grammar(self, text: str, kind: str) -> Grammar:
        begin = self._compiler(self._tokenizer, text, log_level=0)
        if begin.is_error():
            raise UserError(f"not a {kind} that can be followed: {' '.join(begin.get_error().split())}")
        return Grammar(begin)


class _Words:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.tokens = tokenizer.pieces
        self.special_token_ids = sorted(tokenizer.special.values())
        self._numbers = {piece: number for number, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._numbers))

    def __call__(self, text: bytes) -> list[int]:
        """What writes a text and nothing else: many a tokenizer.json puts a blank before whatever text it is given, which no
        form has a place for; then the longest pieces, one by one."""
        ids = self._tokenizer.encode_within(text.decode())
        if b"".join(self.tokens[token] for token in ids) == text:
            return ids
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next(end for end in ends if text[start:end] in self._numbers)
            ids.append(self._numbers[text[start:end]])
            start = end
        return ids
