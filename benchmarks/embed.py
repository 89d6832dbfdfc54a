"""Where the time of one embed goes: python benchmarks/embed.py [images] [repeats]

ViT-B/32 with random weights, 500x375 JPEGs of quality 92. Decoding on one core, exact and fast; the forward pass alone
and `embed` over the same pixel cache, by turns, so that a busy machine slows both; the parts around the forward pass;
and what float16 costs. Everything is in the page cache.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_robustness.core import io
from clip_robustness.inference import embed as module
from clip_robustness.inference.load import load_image_model
from clip_robustness.inference.pixels import Cached, cache_pixels, open_pixels, read_rows

NAME = "ViT-B-32"
SPEC = "resize(224,bicubic)|center_crop(224)|normalize(openai)"
CLASSES = 1000


def write_images(folder: Path, n: int) -> Path:
    """Pictures with detail at all scales, as photographs have it: 45 to 50 KB each."""
    folder.mkdir()
    columns: dict[str, list[Any]] = {name: [] for name in ("image_id", "archive", "offset", "size", "label")}
    for i in range(n):
        rng, total = np.random.default_rng(i), np.zeros((375, 500, 3))
        for scale in (4, 16, 64, 200):
            coarse = rng.integers(0, 256, (max(2, 375 // scale), max(2, 500 // scale), 3), dtype=np.uint8)
            total += scale**0.5 * np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        total = (total - total.min()) / np.ptp(total) * 255 + rng.normal(0, 4, total.shape)
        buffer = BytesIO()
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        path = folder / f"{i:05d}.jpg"
        path.write_bytes(buffer.getvalue())
        for name, value in zip(columns, (path.name, str(path), 0, len(buffer.getvalue()), 0), strict=True):
            columns[name].append(value)
    io.write_parquet(folder / "index.parquet", {name: np.array(values) for name, values in columns.items()})
    return folder / "index.parquet"


def write_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": {"size": 224}}
    io.write_json(folder / "open_clip_config.json", config)
    save_file(open_clip.create_model(NAME).state_dict(), folder / "open_clip_model.safetensors")
    io.seal(folder, model=NAME)
    return folder


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cache_rates(index: Path, folder: Path, n: int, repeats: int) -> None:
    for decode in ("exact", "fast"):
        out = folder / f"{decode}.npy"
        best = min(_cpu_seconds(index, out, decode) for _ in range(repeats))
        print(f"pixel cache, {decode:5}: {n / best:6,.0f} images/s of one core")
    tolerance = io.read_json(folder / "fast.json")["tolerance"]
    images, _ = open_pixels(folder / "exact.npy")
    other, _ = open_pixels(folder / "fast.npy")
    apart = np.abs(images.astype(np.int16) - other)
    print(f"fast against exact: at most {apart.max()} level, {np.mean(apart > 0):.2%} of values; sample {tolerance}")


def _cpu_seconds(index: Path, out: Path, decode: str) -> float:
    """Processor time, which a busy machine stretches less than the clock's."""
    start = time.process_time()
    cache_pixels(index, SPEC, out, decode=decode)
    return time.process_time() - start


def forward_rates(weights: Path, pixels: Path, precision: str, folder: Path, n: int, repeats: int) -> None:
    """The bare forward pass and embed, one after the other, `repeats` times."""
    images, cached = open_pixels(pixels)[0], Cached(pixels)
    mean, std = module.Preprocessing.parse(SPEC).mean, module.Preprocessing.parse(SPEC).std
    assert mean is not None and std is not None
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    loaded = load_image_model(weights, "open_clip", mean, std)
    encoder = module._make_encoder(loaded, torch.device("cpu"), dtype, "auto", False, images.shape[1:])
    batches = [read_rows(images, i, min(i + encoder.batch_size, n)) for i in range(0, n, encoder.batch_size)]
    ratios, bare, whole = [], [], []
    with torch.inference_mode():
        encoder.forward(batches[0])
        for repeat in range(repeats):
            target = folder / f"{precision}-{repeat}"
            pairs = (
                lambda: [encoder.forward(batch) for batch in batches],
                lambda target=target: module._embed_one(encoder, cached, target, "embed"),
            )
            order = (0, 1) if repeat % 2 else (1, 0)
            took = {i: seconds(pairs[i]) for i in order}
            bare.append(took[0])
            whole.append(took[1])
            ratios.append(took[1] / took[0])
    quartiles = statistics.quantiles(ratios, n=4) if repeats > 1 else ratios * 3
    print(f"{precision}: forward {n / min(bare):5.0f} images/s, embed {n / min(whole):5.0f}; overhead, median of")
    print(
        f"      {repeats} pairs: {quartiles[1] - 1:+.1%} (quartiles {quartiles[0] - 1:+.1%}, {quartiles[2] - 1:+.1%})"
    )


def float16_loss(weights: Path, pixels: Path) -> None:
    mean, std = module.Preprocessing.parse(SPEC).mean, module.Preprocessing.parse(SPEC).std
    assert mean is not None and std is not None
    images, _ = open_pixels(pixels)
    encoder = module._Encoder(load_image_model(weights, "open_clip", mean, std), torch.device("cpu"), torch.float32, 32)
    with torch.inference_mode():
        rows = read_rows(images, 0, min(256, len(images)))
        exact = encoder(rows)
        encoder.batch_size = 7
        print(f"batches of 7 against 32, float32: at most {np.abs(encoder(rows) - exact).max():.1e}")
    stored = exact.astype(np.float16).astype(np.float32)
    head = np.random.default_rng(0).standard_normal((CLASSES, exact.shape[1])).astype(np.float32)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    logits, others = 100 * exact @ head.T, 100 * stored @ head.T
    same = np.mean(logits.argmax(1) == others.argmax(1))
    print(
        f"float16: feature {np.abs(stored - exact).max():.1e}, logit at scale 100 {np.abs(logits - others).max():.1e}"
    )
    print(f"         {same:.2%} of answers the same, {CLASSES} random classes, {len(exact)} images")


def main() -> None:
    n, repeats = [*map(int, sys.argv[1:3]), *(512, 9)[len(sys.argv) - 1 :]]
    print(f"{n} images, {repeats} repeats, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index, weights = write_images(folder / "images", n), write_weights(folder / "weights")
        cache_rates(index, folder, n, 3)
        images, _ = open_pixels(folder / "exact.npy")
        read = min(seconds(lambda: [read_rows(images, i, i + 64) for i in range(0, n - 63, 64)]) for _ in range(5))
        print(f"pixel cache, read: {n // 64 * 64 / read:,.0f} images/s")
        forward_rates(weights, folder / "exact.npy", "bf16", folder, n, repeats)
        forward_rates(weights, folder / "exact.npy", "fp32", folder, n, max(2, repeats // 2))
        float16_loss(weights, folder / "exact.npy")


if __name__ == "__main__":
    main()
