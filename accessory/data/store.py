"""Tokenised samples of one file, memory-mapped: made once, shared by all processes, cached by content.

CACHE/<key>/tokens.i32    the tokens of all samples; a token that is not trained is stored as its complement (~t)
CACHE/<key>/ends.i64      per sample: where its tokens end
CACHE/<key>/places.i64    per sample: the place of its record in the file
CACHE/<key>/digests.u64   per sample: equal for equal tokens and images
CACHE/<key>/labels.i32    per sample: the number of its label, -1 if it has none
CACHE/<key>/images.jsonl  per sample with images: their names as in its record
CACHE/<key>/seen.i64      per sample: where its line of images.jsonl ends (if it has none, where the line before does)
CACHE/<key>/dropped.jsonl the records (or parts of one) that give no sample, and why
CACHE/<key>/bad.jsonl     the records that cannot be used, and why
CACHE/<key>/report.json   counts of the records and samples
"""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from accessory.config import read_mapping, write_json
from accessory.data.placement import PLACE
from accessory.data.sources import SourceRow, content_digest, how_read, place_name, read_rows
from accessory.errors import UserError
from accessory.parallel.forkserver import Killed, NotStarted, fork_server, map_in_processes
from accessory.parallel.launch import own_cores
from accessory.visual.images import ImageError, is_data_uri

VERSION = 7
"""The version of the files' format and of how samples are made; part of the key."""
FILES = (
    *("tokens.i32", "ends.i64", "places.i64", "digests.u64", "labels.i32"),
    *("images.jsonl", "seen.i64", "dropped.jsonl", "bad.jsonl"),
)
CHUNK = 2 * 2**20  # bytes of records in a worker's chunk


@dataclass(frozen=True)
class Sample:
    """The tokens of one sample, and which of them are trained, each [n]; tokens of an image are PLACE.

    ``label``: the number of its label. ``images``: paths and data: URIs, in the order of their places.
    """

    tokens: np.ndarray
    trained: np.ndarray
    label: int | None = None
    images: tuple[str, ...] = ()


@dataclass
class Report:
    """Counts of a file's records and samples."""

    records: int = 0
    targets: int = 0  # tokens or labels that are predicted
    truncated: int = 0  # samples longer than max_seq_len
    dropped: int = 0  # samples without a trained token, or with an image that did not fit
    unseen: int = 0  # those of the dropped samples whose images did not fit
    images: int = 0
    bad: int = 0

    def add(self, other: "Report") -> None:
        for number in fields(self):
            setattr(self, number.name, getattr(self, number.name) + getattr(other, number.name))


class Bad(NamedTuple):
    """A record that cannot be used.

    ``image``: if an image file is the reason, its path and its state then (``file_state``).
    """

    place: int
    reason: str
    image: tuple[str, str] | None


class Dropped(NamedTuple):
    """A sample that was dropped: the place of its record, and why."""

    place: int
    reason: str


Encoder = Callable[[object], list[Sample]]
"""Turns a record into its samples (several for a long document). Raises ValueError with the reason if the record is bad."""


class Encoded(NamedTuple):
    """A worker's result for a chunk of rows."""

    values: np.ndarray  # int32, as stored
    ends: np.ndarray
    places: np.ndarray
    digests: np.ndarray
    labels: np.ndarray
    images: list[bytes]  # a line for each sample, empty if it has none
    dropped: list[Dropped]
    bad: list[Bad]
    report: Report


