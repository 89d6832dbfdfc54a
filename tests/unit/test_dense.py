"""Dense features against the libraries' own, and matches against brute force."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from torch.nn import functional

import clip_robustness
from clip_robustness.core.io import InputError
from clip_robustness.inference.dense import Dense, dense_features, ratio_matches, sample
from clip_robustness.inference.load import ImageModel

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
VIT = {"embed_dim": 24, "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}}
TOWERS = {
    "clip_vit": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "clip_resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "clip_convnext": {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "clip_eva": {
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "token",
        "timm_proj": None,
        "image_size": 224,
    },
}
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 64, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "resnet18": {},
    "resnet50": {},
    "convnext_atto": {},
}


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def wrapped(tower: torch.nn.Module) -> ImageModel:
    return ImageModel(tower, "features", MEAN, STD).eval()


def normalised(image: np.ndarray) -> torch.Tensor:
    values = (torch.from_numpy(image).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return values.permute(2, 0, 1)[None].float()


def clip_tower(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(vision_cfg=TOWERS[name], **VIT).visual.eval()


def timm_tower(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **TIMM[name]).eval()


def as_map(grid: torch.Tensor) -> torch.Tensor:
    """What `dense_features` makes of a library's [1, d, h, w]."""
    return functional.normalize(grid[0].permute(1, 2, 0), dim=2)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["clip_vit", "clip_eva"])
def test_patch_tokens_are_open_clips_own(name: str, norm: bool) -> None:
    tower = clip_tower(name)
    size = TOWERS[name]["image_size"]
    image = pixels(size, size)
    with torch.no_grad():
        own = tower.forward_intermediates(normalised(image), indices=1, normalize_intermediates=norm)
    dense = dense_features(wrapped(tower), image, norm=norm)
    torch.testing.assert_close(dense.features, as_map(own["image_intermediates"][0]), atol=1e-5, rtol=1e-4)
    patch = 16 if name == "clip_vit" else 14
    assert (dense.stride, dense.native, dense.origin) == (patch, patch, (0, 0))
    assert dense.features.dtype == torch.float32


