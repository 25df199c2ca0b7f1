"""The YAML data mix: which files, how much of each.

META:
  - path: ../data/ultrachat.jsonl     # json or jsonl; relative to this file; ~ and $VARIABLES are expanded
    type: text                        # what the records hold; their kind (dialog, instruction) is recognised
    ratio: 0.5                        # the share of the records that is used, chosen by the seed
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accessory.config import from_mapping, read_mapping
from accessory.console import progress
from accessory.data.records import RecordError
from accessory.data.templates import render
from accessory.data.tokenizer import Segment, Tokenizer
from accessory.errors import UserError


@dataclass(frozen=True)
class MixEntry:
    path: str
    type: Literal["text"] = "text"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio of {self.path} must lie above 0 and at most at 1, found {self.ratio}")


@dataclass(frozen=True)
class Sample:
    """Tokens of one record, ``<s>`` first, and which of them are trained."""

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Dataset:
    """All samples of a mix, in the order of its files, and what was cut to fit."""

    samples: list[Sample]
    truncated: int
    dropped: int

    def split(self, share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
        """Hold out ``share`` of the samples, chosen by ``seed``: (training, validation)."""
        count = min(len(self.samples) - 1, max(1, round(len(self.samples) * share))) if share > 0 else 0
        held_out = set(random.Random(seed).sample(range(len(self.samples)), count))
        training = [s for i, s in enumerate(self.samples) if i not in held_out]
        return training, [self.samples[i] for i in sorted(held_out)]


def load_mix(path: str | Path, tokenizer: Tokenizer, max_seq_len: int, seed: int) -> Dataset:
    """Read, check and tokenise every record of a mix.

    A sample longer than ``max_seq_len`` is truncated; one with no trained token left is dropped; both are counted.

    Raises:
        UserError: naming file and line, for anything that cannot be read.
    """
    samples: list[Sample] = []
    truncated = dropped = 0
    for segments in progress(list(read_mix(path, seed)), desc="tokenise", unit="record"):
        tokens, trained = tokenizer.encode_segments(segments)
        truncated += len(tokens) > max_seq_len
        sample = Sample(tokens[:max_seq_len], trained[:max_seq_len])
        if any(sample.trained):
            samples.append(sample)
        else:
            dropped += 1
    if not samples:
        raise UserError(f"{path}: no record with anything to train on within {max_seq_len} tokens")
    return Dataset(samples, truncated, dropped)


def read_mix(path: str | Path, seed: int) -> Iterator[list[Segment]]:
    """Yield the segments of every chosen record of a mix."""
    path = Path(path)
    values = read_mapping(path)
    entries = values.get("META")
    if set(values) != {"META"} or not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: a data mix is one key META with a list of sources")
    for number, value in enumerate(entries, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: META entry {number} must be a mapping with at least a path")
        entry = from_mapping(MixEntry, value, f"{path}: META entry {number}")
        expanded = os.path.expandvars(entry.path)
        if "$" in expanded:
            raise UserError(f"{path}: META entry {number}: {entry.path}: the variable is not set in the environment")
        file = path.parent / Path(expanded).expanduser()
        records = list(read_records(file))
        if not records:
            raise UserError(f"{file}: holds no record")
        if entry.ratio < 1:
            count = max(1, round(len(records) * entry.ratio))
            chosen = sorted(random.Random(f"{seed}/{number}").sample(range(len(records)), count))
            records = [records[i] for i in chosen]
        for where, record in records:
            try:
                yield render(record)
            except RecordError as error:
                raise UserError(f"{where}: {error}") from error


def mix_texts(path: str | Path) -> Iterator[str]:
    """The text of every chosen record of a mix, line by line, to train a tokenizer on."""
    for segments in read_mix(path, seed=0):
        text = "".join(segment.text for segment in segments if not segment.special)
        yield from (line for line in text.splitlines() if line)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (``file:line`` or ``file[index]``, record) of a .jsonl or .json file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: expected a .json or .jsonl file")
    if path.suffix == ".json":
        records = _parse(path.read_bytes(), path, 1)
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a list of records, found {type(records).__name__}")
        yield from ((f"{path}[{index}]", record) for index, record in enumerate(records))
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.rstrip(), path, number)


def _parse(text: bytes, path: Path, first_line: int) -> Any:
    """Parse JSON; an error names the line, the first line of ``text`` being ``first_line`` of the file."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: not valid UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{first_line + error.lineno - 1}: not valid JSON: {error.msg}") from error
