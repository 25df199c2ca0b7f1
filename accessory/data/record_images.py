"""Images in records: beside the text under ``image`` or ``images``, or among it as parts in OpenAI's form."""

import base64
from collections.abc import Mapping
from typing import Any

from PIL import Image

from accessory.data.fields import Fields, RecordError, whole_text
from accessory.visual.images import Picture

IMAGE = "<image>"
"""Where an image stands in a text, as LLaVA's records say it."""


def read_images(record: Fields, *keys: str) -> tuple[Picture, ...]:
    """The images of a record, whose text has been read. ``keys``: where else a path may stand."""
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
    """Add what a part of a turn shows to the images of its record; ``kind``: ``image_url``, or ``image``."""
    image = part.take(kind)
    if kind == "image_url" and isinstance(image, Mapping):
        inner = part.inside(image, part.where)
        inner.take("detail")  # how closely to look, which a model of fixed views does not ask
        image = inner.take("url")
        inner.refuse_rest()
    if isinstance(image, Image.Image):
        part.images.append(image)
    elif image is not None:
        part.images.append(_image(image, part.where))
    elif kind == "image_url":
        raise RecordError(f"{part.where}: 'image_url' must be a text, or an object with the text 'url'")
    # else it stands under 'images', in the order of these parts


def _image(value: Any, what: str) -> Picture:
    """A path or data: URI; of a file's bytes, as tables hold them, the latter."""
    if isinstance(value, Mapping):
        if isinstance(content := value.get("bytes"), bytes):
            return f"data:;base64,{base64.b64encode(content).decode()}"
        value = value.get("path")
    return whole_text(value, what, "path")
