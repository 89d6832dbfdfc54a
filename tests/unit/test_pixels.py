from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference import images
from tests.unit.samples import broken_images, encoded, picture

SIZES = [(500, 375), (375, 500), (333, 251), (251, 333), (224, 224), (225, 224), (100, 7), (1, 40), (40, 1), (3, 5)]


def ours(image: Image.Image, spec: str) -> np.ndarray:
    parsed = Preprocessing.parse(spec)
    result = images.preprocess(image, parsed)
    assert result.dtype == np.uint8
    assert result.shape == (*parsed.size, 3)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("spec", "squash", "side", "crop", "mode"),
    [
        ("resize(224,bicubic)|center_crop(224)", False, 224, 224, "bicubic"),
        ("resize(248,bicubic)|center_crop(224)", False, 248, 224, "bicubic"),
        ("resize(37,bilinear)|center_crop(32x36)", False, 37, (32, 36), "bilinear"),
        ("resize(31,lanczos)|center_crop(40)", False, 31, 40, "lanczos"),
        ("resize(32,bicubic)|center_crop(51x30)", False, 32, (51, 30), "bicubic"),
        ("resize(64x48,bicubic)", True, (64, 48), None, "bicubic"),
        ("resize(64x48,nearest)|center_crop(33x48)", True, (64, 48), (33, 48), "nearest"),
    ],
)
def test_equals_torchvision_to_the_last_bit(
    size: tuple[int, int], spec: str, squash: bool, side: object, crop: object, mode: str
) -> None:
    from torchvision import transforms

    image = picture(*size)
    steps = [transforms.Resize(side, transforms.InterpolationMode(mode))]
    steps += [transforms.CenterCrop(crop)] if crop else []
    expected = np.asarray(transforms.Compose(steps)(image))
    assert np.array_equal(ours(image, spec), expected)


@pytest.mark.parametrize("own", ["resize(224,bicubic)|center_crop(224)", "resize(256,bilinear)|center_crop(224)"])
def test_an_image_that_was_cropped_to_the_models_size_is_taken_as_it_is(own: str) -> None:
    """ImageNet-C is of 224 x 224 px: a model of that size sees every pixel of it, unchanged."""
    spec, image = Preprocessing.parse(own).of_cropped, picture(224, 224)
    assert np.array_equal(images.preprocess(image, spec), np.asarray(image))
    if "256" in own:  # and not enlarged and cut again
        assert not np.array_equal(ours(image, own), np.asarray(image))


@pytest.mark.parametrize("own", ["resize(336,bicubic)|center_crop(336)", "resize(352,bicubic)|center_crop(336)"])
def test_an_image_that_was_cropped_is_enlarged_whole_for_a_larger_model(own: str) -> None:
    image = picture(224, 224)
    expected = np.asarray(image.resize((336, 336), Image.Resampling.BICUBIC))
    assert np.array_equal(images.preprocess(image, Preprocessing.parse(own).of_cropped), expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 80), st.integers(1, 80))
def test_equals_torchvision_for_any_sizes(width: int, height: int, side: int, tall: int, wide: int) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = picture(width, height)
    expected = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop((tall, wide))])(image)
    assert np.array_equal(ours(image, f"resize({side},bicubic)|center_crop({tall}x{wide})"), np.asarray(expected))
    assert np.array_equal(ours(image, f"center_crop({tall}x{wide})"), np.asarray(CenterCrop((tall, wide))(image)))


def normalised(image: Image.Image, spec: str):
    from torchvision.transforms import functional

    parsed = Preprocessing.parse(spec)
    return functional.normalize(functional.to_tensor(images.preprocess(image, parsed)), parsed.mean, parsed.std)


