"""Images through one model, a suite of data sets at a time: `embed`.

The model is loaded once. Finished shards lie in a work folder under a key of everything that decides the
numbers, outside the rule's outputs (Snakemake deletes those when a job fails): a killed job loses one shard at most,
and a job that runs again for a reason that does not touch the numbers only links what is there.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_robustness.core import io, provenance
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import ImageModel, load_image_model, to_float16
from clip_robustness.inference.pixels import open_pixels

SHARD = 4096
NUMBERS = ("inference.embed", "inference.load", "inference.pixels", "core.preprocessing")


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """The model on its device, and how it is run there."""

    model: ImageModel
    device: torch.device
    dtype: torch.dtype
    batch_size: int

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        batch, parts, start = self.batch_size, [], 0
        while start < len(pixels):
            try:
                parts.append(self._forward(pixels[start : start + batch]))
                start += batch
            except torch.cuda.OutOfMemoryError:
                if batch == 1:
                    raise io.InputError("out of GPU memory with a single image; use a larger GPU") from None
                batch //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: batches of {batch} from here on", file=sys.stderr)
        return np.concatenate(parts)

    def _forward(self, pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(np.array(pixels)).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images).float().cpu().numpy()


def embed(
    model: str,
    library: str,
    preprocess: str,
    weights: Path,
    pixels: Sequence[Path],
    out: Path,
    work: Path,
    precision: str = "auto",
    batch_size: int = 256,
) -> None:
    """Embed every pixel cache in `pixels` into `out`/{data set}.npy with its manifest {data set}.json.

    Features (or a classifier's logits) are float16 [n, d] in the order of the index; the manifest is written last.
    Errors: `InputError` for weights that fail their checksum or do not fit, for pixels of another spec, and
    for a result that is not finite.
    """
    spec = Preprocessing.parse(preprocess)
    if spec.mean is None or spec.std is None:
        raise io.InputError(f"model '{model}': its preprocessing '{preprocess}' lacks normalize(…)")
    sealed = io.check_sealed(weights)
    torch.set_float32_matmul_precision("highest")
    with lease() as leased, torch.inference_mode():
        device = torch.device("cuda" if leased is not None else "cpu")
        dtype = _dtype(precision, device)
        facts = {
            "model": model,
            "weights": sealed["files"],
            "preprocess": str(spec),
            "precision": str(dtype).removeprefix("torch."),
            "device": device.type,
            "code": provenance.code_hash(*NUMBERS, imports=False),
            "versions": provenance.versions(["torch", "open_clip_torch", "timm", "numpy"]),
        }
        encoder: _Encoder | None = None
        for path in pixels:
            images, cached = open_pixels(path)
            # A data set may be freed from its border first; all else must be the model's own preprocessing.
            if dataclasses.replace(Preprocessing.parse(cached["spec"]), border=0).pixel_spec != spec.pixel_spec:
                raise io.InputError(f"{path}: made for {cached['spec']}, and {model} needs {spec.pixel_spec}")
            identity = {**facts, "ids_sha256": cached["ids_sha256"], "pixels_sha256": cached["pixels_sha256"]}
            folder = work / io.digest(identity)[:32]
            if not (folder / "manifest.json").is_file():
                if encoder is None:
                    loaded = load_image_model(weights, library, spec.mean, spec.std)
                    encoder = _Encoder(loaded.to(device), device, dtype, batch_size)
                _embed_one(encoder, images, folder, f"{model} on {path.stem}", identity)
            manifest = io.check_sealed(folder)
            masked = {"masked": cached["masked"]} if cached.get("masked") else {}
            io.place(folder / "embeddings.npy", out / f"{path.stem}.npy")
            io.write_json(out / f"{path.stem}.json", {**manifest, "dataset": path.stem, **masked})


def _embed_one(encoder: _Encoder, images: np.ndarray, folder: Path, what: str, identity: dict[str, Any]) -> None:
    whole = folder / "embeddings.npy"
    if not whole.is_file():
        shards = _embed_shards(encoder, images, folder, what)
        io.save_array(whole, np.concatenate([io.load_array(shard) for shard in shards]))
    for shard in folder.glob("shard-*.npy"):
        shard.unlink()
    n, dim = io.load_array(whole).shape
    io.seal(folder, **identity, kind=encoder.model.kind, n=n, dim=dim)


def _embed_shards(encoder: _Encoder, images: np.ndarray, folder: Path, what: str) -> list[Path]:
    progress = io.Progress(what, len(images))
    shards = []
    for start in range(0, len(images), SHARD):
        shard = folder / f"shard-{start:09d}.npy"
        chunk = images[start : start + SHARD]
        shards.append(shard)
        if shard.is_file():
            progress.skip(len(chunk))
            continue
        features = []
        for first in range(0, len(chunk), encoder.batch_size):
            part = encoder(chunk[first : first + encoder.batch_size])
            features.append(to_float16(part, what, start + first))
            progress.update(len(part))
        io.save_array(shard, np.concatenate(features))
    return shards


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 on a GPU or a CPU that computes in it (AMX, AVX512-BF16), float32 else or when asked for."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
