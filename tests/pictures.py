"""Pictures for the tests, and data that shows them."""

import base64
import io

import numpy as np
from PIL import Image


def noise(width, height, mode="RGB", seed=0):
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if shape[2] == 1 else values, mode)


def file_bytes(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def data_uri(image, kind="PNG"):
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file_bytes(image, kind)).decode()}"