@pytest.mark.parametrize("size", SIZES)
def test_equals_open_clip(size: tuple[int, int]) -> None:
    import torch
    from open_clip.transform import PreprocessCfg, image_transform, image_transform_v2

    image = picture(*size)
    theirs = image_transform(224, is_train=False)(image)
    assert torch.equal(normalised(image, "resize(224,bicubic)|center_crop(224)|normalize(openai)"), theirs)
    siglip = PreprocessCfg(size=96, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash", interpolation="bicubic")
    theirs = image_transform_v2(siglip, is_train=False)(image)
    assert torch.equal(normalised(image, "resize(96x96,bicubic)|normalize(inception)"), theirs)
    plain = image_transform_v2(PreprocessCfg(size=64, interpolation="bilinear"), is_train=False)(image)
    assert torch.equal(normalised(image, "resize(64,bilinear)|center_crop(64)|normalize(openai)"), plain)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("resize(248,bicubic)|center_crop(224)|normalize(imagenet)", {"crop_pct": 0.9, "interpolation": "bicubic"}),
        ("resize(256,bilinear)|center_crop(224)|normalize(imagenet)", {"interpolation": "bilinear"}),
        (
            "resize(256x256,bicubic)|center_crop(224)|normalize(imagenet)",
            {"crop_mode": "squash", "interpolation": "bicubic"},
        ),
        ("border_crop(2)|resize(256,bicubic)|center_crop(224)|normalize(imagenet)", {"crop_border_pixels": 2}),
    ],
)
def test_equals_timm(size: tuple[int, int], spec: str, options: dict) -> None:
    import torch
    from timm.data import create_transform
    from torchvision.transforms import functional

    if "border" in spec and min(size) <= 4:
        with pytest.raises(InputError, match="nothing inside a border of 2 px"):
            ours(picture(*size), spec)
        return
    transform = create_transform((3, 224, 224), is_training=False, **{"interpolation": "bicubic", **options})
    image = picture(*size)
    parsed = Preprocessing.parse(spec)
    mean, std = torch.tensor(parsed.mean), torch.tensor(parsed.std)  # as timm holds them
    own = functional.normalize(functional.to_tensor(images.preprocess(image, parsed)), mean, std)
    assert torch.equal(transform(image), own)


def awkward_images() -> dict[str, bytes]:
    rgb = picture(31, 23)
    deep = Image.fromarray(np.arange(31 * 23, dtype=np.uint16).reshape(23, 31) * 90)
    palette = rgb.quantize(16)
    alpha = rgb.copy()
    alpha.putalpha(128)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "grey.jpg": encoded(rgb.convert("L")),
        "cmyk.jpg": encoded(rgb.convert("CMYK")),
        "progressive.jpg": encoded(rgb, progressive=True),
        "palette.png": encoded(palette, "PNG", transparency=b"\x00\x80\xff"),
        "palette.gif": encoded(palette, "GIF"),
        "alpha.png": encoded(alpha, "PNG"),
        "grey_alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "bilevel.png": encoded(rgb.convert("1"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "png_by_another_name.JPEG": encoded(rgb, "PNG"),
        "turned.jpg": encoded(rgb, exif=turned),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "plain.bmp": encoded(rgb, "BMP"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", awkward_images())
def test_decodes_as_torchvisions_loader_does(tmp_path: Path, name: str) -> None:
    from torchvision.datasets.folder import pil_loader

    data = awkward_images()[name]
    (tmp_path / name).write_bytes(data)
    image = images.decode(data, "a.tar", name)
    assert (image.mode, image.size) == ("RGB", (31, 23))  # also the turned one: orientation is not applied
    assert np.array_equal(np.asarray(image), np.asarray(pil_loader(str(tmp_path / name))))


@pytest.mark.parametrize("name", broken_images())
def test_what_cannot_be_decoded_names_archive_and_image(name: str) -> None:
    with pytest.raises(InputError, match=rf"a\.tar, image 'n1/{name}': cannot decode it \(.+\)"):
        images.decode(broken_images()[name], "a.tar", f"n1/{name}")
