"""The fast path of the pixel cache, held against the exact one."""

import functools
import io as bytes_io
import json

import numpy as np
import pytest
from PIL import Image

from clip_robustness.core.preprocessing import INTERPOLATIONS, Preprocessing
from clip_robustness.inference import decoding, fast_pixels, images, pixels
from tests.unit.samples import broken_images, encoded, picture
from tests.unit.test_pixel_cache import make_index

SIZES = [(500, 375), (375, 500), (640, 480), (333, 500), (100, 7), (7, 100), (1, 40), (40, 1), (3, 5), (90, 300)]
RESIZES = ("resize(48,{})|center_crop(48)", "resize(57,{})|center_crop(48x40)", "resize(64x48,{})")
SPECS = [resize.format(mode) for resize in RESIZES for mode in INTERPOLATIONS]
SPECS += ["border_crop(2)|resize(48,bicubic)|center_crop(60)", "center_crop(64)"]


def smooth(width: int, height: int) -> Image.Image:
    return picture(max(2, width // 6), max(2, height // 6)).resize((width, height), Image.Resampling.BICUBIC)


def striped(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([(rows % 2) * 255, (columns % 3) * 127, (rows + columns) % 256], -1).astype(np.uint8)
    )


COLOURS = {
    "photo": lambda image: encoded(image, quality=92),
    "grey": lambda image: encoded(image.convert("L")),
    "cmyk": lambda image: encoded(image.convert("CMYK")),
    "progressive": lambda image: encoded(image, progressive=True),
    "4:4:4": lambda image: encoded(image, subsampling=0, quality=100),
    "4:2:2": lambda image: encoded(image, subsampling=1, quality=1),
    "rgb": lambda image: encoded(image, keep_rgb=True),
    "png": lambda image: encoded(image, "PNG"),
}


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("draw", [picture, smooth, striped])
def test_decodes_to_the_bytes_of_the_exact_path(colours, draw):
    for size in SIZES:
        data = COLOURS[colours](draw(*size))
        array = fast_pixels.decode_jpeg(data)
        if colours in ("cmyk", "png"):
            assert array is None
        else:
            assert np.array_equal(array, np.asarray(images.decode(data, "", "")))


@pytest.mark.parametrize("spec", SPECS)
def test_is_within_one_level_of_the_exact_path(spec):
    parsed, counts = Preprocessing.parse(spec), np.zeros(256, int)
    for draw in (picture, smooth, striped):
        for size in SIZES:
            if min(size) <= 2 * parsed.border:
                continue
            for colours in ("photo", "cmyk", "png"):
                data = COLOURS[colours](draw(*size))
                fast = fast_pixels.preprocess_fast(data, "", "", parsed)
                exact = images.preprocess(images.decode(data, "", ""), parsed)
                assert fast.shape == exact.shape and fast.dtype == np.uint8
                counts += np.bincount(np.abs(fast.astype(int) - exact).ravel(), minlength=256)
    assert not counts[2:].any()
    if any(word in spec for word in ("nearest", "lanczos")) or "resize" not in spec:
        assert not counts[1:].any()  # done exactly
    else:
        assert 0 < counts[1] < 0.1 * counts.sum()


@pytest.mark.parametrize(
    "size",
    [(200, 100), (49, 100), (300, 45), (60, 300), (1, 500)],
    ids=["no factor 1.25", "enlarged", "enlarged", "tall", "one pixel"],
)
def test_what_would_be_further_apart_is_left_to_the_exact_path(size):
    array = np.asarray(picture(*size))
    new = {(200, 100): (180, 90), (60, 300): (20, 100), (1, 500): (1, 50)}.get(size, (98, 90))
    assert fast_pixels.resize(array, new, "bicubic") is None


@pytest.mark.parametrize("name", broken_images())
def test_what_cannot_be_decoded_is_said_as_on_the_exact_path(name):
    data, spec = broken_images()[name], Preprocessing.parse(SPECS[0])
    messages = []
    exact, fast = images.decode, functools.partial(fast_pixels.preprocess_fast, spec=spec)
    for path in (exact, fast):
        with pytest.raises(pixels.InputError) as caught:
            path(data, "a.tar", name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_cache_says_how_far_it_is_from_the_exact_one(tmp_path):
    files = {f"{i:03d}.jpg": encoded(smooth(90 + i % 7, 120 - i % 5), quality=92) for i in range(130)}
    index = make_index(tmp_path, files | {"grey.png": encoded(picture(80, 60), "PNG")})
    spec = "resize(40,bicubic)|center_crop(36)"
    for workers in (1, 2, 4):
        pixels.cache_pixels(index, spec, tmp_path / f"{workers}.npy", workers, decode="fast")
    for suffix in ("npy", "json"):
        first, *others = [(tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (1, 2, 4)]
        assert others == [first, first]
    pixels.cache_pixels(index, spec, tmp_path / "exact.npy")
    fast, exact = (np.load(tmp_path / name).astype(int) for name in ("1.npy", "exact.npy"))
    assert np.abs(fast - exact).max() == 1
    manifest, plain = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "exact.json"))
    assert (manifest["decode"], plain["decode"]) == ("fast", "exact") and "tolerance" not in plain
    checked = np.abs(fast - exact)[:: decoding.CHECKED]
    assert manifest["tolerance"]["values"] == checked.size
    assert manifest["tolerance"]["levels"] == checked.max()
    assert manifest["tolerance"]["share_one_level"] == np.mean(checked == 1)
    assert set(manifest["versions"]) == {"simplejpeg", "torch"}


def test_a_fast_path_that_is_far_off_is_refused(tmp_path, monkeypatch):
    index = make_index(tmp_path, {f"{i}.jpg": encoded(smooth(90, 80)) for i in range(3)})
    plain = fast_pixels.resize
    monkeypatch.setattr(fast_pixels, "resize", lambda *arguments: plain(*arguments) // 2)
    with pytest.raises(pixels.InputError, match=r"levels of 255 off the exact path here; set `decode: exact`"):
        pixels.cache_pixels(index, "resize(40,bicubic)|center_crop(36)", tmp_path / "c.npy", decode="fast")
    assert not list(tmp_path.glob("c.*"))
    with pytest.raises(pixels.InputError, match="expected exact or fast"):
        pixels.cache_pixels(index, "center_crop(36)", tmp_path / "c.npy", decode="quick")


def test_a_bomb_is_left_to_pil(monkeypatch):
    buffer = bytes_io.BytesIO()
    picture(100, 100).save(buffer, "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    assert fast_pixels.decode_jpeg(buffer.getvalue()) is None
