"""Pictures: what is read of them, to the bit, and what is refused, in one sentence each."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import data_uri, file_bytes, noise
from PIL import Image

from accessory.visual.images import MOST_BYTES, ImageError, check_image, open_image
from accessory.visual.views import cut_views, normalised, padded_resize


def png_claiming(width, height):
    """A PNG of some bytes whose header claims so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# of LLaMA2-Accessory's padded_resize, which torchvision's transforms do (CLIP's normalisation included), in fp32
GOLDEN = {
    (61, 37, 56): "45de7443e3e84470",
    (61, 37, 224): "57c0cf2ac126d879",
    (31, 90, 56): "9cb6f94d586814e5",
    (31, 90, 224): "0d1ace34b79e6721",
}


@pytest.mark.parametrize(("width", "height", "size"), GOLDEN)
def test_padding_and_resizing_are_the_references_to_the_bit(width, height, size):
    pixels = padded_resize(noise(width, height), size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    digest = hashlib.sha256(normalised(pixels).numpy().tobytes()).hexdigest()[:16]
    assert digest == GOLDEN[width, height, size]


def test_views_are_the_whole_and_then_its_quarters():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    views = cut_views(x, 5, 4)
    assert views.shape == (2, 5, 3, 4, 4)
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)], 1):
        assert torch.equal(views[:, number], x[:, :, row : row + 4, column : column + 4])
    expected = torch.nn.functional.interpolate(x, (4, 4), mode="bicubic")
    assert torch.equal(views[:, 0], expected) and torch.equal(cut_views(x, 1, 4)[:, 0], expected)
    assert torch.equal(cut_views(x, 1, 8)[:, 0], x)
    x = x / 7  # as LLaMA2-Accessory does it: in half precision, but for quarters that are not resized
    rounded = cut_views(x, 5, 4, torch.float16)
    assert torch.equal(rounded[:, 0], torch.nn.functional.interpolate(x.half(), (4, 4), mode="bicubic").float())
    assert torch.equal(rounded[:, 1], x[:, :, :4, :4])
    assert torch.equal(cut_views(x, 1, 8, torch.float16)[:, 0], x.half().float())


def seen(image):
    return np.asarray(open_image(image))


def test_what_is_seen_of_a_picture(tmp_path):
    image = noise(6, 4)
    expected = np.asarray(image)
    (tmp_path / "a.png").write_bytes(file_bytes(image))
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), file_bytes(image), data_uri(image), image):
        assert np.array_equal(seen(picture), expected)
    for kind in ("BMP", "WEBP"):
        assert np.array_equal(seen(file_bytes(image, kind, **{"lossless": True} if kind == "WEBP" else {})), expected)
    # what is transparent is white, and not the colour that is hidden there
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (seen(file_bytes(hidden)) == 255).all()
    assert (seen(file_bytes(Image.new("LA", (4, 4), (9, 0)))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    assert (seen(file_bytes(palette, transparency=0)) == 255).all() and (seen(file_bytes(palette)) == 0).all()
    # as it was held
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(seen(file_bytes(image, exif=exif)), np.rot90(expected, -1))
    # 16 bits of grey, of which Pillow would make black and white
    grey = Image.fromarray(np.full((4, 4), 0x4080, np.uint16))
    assert (seen(file_bytes(grey)) == 0x40).all()
    assert seen(file_bytes(noise(6, 4, "CMYK"), "JPEG")).shape == (4, 6, 3)
    assert (seen(file_bytes(Image.new("1", (4, 4), 1))) == 255).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("black", "white")]
    assert (seen(file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 0).all()


BROKEN = {
    "cut off": (lambda: file_bytes(noise(64, 64))[:2000], "damaged or cut off"),
    "no image": (lambda: b"hello " * 9, "no image, or of another format than PNG, JPEG, WEBP, GIF, BMP"),
    "of another format": (lambda: file_bytes(noise(8, 8), "TIFF"), "of another format than PNG"),
    "a bomb": (lambda: png_claiming(10_000, 10_000), "10000 x 10000 pixels are too large: at most 50 million"),
    "a larger bomb": (lambda: png_claiming(60_000, 60_000), "too large: at most 50 million pixels"),
    "a strip": (lambda: png_claiming(15_000, 2), "15000 x 2 pixels are too large"),
    "a point": (lambda: file_bytes(noise(1, 1)), "1 x 1 pixels: there is nothing to be seen"),
    "a large file": (lambda: bytes(MOST_BYTES + 2**20), "33 MiB; at most 32 are read"),
    "a large URI": (lambda: "data:image/png;base64," + "A" * (MOST_BYTES // 3 * 4 + 2**21), "at most 32 are read"),
    "no base64": (lambda: "data:image/png;base64,?", "not base64"),
    "base64 in lines": (lambda: "data:image/png;base64,AAAA\nAAAA", "not base64"),
    "an array": (lambda: np.zeros((4, 4, 3), np.uint8), "a ndarray is none: give a path, a data: URI, bytes, or an image"),
    "a URI of another kind": (lambda: "data:image/svg+xml,<svg/>", "expected data:image/png;base64,"),
    "on the web": (lambda: "https://a.b/c.png", "images on the web are not fetched: download it, and name the file"),
    "nowhere": (lambda: "/no/where.png", "image /no/where.png: no such file"),
    "a folder": (lambda: "/tmp", "image /tmp: a directory"),
    "a large image of Pillow's": (lambda: Image.new("1", (20_000, 20)), "20000 x 20 pixels are too large"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_seen_is_told_in_a_sentence(name):
    picture, message = BROKEN[name]
    with pytest.raises(ImageError) as told:
        open_image(picture())
    assert message in str(told.value) and len(str(told.value)) < 400 and "\n" not in str(told.value)


def test_a_header_tells_without_the_pixels(monkeypatch):
    """All but what is damaged in its middle."""
    pictures = {message: picture() for name, (picture, message) in BROKEN.items() if name != "cut off"}
    good = file_bytes(noise(8, 8))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels are read"))
    check_image(good)
    for message, picture in pictures.items():
        with pytest.raises(ImageError) as told:
            check_image(picture)
        assert message in str(told.value)
