"""LLaMA2-Accessory's converted directories, in both layouts and any model-parallel size, ``.pth`` or ``.safetensors``.

DIR/consolidated.RR-of-MM.model.{pth,safetensors}   model-parallel rank RR of MM; every name has the prefix ``llma.``
DIR/config.json   DIR/meta.json
"""

import re
from collections.abc import Iterator
from pathlib import Path

from accessory.checkpoint.encoders import taken_out
from accessory.checkpoint.encoding import Encoding
from accessory.checkpoint.storage import TensorFile, index_file
from accessory.checkpoint.tiles import Directory, Tile
from accessory.config import read_mapping, write_json
from accessory.errors import UserError
from accessory.model.adapter import Adapter
from accessory.model.args import ModelArgs
from accessory.model.codecs import is_part
from accessory.model.logical import CONNECTOR, Adapters, LogicalModel
from accessory.model.moe.layouts import EXPERT, SPARSE, Layout, SparseLayout, get_layout
from accessory.model.visual import PresetName, VisualArgs
from accessory.settings import FileFormat

PREFIX = "llma."
_ADAPTED = re.compile(
    r"llma\.(layers\.\d+\.)(?:attention\.(w[qkvo])|feed_forward\.experts\.\d+\.(w[123]))\.(lora_a\.weight|bias)"
)


def file_name(rank: int, size: int, suffix: str) -> str:
    return f"consolidated.{rank:02d}-of-{size:02d}.model.{suffix}"


def rank_tiles(
    logical: LogicalModel, layout: Layout, rank: int, size: int, file: str, prefix: str = PREFIX
) -> Iterator[Tile]:
    """The tiles in the file of model-parallel rank ``rank`` of ``size``.

    The expert layout stores one matrix per expert, by its global number: ``experts.{e}.w1.weight``, and its adapter as
    ``experts.{e}.w1.lora_a.weight``, ``.lora_b.weight`` and ``.bias``. The sparse layout stores the slices of all experts in
    one matrix, ``w1 [E * F/mp, D]``, with w2 transposed to the same shape; it has no names for adapters. Parts of quantised
    matrices are ``experts.{e}.w1.codes`` or ``w1.codes``, never transposed: blocks lie along the rows.
    """
    for name, cut in logical.cuts(layout).items():
        region = cut.region(rank, size)
        owner, is_expert, tensor = name.partition(".experts.")
        if not is_expert:
            stored = name.removeprefix(CONNECTOR)
            yield Tile(name, region, file, prefix + (f"{name}.weight" if name.endswith(("lora_a", "lora_b")) else stored))
            continue
        weight, _, part = tensor.partition("_")  # w1, or w1_lora_a
        if isinstance(layout, SparseLayout):
            if part and not is_part(name):
                raise UserError(f"the files of the layout 'mixtral_sparse' have no place for {name}")
            encoding = Encoding("e d f -> (e f) d" if tensor == "w2" else "e f d -> (e f) d")
            yield Tile(name, region, file, f"{prefix}{owner}.{tensor.replace('_', '.')}", encoding)
            continue
        stored = f"{part}.weight" if part in ("lora_a", "lora_b") else part or "weight"
        for e in range(region[0].start, region[0].stop):
            key = f"{prefix}{owner}.experts.{e}.{weight}.{stored}"
            yield Tile(name, (slice(e, e + 1), *region[1:]), file, key, Encoding("e ... -> ..."))


