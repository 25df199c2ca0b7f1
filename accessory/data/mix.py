"""From a YAML data mix to samples: tokenised, split, and in an order that is a function of (seed, epoch) alone.

META:
  - path: ../data/ultrachat.jsonl     # see MixEntry for every key, and data/README.md for what records look like
    ratio: 0.5
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, overload

import numpy as np

from accessory.config import nearest
from accessory.console import progress, say
from accessory.data.held_out import hold_out
from accessory.data.order import Part, Shuffled
from accessory.data.placement import encode_placed, images_set_apart
from accessory.data.records import Conversation, Document, Record, label_number, read_record
from accessory.data.sources import MixEntry, MixSource, content_digest, place_name, read_rows, read_sources
from accessory.data.store import Encoder, Sample, Store, make_store
from accessory.data.templates import default_template, get_template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.model.visual import VisualArgs
from accessory.parallel.watchdog import progressed
from accessory.visual.images import check_image, is_data_uri, is_on_the_web

BadRecords = Literal["error", "skip"]


def make_encoder(
    path: Path, entry: MixEntry, max_seq_len: int, labels: Sequence[str], visual: VisualArgs | None, folder: Path
) -> Encoder:
    """Make the function that turns a record of ``entry`` into samples. A record gives one sample; a text that is too long,
    and has neither a label nor an image, gives several, and an image with several captions one for each.

    Args:
        visual: the model's image settings; None: it reads text only. folder: what paths of images are relative to.
    """
    tokenizer = Tokenizer(path)
    template = get_template(entry.template, tokenizer) if entry.template else None

    def encode(raw: object) -> list[Sample]:
        record, images = images_set_apart(read_record(raw, entry.form), visual)
        names = tuple(map(str, images))
        for name in names:
            check_image(name if is_data_uri(name) or is_on_the_web(name) else folder / name)
        records: list[Record] = [record]
        if isinstance(record, Document):
            records = [replace(record, text=text, others=()) for text in (record.text, *record.others)]
        return [sample for one in records for sample in encode_one(one, names)]

    def encode_one(record: Record, images: tuple[str, ...]) -> list[Sample]:
        label = label_number(record, labels)
        segments = (template or default_template(record)).render(record, entry.train_on)
        tokens, trained = map(np.array, encode_placed(tokenizer, segments, len(images), visual))
        if label is not None:
            return [Sample(tokens, np.zeros_like(trained), label, images)]
        if images or not isinstance(record, Document) or len(tokens) <= max_seq_len:
            return [Sample(tokens, trained, images=images)]
        # the last token of a part is also the first of the next, so that every token is predicted once
        starts = range(0, len(tokens) - 1, max_seq_len - 1)
        parts = (slice(start, start + max_seq_len) for start in starts)
        return [Sample(tokens[part], trained[part]) for part in parts]

    return encode


class Samples(Sequence[Sample]):
    """The training samples or the held-out samples of several stores, read from the disk on demand."""

    def __init__(self, stores: Sequence[Store], held_out: np.ndarray, training: bool):
        """``held_out``: sorted sample numbers over all stores. If ``training``, these are all the others, else these."""
        self.stores, self._held_out, self._training = stores, held_out, training
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        # for each held-out sample, the number of training samples before it
        self._before = held_out - np.arange(len(held_out))

    def __len__(self) -> int:
        return int(self._starts[-1]) - len(self._held_out) if self._training else len(self._held_out)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        store, number = self._locate(index)
        return store[number]

    def where(self, index: int) -> str:
        """The file and line of a sample's record."""
        store, number = self._locate(index)
        return store.where(number)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[samples] token counts, int32."""
        return self._of_mine([np.zeros(0, np.int32), *(store.lengths() for store in self.stores)])

    @cached_property
    def retold(self) -> np.ndarray:
        """[samples] whether each is another caption of the images of the sample before (see ``Store``), bool."""
        return self._of_mine([np.zeros(0, bool), *(store.retold() for store in self.stores)])

    def _of_mine(self, of_stores: list[np.ndarray]) -> np.ndarray:
        everything = np.concatenate(of_stores)
        return np.delete(everything, self._held_out) if self._training else everything[self._held_out]

    def _locate(self, index: int) -> tuple[Store, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = (
            index + int(self._before.searchsorted(index, side="right")) if self._training else int(self._held_out[index])
        )
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.stores[place], number - int(self._starts[place])


@dataclass(frozen=True)
class Tokenised:
    """A source of a mix and its samples, in one store for each file."""

    source: MixSource
    stores: list[Store]

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    @property
    def template(self) -> str:
        """The template of its records; if the mix names none, the default of the first record that can be used."""
        for row in itertools.chain.from_iterable(map(read_rows, self.source.files)):
            with suppress(ValueError):
                return self.source.entry.template or default_template(read_record(row.parse(), self.source.entry.form)).name
        raise AssertionError("a source without samples")

    def bad(self) -> Iterator[str]:
        """Every bad record: file, line and reason."""
        for store in self.stores:
            for bad in store.bad():
                yield f"{place_name(store.file, bad.place)}: {bad.reason}"

    def dropped(self) -> Iterator[str]:
        """Every record that gives no sample because nothing in it would be learnt: file, line and reason."""
        for store in self.stores:
            for place, reason in store.dropped():
                yield f"{place_name(store.file, place)}: dropped: {reason}"


@dataclass(frozen=True)
class Dataset:
    """A tokenised mix.

    Attributes:
        training, validation: the samples. parts: the range of ``training`` that belongs to each training source, in order.
    """

    sources: list[Tokenised]
    training: Samples
    validation: Samples
    parts: list[tuple[MixEntry, range]]
    seed: int

    def count(self, what: Literal["truncated", "dropped", "unseen", "images"]) -> int:
        return sum(getattr(store.report, what) for source in self.sources for store in source.stores)

    def templates(self) -> Counter[str]:
        """The number of samples in each template, over the training sources."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            if len(source) and source.source.entry.split == "train":
                counts[source.template] += len(source)
        return counts

    def epoch(self, epoch: int) -> Shuffled:
        """The numbers of the training samples in epoch ``epoch``, in order: the same for every parallel size.

        If an image has several captions, one is used each time, and another one the next time.
        """
        found = zip(self.parts, self._firsts, strict=True)
        sizes = [len(own) if firsts is None else len(firsts) - 1 for (_, own), firsts in found]
        total, weights = sum(sizes), sum(entry.weight or 0.0 for entry, _ in self.parts)
        parts = []
        for number, ((entry, own), size, firsts) in enumerate(zip(self.parts, sizes, self._firsts, strict=True)):
            often = entry.ratio or entry.epochs or 1.0
            count = max(1, round(total * entry.weight / weights if entry.weight else size * often))
            # a ratio always takes the same records; otherwise an epoch begins where the last one ended, so that no record
            # is repeated before every other one has been used
            skip, before = (0, epoch) if entry.ratio else (epoch * (count % size), epoch * (count // size))
            parts.append(Part(own.start, size, count, f"{self.seed}/part/{number}", skip, firsts, before))
        return Shuffled(parts, f"{self.seed}/epoch/{epoch}")

    @cached_property
    def _firsts(self) -> list[np.ndarray | None]:
        """``Part.firsts`` of each part."""
        retold = (self.training.retold[own.start : own.stop] for _, own in self.parts)
        return [np.append(np.flatnonzero(~mine), len(mine)) if mine.any() else None for mine in retold]


def check_columns(source: MixSource, mix: str | Path) -> None:
    """Refuse a column name that no record has, which would otherwise be read as empty."""
    columns, seen = set(source.entry.columns.given.values()), set[str]()
    rows = itertools.chain.from_iterable(map(read_rows, source.files))
    while not columns <= seen:
        row = next(rows, None)
        if row is None:
            column = min(columns - seen)
            raise UserError(f"{mix}: {source.entry.path}: columns: no record has '{column}'{nearest(column, list(seen))}")
        with suppress(ValueError):  # listed with the bad records
            record = row.parse()
            seen |= record.keys() if isinstance(record, dict) else set()


def tokenise_mix(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    labels: Sequence[str] = (),
    visual: VisualArgs | None = None,
) -> list[Tokenised]:
    """Read, check and tokenise every record of a mix, or take the result from the cache. The stores list bad records.

    Args:
        labels: a classifier's labels; each record must have one. Empty: next-token prediction; no record may have one.
        visual: the model's image settings; None: no record may have an image.
    """
    if max_seq_len < 2:
        raise UserError(f"max_seq_len must be at least 2, for a token is learnt from those before it; found {max_seq_len}")
    if visual and max_seq_len <= visual.words + 2:
        raise UserError(f"max_seq_len {max_seq_len} has no room for an image of {visual.words} words and its text")
    sources, result = read_sources(path), list[Tokenised]()
    files = {name: content_digest(file) for name, file in tokenizer.files.items()}
    with progress(desc="tokenise", unit=" records") as bar:

        def count(records: int) -> None:
            bar.update(records)
            progressed()

        for source in sources:
            entry = source.entry
            try:
                encoder = partial(make_encoder, tokenizer.path, entry, max_seq_len, labels, visual)
                encoder(Path())
            except UserError as error:
                raise UserError(f"{path}: {entry.path}: {error}") from error
            settings = {"tokenizer": files, "max_seq_len": max_seq_len, "entry": entry.encoding, "labels": labels}
            check_columns(source, path)
            stores = [_store(source, file, settings, encoder, count, visual) for file in source.files]
            if not any(store.report.records for store in stores):
                raise UserError(f"{source.files[0]}: holds no record")
            result.append(Tokenised(source, stores))
    return result


def _store(
    source: MixSource,
    file: Path,
    settings: dict[str, object],
    encoder: Callable[[Path], Encoder],
    count: Callable[[int], None],
    visual: VisualArgs | None,
) -> Store:
    folder = source.folder(file)
    if visual:  # the stored samples depend on the places of images, and on whether their files could be read
        settings = settings | {"image": (visual.words, visual.place), "folder": str(folder.resolve())}
    return make_store(file, settings, partial(encoder, folder), count, folder)


def load_mix(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    seed: int,
    validation: float = 0.0,
    bad_records: BadRecords = "error",
    labels: Sequence[str] = (),
    visual: VisualArgs | None = None,
) -> Dataset:
    """Load the samples of a mix.

    A sample longer than ``max_seq_len`` is truncated. One with no trained token left, or with an image that does not fit,
    is dropped. Both are counted.

    Args:
        validation: share of the samples to hold out, as whole records chosen by ``seed``. If entries of the mix are marked
            ``split: validation``, these are held out and nothing else.
        bad_records: "skip": say how many are bad, and continue without them.
        labels, visual: see ``tokenise_mix``.

    Raises:
        UserError: something cannot be read; the message names file and line.
    """
    sources = tokenise_mix(path, tokenizer, max_seq_len, labels, visual)
    first = next((line for source in sources for line in source.bad()), None)
    if first:
        count = sum(store.report.bad for source in sources for store in source.stores)
        if bad_records == "error":
            more = f" (and {count - 1} more bad records; accessory data check lists them)" if count > 1 else ""
            raise UserError(f"{first}{more}")
        say(f"warning: {count} bad records are skipped, the first: {first}")
    return split_mix(path, sources, max_seq_len, seed, validation)


def split_mix(path: str | Path, sources: list[Tokenised], max_seq_len: int, seed: int, validation: float) -> Dataset:
    """Split a tokenised mix into training and held-out samples (see ``load_mix``)."""
    stores = [store for source in sources for store in source.stores]
    ends = list(itertools.accumulate(len(source) for source in sources))
    spans = [range(end - len(source), end) for source, end in zip(sources, ends, strict=True)]
    marked = [source.source.entry.split == "validation" for source in sources]
    held_out = np.concatenate([np.zeros(0, np.int64), *(span for span, mark in zip(spans, marked, strict=True) if mark)])
    count = ends[-1] - len(held_out)
    if not count:
        raise UserError(f"{path}: no record with anything to train on within {max_seq_len} tokens")
    if not any(marked) and validation > 0:
        held_out = hold_out(stores, validation, seed)
        if not len(held_out):
            say(f"warning: {path}: a single record; nothing is held out")
    # numbers among the training samples, which leave out those held out
    parts = []
    for source, span, mark in zip(sources, spans, marked, strict=True):
        start, stop = (int(border - held_out.searchsorted(border)) for border in (span.start, span.stop))
        if not mark and start < stop:
            parts.append((source.source.entry, range(start, stop)))
    return Dataset(sources, Samples(stores, held_out, True), Samples(stores, held_out, False), parts, seed)


def mix_texts(path: str | Path) -> Iterator[str]:
    """The text of every record of a mix, line by line, for training a tokenizer."""
    for source in read_sources(path):
        check_columns(source, path)
        for file in source.files:
            for row in read_rows(file):
                try:
                    text = _text_of(row.parse(), source.entry)
                except ValueError as error:
                    raise UserError(f"{place_name(file, row.place)}: {error}") from error
                yield from (line for line in text.splitlines() if line)


def _text_of(raw: object, entry: MixEntry) -> str:
    """The text of a record as its template writes it; without markup if the template is the tokenizer's own, which is not
    trained yet."""
    record = replace(read_record(raw, entry.form), images=())
    if entry.template == "chat_template" and isinstance(record, Conversation):
        calls = [{"name": call.name, "arguments": call.arguments} for turn in record.turns for call in turn.calls]
        tools = [json.dumps(value, ensure_ascii=False) for value in (*record.tools, *calls)]
        return "\n".join([record.system or "", *tools, *(turn.question for turn in record.turns)])
    template = get_template(entry.template) if entry.template else default_template(record)
    return "".join(segment.text for segment in template.render(record) if not segment.special)
