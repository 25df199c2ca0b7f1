"""The files of a visual model's frozen encoders.

visual.safetensors   every tensor whole, under LLaMA2-Accessory's names without ``llma.``
visual.json          the ``visual`` section of config.json, in a directory without a model

Encoders are also read from LLaMA2-Accessory's own directories, where each rank's file holds all of them, and from
transformers', under ``vision_tower.``. This program writes them to a file of their own, which a run links into each save.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from accessory.checkpoint.storage import Stored, TensorWriter, index_file, lay_out
from accessory.checkpoint.tiles import Directory, Tile, TileReader
from accessory.config import from_mapping, read_mapping
from accessory.errors import UserError
from accessory.files import replacing
from accessory.model.logical import LogicalModel, whole_region
from accessory.model.visual import VisualArgs
from accessory.visual.vision import Vision, vision_shapes

FILE, DESCRIPTION = "visual.safetensors", "visual.json"
_OWN = re.compile(r"(?:llma\.)?((?:clip|openclip_convnext_xxl|dinov2_vitg14|qformer|siglip)\..+)")
_UNUSED = re.compile(
    r"clip\.(positional_embedding|text_projection|logit_scale|attn_mask|(token_embedding|ln_final|transformer)\..*)"
    r"|dinov2_vitg14\.mask_token|qformer\..*position_ids"
)
"""Tensors in the reference's files that belong to the unused halves of the encoders."""


class EncodersDirectory(Directory):
    """A directory of the two files above, without a model."""

    format = "visual"

    def __init__(self, directory: Path):
        self.directory, self.stored = directory, {}
        if not (directory / DESCRIPTION).is_file():
            raise UserError(f"{directory}: {FILE} stands there without {DESCRIPTION}, which says how a model sees with it")
        self.visual = from_mapping(VisualArgs, read_mapping(directory / DESCRIPTION), str(directory / DESCRIPTION))

    @classmethod
    def find(cls, directory: Path) -> "EncodersDirectory | None":
        return cls(directory) if (directory / FILE).is_file() else None

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        return iter(())


def taken_out(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Move the encoders' tensors out of ``tensors``. Unused ones are removed and left out of the result."""
    found = {key: match[1] for key in tensors if (match := _OWN.fullmatch(key))}
    return {name: stored for key, name in found.items() if (stored := tensors.pop(key)) and not _UNUSED.fullmatch(name)}


def encoder_reader(directory: Directory, visual: VisualArgs) -> TileReader | None:
    """A directory's encoders as a source, if it has any.

    Raises:
        UserError: they do not fit ``visual``.
    """
    path = directory.directory / FILE
    if not directory.encoders and not path.is_file():
        return None
    stored = directory.encoders or index_file(path).tensors
    tiles = in_transformers(visual) if directory.format == "hf" and directory.encoders else as_they_are(visual)
    reader = TileReader(str(path if not directory.encoders else directory.directory), tiles, {"": stored})
    for problem in reader.problems(partial=False, most=2):
        raise UserError(f"{problem}: does visual of config.json describe these encoders?")
    return reader


def as_they_are(visual: VisualArgs) -> Iterator[Tile]:
    """The tiles of encoders under LLaMA2-Accessory's names."""
    for name, shape in vision_shapes(visual).items():
        yield Tile(name, whole_region(shape), "", name)


_IN_TRANSFORMERS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    ".attn.": ".self_attn.",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


def in_transformers(visual: VisualArgs) -> Iterator[Tile]:
    """The tiles of CLIP or SigLIP under transformers' names without ``vision_tower.``, with separate q, k and v."""
    for name, shape in vision_shapes(visual).items():
        key = name.removeprefix("clip.visual.").removeprefix("siglip.")
        for ours, theirs in _IN_TRANSFORMERS.items():
            key = key.replace(ours, theirs)
        before, stacked, part = key.partition("in_proj_")
        if not stacked:
            yield Tile(name, whole_region(shape), "", key)
            continue
        each = shape[0] // 3
        for number, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(number * each, (number + 1) * each)
            yield Tile(name, (rows, *whole_region(shape)[1:]), "", f"{before}{projection}.{part}")


def write_encoders(path: Path, vision: Vision, dtype: torch.dtype) -> None:
    """Write a visual.safetensors, one tensor after the other."""
    with replacing(path) as unfinished:  # other directories may have links to the existing file
        lay_out(unfinished, {name: (dtype, tensor.shape) for name, tensor in vision.tensors()}, {})
        with TensorWriter(unfinished) as file:
            for name, tensor in vision.tensors():
                file.write(name, tensor.to("cpu", dtype))