def encode_rows(rows: list[SourceRow], encode: Encoder, max_seq_len: int) -> Encoded:
    """Samples of some rows, cut to ``max_seq_len``. A sample whose images do not fit is dropped, not cut."""
    report, parts, places = Report(records=len(rows)), [np.zeros(0, np.int32)], []
    digests, labels, images, dropped, bad = [], [], [], [], []
    for row in rows:
        try:
            samples = encode(row.parse())
        except ValueError as error:
            file = error.file if isinstance(error, ImageError) else None
            bad.append(Bad(row.place, str(error), (str(file), file_state(file)) if file else None))
            continue
        for sample in samples:
            report.truncated += len(sample.tokens) > max_seq_len
            mask = sample.trained[:max_seq_len]
            targets = int(mask[1:].sum()) + (sample.label is not None)  # the first token is not predicted
            unseen = (sample.tokens[max_seq_len:] == PLACE).any()
            if unseen or not targets:
                reason = "an image does not fit" if unseen else "nothing to learn"
                dropped.append(Dropped(row.place, f"{reason} within {max_seq_len} tokens"))
                report.unseen += bool(unseen)
                continue
            ids = sample.tokens[:max_seq_len].astype(np.int32)
            parts.append(np.where(mask, ids, ~ids))
            places.append(row.place)
            images.append(json.dumps(sample.images).encode() + b"\n" if sample.images else b"")
            digests.append(hashlib.blake2b(parts[-1].tobytes() + images[-1], digest_size=8).digest())
            labels.append(-1 if sample.label is None else sample.label)
            report.targets += targets
            report.images += len(sample.images)
    report.dropped, report.bad = len(dropped), len(bad)
    ends = np.cumsum([len(part) for part in parts[1:]], dtype=np.int64)
    index = ends, np.array(places, np.int64), np.frombuffer(b"".join(digests), np.uint64), np.array(labels, np.int32)
    return Encoded(np.concatenate(parts), *index, images, dropped, bad, report)


