"""Quantisation codecs: a matrix as codes of a few bits, and what turns each block of codes back into numbers.

A codec replaces a matrix [..., out, in] by *parts*, each a tensor of bytes with the same dimensions but the last:

    codes   what stands for each value, in so many bits, one after the other: the first in the lowest bits of the first byte
    scales  the two bytes of a number for each block of ``group`` values along the input dimension, or for a whole row
    zeros   of int4, int3 and int2: the code that stands for zero, a byte for each block

A block lies within one row, and nothing is shared by a whole matrix. So cutting the parts gives the same as quantising the
cut matrix, in either layout, as long as blocks stay whole. The parts are bytes because nothing rounds bytes (FSDP casts
frozen floating-point tensors), and every communication backend can send them. Values are decoded in fp32, and then rounded
to the dtype that is wanted.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.config import nearest
from accessory.errors import UserError

Parts = dict[str, Tensor]
PARTS = ("codes", "scales", "zeros")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Values of equal probability under a normal distribution, zero among them (Dettmers et al. 2023)."""
BLOCKS = {"nf4": 64, "int4": 128, "int3": 64, "int2": 32}
"""Values of a block, where a name says no other."""
CHUNK = 2**20
"""Numbers that are encoded, or on a CPU decoded, at a time, to keep intermediate tensors small."""


