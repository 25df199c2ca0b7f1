"""Tokenised samples of one file, memory-mapped: made once, shared by all processes, found again by content.

CACHE/<key>/tokens.i32    tokens one behind the other; a token that is not trained is stored as its complement (~t)
CACHE/<key>/index.npy     per sample: where its tokens end, which record it is from, a digest
CACHE/<key>/report.json   what happened to the records
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import NamedTuple

import numpy as np

from accessory.config import read_mapping, write_json
from accessory.data.sources import Row, content_digest, place_name, read_rows

VERSION = 1
"""Of the files and of how samples are made; part of the key."""
CHUNK = 2 * 2**20  # bytes of records that a worker takes at once
INDEX = np.dtype([("end", np.int64), ("place", np.int64), ("digest", np.uint64)])


@dataclass(frozen=True)
class Sample:
    """Tokens of one record, ``<s>`` first, and which of them are trained: each [n]."""

    tokens: np.ndarray
    trained: np.ndarray


@dataclass
class Report:
    """What became of a file's records."""

    records: int = 0
    truncated: int = 0  # cut to fit
    dropped: int = 0  # nothing trained was left in them
    bad: list[tuple[int, str]] = field(default_factory=list)  # (place, reason)


Encoder = Callable[[object], list[tuple[list[int], list[bool]]]]
"""A record to its samples (several for a long document). Raises ValueError with the reason if it is bad."""


class Encoded(NamedTuple):
    """What a worker made of some rows."""

    values: bytes  # int32, as stored
    samples: np.ndarray  # INDEX
    report: Report


def encode_rows(rows: list[Row], encode: Encoder, max_seq_len: int) -> Encoded:
    """Samples of some rows, cut to ``max_seq_len``."""
    report, parts, index, end = Report(records=len(rows)), [], [], 0
    for row in rows:
        try:
            samples = encode(row.parse())
        except ValueError as error:
            report.bad.append((row.place, str(error)))
            continue
        for tokens, trained in samples:
            report.truncated += len(tokens) > max_seq_len
            mask = np.array(trained[:max_seq_len], dtype=bool)
            if not mask[1:].any():  # <s> has no prediction
                report.dropped += 1
                continue
            ids = np.array(tokens[:max_seq_len], dtype=np.int32)
            parts.append(np.where(mask, ids, ~ids))
            end += len(ids)
            digest = hashlib.blake2b(parts[-1].tobytes(), digest_size=8).digest()
            index.append((end, row.place, int.from_bytes(digest, "little")))
    values = np.concatenate(parts).tobytes() if parts else b""
    return Encoded(values, np.array(index, dtype=INDEX), report)


class Store:
    """The samples of one file, in the order of its records."""

    def __init__(self, directory: Path, file: Path):
        self.file = file
        self.index = np.load(directory / "index.npy", mmap_mode="r")
        empty = not len(self.index)
        self.values = np.zeros(0, np.int32) if empty else np.memmap(directory / "tokens.i32", np.int32, "r")
        report = read_mapping(directory / "report.json")
        self.report = Report(**report | {"bad": [(place, reason) for place, reason in report["bad"]]})

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        start = int(self.index["end"][number - 1]) if number else 0
        values = np.array(self.values[start : int(self.index["end"][number])])
        trained = values >= 0
        return Sample(np.where(trained, values, ~values), trained)

    def lengths(self) -> np.ndarray:
        return np.diff(self.index["end"], prepend=0).astype(np.int32)

    def where(self, number: int) -> str:
        """File and line of a sample's record."""
        return place_name(self.file, int(self.index["place"][number]))


def make_store(
    file: Path, settings: dict[str, object], make_encoder: Callable[[], Encoder], bar: Callable[[int], object]
) -> Store:
    """The samples of ``file``, from the cache or made now by all cores this process may use.

    Args:
        settings: all that decides how a record becomes samples, ``max_seq_len`` among it; with the file's content, the key.
        make_encoder: called in every worker; must be picklable.
        bar: told the number of records as they are done.
    """
    described = json.dumps({"version": VERSION, "content": content_digest(file), **settings}, sort_keys=True)
    directory = cache() / hashlib.sha256(described.encode()).hexdigest()[:32]
    if not directory.exists():
        temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        try:
            _write(temporary, file, make_encoder, int(str(settings["max_seq_len"])), bar)
            temporary.rename(directory)
        except OSError:
            if not directory.exists():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Store(directory, file)


def cache() -> Path:
    """$ACCESSORY_CACHE, or a folder in the user's cache directory."""
    return Path(os.environ.get("ACCESSORY_CACHE", Path.home() / ".cache" / "accessory"))


def _write(
    directory: Path, file: Path, make_encoder: Callable[[], Encoder], max_seq_len: int, bar: Callable[[int], object]
) -> None:
    total, indices, end = Report(), [], 0
    with open(directory / "tokens.i32", "wb") as values:
        for part in _encoded(file, make_encoder, max_seq_len):
            values.write(part.values)
            part.samples["end"] += end
            indices.append(part.samples)
            end += len(part.values) // 4
            total.records += part.report.records
            total.truncated += part.report.truncated
            total.dropped += part.report.dropped
            total.bad += part.report.bad
            bar(part.report.records)
    np.save(directory / "index.npy", np.concatenate(indices) if indices else np.zeros(0, INDEX))
    write_json(directory / "report.json", asdict(total))


def _encoded(file: Path, make_encoder: Callable[[], Encoder], max_seq_len: int) -> Iterator[Encoded]:
    """Every chunk of the file's rows, encoded, in their order; by several processes if there is more than one chunk."""
    chunks = _chunks(read_rows(file))
    first = next(chunks, None)
    if first is None:
        return
    yield encode_rows(first, make_encoder(), max_seq_len)
    second = next(chunks, None)
    if second is None:
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # forking a process that has run threaded torch hangs
    with context.Pool(workers, _start_worker, (make_encoder, max_seq_len)) as pool:
        pending: deque[AsyncResult[Encoded]] = deque()
        for chunk in itertools.chain([second], chunks):
            pending.append(pool.apply_async(_work, (chunk,)))
            if len(pending) > 2 * workers:  # or the whole file would wait in memory
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.value) if isinstance(row.value, bytes) else 2048
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_worker: tuple[Encoder, int]


def _start_worker(make_encoder: Callable[[], Encoder], max_seq_len: int) -> None:
    global _worker
    _worker = make_encoder(), max_seq_len


def _work(rows: list[Row]) -> Encoded:
    return encode_rows(rows, *_worker)