class Store:
    """The samples of one file, in the order of its records."""

    def __init__(self, directory: Path, file: Path, folder: Path | None = None):
        """``folder``: what paths of images are relative to; None: the file's directory."""
        self.file, self._directory, self._folder = file, directory, folder or file.parent
        self._values, self._ends = _map(directory / "tokens.i32", np.int32), _map(directory / "ends.i64", np.int64)
        self._places, self.digests = _map(directory / "places.i64", np.int64), _map(directory / "digests.u64", np.uint64)
        self._labels = _map(directory / "labels.i32", np.int32)
        self._lines, self._seen = _map(directory / "images.jsonl", np.uint8), _map(directory / "seen.i64", np.int64)
        self.report = Report(**read_mapping(directory / "report.json"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Sample:
        start = int(self._ends[number - 1]) if number else 0
        values = np.array(self._values[start : int(self._ends[number])])
        trained, label = values >= 0, int(self._labels[number])
        return Sample(np.where(trained, values, ~values), trained, None if label < 0 else label, self.images(number))

    def images(self, number: int) -> tuple[str, ...]:
        """The images of a sample, as paths or data: URIs."""
        start, end = (int(self._seen[number - 1]) if number else 0), int(self._seen[number])
        names = json.loads(self._lines[start:end].tobytes()) if start < end else ()
        return tuple(name if is_data_uri(name) else str(self._folder / name) for name in names)

    def lengths(self) -> np.ndarray:
        """[samples] token counts, int32."""
        lengths = np.empty(len(self), np.int32)
        lengths[:1] = self._ends[:1]
        np.subtract(self._ends[1:], self._ends[:-1], out=lengths[1:], casting="same_kind")
        return lengths

    @property
    def key(self) -> str:
        """A digest of all that the samples depend on: the file's content, the tokenizer, the template, ..."""
        return self._directory.name

    def where(self, number: int) -> str:
        """The file and line of a sample's record."""
        return place_name(self.file, int(self._places[number]))

    def borders(self) -> np.ndarray:
        """The first sample of every record (a long document has several), and the number of samples at the end, int64."""
        first = np.ones(len(self) + 1, bool)
        np.not_equal(self._places[1:], self._places[:-1], out=first[1:-1])
        return np.flatnonzero(first)

    def retold(self) -> np.ndarray:
        """[samples] whether each is another caption of the images of the sample before, bool."""
        same = np.zeros(len(self), bool)
        np.equal(self._places[1:], self._places[:-1], out=same[1:])  # a text with images is never split
        same[1:] &= self._seen[1:] > self._seen[:-1]
        return same

    def dropped(self) -> Iterator[Dropped]:
        """The samples that were dropped, in order."""
        yield from itertools.starmap(Dropped, _lines(self._directory / "dropped.jsonl"))

    def bad(self) -> Iterator[Bad]:
        """The records that cannot be used, in order."""
        yield from _bad_of(self._directory)


def _bad_of(directory: Path) -> Iterator[Bad]:
    yield from itertools.starmap(Bad, _lines(directory / "bad.jsonl"))


def _lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def file_state(path: str | Path) -> str:
    """A text that changes when the file does: its size and time of change, or why it cannot be read."""
    try:
        found = os.stat(path)
    except OSError as error:
        return str(error.strerror)
    return f"{found.st_size} {found.st_mtime_ns}"


def _map(path: Path, dtype: type[np.number]) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def make_store(
    file: Path,
    settings: dict[str, object],
    make_encoder: Callable[[], Encoder],
    bar: Callable[[int], object],
    folder: Path | None = None,
) -> Store:
    """The samples of ``file``, from the cache, or made now on all cores that this process may use.

    Args:
        settings: everything that decides how a record becomes samples, including ``max_seq_len``. Together with the file's
            suffix and content they make the key.
        make_encoder: called in every worker; must be picklable.
        bar: called with the number of records in each finished chunk.
        folder: what paths of images are relative to; None: the file's directory.
    """
    described = {"version": VERSION, "suffix": how_read(file), "content": content_digest(file), **settings}
    directory = cache() / hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    if directory.exists() and _is_outdated(directory):
        shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            _write(temporary, file, make_encoder, int(str(settings["max_seq_len"])), bar)
            temporary.rename(directory)
        except OSError as error:
            if not directory.exists():  # else another process was faster, with the same result
                raise UserError(
                    f"{cache()}: cannot keep tokenised data: {error.strerror}; set ACCESSORY_CACHE to another folder"
                ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Store(directory, file, folder)


def _is_outdated(directory: Path) -> bool:
    """Whether an image that made a record bad has changed since."""
    return any(file_state(bad.image[0]) != bad.image[1] for bad in _bad_of(directory) if bad.image)


def cache() -> Path:
    """$ACCESSORY_CACHE, or a folder in the user's cache directory."""
    return Path(os.environ.get("ACCESSORY_CACHE", Path.home() / ".cache" / "accessory"))


def _write(
    directory: Path, file: Path, make_encoder: Callable[[], Encoder], max_seq_len: int, bar: Callable[[int], object]
) -> None:
    total, end, seen = Report(), 0, 0
    with ExitStack() as stack:
        files = (stack.enter_context(open(directory / name, "wb")) for name in FILES)
        tokens, ends, places, digests, labels, images, seens, dropped, bad = files
        for part in _encoded(file, make_encoder, max_seq_len):
            tokens.write(part.values.tobytes())
            ends.write((part.ends + end).tobytes())
            places.write(part.places.tobytes())
            digests.write(part.digests.tobytes())
            labels.write(part.labels.tobytes())
            images.writelines(part.images)
            seens.write((np.cumsum([len(line) for line in part.images], dtype=np.int64) + seen).tobytes())
            dropped.writelines(json.dumps(record).encode() + b"\n" for record in part.dropped)
            bad.writelines(json.dumps(record).encode() + b"\n" for record in part.bad)
            end += len(part.values)
            seen += sum(map(len, part.images))
            total.add(part.report)
            bar(part.report.records)
    write_json(directory / "report.json", asdict(total))


def _encoded(file: Path, make_encoder: Callable[[], Encoder], max_seq_len: int) -> Iterator[Encoded]:
    """The file's chunks of rows, encoded, in order; by several processes if there is more than one chunk."""
    chunks = _chunks(read_rows(file))
    first = next(chunks, None)
    if first is None:
        return
    yield encode_rows(first, make_encoder(), max_seq_len)
    second = next(chunks, None)
    if second is None:
        return
    encode = partial(_make_encode, make_encoder, max_seq_len)
    try:
        yield from map_in_processes(fork_server(__name__), encode, itertools.chain([second], chunks), own_cores())
    except Killed as error:
        raise UserError(f"{file}: a process that tokenised it was killed; is there too little memory?") from error
    except NotStarted as error:
        raise UserError(f"{file}: cannot be tokenised by several processes: {error}") from error


def _make_encode(make_encoder: Callable[[], Encoder], max_seq_len: int) -> Callable[[list[SourceRow]], Encoded]:
    return partial(encode_rows, encode=make_encoder(), max_seq_len=max_seq_len)


def _chunks(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    chunk: list[SourceRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
