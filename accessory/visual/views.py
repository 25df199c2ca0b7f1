"""An image in the form for encoders: a square, and the views cut from it."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

BACKGROUND = (122, 116, 104)
"""The colour that pads an image to a square: CLIP's mean, rounded as in LLaMA2-Accessory."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def padded_resize(image: Image.Image, size: int) -> Tensor:
    """Pad an image in RGB to a square with BACKGROUND, with the image in the middle, and resize that (bicubic): uint8
    [3, size, size]."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(square.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., 3, S, S] -> normalised for CLIP, in ``dtype``."""
    mean, std = (torch.tensor(some, dtype=dtype, device=pixels.device).view(3, 1, 1) for some in (CLIP_MEAN, CLIP_STD))
    return (pixels.to(dtype) / 255 - mean) / std


def cut_views(pixels: Tensor, views: int, size: int, rounding: torch.dtype | None = None) -> Tensor:
    """[N, 3, S, S] of ``normalised`` -> [N, views, 3, size, size].

    Args:
        views: 1: the whole; 5: the whole, then its quarters row by row from the top left.
        rounding: the dtype to which pixels are rounded before and after resizing; LLaMA2-Accessory uses torch.float16.
    """

    def resized(to: int) -> Tensor:
        if to == pixels.shape[-1]:
            return pixels
        x = pixels if rounding is None else pixels.to(rounding)
        return F.interpolate(x, (to, to), mode="bicubic").to(pixels.dtype)

    whole = resized(size) if rounding is None else resized(size).to(rounding).to(pixels.dtype)
    if views == 1:
        return whole[:, None]
    quarters = resized(2 * size).unflatten(3, (2, size)).unflatten(2, (2, size))  # [N, 3, 2, size, 2, size]
    return torch.cat([whole[:, None], quarters.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)], 1)
