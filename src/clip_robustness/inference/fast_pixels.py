"""The opt-in fast path of the pixel cache: libjpeg-turbo straight to an array, and torch's uint8 resize.

Decoding gives PIL's own bytes. The resize filters as PIL's does, in 16-bit instead of 32-bit fixed point, so a value
may come out one level higher or lower. Two roundings can add up: of 12,000 resizes of noise, stripes and smooth
pictures within the limits below, 13 had a value that is two levels apart, and none three. What is outside of the
limits is left to the exact path, and a cache's manifest says what was found on its own images.
Licences: simplejpeg MIT, with libjpeg-turbo (BSD-style) inside; torch BSD.
"""

import numpy as np
import simplejpeg
import torch
from PIL import Image

from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.images import crop, crop_starts, decode, preprocess, resized_size

MODES = ("bilinear", "bicubic")  # torch has no Lanczos for uint8, and breaks ties of `nearest` otherwise
SHRINK = 1.25  # below this factor on either side two levels become more frequent, and enlarging, common


def preprocess_fast(data: bytes, archive: str, image_id: str, spec: Preprocessing) -> np.ndarray:
    """`preprocess` of `decode`, by the fast path where it takes this image, else exactly."""
    whole = decode_jpeg(data)
    if whole is None:
        return preprocess(decode(data, archive, image_id), spec)
    height, width = whole.shape[:2]
    inner = whole[spec.border : height - spec.border, spec.border : width - spec.border]
    resized = None
    if inner.size:
        size = resized_size(inner.shape[1], inner.shape[0], spec)
        resized = resize(inner, size, spec.interpolation)
    if resized is None:
        return preprocess(Image.fromarray(whole), spec)
    if spec.crop is None:
        return resized
    top, left = crop_starts(resized.shape[1], resized.shape[0], spec.crop)
    if min(top, left) < 0:
        return np.array(crop(Image.fromarray(resized), spec))
    return resized[top : top + spec.crop[0], left : left + spec.crop[1]]


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """JPEG -> RGB uint8 [h, w, 3], equal to PIL's, or None for what is left to PIL: other formats, CMYK, faults."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # a fault, which PIL words or tolerates as on the exact path
        return None


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray | None:
    """uint8 [h, w, 3] -> uint8 [height, width, 3] of `size` = (width, height), or None where it would not be close."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    if interpolation not in MODES or not _is_close(width, height, *size):
        return None
    channels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels, size[::-1], mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _is_close(width: int, height: int, new_width: int, new_height: int) -> bool:
    if min(new_width, new_height) < 2:  # torch 2.14 takes such an image for another memory layout
        return False
    if width < SHRINK * new_width or height < SHRINK * new_height:
        return False
    return height - new_height <= 2 * (width - new_width)  # else Pillow 13 filters the columns first: other roundings
