"""Images in records: beside the text under ``image`` or ``images``, or within it as parts in OpenAI's form."""

import base64
from collections.abc import Mapping
from typing import Any

from PIL import Image

from accessory.data.fields import Fields, RecordError, whole_text
from accessory.visual.images import Picture

IMAGE = "<image>"
"""The mark for an image in a text, as in LLaVA's records."""


def read_images(record: Fields, *keys: str) -> tuple[Picture, ...]:
    """The images of a record whose text has already been read. ``keys``: further keys that may hold a path."""
    several = record.take("images")
    if several is not None and not isinstance(several, list | tuple):
        raise RecordError(f"{record.name('images')} must be a list of paths")
    beside = [(record.take(key), record.name(key)) for key in ("image", *keys)]
    beside += [(one, "an image") for one in several or ()]
    named = [_image(image, what) for image, what in beside if image is not None and image != ""]
    if named and record.images:
        raise RecordError("some images stand among the text and others beside it: which comes first is not known")
    return tuple(named or record.images)


def read_part(part: Fields, kind: str) -> None:
    """Add the image of a part of a turn to the images of its record; ``kind``: ``image_url`` or ``image``."""
    image = part.take(kind)
    if kind == "image_url" and isinstance(image, Mapping):
        inner = part.inside(image, part.where)
        inner.take("detail")  # the resolution to use; here the views of an image are fixed
        image = inner.take("url")
        inner.refuse_rest()
    if isinstance(image, Image.Image):
        part.images.append(image)
    elif image is not None:
        part.images.append(_image(image, part.where))
    elif kind == "image_url":
        raise RecordError(f"{part.where}: 'image_url' must be a text, or an object with the text 'url'")
    # else the image is under 'images', in the order of these parts


def _image(value: Any, what: str) -> Picture:
    """A path or data: URI. The bytes of a file, as tables hold them, become a data: URI."""
    if isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return f"data:;base64,{base64.b64encode(content).decode()}"
        value = value.get("path")
    return whole_text(value, what, "path")