@pytest.mark.parametrize("name", ["clip_resnet", "clip_convnext"])
def test_stages_are_open_clips_own(name: str) -> None:
    tower, image = clip_tower(name), pixels(64, 128)
    with torch.no_grad():
        own = tower.forward_intermediates(normalised(image), indices=1, intermediates_only=True)
    grid = own["image_intermediates"][-1]
    assert grid.shape[2:] == (2, 4)
    dense = dense_features(wrapped(tower), image, stride=0)
    assert (dense.stride, dense.native) == (32, 32)
    torch.testing.assert_close(dense.features, as_map(grid), atol=1e-5, rtol=1e-4)
    dense = dense_features(wrapped(tower), image)
    finer = functional.interpolate(grid, scale_factor=2, mode="bilinear")
    assert (dense.stride, dense.native, tuple(dense.features.shape[:2])) == (16, 32, (4, 8))
    torch.testing.assert_close(dense.features, as_map(finer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TIMM)
def test_maps_are_timms_own(name: str) -> None:
    tower = timm_tower(name)
    size = TIMM[name].get("img_size", 64)
    image = pixels(size, size)
    with torch.no_grad():
        own = tower.forward_features(normalised(image))  # after the final norm
    if own.ndim == 3:
        side = size // tower.patch_embed.patch_size[0]
        own = own[:, tower.num_prefix_tokens :].transpose(1, 2).unflatten(2, (side, side))
    dense = dense_features(wrapped(tower), image, stride=0, norm=True)
    torch.testing.assert_close(dense.features, as_map(own), atol=1e-5, rtol=1e-4)


def test_the_norm_is_a_choice() -> None:
    tower, image = timm_tower("vit_tiny_patch16_224"), pixels(64, 64)
    torch.nn.init.normal_(tower.norm.weight)
    before, after = (
        dense_features(wrapped(tower), image, norm=norm, normalise=False).features for norm in (False, True)
    )
    with torch.inference_mode():
        torch.testing.assert_close(tower.norm(before), after)
    assert not torch.allclose(before, after, atol=0.1)


def test_position_embeddings_of_another_size_are_open_clips_own() -> None:
    tower, image = clip_tower("clip_vit"), pixels(96, 96)
    torch.nn.init.normal_(tower.positional_embedding)
    larger = open_clip.CLIP(vision_cfg={**TOWERS["clip_vit"], "image_size": 96}, **VIT).eval()
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    resize_pos_embed(state, larger)
    larger.load_state_dict(state, strict=False)
    ours = dense_features(wrapped(tower), image).features
    torch.testing.assert_close(ours, dense_features(wrapped(larger.visual), image).features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"])
def test_position_embeddings_of_another_size_are_timms_own(name: str) -> None:
    tower = timm_tower(name)
    patch = tower.patch_embed.patch_size[0]
    image, model = pixels(6 * patch, 8 * patch), wrapped(tower)
    ours = dense_features(model, image)
    assert tuple(ours.features.shape[:2]) == (6, 8)
    again = timm_tower(name)
    again.set_input_size(img_size=image.shape[:2])
    with torch.no_grad():
        grid = again.forward_intermediates(normalised(image), indices=1, intermediates_only=True)[-1]
    torch.testing.assert_close(ours.features, as_map(grid), atol=1e-5, rtol=1e-4)
    # A call at one size leaves nothing behind for the next.
    dense_features(model, pixels(3 * patch, 3 * patch))
    assert torch.equal(dense_features(model, image).features, ours.features)


@pytest.mark.parametrize("name", ["clip_vit", "clip_resnet", "clip_convnext", "clip_eva"])
def test_half_precision_is_near(name: str) -> None:
    model, image = wrapped(clip_tower(name)), pixels(70, 98)
    exact, near = (dense_features(model, image, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert near.features.dtype == torch.float32 and near[1:] == exact[1:]
    assert float((exact.features * near.features).sum(dim=2).min()) > 0.99


def test_memory_that_is_not_enough_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = clip_tower("clip_vit")

    def allocate(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory: you tried to allocate")

    monkeypatch.setattr(tower.transformer, "forward", allocate)
    with pytest.raises(InputError, match="out of cpu memory with one image of 96 x 128 px"):
        dense_features(wrapped(tower), pixels(96, 128))


def test_an_image_that_is_no_multiple_of_the_patch_is_padded_by_the_mean() -> None:
    model, image = wrapped(timm_tower("eva02_tiny_patch14_224")), pixels(50, 64)
    dense = dense_features(model, image)
    assert (tuple(dense.features.shape[:2]), dense.stride, dense.origin) == ((4, 5), 14, (-3, -3))
    framed = np.full((56, 70, 3), 255 * np.array(MEAN)).round().astype(np.uint8)
    framed[3:53, 3:67] = image
    expected = dense_features(model, framed).features
    assert float((dense.features * expected).sum(dim=2).min()) > 0.9999  # the mean is no whole number of 255


def test_a_tower_without_a_map_is_named() -> None:
    mixer = timm.create_model("mixer_s32_224", num_classes=2).eval()
    with pytest.raises(InputError, match=r"no dense features of a MlpMixer at 96 x 128 px.*Leave the model out"):
        dense_features(wrapped(mixer), pixels(96, 128))


def test_features_that_are_not_finite_are_refused() -> None:
    tower = timm_tower("vit_tiny_patch16_224")
    torch.nn.init.constant_(tower.patch_embed.proj.bias, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        dense_features(wrapped(tower), pixels(64, 64))


def test_samples_at_centres_are_the_cells_and_on_a_grid_an_interpolation() -> None:
    features = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    dense = Dense(features, 14.0, 14.0, (-3.0, -1.0))
    y, x = np.mgrid[:6, :8]
    centres = np.stack([x * 14 + 4, y * 14 + 6], axis=-1).reshape(-1, 2)
    for mode in ("bilinear", "bicubic"):
        torch.testing.assert_close(sample(dense, centres, mode), features.flatten(0, 1), atol=1e-5, rtol=1e-4)
    flush = Dense(features, 4.0, 4.0, (0.0, 0.0))
    y, x = np.mgrid[:24, :32] + 0.5
    points = np.stack([x, y], axis=-1).reshape(-1, 2)
    for mode in ("bilinear", "bicubic"):
        grid = functional.interpolate(features.permute(2, 0, 1)[None], (24, 32), mode=mode)
        expected = grid[0].permute(1, 2, 0).flatten(0, 1)
        torch.testing.assert_close(sample(flush, points, mode), expected, atol=1e-5, rtol=1e-4)


def brute_force(queries: np.ndarray, gallery: np.ndarray, most: int) -> list[tuple[int, int]]:
    queries, gallery = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (queries, gallery))
    found = []
    for i, query in enumerate(queries):
        distances = [1 - float(query @ other) for other in gallery]
        order = sorted(range(len(distances)), key=distances.__getitem__)
        found.append((distances[order[0]] / distances[order[1]], i, order[0]))
    return [(i, j) for _, i, j in sorted(found)[:most]]


@pytest.mark.parametrize("chunk", [1, 100, 1 << 25])
def test_matches_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("clip_robustness.inference.dense.CHUNK", chunk)
    rng = np.random.default_rng(3)
    queries, gallery = rng.normal(size=(60, 8)), rng.normal(size=(45, 8))
    i, j = ratio_matches(torch.tensor(queries), torch.tensor(gallery), 25)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == brute_force(queries, gallery, 25)


def test_matches_of_few_points() -> None:
    some = torch.randn(4, 3)
    for queries, gallery in ((some[:0], some), (some, some[:1])):
        i, j = ratio_matches(queries, gallery, 10)
        assert len(i) == len(j) == len(queries)
        assert (j == 0).all()
    i, j = ratio_matches(some, some, 10)
    assert i.tolist() == [0, 1, 2, 3] and j.tolist() == [0, 1, 2, 3]


def test_memory_is_bounded_at_800_pixels() -> None:
    """The map of a ViT at 800 x 800 px, and matches of as many points as Probe3D's ScanNet has, in a process's peak."""
    script = """
import resource, timm, torch, numpy as np
from clip_robustness.inference.dense import dense_features, ratio_matches
from clip_robustness.inference.load import ImageModel
tower = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dense = dense_features(ImageModel(tower, "logits", (0.5,) * 3, (0.5,) * 3), np.zeros((800, 800, 3), np.uint8))
assert dense.features.shape == (50, 50, 192)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
points = torch.randn(19200, 32)
i, j = ratio_matches(points, points, 1000)
assert (i == j).all() and len(i) == 1000
print(after - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - after)
"""
    environment = {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    map_kb, match_kb = map(int, done.stdout.split())
    assert map_kb < 400_000
    assert match_kb < 500_000  # all similarities at once are 1,474,560 kB
