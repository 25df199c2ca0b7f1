"""Tensors on disk: find them without reading them, map one at a time, write one at a time.

There are two kinds of file: ``.safetensors``, and torch's zip archive (``.pth``, ``.pt``), whose tensors may stand under a
key ``model``. An archive may also come in parts that are read as one file. No pickle is ever loaded that could run code.
"""

import bisect
import io
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.errors import UserError
from accessory.files import check_file

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_DTYPES |= {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # in quantised matrices
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SYNC_BYTES = 2**30  # bytes between two fsyncs: a single one at the end would look like a stall
_MAX_HEADER = 100 * 2**20  # the safetensors format's own limit


class JoinedFiles(io.RawIOBase):
    """One or several files, read as if they were concatenated."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.starts = [0, *accumulate(path.stat().st_size for path in self.paths)]
        self.position = 0

    def __str__(self) -> str:
        return str(self.paths[0])

    def locate(self, offset: int) -> tuple[Path, int, int]:
        """The file that holds byte ``offset``, the byte's place in it, and how many bytes follow in that file."""
        index = bisect.bisect_right(self.starts, offset, hi=len(self.paths)) - 1
        return self.paths[index], offset - self.starts[index], self.starts[index + 1] - offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.starts[-1]}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.starts[-1]:
            return 0
        path, offset, left = self.locate(self.position)
        with open(path, "rb") as file:
            file.seek(offset)
            count = file.readinto(memoryview(buffer)[:left])
        self.position += count
        return count

    def read_exactly(self, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        self.position, done = offset, 0
        while done < size:
            count = self.readinto(memoryview(content)[done:])
            if count == 0:
                raise EOFError(f"it ends {size - done} bytes too early")
            done += count
        return content


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are."""

    parts: JoinedFiles
    offset: int  # of its first element
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def map(self) -> Tensor:
        """The tensor, memory-mapped: pages are read from disk when touched, and freed with the tensor."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if math.prod(self.shape) else 0
        size = reach * self.dtype.itemsize
        if size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        path, offset, left = self.parts.locate(self.offset)
        aligned = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        buffer: Any
        if size <= left and offset % self.dtype.itemsize == 0:
            with open(path, "rb") as file:
                # a private mapping: torch wants writable memory, and nothing written would reach the file
                buffer = mmap.mmap(file.fileno(), offset - aligned + size, access=mmap.ACCESS_COPY, offset=aligned)
            start = offset - aligned
        else:  # it crosses the border of two parts, or is not aligned
            buffer, start = self.parts.read_exactly(self.offset, size), 0
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=reach, offset=start)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class TensorFile:
    """The content of a file: ``tensors`` by key, and ``notes``, plain values stored beside them."""

    tensors: dict[str, Stored]
    notes: dict[str, str]


def index_file(*paths: Path) -> TensorFile:
    """Find the tensors of a file (or of one in several parts) without reading them.

    Raises:
        UserError: it is missing or damaged, holds something else, or a pickle in it could run code.
    """
    for path in paths:
        check_file(path, "a file of the checkpoint, which is incomplete")
    parts = JoinedFiles(paths)
    try:
        return _index_safetensors(parts) if paths[0].suffix == ".safetensors" else _index_archive(parts)
    except UserError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{paths[0]}: damaged or not a checkpoint file ({_short(error)})") from error


def _index_safetensors(parts: JoinedFiles) -> TensorFile:
    """The file has the header's length in 8 bytes, the header in JSON, then the tensors' bytes."""
    (length,) = struct.unpack("<Q", parts.read_exactly(0, 8))
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(parts.read_exactly(8, length))
    notes = header.pop("__metadata__", None) or {}
    tensors, end = {}, 0
    for key, entry in header.items():
        shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise not_a_weight(parts, key, entry["dtype"])
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if begin < 0 or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key} has a wrong size")
        tensors[key] = Stored(parts, 8 + length + begin, dtype, shape, _contiguous(shape))
        end = max(end, stop)
    missing = 8 + length + end - parts.starts[-1]
    if missing > 0:
        raise EOFError(f"it ends {missing} bytes too early")
    return TensorFile(tensors, {key: str(value) for key, value in notes.items()})


def not_a_weight(parts: JoinedFiles, key: str, dtype: object) -> UserError:
    return UserError(f"{parts}: {key} is of type {dtype}; weights are fp64, fp32, fp16 or bf16 here, not quantised")


def _index_archive(parts: JoinedFiles) -> TensorFile:
    """torch.load without the data: in fake mode a storage knows the offset of its bytes in the archive."""
    try:
        with FakeTensorMode():
            content = torch.load(io.BufferedReader(parts), weights_only=True)
    except (RuntimeError, EOFError, OSError):
        raise
    except Exception as error:  # torch raises pickle.UnpicklingError, and others, for what it refuses to unpickle
        raise UserError(f"{parts}: refused, it holds more than tensors (a pickle could run code)") from error
    nested = isinstance(content, dict) and "model" in content
    tensors = content["model"] if nested else content
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()):
        raise UserError(f'{parts}: expected {{name: tensor}} or {{"model": {{name: tensor}}}} in it')
    notes = {key: str(value) for key, value in content.items() if isinstance(value, str | int)} if nested else {}
    stored = {}
    for key, tensor in tensors.items():
        base = tensor.untyped_storage()._checkpoint_offset
        if base is None or tensor.is_neg() or tensor.is_conj():
            raise UserError(
                f"{parts}: saved in an old or unusual form; load it with torch, clone its tensors and save it anew"
            )
        if tensor.dtype not in _SAFETENSORS_NAMES or not tensor.dtype.is_floating_point:
            raise not_a_weight(parts, key, tensor.dtype)
        offset = base + tensor.storage_offset() * tensor.dtype.itemsize
        stored[key] = Stored(parts, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if stored[key].offset + tensor.nbytes > parts.starts[-1]:
            raise EOFError("it ends too early")
    return TensorFile(stored, notes)


Announced = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors that a file will hold: key -> (dtype, shape)."""


def lay_out(path: Path, tensors: Announced, notes: Mapping[str, str]) -> None:
    """Make a file with room for ``tensors``. ``notes``: plain values stored beside them."""
    of_format = _lay_out_safetensors if path.suffix == ".safetensors" else _lay_out_archive
    of_format(path, tensors, notes)


class TensorWriter:
    """Writes the tensors of a file made by ``lay_out``, one at a time and in any order.

    Several processes may write parts of one file at the same time.
    """

    def __init__(self, path: Path):
        self._places = index_file(path).tensors
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._unsynced = 0

    def write(self, key: str, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self._places[key].shape, f"{key} is not what was announced"
        self.write_part(key, 0, tensor.contiguous().view(-1))

    def write_part(self, key: str, start: int, values: Tensor) -> None:
        """Write ``values`` from number ``start`` of the flattened tensor on."""
        place = self._places[key]
        assert values.dtype == place.dtype, f"{key} is not what was announced"
        left = values.view(torch.uint8).numpy().data
        self._file.seek(place.offset + start * place.dtype.itemsize)
        while len(left):
            left = left[self._file.write(left) :]
        self._unsynced += values.nbytes
        if self._unsynced > SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        if not failed:
            os.fsync(self._file.fileno())
        self._file.close()


def _lay_out_safetensors(path: Path, tensors: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    end = 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)


def _lay_out_archive(path: Path, tensors: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """torch.save without the data, nor the archive's checksums, which torch does not check."""
    with FakeTensorMode():
        content = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in tensors.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"model": content, **notes}, path)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
