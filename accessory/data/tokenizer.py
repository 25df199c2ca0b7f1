"""One class for tokenizers of both kinds; training a tokenizer; checking that one fits a model."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from accessory.config import read_mapping
from accessory.data.tokenizer_models import BOS, EOS, HuggingFace, Model, Segment, SentencePiece
from accessory.errors import UserError
from accessory.files import check_file, check_writable, replacing

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""Names of a tokenizer's file. Of a directory with both, this program reads the first and transformers the last."""
CHAT_TEMPLATES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
"""Where transformers keeps a tokenizer's chat template, and a separate one for conversations with tools if there is one."""


class Tokenizer:
    """A ``tokenizer.model`` or ``tokenizer.json``. Special tokens are only ever added by id: ``</s>`` in a user's text
    stays text.

    Attributes:
        n_words: size of the vocabulary. bos_id, eos_id: -1 if the tokenizer has none.
        special: ids of special tokens by name.
        settings: the content of tokenizer_config.json, if that is beside the file.
    """

    def __init__(self, path: str | Path):
        self.path = check_file(path, "a tokenizer.model (SentencePiece) or tokenizer.json")
        beside = self.path.with_name("tokenizer_config.json")
        self.settings = read_mapping(beside) if beside.is_file() else {}
        kind = HuggingFace if self.path.suffix == ".json" else SentencePiece
        self._model: Model = kind(self.path, self.settings)
        self.n_words, self.bos_id, self.eos_id = self._model.size, self._model.bos_id, self._model.eos_id
        self.special = self._model.special
        self._ids = self.special | {BOS: self.bos_id, EOS: self.eos_id}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.path,)  # pickled as its path: ``tokenizers`` loses ``encode_special_tokens`` in pickling

    @property
    def files(self) -> dict[str, Path]:
        """The files that a checkpoint needs to carry this tokenizer, by their names in the checkpoint."""
        names = ("tokenizer_config.json", "special_tokens_map.json", *CHAT_TEMPLATES.values())
        beside = {name: self.path.parent / name for name in names}
        own = "tokenizer.json" if self.path.suffix == ".json" else "tokenizer.model"
        return {own: self.path} | {name: path for name, path in beside.items() if path.is_file()}

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        segments = [Segment(BOS, False, special=True)] * bos + [Segment(text, False)] + [Segment(EOS, False, True)] * eos
        return self.encode_segments(segments)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._model.decode(list(ids))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token by id, empty for special ones. A token may be a single byte of a character."""
        return self._model.pieces()

    def encode_within(self, text: str) -> list[int]:
        """The tokens of a text in the middle of a sequence: without the space that may be put before its beginning."""
        return self.encode_segments([Segment(EOS, False, special=True), Segment(text, False, joined=True)])[0][1:]

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Encode segments as one text; a token is trained if it ends inside a trained segment.

        The text is tokenised as a whole, so that training sees the same tokens as generation. A token that crosses a border
        (the space before an answer) belongs to the answer. Only segments marked ``apart`` are encoded by themselves.

        Returns:
            Token ids, and whether each is trained.

        Raises:
            UserError: the tokenizer lacks a special token.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for run in self._runs(segments):
            found, ends = self._model.encode(run)
            position = done = 0
            for segment in run:
                position += len(self._model.written(segment))
                until = bisect_right(ends, position) if segment is not run[-1] else len(ends)
                trained += [segment.trained] * (until - done)
                done = until
            ids += found
        return ids, trained

    def _runs(self, segments: Iterable[Segment]) -> Iterator[list[Segment]]:
        """Split segments into the runs that are encoded as one text."""
        run: list[Segment] = []
        for segment in segments:
            if segment.special:
                if segment.text not in self._ids:
                    raise UserError(f"{self.path}: has no special token {segment.text}, which the template needs")
                if self._ids[segment.text] < 0:
                    continue  # some tokenizers have no token that begins a text
            if segment.apart and run:
                yield run
                run = []
            run.append(segment)
        if run:
            yield run


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that does not fit the model: more pieces than vocab_size, or fewer than padding explains."""
    if not vocab_size - 256 < tokenizer.n_words <= vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.n_words} pieces but the model's vocab_size is {vocab_size}: "
            "they do not belong together"
        )


def train_tokenizer(lines: Iterable[str], out: str | Path, vocab_size: int) -> Path:
    """Train a byte-fallback BPE model on ``lines`` and write it to ``out`` (``tokenizer.model``).

    Raises:
        UserError: the text has too few pieces or too many characters for ``vocab_size``; the message says what is possible.
    """
    if not 0 < vocab_size < 2**31:
        raise UserError(f"a tokenizer has some thousands of pieces, or as many as its text allows; found {vocab_size}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    try:
        with replacing(out) as unfinished, open(unfinished, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.9995,
                input_sentence_size=20000,
                shuffle_input_sentence=False,
                num_threads=2,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise UserError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {_why(str(error))}") from error
    return out


def _why(error: str) -> str:
    """Explain an error of SentencePiece."""
    if "sentences_.empty()" in error:
        return "it is empty"
    if most := re.search(r"set it to a value <= (\d+)", error):
        return f"it is enough for {most[1]}; set --vocab-size to at most that, or take more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"its characters and the 256 bytes need {least[1]}; set --vocab-size to at least that"
    return error
