"""The sources of records: the entries of a YAML mix, their files, and the rows in them.

Files are .jsonl, .json (a list, or one object per line), .parquet, .csv, .tsv, .arrow and .txt (one document each), also
compressed as .gz or .zst.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

from accessory.config import from_mapping, read_mapping
from accessory.data.records import Columns, Kind, RecordForm
from accessory.data.templates import TrainOn
from accessory.errors import UserError
from accessory.files import check_file
from accessory.parallel.watchdog import progressed

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst")
_CHOOSING = ("path", "name", "split", "ratio", "epochs", "weight", "root")
"""Settings of an entry that say which records are used and how often."""
_HERE = {
    "caption": "kind: caption",
    "single_turn_llava": "kind: conversations and template: alpaca",
    "None": "template: bare",
    **{name: f"template: {name}" for name in ("alpaca", "shortqa", "qg")},
}
"""What to set instead of the reference's values of ``preprocess`` and ``prompt_type``."""
MAX_RECORD = 16 * 2**20
"""Bytes. A larger record is no conversation but a sign of a wrong file."""


@dataclass(frozen=True)
class MixEntry:
    """One entry of META. At most one of ``ratio``, ``epochs`` and ``weight`` is given."""

    path: str  # file, directory or glob; relative to the mix; ~ and $VARIABLES are expanded
    type: Literal["text", "image_text"] = "text"  # for the reference's mixes; here any record may have an image
    name: str | None = None  # in reports; null: the path
    kind: Kind | None = None  # conversations | messages | instruction | text | caption; null: from the records' keys
    # the records' own names for the keys that are read: {instruction: question, output: answer}
    columns: Columns = field(default_factory=Columns)
    ignore: tuple[str, ...] = ()  # keys of the records to leave out; any other key that nothing uses is refused
    # mixtral-instruct | dialog | alpaca | chatml | vicuna | shortqa | qg | bare | plain | chat_template;
    # null: dialog, alpaca, plain, by kind
    template: str | None = None
    train_on: TrainOn = "answers"  # or last_answer, or all
    split: Literal["train", "validation"] = "train"  # validation: all of it is held out
    ratio: float | None = None  # share of the records that an epoch uses, chosen by the seed: above 0, at most 1
    epochs: float | None = None  # how often an epoch of the run goes through them: 2.5 is twice and a half
    weight: float | None = None  # share of the epoch, relative to the other entries' weights (all or none have one)
    root: str | None = None  # what image paths are relative to, itself relative to the mix; null: the records' file
    # for the reference's mixes; anything but "default" is set with kind and template here
    preprocess: str | None = None
    prompt_type: str | None = None

    @property
    def form(self) -> RecordForm:
        """The settings for reading its records."""
        return RecordForm(self.kind, self.columns, self.ignore)

    @property
    def encoding(self) -> dict[str, Any]:
        """The settings that a record's tokens depend on."""
        return {key: value for key, value in asdict(self).items() if key not in _CHOOSING}

    def __post_init__(self) -> None:
        both = sorted({*self.columns.given.values()} & {*self.ignore})
        if both:
            raise UserError(f"{self.path}: '{both[0]}' is named under columns and under ignore; keep one")
        given = [name for name in ("ratio", "epochs", "weight") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{self.path}: {' and '.join(given)} say the same in two ways; keep one")
        if given and self.split == "validation":
            raise UserError(
                f"{self.path}: {given[0]} says how much is trained on, and split: validation that nothing is; keep one"
            )
        for name in ("preprocess", "prompt_type"):
            if (asked := getattr(self, name)) not in (None, "default"):
                instead = _HERE.get(asked, "kind and template")
                raise UserError(f"{self.path}: {name} '{asked}' is not known here; set {instead} instead")
        for name in given:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} of {self.path} must be above 0, and a number, found {getattr(self, name)}")
        if self.ratio is not None and self.ratio > 1:
            raise UserError(f"ratio of {self.path} must be at most 1, found {self.ratio}; to repeat records, set epochs")


