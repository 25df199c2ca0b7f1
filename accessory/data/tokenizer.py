"""SentencePiece tokenizers: encode, decode, and train one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from accessory.errors import UserError


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample's text; ``trained``: the model learns to write it."""

    text: str
    trained: bool


class Tokenizer:
    """A ``tokenizer.model``. Special tokens are only ever added by id: ``</s>`` in a user's text stays text."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; expected a SentencePiece tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.n_words: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + self._model.encode(text) + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def encode_segments(self, segments: Sequence[Segment], eos: bool) -> tuple[list[int], list[bool]]:
        """Encode ``<s>`` and the joined text at once; a token is trained if it ends inside a trained segment.

        Tokens are those of the whole text, so that training sees what generation will; a token that reaches over the
        border (the space before an answer) belongs to the answer. ``eos`` is trained if the last segment is.

        Returns:
            Token ids, and for each whether it is trained.
        """
        text = "".join(segment.text for segment in segments)
        ends, trained_ends, position = [], [], 0
        for segment in segments:
            position += len(segment.text)
            ends.append(position)
            trained_ends.append(segment.trained)
        ids, trained, current = [self.bos_id], [False], 0
        encoded = self._model.encode(text, out_type="offset_mapping")
        for token, (begin, end) in zip(encoded["ids"], encoded["offsets"], strict=True):
            # of a character written in bytes, only the last byte has a width
            while current < len(ends) - 1 and max(end, begin + 1) > ends[current]:
                current += 1
            ids.append(token)
            trained.append(trained_ends[current])
        if eos:
            ids.append(self.eos_id)
            trained.append(segments[-1].trained)
        return ids, trained


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's: more pieces than rows, or so few that it is no padding."""
    if not vocab_size - 256 < tokenizer.n_words <= vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.n_words} pieces but the model's vocab_size is {vocab_size}: "
            "they do not belong together"
        )


def train_tokenizer(lines: Iterable[str], out: str | Path, vocab_size: int) -> Path:
    """Train a byte-fallback BPE model on ``lines`` and write it to ``out`` (``tokenizer.model``).

    Raises:
        UserError: the text is too small for ``vocab_size``.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
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
        temporary.unlink()
        raise UserError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {error}") from error
    temporary.replace(out)
    return out
