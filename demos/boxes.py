"""Places of objects in a model's answer: ``<p>name</p>[x1,y1,x2,y2;...]``, in fractions of the padded square image."""

import re
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = ("red", "blue", "green", "orange", "purple", "brown")
_NUMBER = r"\s*\d*\.?\d+\s*"
_PLACE = rf"{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?"
_FOUND = re.compile(rf"<p>(.*?)</p>\s*\[({_PLACE}(?:;{_PLACE})*)\]", re.DOTALL)


class Place(NamedTuple):
    """The name of an object, and its box (x1, y1, x2, y2) or point (x, y)."""

    name: str
    at: tuple[float, ...]


def places_in(text: str) -> list[Place]:
    """The places in a text, in fractions of the square."""
    return [
        Place(name.strip(), tuple(map(float, place.split(","))))
        for name, places in _FOUND.findall(text)
        for place in places.split(";")
    ]


def in_image(at: tuple[float, ...], width: int, height: int) -> list[float]:
    """The pixel coordinates of a place, in an image of this size that was padded to a square."""
    side = max(width, height)
    begins = (side - width) // 2, (side - height) // 2
    return [
        min(max(value * side - begins[axis], 0), (width, height)[axis] - 1)
        for axis, value in zip((0, 1) * 2, at, strict=False)
    ]


def drawn(image: Image.Image, text: str) -> Image.Image | None:
    """A copy of the image with the text's places drawn into it; None if there are none."""
    places = places_in(text)
    if not places:
        return None
    image = image.copy()
    names = list(dict.fromkeys(place.name for place in places))
    pen, line = ImageDraw.Draw(image), max(2, max(image.size) // 250)
    for place in places:
        colour = COLOURS[names.index(place.name) % len(COLOURS)]
        pixels = in_image(place.at, *image.size)
        x, y, *_ = pixels
        if len(pixels) == 4:
            left, right = sorted(pixels[::2])
            top, bottom = sorted(pixels[1::2])
            pen.rectangle((left, top, right, bottom), outline=colour, width=line)
            x, y = left, top
        else:
            pen.ellipse((x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line), fill=colour)
        pen.text((x + line + 1, y + line), place.name, fill=colour)
    return image