class AccessoryDirectory(Directory):
    """A directory of the files above. The values of ``model-diff`` files are added to another checkpoint's weights."""

    def __init__(self, directory: Path, size: int, kind: str):
        self.directory, self.size, self.adds = directory, size, kind.startswith("model-diff")
        files = [f"consolidated.{rank:02d}-of-{size:02d}.{kind}" for rank in range(size)]
        indexed = {file: index_file(directory / file) for file in files}
        for rank, (file, content) in enumerate(indexed.items()):
            _check_rank(directory / file, content, rank, size)
        self.stored = {file: content.tensors for file, content in indexed.items()}
        self.encoders = [taken_out(tensors) for tensors in self.stored.values()][-1]  # each file has them whole
        self.layout = self._own_layout()
        self.visual = self._own_visual()
        self.format = self.layout.name

    @classmethod
    def find(cls, directory: Path) -> "AccessoryDirectory | None":
        found = set()
        for path in directory.iterdir():
            if match := re.fullmatch(r"consolidated\.\d\d-of-(\d\d)\.(model(?:-diff)?\.(?:pth|safetensors))", path.name):
                found.add((int(match[1]), match[2]))
        if len(found) > 1:
            kinds = ", ".join(f"of-{size:02d}.{kind}" for size, kind in sorted(found))
            raise UserError(f"{directory}: holds files of more than one checkpoint ({kinds}); keep one set")
        return cls(directory, *found.pop()) if found else None

    def adapters(self, base: LogicalModel) -> Adapters:
        """The adapters stored beside the weights (``mixtral_peft``). The files do not give a scaling."""
        ranks: dict[str, int] = {}
        biased: set[str] = set()
        for key, stored in (item for tensors in self.stored.values() for item in tensors.items()):
            if match := _ADAPTED.fullmatch(key):
                layer, attention, expert, part = match.groups()
                matrix = f"{layer}attention.{attention}.weight" if attention else f"{layer}feed_forward.experts.{expert}"
                if part == "bias":
                    biased.add(matrix)
                elif len(stored.shape) == 2:
                    ranks[matrix] = stored.shape[0]
        return {matrix: Adapter(rank=ranks.get(matrix, 0), bias=matrix in biased) for matrix in ranks.keys() | biased}

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        for rank, file in enumerate(self.stored):
            yield from rank_tiles(logical, self.layout, rank, self.size, file)

    def _own_layout(self) -> Layout:
        """The layout in meta.json; if there is none, by the tensors' names."""
        if (named := self._llama_type()) is not None:
            return get_layout(named)
        fused = any(re.search(r"\.feed_forward\.w1$", key) for keys in self.stored.values() for key in keys)
        return SPARSE if fused else EXPERT

    def _llama_type(self) -> str | None:
        meta = self.directory / "meta.json"
        named = read_mapping(meta).get("llama_type") if meta.is_file() else None
        if not (named is None or isinstance(named, str)):
            raise UserError(f"{meta}: llama_type is {named!r}, expected a name")
        return named

    def _own_visual(self) -> VisualArgs | None:
        """The image settings, by the names of the connector's tensors; meta.json tells ens5 from ens."""
        keys = next(iter(self.stored.values()))
        if f"{PREFIX}visual_proj.0.weight" in keys:
            return VisualArgs("ens5" if (self._llama_type() or "").endswith("ens5") else "ens")
        presets: dict[str, PresetName] = {
            "qformer_proj.0": "qformer",
            "clip_proj": "clip",
            "multi_modal_projector.linear_1": "llava",
        }
        return next((VisualArgs(preset) for name, preset in presets.items() if f"{PREFIX}{name}.weight" in keys), None)


def _check_rank(path: Path, content: TensorFile, rank: int, size: int) -> None:
    """Check the rank noted in a file that this program wrote. Nothing else shows if two files of the sparse layout were
    swapped."""
    said = content.notes.get("rank", str(rank)), content.notes.get("size", str(size))
    if said != (str(rank), str(size)):
        raise UserError(
            f"{path}: its name says model-parallel rank {rank} of {size}, but it was written as rank {said[0]} of "
            f"{said[1]}: give the files their own names back"
        )


def planned_tiles(logical: LogicalModel, layout: Layout, size: int, suffix: FileFormat) -> Iterator[Tile]:
    """The tiles of a whole directory, for writing."""
    for rank in range(size):
        yield from rank_tiles(logical, layout, rank, size, file_name(rank, size, suffix))


def check_suffix(args: ModelArgs, suffix: FileFormat) -> None:
    """Raise UserError if LLaMA2-Accessory would read files of this model, but compute something else."""
    if args.quantise and suffix == "pth":
        raise UserError("LLaMA2-Accessory's .pth files have no place for quantised matrices: write safetensors")
    if args.moe.score_bias and suffix == "pth":
        raise UserError(
            "LLaMA2-Accessory's .pth files have no place for the routers' score biases (train.balance: bias), and it "
            "would choose other experts: write safetensors"
        )


def rank_notes(rank: int, size: int) -> dict[str, str]:
    """A file's notes: its rank and the number of ranks."""
    return {"rank": str(rank), "size": str(size)}


def write_description(directory: Path, args: ModelArgs, layout: Layout, biased: bool = False) -> None:
    """Write config.json and meta.json. ``biased``: the files hold biases, as for ``mixtral_peft``."""
    said = args.to_dict() | ({"bias_tuning": True} if biased else {})
    named = "mixtral_peft" if biased else layout.name
    if args.visual in (VisualArgs("ens"), VisualArgs("ens5")) and isinstance(layout, SparseLayout):
        named += f"_{args.visual.preset}"
    if args.visual == VisualArgs("clip") or named.endswith(("ens", "ens5")):
        del said["visual"]  # names and meta.json show it, and LLaMA2-Accessory has no such key
    write_json(directory / "config.json", said)
    write_json(directory / "meta.json", {"llama_type": named})