@dataclass(frozen=True)
class Codec:
    """How a matrix is quantised.

    Attributes:
        kind: nf4: one of 16 fixed values times the block's largest. int4: one of 16 even steps from a zero of the block's
            own, the grid of GPTQ and AWQ; int3: of 8; int2: of 4. int8: one of 255 even steps.
        group: values of a block; None: a row is one.
    """

    kind: str
    group: int | None

    @property
    def name(self) -> str:
        return self.kind if self.group is None else f"{self.kind}-{self.group}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.kind[-1])

    @property
    def most(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def has_zeros(self) -> bool:
        """Whether a block has a zero of its own."""
        return self.kind not in ("nf4", "int8")

    @property
    def scale_dtype(self) -> torch.dtype:
        """What the bits of scales are: beside zeros fp16, as in the files of GPTQ and AWQ."""
        return torch.float16 if self.has_zeros else torch.bfloat16

    def width(self, nbytes: int) -> int:
        """How many values have codes of so many bytes."""
        return nbytes * 8 // self.bits

    def shapes(self, matrix: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of the parts of a ``matrix`` [..., out, in]."""
        *rows, inner = matrix
        parts, blocks = PARTS if self.has_zeros else PARTS[:2], inner // (self.group or inner)
        return {part: (*rows, blocks * self.bytes_of_block(part, inner)) for part in parts}

    def cut_dims(self, dims: int, cut: int | None) -> dict[str, int | None]:
        """Where each part is cut, if its matrix of ``dims`` dimensions is along ``cut``: a row's scale is whole."""
        of_blocks = None if self.group is None and cut == dims - 1 else cut
        return {"codes": cut, "scales": of_blocks, "zeros": of_blocks}

    def bytes_of_block(self, part: str, width: int) -> int:
        """How much of a part stands for a block, in rows of ``width`` values."""
        return {"codes": (self.group or width) * self.bits // 8, "scales": 2, "zeros": 1}[part]

    def encode(self, matrix: Tensor) -> Parts:
        """Of [..., out, in]. Raises ValueError if a value is NaN, or its block too wide for its scale."""
        rows = matrix.reshape(-1, matrix.shape[-1])
        found = [self._encode(rows[some].float()) for some in self._chunks(rows.shape, CHUNK)]
        return {
            part: torch.cat([each[part] for each in found]).view(shape) for part, shape in self.shapes(matrix.shape).items()
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix [..., out, in] that parts stand for."""
        codes = parts["codes"]
        out = codes.new_empty(*codes.shape[:-1], self.width(codes.shape[-1]), dtype=dtype)
        rows, flat = out.view(-1, out.shape[-1]), {part: t.flatten(0, -2) for part, t in parts.items()}
        scale_of = flat["scales"].view(self.scale_dtype).float().unsqueeze(-1)
        for some in self._chunks(rows.shape, CHUNK if codes.device.type == "cpu" else out.numel()):
            values = self._values(flat["codes"][some]).unflatten(-1, (scale_of.shape[1], -1))
            if self.has_zeros:
                values -= flat["zeros"][some].unsqueeze(-1)
            rows[some] = values.mul_(scale_of[some]).flatten(1)
        return out

    def _chunks(self, shape: Sequence[int], numbers: int) -> Iterator[slice]:
        """All rows, as many at a time as have about so many ``numbers``."""
        step = max(1, numbers // max(1, shape[1]))
        return (slice(first, first + step) for first in range(0, shape[0], step))

    def _encode(self, rows: Tensor) -> Parts:
        blocks = rows.unflatten(-1, (-1, self.group or rows.shape[-1]))
        scale, zero = self.grid(blocks)
        return self.parts(self.nearest(blocks, scale, zero).flatten(-2), scale, zero)

    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The scale of each block [..., group], as it is kept, and the code of its zero: [..., 1] each, in fp32.

        Raises:
            ValueError: a value is NaN, or the block too wide for its scale.
        """
        least, most = blocks.aminmax(dim=-1, keepdim=True)
        low, high = least.clamp(max=0), most.clamp(min=0)
        spread = high - low if self.has_zeros else torch.maximum(-low, high)
        scale = self.kept(spread / {"nf4": 1, "int8": 127}.get(self.kind, self.most))
        return scale, (-low / scale).round().clamp(0, self.most) if self.has_zeros else torch.full_like(scale, 128)

    def kept(self, scale: Tensor) -> Tensor:
        """A scale as its bits say it, in fp32. Raises ValueError as ``grid`` does."""
        bits = scale.to(self.scale_dtype)
        bits = bits.where(bits != 0, 1.0)  # of zeros, which stay zeros
        if not bits.isfinite().all():
            raise ValueError("NaN, infinite or too large values")
        return bits.float()

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes of what comes nearest to ``values``, uint8: a byte each."""
        if self.kind == "nf4":
            return torch.bucketize(values / scale, _middles(values.device)).to(torch.uint8)
        return ((values / scale).round() + zero).clamp(1 if self.kind == "int8" else 0, self.most).to(torch.uint8)

    def numbers(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What codes, a byte each, stand for, in fp32."""
        if self.kind == "nf4":
            return nf4_levels(codes.device)[codes.int()] * scale
        return (codes - zero) * scale

    def parts(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Parts:
        """Of rows [n, in] of codes, a byte each, and the grids [n, blocks, 1] that they are of."""
        parts = {"codes": packed(codes, self.bits), "scales": scale.to(self.scale_dtype).squeeze(-1).view(torch.uint8)}
        return parts | ({"zeros": zero.to(torch.uint8).squeeze(-1)} if self.has_zeros else {})

    def _values(self, codes: Tensor) -> Tensor:
        """What each code stands for before scale and zero, in fp32: of [n, bytes] as many as they hold."""
        if self.kind == "int8":
            return codes.float() - 128
        places = codes.int()
        if self.bits == 3:  # of three bytes 12 bits at a time
            first, second, third = places.view(len(codes), -1, 3).unbind(-1)
            places = torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], -1)
        several = _several(self.kind, codes.device).index_select(0, places.flatten())
        return several.view(torch.float32).view(len(codes), -1)


def get_codec(name: str) -> Codec:
    """The codec called ``name``: int8 (by rows), or one of BLOCKS, or nf4-32 and the like."""
    kind, given, size = name.partition("-")
    if kind not in BLOCKS and name != "int8":
        raise UserError(f"no matrix can be held as '{name}'{nearest(name, [*BLOCKS, 'int8'])}; nf4-32: blocks of 32")
    if name == "int8":
        return Codec(name, None)
    codec = Codec(kind, int(size) if size.isdecimal() else 0 if given else BLOCKS[kind])
    whole = _in_whole_bytes(codec.bits)
    if not codec.group or codec.group % whole:
        raise UserError(f"'{name}': a block has a multiple of {whole} values, whose codes of {codec.bits} bits fill bytes")
    return codec


def is_part(name: str) -> bool:
    """Whether a tensor is part of a quantised matrix, by its logical name."""
    return re.search(r"[._](codes|scales|zeros)$", name) is not None


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n], a byte each, of so many ``bits``: one after the other, as they are kept [..., n * bits / 8]."""
    together = _in_whole_bytes(bits)
    if together == 1:
        return codes
    places = torch.arange(together, device=codes.device)
    several = (codes.unflatten(-1, (-1, together)).int() << places * bits).sum(-1)
    return torch.stack([several >> 8 * n & 255 for n in range(together * bits // 8)], -1).flatten(-2).to(torch.uint8)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """What ``packed`` was given."""
    together = _in_whole_bytes(bits)
    several = codes.unflatten(-1, (-1, together * bits // 8)).int()
    whole = torch.stack([several[..., n] << 8 * n for n in range(several.shape[-1])]).sum(0, dtype=torch.int32)
    places = torch.arange(together, device=codes.device, dtype=torch.int32)
    return (whole.unsqueeze(-1) >> places * bits & (1 << bits) - 1).flatten(-2).to(torch.uint8)


def _in_whole_bytes(bits: int) -> int:
    """The least number of codes of so many bits that fill bytes."""
    return 8 // math.gcd(8, bits)


@functools.cache
def _several(kind: str, device: torch.device) -> Tensor:
    """What the codes in each byte stand for [256], or of three bits in twelve [4096]: numbers in fp32 side by side, which
    are looked up as one of another type."""
    bits = int(kind[-1])
    with torch.inference_mode(False):
        table = torch.tensor(NF4 if kind == "nf4" else range(2**bits), dtype=torch.float32, device=device)
        together = 12 if bits == 3 else 8
        places = torch.arange(2**together, device=device)
        several = torch.stack([table[places >> shift & 2**bits - 1] for shift in range(0, together, bits)], 1)
        return several.view(torch.float64 if several.shape[1] == 2 else torch.complex128).flatten()


@functools.cache
def _middles(device: torch.device) -> Tensor:
    """Between neighbours of NF4 [15]."""
    table = nf4_levels(device)
    with torch.inference_mode(False):
        return (table[1:] + table[:-1]) / 2


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """NF4 [16]."""
    with torch.inference_mode(False):
        return torch.tensor(NF4, device=device)
