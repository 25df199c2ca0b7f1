"""What a model is asked: token ids, and the images whose places are among them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from accessory.data.fields import RecordError, whole_text
from accessory.data.placement import PLACE, encode_placed, images_set_apart
from accessory.data.records import Document, as_document, read_question
from accessory.data.templates import Template
from accessory.data.tokenizer import BOS, EOS, Segment, Tokenizer
from accessory.errors import UserError
from accessory.model.visual import VisualArgs
from accessory.visual.images import Picture, open_image
from accessory.visual.views import CLIP_MEAN, CLIP_STD, padded_resize

Shown = Sequence[Any] | Tensor | None
"""For each prompt an image, a list of them, or None; or [prompts, 3, size, size], one for each."""
BLIND = "images are given, and this model reads text only"


class Prompt(NamedTuple):
    """Token ids, of which each image has PLACE in its places, and the images in their order: uint8 [3, size, size]."""

    tokens: list[int]
    images: tuple[Tensor, ...] = ()


def read_image(image: Picture | Tensor, visual: VisualArgs) -> Tensor:
    """uint8 [3, size, size] of a picture, or of what LLaMA2-Accessory's transforms make of one.

    Raises:
        UserError: it cannot be read, or is a tensor of another shape.
    """
    if not isinstance(image, Tensor):
        return padded_resize(open_image(image), visual.size)
    expected = (3, visual.size, visual.size)
    if image.shape != expected:
        raise UserError(f"an image's tensor must be {list(expected)} for this model, found {list(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point():
        raise UserError(f"an image's tensor must be uint8, or normalised as CLIP's are, found {image.dtype}")
    mean, std = (torch.tensor(some, dtype=torch.float64).view(3, 1, 1) for some in (CLIP_MEAN, CLIP_STD))
    return ((image.double().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def ask_for(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    tokenizer: Tokenizer,
    visual: VisualArgs | None,
) -> Prompt:
    """What asks for the next answer of a conversation; see ``MetaModel.asked``."""
    try:
        question = read_question(messages, tools)
        record, images = images_set_apart(as_document(question) if template.documents else question, visual)
        tokens, _ = encode_placed(tokenizer, template.prompt(record), len(images), visual)
    except RecordError as error:  # there is no mix whose entry could do anything about it
        raise UserError(error.problem) from error
    return Prompt(tokens, tuple(read_image(image, visual) for image in images if visual))


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Any], images: Shown, visual: VisualArgs | None, bos: bool, eos: bool
) -> list[Prompt]:
    """The tokens of texts (or of token ids, which are taken as they are) with the images that are shown with each.

    Args:
        visual: how the model sees; None: it does not.
    """
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if not listed or not prompts or not all(isinstance(one, Iterable) and not isinstance(one, bytes) for one in prompts):
        raise UserError("expected a list of texts or of lists of token ids, with one at least")
    if images is None:
        images = [None] * len(prompts)
    if isinstance(images, str | bytes | Path | Image.Image) or len(images) != len(prompts):
        raise UserError(
            f"images must be a list with an entry for each of the {len(prompts)} prompts: an image, a list or None"
        )
    return [_encode(tokenizer, prompt, _several(own), visual, bos, eos) for prompt, own in zip(prompts, images, strict=True)]


def _several(images: Any) -> list[Picture | Tensor]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _encode(
    tokenizer: Tokenizer, prompt: Any, images: list[Picture | Tensor], visual: VisualArgs | None, bos: bool, eos: bool
) -> Prompt:
    if images and visual is None:
        raise UserError(BLIND)
    if isinstance(prompt, str):
        whole_text(prompt, "a prompt")
    if not visual:
        return Prompt(tokenizer.encode(prompt, bos, eos) if isinstance(prompt, str) else list(prompt))
    pixels = tuple(read_image(image, visual) for image in images)
    if not isinstance(prompt, str):
        return Prompt(list(prompt), pixels)
    # what shows where the images are is read as in records; the images themselves are here
    record, _ = images_set_apart(Document(prompt, ("",) * len(images)), visual)
    assert isinstance(record, Document)
    segments = [Segment(BOS, False, special=True)] * bos + [Segment(record.text, False)]
    segments += [Segment(EOS, False, special=True)] * eos
    return Prompt(encode_placed(tokenizer, segments, len(images), visual)[0], pixels)


def check_tokens(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise UserError unless there are some, all of them the model's own, or places of images."""
    if not tokens:
        raise UserError(f"{what} must have at least one token")
    if not all(0 <= token < vocab_size or token == PLACE for token in tokens):
        raise UserError(f"{what} has tokens from 0 to {vocab_size - 1}")


def check_places(tokens: Sequence[int], images: int, visual: VisualArgs | None) -> None:
    """Raise UserError unless each of so many images has its places among ``tokens``."""
    if images and not visual:
        raise UserError(BLIND)
    there, needed = list(tokens).count(PLACE), images * visual.words if visual else 0
    if there != needed:
        raise UserError(f"a prompt with {images} images must have {needed} places for them, found {there}")
