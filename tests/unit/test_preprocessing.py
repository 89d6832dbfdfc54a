import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import INTERPOLATIONS, STATISTICS, Preprocessing

side = st.integers(1, 99_999)
pair = st.tuples(side, side)
real = st.floats(-1e6, 1e6)
positive = st.floats(1e-9, 1e6, exclude_min=True)
statistics = st.one_of(
    st.just((None, None)),
    st.sampled_from(sorted(STATISTICS.values())),
    st.tuples(st.tuples(real, real, real), st.tuples(positive, positive, positive)),
)


@st.composite
def specs(draw: st.DrawFn) -> Preprocessing:
    resize = draw(st.sampled_from(["none", "shorter", "squash"]))
    crop = draw(pair if resize != "squash" else st.none() | pair)
    mean, std = draw(statistics)
    return Preprocessing(
        border=draw(st.integers(0, 20)),
        shorter_side=draw(side) if resize == "shorter" else None,
        squash=draw(pair) if resize == "squash" else None,
        interpolation=draw(st.sampled_from(INTERPOLATIONS)) if resize != "none" else "bicubic",
        crop=crop,
        mean=mean,
        std=std,
    )


@given(specs())
def test_what_is_written_reads_back_the_same(spec: Preprocessing) -> None:
    assert Preprocessing.parse(str(spec)) == spec
    pixels = Preprocessing.parse(spec.pixel_spec)
    assert (pixels.mean, pixels.std, pixels.size) == (None, None, spec.size)
    assert pixels.pixel_spec == spec.pixel_spec
    assert pixels.key == spec.key


@given(specs(), specs())
def test_keys_differ_exactly_when_pixel_specs_do(one: Preprocessing, other: Preprocessing) -> None:
    assert (one.key == other.key) == (one.pixel_spec == other.pixel_spec)
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in one.key)


def test_the_language() -> None:
    spec = Preprocessing.parse(" resize(224,bicubic) | center_crop(224) | normalize(openai) ")
    assert str(spec) == "resize(224,bicubic)|center_crop(224)|normalize(openai)"
    assert (spec.key, spec.size) == ("resize224-bicubic_crop224", (224, 224))
    assert (spec.mean, spec.std) == STATISTICS["openai"]
    numbers = "0.48145466,0.4578275,0.40821073;0.26862954,0.26130258,0.27577711"
    assert Preprocessing.parse(f"resize(224,bicubic)|center_crop(224)|normalize({numbers})") == spec
    squash = Preprocessing.parse("border_crop(2)|resize(256x320,bilinear)")
    assert (squash.key, squash.size, squash.border) == ("border2_resize256x320-bilinear", (256, 320), 2)
    assert Preprocessing.parse("resize(256x320,bilinear)|center_crop(224x288)").size == (224, 288)


@given(specs())
def test_images_that_were_cropped_are_resized_to_the_same_size(spec: Preprocessing) -> None:
    cropped = spec.of_cropped
    assert cropped.size == cropped.squash == spec.size and cropped.crop is None
    assert (cropped.mean, cropped.std, cropped.border) == (spec.mean, spec.std, spec.border)
    assert cropped.of_cropped == cropped and Preprocessing.parse(str(cropped)) == cropped


def test_the_named_statistics_are_the_libraries_own() -> None:
    from open_clip import constants as clip
    from timm.data import constants as timm

    assert STATISTICS["openai"] == (clip.OPENAI_DATASET_MEAN, clip.OPENAI_DATASET_STD)
    assert STATISTICS["imagenet"] == (timm.IMAGENET_DEFAULT_MEAN, timm.IMAGENET_DEFAULT_STD)
    assert STATISTICS["inception"] == (timm.IMAGENET_INCEPTION_MEAN, timm.IMAGENET_INCEPTION_STD)


@pytest.mark.parametrize(
    ("text", "column", "part"),
    [
        ("", 1, "expected operation"),
        ("resize(224,bicubik)|center_crop(224)", 8, "did you mean 'bicubic'"),
        ("resize(224,bicubic)|crop(224)", 21, "did you mean 'center_crop'"),
        ("resize(224,bicubic)|center_crop(224)|normalize(opnai)", 48, "did you mean 'openai'"),
        ("center_crop(224)|resize(224,bicubic)", 18, "the order is border_crop"),
        ("center_crop(224)|center_crop(224)", 18, "out of place"),
        ("resize(224)|center_crop(224)", 8, "SIZE,INTERPOLATION"),
        ("resize(0,bicubic)|center_crop(224)", 8, "1 to 99999"),
        ("resize(224,bicubic)|center_crop(224x)", 33, "N or HxW"),
        ("resize(224,bicubic)|center_crop(-1)", 33, "N or HxW"),
        ("resize(²,bicubic)|center_crop(1)", 8, "N (shorter side)"),
        ("center_crop(8)|normalize(0.5,0.5,0.5;0.5,0.5,0)", 26, "positive standard deviations"),
        ("center_crop(8)|normalize(0.5,0.5;0.5,0.5)", 26, "three means"),
        ("center_crop(8)|normalize(nan,0,0;1,1,1)", 26, "three means"),
        ("center_crop(8)|normalize(1,2,3)", 26, "three means"),
        ("center_crop(8)||normalize(openai)", 16, "expected operation"),
    ],
)
def test_a_wrong_spec_says_where_and_what(text: str, column: int, part: str) -> None:
    with pytest.raises(InputError) as caught:
        Preprocessing.parse(text)
    assert f"column {column}:" in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("text", ["resize(224,bicubic)", "border_crop(2)", "normalize(openai)"])
def test_a_spec_of_unknown_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="different shapes"):
        Preprocessing.parse(text)


@given(st.text(alphabet="resizcntcropbd_(),|x0123456789;. ²٣\n", max_size=60))
def test_any_text_parses_or_says_what_is_wrong(text: str) -> None:
    try:
        spec = Preprocessing.parse(text)
    except InputError as error:
        assert text in str(error)
    else:
        assert Preprocessing.parse(str(spec)) == spec
        assert math.prod(spec.size) > 0