@dataclass(frozen=True)
class MixSource:
    """An entry with its files."""

    entry: MixEntry
    files: tuple[Path, ...]
    root: Path | None  # what image paths are relative to; None: the directory of the file that names them

    @property
    def name(self) -> str:
        return self.entry.name or self.entry.path

    def folder(self, file: Path) -> Path:
        """The directory that image paths in the records of ``file`` are relative to."""
        return self.root or file.parent


def read_sources(mix: str | Path) -> list[MixSource]:
    """Read the sources of a YAML mix.

    Raises:
        UserError: the file is not a mix, a path does not exist, or a file is named twice.
    """
    mix = Path(mix)
    if is_readable(mix) and file_kind(mix) != ".json":
        raise UserError(f"{mix}: records, where a YAML mix is expected that names them, as META: [{{path: {mix.name}}}]")
    values = read_mapping(mix)
    entries = values.get("META")
    if set(values) != {"META"} or not isinstance(entries, list) or not entries:
        raise UserError(f"{mix}: a data mix is one key META with a list of sources")
    sources: list[MixSource] = []
    seen: dict[Path, int] = {}
    for number, value in enumerate(entries, 1):
        where = f"{mix}: META entry {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping with at least a path")
        entry = from_mapping(MixEntry, value, where)
        root = entry.root and _expand(entry.root, mix.parent, where)
        if root and not root.is_dir():
            raise UserError(f"{where}: root {root}: no such directory")
        source = MixSource(entry, tuple(_find(entry.path, mix.parent, where)), root or None)
        for file in source.files:
            if (real := file.resolve()) in seen:
                raise UserError(f"{where}: {file} is in entry {seen[real]} already; set epochs to repeat it")
            seen[real] = number
        sources.append(source)
    weighted = [source for source in sources if source.entry.weight is not None]
    if weighted and len(weighted) < sum(source.entry.split == "train" for source in sources):
        raise UserError(f"{mix}: either every training entry has a weight, or none")
    return sources


def _find(path: str, home: Path, where: str) -> list[Path]:
    place = _expand(path, home, where)
    if place.is_dir():
        files = sorted(Path(folder, name) for folder, names in _walk(place) for name in names if is_readable(Path(name)))
    elif glob.has_magic(str(place)):
        files = sorted(file for file in _match(str(place)) if not file.is_dir())
    else:
        files = [place]
    if not files:
        raise UserError(f"{where}: {path}: no file there; expected {', '.join(SUFFIXES)}, also {' or '.join(COMPRESSED)}")
    for file in files:
        if not is_readable(file):
            raise UserError(f"{file}: expected {', '.join(SUFFIXES)}, also compressed as {' or '.join(COMPRESSED)}")
        check_file(file, "records")
    return files


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """This folder and every one below it, with the names of its files. Links are followed; no folder is visited twice."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield path, names


def _match(pattern: str) -> list[Path]:
    """The paths that match a glob. ``**`` stands for any number of folders; cycles of links are not followed."""
    head, stars, tail = pattern.partition("/**/")
    if not stars:
        return [Path(name) for name in glob.glob(pattern)]
    folders = (path for root in glob.glob(head) for path, _ in _walk(Path(root)))
    return [found for path in folders for found in _match(f"{glob.escape(path)}/{tail}")]


def _expand(path: str, home: Path, where: str) -> Path:
    """A path of the mix with variables and ~ expanded; relative to ``home``."""
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise UserError(f"{where}: {path}: the variable is not set in the environment")
    return home / Path(expanded).expanduser()


def is_readable(file: Path) -> bool:
    return file_kind(file) in SUFFIXES


def file_kind(file: Path) -> str:
    """The file's suffix without that of a compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def how_read(file: Path) -> str:
    """The part of a file's name that decides how it is read: its suffix with that of a compression."""
    return file_kind(file) + (file.suffix if file.suffix in COMPRESSED else "")


