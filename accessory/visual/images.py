"""Opens images as RGB. A file that is no image or is too large is refused by its header, before pixels are read."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from accessory.errors import UserError
from accessory.files import check_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats that are read. Pillow knows many more, but those are used more often for attacks than for pictures."""
MOST_BYTES = 32 * 2**20
"""The largest file."""
MOST_PIXELS, MOST_SQUARE = 50_000_000, 200_000_000
"""The most pixels of an image, and of the square that it is padded to, which for a long strip has many more."""

Picture = str | Path | bytes | Image.Image
"""A path, a data: URI, the bytes of a file, or an image of Pillow's."""


class ImageError(UserError):
    """An image that cannot be used; the message names it.

    Attributes:
        file: its path; None: it is not from a file.
    """

    def __init__(self, reason: str, file: Path | None = None):
        super().__init__(reason)
        self.file = file


def is_data_uri(name: str) -> bool:
    return name[:5].lower() == "data:"


def is_on_the_web(name: str) -> bool:
    return re.match("https?:", name, re.IGNORECASE) is not None


def shortened(name: str) -> str:
    """An image's name, cut for messages: a data: URI holds the whole image."""
    name = name if len(name) <= 100 else f"{name[:100]}..."
    return name.replace("\n", " ")


def check_image(picture: Picture) -> None:
    """Raise ImageError if its header already shows that it cannot be used."""
    with _naming(picture):
        _header(picture)


def open_image(picture: Picture) -> Image.Image:
    """The picture in RGB: turned as its EXIF says, transparent parts on white, and the first frame of an animation.

    Raises:
        ImageError: it does not exist, is no image of FORMATS, is too large, or is damaged.
    """
    with _naming(picture):
        image = _header(picture)
        image.seek(0)
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def _naming(picture: Picture) -> Iterator[None]:
    """Turn any error inside into an ImageError that names ``picture``: decoders of damaged files raise all kinds."""
    name, file = "the image", None
    if isinstance(picture, str | Path):
        name = f"image {shortened(str(picture))}"
        file = None if is_data_uri(str(picture)) else Path(picture)
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}", file) from error
    except UserError as error:  # it names the file
        raise ImageError(f"image {str(error).replace(str(picture), shortened(str(picture)))}", file) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: no image, or of another format than {', '.join(FORMATS)}", file) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {_TOO_LARGE}", file) from error
    except Exception as error:
        raise ImageError(f"{name}: damaged or cut off ({_one_line(error)})", file) from error


_TOO_LARGE = f"too large: at most {MOST_PIXELS // 10**6} million pixels are read, {MOST_SQUARE // 10**6} in its square"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _header(picture: Picture) -> Image.Image:
    """The image, before its pixels are read."""
    if isinstance(picture, str) and is_data_uri(picture):
        picture = _decoded(picture)
    if isinstance(picture, Image.Image):
        image = picture
    elif isinstance(picture, bytes):
        _check_bytes(len(picture))
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
    elif not isinstance(picture, str | Path):
        raise ImageError(f"a {type(picture).__name__} is none: give a path, a data: URI, bytes, or an image of Pillow's")
    elif is_on_the_web(str(picture)):
        raise ImageError("images on the web are not fetched: download it, and name the file")
    else:
        _check_bytes(check_file(picture, "an image").stat().st_size)
        image = Image.open(picture, formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) ** 2 > MOST_SQUARE:
        raise ImageError(f"{width} x {height} pixels are {_TOO_LARGE}")
    if min(width, height) < 2:
        raise ImageError(f"{width} x {height} pixels: there is nothing to be seen")
    return image


def _check_bytes(size: int) -> None:
    if size > MOST_BYTES:
        raise ImageError(f"{size / 2**20:.0f} MiB; at most {MOST_BYTES / 2**20:.0f} are read")


def _decoded(uri: str) -> bytes:
    """The bytes in a data: URI."""
    head, comma, text = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("expected data:image/png;base64, and the image's bytes so encoded")
    _check_bytes(len(text) * 3 // 4)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ImageError(f"not base64: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:  # else the hidden colours of transparent pixels would show
        above = image.convert("RGBA")
        image = Image.new("RGBA", above.size, "white")
        image.alpha_composite(above)
    elif image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
