"""The YAML data mix as samples: tokenised, split, and in an order that is a function of (seed, epoch) alone.

META:
  - path: ../data/ultrachat.jsonl     # see MixEntry for every key, and data/README.md for what records look like
    ratio: 0.5
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, overload

import numpy as np

from accessory.console import progress, say
from accessory.data.records import recognise
from accessory.data.sources import MixEntry, Source, content_digest, place_name, read_rows, read_sources
from accessory.data.store import Encoder, Sample, Store, make_store
from accessory.data.templates import get_template, render
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError

BadRecords = Literal["error", "skip"]


def make_encoder(path: Path, entry: MixEntry, max_seq_len: int) -> Encoder:
    """What turns a record of ``entry`` into samples: one; of a text that is too long, several."""
    tokenizer = Tokenizer(path)
    template = get_template(entry.template, tokenizer) if entry.template else None

    def encode(record: object) -> list[tuple[list[int], list[bool]]]:
        kind = entry.kind or recognise(record)
        tokens, trained = tokenizer.encode_segments(render(record, template, entry.train_on, kind))
        if kind != "text" or len(tokens) <= max_seq_len:
            return [(tokens, trained)]
        # the last token of a part is the first of the next, so that every token is predicted once
        starts = range(0, len(tokens) - 1, max_seq_len - 1)
        return [(tokens[start : start + max_seq_len], trained[start : start + max_seq_len]) for start in starts]

    return encode


class Samples(Sequence[Sample]):
    """Some of the samples of several stores; they are read from the disk when they are asked for."""

    def __init__(self, stores: Sequence[Store], numbers: np.ndarray):
        self.stores, self.numbers = stores, numbers
        self._starts = np.cumsum([0, *(len(store) for store in stores)])

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self.stores, self.numbers[index])
        store, number = self._locate(index)
        return store[number]

    def where(self, index: int) -> str:
        """File and line of a sample's record."""
        store, number = self._locate(index)
        return store.where(number)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int32."""
        lengths = [store.lengths() for store in self.stores]
        return np.concatenate(lengths)[self.numbers] if lengths else np.zeros(0, np.int32)

    def _locate(self, index: int) -> tuple[Store, int]:
        number = int(self.numbers[index])
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.stores[place], number - int(self._starts[place])


@dataclass(frozen=True)
class Tokenised:
    """A source and its samples."""

    source: Source
    stores: list[Store]

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    def bad(self) -> Iterator[str]:
        """Every bad record: file, line and reason."""
        for store in self.stores:
            yield from (f"{place_name(store.file, place)}: {reason}" for place, reason in store.report.bad)


@dataclass(frozen=True)
class Dataset:
    """A mix, tokenised.

    Attributes:
        training, validation: the samples of each. parts: which of ``training`` are each training source's.
    """

    sources: list[Tokenised]
    training: Samples
    validation: Samples
    parts: list[tuple[MixEntry, np.ndarray]]
    seed: int

    def count(self, what: Literal["truncated", "dropped"]) -> int:
        return sum(getattr(store.report, what) for source in self.sources for store in source.stores)

    def epoch(self, epoch: int) -> np.ndarray:
        """Which training samples epoch ``epoch`` goes through, in order: the same for every parallel size."""
        total = sum(len(own) for _, own in self.parts)
        weights = sum(entry.weight or 0.0 for entry, _ in self.parts)
        chosen = []
        for number, (entry, own) in enumerate(self.parts):
            often = entry.ratio or entry.epochs or 1.0
            count = max(1, round(total * entry.weight / weights if entry.weight else len(own) * often))
            whole, rest = divmod(count, len(own))
            # a ratio is always the same share of the records; what is repeated takes others in every epoch
            draw = order(len(own), f"{self.seed}/{number}" if entry.ratio else f"{self.seed}/{number}/{epoch}")
            chosen += [own] * whole + [own[np.sort(draw[:rest])]]
        everything = np.concatenate(chosen)
        return everything[order(len(everything), f"{self.seed}/{epoch}")]


def order(count: int, seed: str) -> np.ndarray:
    """A permutation of ``count`` numbers, the same on every machine and with every version of numpy."""
    state = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    return np.random.PCG64(state).random_raw(count).argsort(kind="stable")


def tokenise_mix(path: str | Path, tokenizer: Tokenizer, max_seq_len: int) -> list[Tokenised]:
    """Read, check and tokenise every record of a mix, or find that in the cache; bad records are in the reports."""
    sources, result = read_sources(path), []
    beside = (tokenizer.path.parent / name for name in ("tokenizer_config.json", "chat_template.jinja"))
    tokens = [content_digest(file) for file in (tokenizer.path, *beside) if file.is_file()]
    with progress(desc="tokenise", unit=" records") as bar:
        for source in sources:
            entry = source.entry
            settings = {"tokenizer": tokens, "max_seq_len": max_seq_len}
            settings |= {key: getattr(entry, key) for key in ("kind", "template", "train_on")}
            encoder = partial(make_encoder, tokenizer.path, entry, max_seq_len)
            result.append(Tokenised(source, [make_store(file, settings, encoder, bar.update) for file in source.files]))
    return result


def load_mix(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    seed: int,
    validation: float = 0.0,
    bad_records: BadRecords = "error",
) -> Dataset:
    """A mix's samples.

    A sample longer than ``max_seq_len`` is truncated; one with no trained token left is dropped; both are counted.

    Args:
        validation: share of the samples that is held out, chosen by ``seed``; if entries of the mix are marked
            ``split: validation``, they are what is held out, and nothing else.
        bad_records: "skip": say how many are bad, and go on without them.

    Raises:
        UserError: naming file and line, for anything that cannot be read.
    """
    sources = tokenise_mix(path, tokenizer, max_seq_len)
    bad = [line for source in sources for line in source.bad()]
    if bad and bad_records == "error":
        more = f" (and {len(bad) - 1} more bad records; accessory data check lists them)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}")
    if bad:
        say(f"warning: {len(bad)} bad records are skipped, the first: {bad[0]}")
    for source in sources:
        if not any(store.report.records for store in source.stores):
            raise UserError(f"{source.source.files[0]}: holds no record")
    stores = [store for source in sources for store in source.stores]
    numbers = np.split(np.arange(sum(map(len, stores))), np.cumsum([len(source) for source in sources])[:-1])
    marked = [source.source.entry.split == "validation" for source in sources]
    held_out = [own for own, mark in zip(numbers, marked, strict=True) if mark]
    parts = [(source.source.entry, own) for source, own, mark in zip(sources, numbers, marked, strict=True) if not mark]
    training = np.concatenate([own for _, own in parts]) if parts else np.zeros(0, np.int64)
    if not len(training):
        raise UserError(f"{path}: no record with anything to train on within {max_seq_len} tokens")
    if not held_out and validation > 0:
        count = min(len(training) - 1, max(1, round(len(training) * validation)))
        held_out = [np.sort(training[order(len(training), f"{seed}/validation")[:count]])]
    out = np.concatenate(held_out) if held_out else np.zeros(0, np.int64)
    kept = np.setdiff1d(training, out, assume_unique=True)
    # numbers within `training`, in which the held-out ones have no place
    places = [(entry, np.searchsorted(kept, np.intersect1d(own, kept, assume_unique=True))) for entry, own in parts]
    places = [(entry, own) for entry, own in places if len(own)]
    return Dataset(sources, Samples(stores, kept), Samples(stores, out), places, seed)


def mix_texts(path: str | Path) -> Iterator[str]:
    """The text of every record of a mix, line by line, to train a tokenizer on."""
    for source in read_sources(path):
        for file in source.files:
            for row in read_rows(file):
                try:
                    segments = render(row.parse(), kind=source.entry.kind)
                except ValueError as error:
                    raise UserError(f"{place_name(file, row.place)}: {error}") from error
                text = "".join(segment.text for segment in segments if not segment.special)
                yield from (line for line in text.splitlines() if line)