@dataclass(frozen=True)
class SourceRow:
    """One record of a file: a parsed value, or bytes still to be parsed (``parse``)."""

    place: int  # the line, from 1; in a file without lines, -1 - the number of the record
    value: Any

    @property
    def size(self) -> int:
        """Its approximate size in bytes."""
        return _size(self.value)

    def parse(self) -> Any:
        """The record. Raises ValueError with the reason if it is not valid JSON or too large."""
        if (size := self.size) > MAX_RECORD:
            raise ValueError(f"a record of {size / 1e6:.0f} MB; at most {MAX_RECORD / 1e6:.0f} MB are read")
        if not isinstance(self.value, bytes):
            return self.value
        try:
            return json.loads(self.value.decode("utf-8"), object_pairs_hook=_each_key_once)
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8: {error.reason}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg}") from error
        except RecursionError as error:
            raise ValueError("not valid JSON: nested too deeply") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key stands in it twice: Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return found


def _size(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def place_name(file: Path, place: int) -> str:
    """``file:line``, or ``file[number]``."""
    return f"{file}:{place}" if place > 0 else f"{file}[{-1 - place}]"


def read_rows(file: Path) -> Iterator[SourceRow]:
    """Every record of a file, one after the other.

    Raises:
        UserError: the file as a whole is not what its name says. ``SourceRow.parse`` reports a single bad line.
    """
    kind = file_kind(file)
    try:
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind == ".arrow":
            yield from _arrow(file)
        else:
            with _open(file) as stream:
                yield from _READERS[kind](file, stream)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, zstandard.ZstdError) as error:  # arrow's is a ValueError
        raise UserError(f"{file}: damaged, or not {kind}: {' '.join(str(error).split())[:120]}") from error


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file))
    if file.suffix == ".zst":
        return io.BufferedReader(zstandard.open(file))
    return open(file, "rb")


def _json(file: Path, stream: BinaryIO) -> Iterator[SourceRow]:
    """A list of records; or one record per line, as in many files with this suffix."""
    beginning = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    if not beginning.startswith(b"["):
        yield from _jsonl(file, stream)
        return
    text = stream.read()
    try:
        records = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        line = 1 + text[: error.start].count(b"\n")
        raise UserError(f"{file}:{line}: not valid UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    yield from (SourceRow(-1 - number, record) for number, record in enumerate(records))


def _jsonl(file: Path, stream: BinaryIO) -> Iterator[SourceRow]:
    for number, line in enumerate(stream, 1):
        if record := (line if number > 1 else line.removeprefix(codecs.BOM_UTF8)).strip():
            yield SourceRow(number, record)


def _table(delimiter: str) -> Any:
    def read(file: Path, stream: BinaryIO) -> Iterator[SourceRow]:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        csv.field_size_limit(MAX_RECORD)
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]:
                raise UserError(f"{file}: several columns are called '{twice[0]}'")
            for record in reader:
                if None in record or None in record.values():
                    raise UserError(
                        f"{file}:{reader.line_num}: a row with another number of columns than the first line has"
                    )
                yield SourceRow(reader.line_num, dict(record))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}: damaged after line {reader.line_num}: {' '.join(str(error).split())}") from error

    return read


def _text(file: Path, stream: BinaryIO) -> Iterator[SourceRow]:
    try:
        yield SourceRow(1, {"text": stream.read().decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8: {error.reason}") from error


_READERS: dict[str, Any] = {".jsonl": _jsonl, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"), ".txt": _text}


def _parquet(file: Path) -> Iterator[SourceRow]:
    import pyarrow.parquet

    yield from _batches(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256))


def _arrow(file: Path) -> Iterator[SourceRow]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as stream:
        try:
            reader = pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            whole = pyarrow.ipc.open_file(stream)
            reader = (whole.get_batch(number) for number in range(whole.num_record_batches))
        yield from _batches(reader)


def _batches(batches: Any) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield SourceRow(-1 - number, _without_nulls(record))
            number += 1


def _without_nulls(value: Any) -> Any:
    """Leave out nulls: tables fill missing columns with them, and a record's kind depends on its keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def content_digest(file: Path) -> str:
    """A digest of the file's content."""
    digest = hashlib.blake2b()
    try:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
                progressed()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]
