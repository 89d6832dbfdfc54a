"""Images through one model, a suite of data sets at a time: `embed`.

The model is loaded once. Finished shards lie in a work folder under a key of everything that decides the
numbers, outside the rule's outputs (Snakemake deletes those when a job fails): a killed job loses one shard at most,
and a job that runs again for a reason that does not touch the numbers only links what is there. Neither the
model's name nor the batch size is in that key: lines with the same weights share their embeddings, and another batch
size changes float32 features by rounding alone (1.2e-7 measured on ViT-B/32), which float16 nearly always hides.

Results are stored in float16. Measured on ViT-B/32 with random weights, 128 images and 1,000 random classes: a feature
(of norm 1) moves by at most 6.1e-5, a logit at scale 100 by at most 4.3e-3, and all top-1 answers stay. The bound for
a feature is 2**-12, half a float16 step below 1.
"""

import concurrent.futures
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clip_robustness.core import io, provenance
from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.lock import alone
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import ImageModel, compute_dtype, device_of, load_image_model, to_float16
from clip_robustness.inference.pixels import Cached, Part, Streamed, read_rows

SHARD = 4096
NUMBERS = ("inference.embed", "inference.load", "core.preprocessing")
CPU_BATCH = 64  # modest: enough to amortise a call, and memory grows with it
LARGEST_BATCH = 1024
SHARE_OF_FREE_MEMORY = 0.8
PROBES = (2, 8)  # images whose peak memory tells what one image takes


