"""Pixel caches and calls of `embed` that several tests need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch

import clip_robustness
from clip_robustness.core import io
from clip_robustness.inference.embed import embed

SPEC = "resize(32,bicubic)|center_crop(32)|normalize(openai)"


def make_pixels(path: Path, n: int) -> Path:
    """A pixel cache of n random images, as `cache_pixels` leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    io.save_array(path, array)
    facts = {"spec": SPEC.rpartition("|")[0], "n": n, "bytes": path.stat().st_size, "masked": []}
    ids = io.ids_digest(f"{i:06d}.png" for i in range(n))
    io.write_json(path.with_suffix(".json"), {**facts, "ids_sha256": ids, "pixels_sha256": io.sha256_file(path)})
    return path


def run(folder, pixels, out, library="open_clip", name="m", **options):
    """(embeddings, manifest) of one model on one data set."""
    options = {"precision": "fp32", "work": out / "work", **options}
    embed(name, library, SPEC, folder, [pixels], out, **options)
    return np.load(out / f"{pixels.stem}.npy"), json.loads((out / f"{pixels.stem}.json").read_text())


def run_in_a_process(folder, pixels, out, before: str = "", **options) -> subprocess.CompletedProcess:
    """The same in a process of its own, which does `before` first and prints its peak memory in kB last."""
    script = f"""
import os, resource, signal
from pathlib import Path
from clip_robustness.inference import embed as module
{before}
options = { ({"precision": "fp32", **options})!r}
module.embed("m", "open_clip", {SPEC!r}, Path({str(folder)!r}), [Path({str(pixels)!r})], Path({str(out)!r}),
             Path({str(out / "work")!r}), **options)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def reference(folder, pixels, library):
    """The library's own way: its model, its normalisation, in one batch."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (torch.from_numpy(np.load(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        if library == "timm":
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images).numpy()
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        return model.eval().encode_image(images, normalize=True).numpy()
