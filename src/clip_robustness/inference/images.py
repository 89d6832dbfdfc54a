"""One image: decoded, resized and cropped, to the last bit as torchvision does it with PIL.

Decoding is PIL's, converted to RGB first: grey, palette, CMYK, 16-bit and alpha become what torchvision's
loader, and so every library that evaluates on folders of images, feeds to its transforms. EXIF orientation
is not applied, as neither open_clip nor timm does. Pillow from version 13 on filters the columns of tall images
first: their bicubic pixels differ from those of older versions, and the manifest of a cache names the version.
"""

import io as bytes_io

import numpy as np
from PIL import Image

from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing

# What data sets hold. Others, such as PostScript, would start programs of the machine.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
LARGEST = 1 << 28  # pixels, which take 1 GB
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(data: bytes, archive: str, image_id: str) -> Image.Image:
    """Encoded bytes -> RGB image. Errors: `InputError` that names archive and image, whatever is wrong with it."""
    try:
        with Image.open(bytes_io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("RGB")
    except MemoryError:  # no fault of the image, which must not be left out for it
        raise
    except Exception as error:  # Pillow raises a dozen types for broken files, SyntaxError and IndexError too
        fault = "zero bytes" if not data else str(error).partition("<_io")[0].strip() or type(error).__name__
        raise InputError(f"{archive}, image '{image_id}': cannot decode it ({fault})") from None


def preprocess(image: Image.Image, spec: Preprocessing) -> np.ndarray:
    """RGB image -> uint8 [h, w, 3] by the pixel part of `spec`, equal to torchvision's Resize and CenterCrop.

    Source: torchvision.transforms.functional, PIL back end (which always filters when it shrinks).
    """
    width, height = image.size
    if spec.border:
        if min(width, height) <= 2 * spec.border:
            raise InputError(f"{width}x{height} px have nothing inside a border of {spec.border} px")
        image = image.crop((spec.border, spec.border, width - spec.border, height - spec.border))
    size = resized_size(*image.size, spec)
    if size != image.size:
        image = image.resize(size, RESAMPLING[spec.interpolation])
    return np.array(crop(image, spec))


def resized_size(width: int, height: int, spec: Preprocessing) -> tuple[int, int]:
    """(width, height) that `spec` resizes to. Errors: `InputError` for one that grows beyond LARGEST."""
    if spec.squash is not None:
        return spec.squash[1], spec.squash[0]
    if spec.shorter_side is None:
        return width, height
    short, long = sorted((width, height))
    longer_side = int(spec.shorter_side * long / short)
    if spec.shorter_side * longer_side > LARGEST:
        raise InputError(f"{width}x{height} px would be resized to {spec.shorter_side} x {longer_side:,}")
    return (spec.shorter_side, longer_side) if width <= height else (longer_side, spec.shorter_side)


def crop(image: Image.Image, spec: Preprocessing) -> Image.Image:
    if spec.crop is None:
        return image
    top, left = crop_starts(*image.size, spec.crop)
    return image.crop((left, top, left + spec.crop[1], top + spec.crop[0]))  # black outside the image


def crop_starts(width: int, height: int, crop: tuple[int, int]) -> tuple[int, int]:
    return _crop_start(height, crop[0]), _crop_start(width, crop[1])


def _crop_start(have: int, want: int) -> int:
    # Python rounds halves to even and torchvision pads the smaller half first: both decide the last pixel.
    return -((want - have) // 2) if want > have else round((have - want) / 2.0)