class Batches:
    """Runs a function on rows in batches. `batch_size` is halved for good when memory runs out."""

    def __init__(self, device: torch.device, batch_size: int):
        self.device, self.batch_size = device, batch_size

    def run(self, function: Callable[..., Any], *rows: Any) -> list[Any]:
        """What `function` gives for each batch of `rows`, arrays or tensors of one length."""
        parts, start, n = [], 0, len(rows[0])
        while start < n:
            stop = min(start + self.batch_size, n)
            fits, part = self._try(function, [values[start:stop] for values in rows])
            if not fits:
                self._halve()
                continue
            parts.append(part)
            start = stop
        return parts

    def _try(self, function: Callable[..., Any], rows: list[Any]) -> tuple[bool, Any]:
        try:
            return True, function(*rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return False, None  # outside the handler, whose traceback would keep the batch's tensors alive

    def _halve(self) -> None:
        if self.batch_size == 1:
            raise io.InputError(f"out of {self.device.type} memory with a single image; use a larger machine")
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: batches of {self.batch_size} from here on", file=sys.stderr, flush=True)


class _Encoder(Batches):
    """The model on its device, and how it is run there."""

    def __init__(
        self, model: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype, batch_size: int
    ):
        super().__init__(device, batch_size)
        self.model, self.dtype = model, dtype

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> float32 [n, d], in as many batches as the memory asks for."""
        return np.concatenate(self.run(self.forward, pixels))

    def forward(self, pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
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
    batch_size: int | str = "auto",
    compile: bool = False,
    specs: Sequence[str] = (),
    workers: int = 1,
    on_error: str = "fail",
    decode: str = "exact",
) -> None:
    """Embed every data set of `pixels` into `out`/{data set}.npy with its manifest {data set}.json.

    pixels: a pixel cache (.npy) each, or an index (.parquet) whose images are decoded as they are needed, by `workers`
    processes; `on_error` and `decode` are then those of `cache_pixels`, and `specs` says for each data set what the
    pixels of a cache already are. Features (or a classifier's logits) are float16 [n, d] in the order of the index; the
    manifest is written last.
    batch_size: images at once; `auto` takes what fits a GPU's free memory, and a fixed number on a CPU. It is halved
    when memory runs out. compile: through torch.compile; what it cannot compile is an error, not a silent detour.
    Errors: `InputError` for weights that fail their checksum or do not fit, for pixels of another spec or that change
    under the job, and for a result that is not finite.
    """
    spec = Preprocessing.parse(preprocess)
    if spec.mean is None or spec.std is None:
        raise io.InputError(f"model '{model}': its preprocessing '{preprocess}' lacks normalize(…)")
    # Its checksums are compared when the model is loaded.
    sealed = io.read_manifest(weights / "manifest.json", files=dict)
    torch.set_float32_matmul_precision("highest")
    with lease() as leased, torch.inference_mode():
        device = device_of(leased)
        dtype = compute_dtype(precision, device.type)
        facts = {
            "library": library,
            "weights": sealed["files"],
            "preprocess": str(spec),
            "precision": str(dtype).removeprefix("torch."),
            "compile": compile,
            "device": device.type,
            "code": provenance.code_hash(*NUMBERS, imports=False),
            "versions": provenance.versions(["torch", "open_clip_torch", "timm", "numpy"]),
        }
        encoder: _Encoder | None = None
        for path, pixel_spec in zip(pixels, specs or [spec.pixel_spec] * len(pixels), strict=True):
            images: Cached | Streamed
            if path.suffix == ".npy":
                images = Cached(path)
            else:
                images = Streamed(path, pixel_spec, workers, on_error, decode)
            # A data set may be freed from its border first, or be cropped already; all else must be the model's own.
            own = (spec.pixel_spec, spec.of_cropped.pixel_spec)
            if dataclasses.replace(images.spec, border=0).pixel_spec not in own:
                raise io.InputError(f"{path}: made for {images.spec}, and {model} needs {spec.pixel_spec}")
            identity = {**facts, **images.facts}
            folder = work / io.digest(identity)[:32]
            with alone(folder):  # a model of another name may have the same weights
                if (manifest := io.sealed(folder)) is None:
                    if encoder is None:
                        loaded = load_image_model(weights, library, spec.mean, spec.std)
                        encoder = _make_encoder(loaded, device, dtype, batch_size, compile, (*spec.size, 3))
                    masked = _embed_one(encoder, images, folder, f"{model} on {images.name}")
                    n, dim = io.load_array(folder / "embeddings.npy").shape
                    manifest = io.seal(folder, **identity, kind=loaded.kind, n=n, dim=dim, **masked)
                io.place(folder / "embeddings.npy", out / f"{images.name}.npy")
            names = {"model": model, "dataset": images.name, "embeddings_sha256": manifest["files"]["embeddings.npy"]}
            io.write_json(out / f"{images.name}.json", {**manifest, **names})


def _make_encoder(
    model: ImageModel,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | str,
    compile: bool,
    shape: tuple[int, ...],
) -> _Encoder:
    _cast_weights(model.to(device), dtype)
    encoder = _Encoder(torch.compile(model) if compile else model, device, dtype, 1)
    if compile:
        try:
            encoder.forward(np.zeros((1, *shape), np.uint8))
        except Exception as error:  # whatever a compiler says
            fault = str(error).strip().partition("\n")[0]
            raise io.InputError(f"torch.compile: {fault}; set `compile: false`") from error
    if batch_size != "auto":
        encoder.batch_size = int(batch_size)
    elif device.type == "cuda":
        encoder.batch_size = _fitting_batch(encoder, shape)
        print(f"batches of {encoder.batch_size}", file=sys.stderr, flush=True)
    else:
        encoder.batch_size = CPU_BATCH
    return encoder


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Once what autocast does in every batch: the weights of linear and convolution layers in bf16.

    The results are the same to the last bit. Biases stay as they are: they are small, and attention adds them in fp32.
    """
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if name.endswith("weight"):
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def _fitting_batch(encoder: _Encoder, shape: tuple[int, ...]) -> int:
    """The batch that the GPU's memory holds, extrapolated from the peaks of two small ones."""
    peaks = []
    for n in (PROBES[0], *PROBES):  # the first call also makes the libraries' work spaces
        torch.cuda.reset_peak_memory_stats()
        encoder.forward(np.zeros((n, *shape), np.uint8))
        peaks.append(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    return fitting_batch(peaks[1], peaks[2], torch.cuda.memory_allocated() + torch.cuda.mem_get_info()[0])


def fitting_batch(small: int, large: int, memory: int) -> int:
    """The largest power of two, up to `LARGEST_BATCH`, whose peak stays within a share of `memory`.

    small, large: peak bytes with `PROBES` images; more images take more bytes by the same line.
    """
    image = max((large - small) / (PROBES[1] - PROBES[0]), 1)
    most = PROBES[0] + (SHARE_OF_FREE_MEMORY * memory - small) / image
    return 2 ** int(np.log2(np.clip(most, 1, LARGEST_BATCH)))


def _embed_one(encoder: _Encoder, images: Cached | Streamed, folder: Path, what: str) -> dict[str, list[str]]:
    """Write `folder`/embeddings.npy, shard by shard; what the manifest says of images that could not be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("pixels-*"):  # by a job that was killed
        shutil.rmtree(left)
    shards = [folder / f"shard-{start:09d}.npy" for start in range(0, images.n, SHARD)]
    whole, unread = folder / "embeddings.npy", folder / "masked.json"
    if not whole.is_file():
        _embed_shards(encoder, images, shards, what)
        masked = [image_id for shard in shards for image_id in io.read_json(_notes(shard))["masked"]]
        io.write_json(unread, [*images.masked, *masked])
        io.join_arrays(whole, shards)
    for left in folder.glob("shard-*"):
        left.unlink()
    masked = io.read_json(unread)
    return {"masked": masked} if masked else {}


def _notes(shard: Path) -> Path:
    """The shard's checksum, and the ids of its images that could not be read; written after the shard."""
    return shard.with_suffix(".json")


def _is_whole(shard: Path) -> bool:
    if not (shard.is_file() and _notes(shard).is_file()):
        return False
    try:
        if io.read_manifest(_notes(shard), sha256=str, masked=list)["sha256"] == io.sha256_file(shard):
            return True
    except io.InputError:
        pass
    print(f"{shard}: damaged since it was written; its images are embedded again", file=sys.stderr, flush=True)
    return False


def _embed_shards(encoder: _Encoder, images: Cached | Streamed, shards: Sequence[Path], what: str) -> None:
    progress = io.Progress(what, images.n)
    bounds = {shard: (i * SHARD, min((i + 1) * SHARD, images.n)) for i, shard in enumerate(shards)}
    missing = [shard for shard in shards if not _is_whole(shard)]
    if finished := images.n - sum(bounds[shard][1] - bounds[shard][0] for shard in missing):
        progress.skip(finished)
    parts = images.parts([bounds[shard] for shard in missing], shards[0].parent)
    for shard, part in zip(missing, parts, strict=True):
        features, done = [], part.start
        for batch in _batches(encoder, part):
            features.append(to_float16(encoder(batch), what, done))
            done += len(batch)
            progress.update(len(batch))
        io.save_array(shard, np.concatenate(features))
        io.write_json(_notes(shard), {"sha256": io.sha256_file(shard), "masked": list(part.masked)})


def _batches(encoder: _Encoder, part: Part) -> Iterator[np.ndarray]:
    """The images of a part in batches, the next one read while the model computes."""
    images, start, stop = part.pixels, part.offset, part.offset + part.stop - part.start
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        following = reader.submit(read_rows, images, start, min(start + encoder.batch_size, stop))
        while start < stop:
            batch = following.result()
            start += len(batch)
            if start < stop:
                following = reader.submit(read_rows, images, start, min(start + encoder.batch_size, stop))
            yield batch
