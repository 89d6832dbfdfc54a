"""From a sealed weights folder to a model that maps pixels to features or logits.

A weights folder has a model hub's own layout, whoever made it: `open_clip_config.json` and
`open_clip_model.safetensors` for open_clip, `config.json` and `model.safetensors` for timm. A CLIP that was
fine-tuned with a linear head has its head in `classifier.safetensors` beside them (`weight` [C, d],
`bias` [C], applied to the normalised feature) and answers with logits, as a classifier does.
"""

import concurrent.futures
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.io import InputError, check_sealed

CLASSIFIER = "classifier.safetensors"
CONFIGS = {"open_clip": "open_clip_config.json", "timm": "config.json"}
TEXT_CONFIG = "text_config.json"  # of a text tower that the transformers library builds


class ImageModel(nn.Module):
    """uint8 pixels [n, h, w, 3] -> float32 features [n, d], L2-normalised, or logits [n, C].

    `kind` says which. Mean and std are applied on the device, so that only bytes cross the bus.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, kind: str, mean: tuple[float, ...], std: tuple[float, ...], head=None):
        super().__init__()
        self.tower, self.kind, self.head = tower, kind, head
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encode(pixels.permute(0, 3, 1, 2).float())

    def encode(self, levels: Tensor) -> Tensor:
        """The same of float levels [n, 3, h, w] in 0..255, through which gradients flow."""
        out = self.tower((levels - self.mean) / self.std)
        out = (out[0] if isinstance(out, tuple) else out).float()  # CoCa's tower answers with its tokens too
        if self.kind == "logits" and self.head is None:
            return out
        features = nn.functional.normalize(out, dim=-1)
        return self.head(features) if self.head is not None else features


def load_image_model(folder: Path, library: str, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageModel:
    """Load the image side of a model, in float32 on the CPU, checksums first; a convolutional one in channels-last."""
    check_while_importing(folder, library)
    if library == "timm":
        return ImageModel(_channels_last(_load(folder, "timm")), "logits", mean, std).eval()
    clip = load_clip(folder)
    head = None
    if (folder / CLASSIFIER).is_file():
        from safetensors.torch import load_file

        state = load_file(folder / CLASSIFIER)
        head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
        head.load_state_dict(state)
    kind = "logits" if head is not None else "features"
    return ImageModel(_channels_last(clip.visual), kind, mean, std, head).eval()


def load_clip(folder: Path) -> Any:
    """An open_clip model, text tower included, from a folder of the hub's layout."""
    return _sequence_first(_load(folder, "open_clip")).eval()


def build_model(folder: Path, library: str, device: str = "cpu") -> nn.Module:
    """The library's own model with the folder's weights, and with whatever the library says of what does not fit.

    device: `meta` compares names and shapes of all tensors and computes nothing.
    """
    package = import_library(library)
    with torch.device(device):
        if library == "timm":
            return package.create_model(f"local-dir:{folder}", pretrained=True)
        options = {"require_pretrained": True, "weights_only": True, "device": device}
        return package.create_model(f"local-dir:{folder}", **options, **_text_tower(folder))


def import_library(name: str) -> Any:
    """open_clip or timm. Collecting garbage among their 700,000 objects, here and at exit, took 1.5 s of a process."""
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        module = importlib.import_module(name)
        gc.freeze()  # what is imported stays, so later collections leave it out
        return module
    finally:
        gc.enable()


def check_while_importing(folder: Path, library: str) -> dict[str, Any]:
    """The manifest of a sealed folder. Its checksums take a thread as long as the library's import takes this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_sealed, folder)
        import_library(library)
        return checked.result()


def summary(error: Exception) -> str:
    """What a library says of weights that it cannot take, with the first few of the tensors that it lists.

    Errors: `error` itself where memory ran out, which is no fault of the weights.
    """
    if is_out_of_memory(error):
        raise error
    if "weights_only" in str(error):  # torch tells at length how to run what is in a file
        return "a file of them is a pickle that holds more than tensors, and is not read."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for i, line in enumerate(lines):
        names = line.split(", ")
        if "key(s) in state_dict" in line and len(names) > 3:
            lines[i] = f"{', '.join(names[:3])} and {len(names) - 3} more."
    more = [f"and {len(lines) - 5} more lines"] if len(lines) > 5 else []
    return " ".join(lines[:5] + more) or type(error).__name__


def load_tokenizer(folder: Path) -> Any:
    return import_library("open_clip").get_tokenizer(f"local-dir:{folder}")


def scale_and_bias(clip: Any) -> tuple[float, float]:
    """The model's own learned logit scale and bias (0 where its loss has none)."""
    bias = getattr(clip, "logit_bias", None)
    return float(clip.logit_scale.exp()), float(bias) if bias is not None else 0.0


def _load(folder: Path, library: str) -> Any:
    _expect(folder, CONFIGS[library], "architecture" if library == "timm" else "model_cfg")
    try:
        return build_model(folder, library)
    except Exception as error:  # whatever a library says of weights that it cannot take
        remedy = "Check the model's line in models.tsv (weights, library), then delete the folder and run again."
        raise InputError(
            f"{folder}: these weights do not fit the architecture in the folder's configuration: "
            f"{summary(error)} {remedy}"
        ) from error


def _expect(folder: Path, name: str, key: str) -> None:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name}: cannot read the model's configuration ({error})") from None
    if key not in config:
        raise InputError(f"{folder / name}: no '{key}' in it, so it is not this library's configuration")


def _text_tower(folder: Path) -> dict[str, Any]:
    """What open_clip needs to build a text tower of the transformers library without asking the hub for its shape."""
    text = json.loads((folder / CONFIGS["open_clip"]).read_text(encoding="utf-8"))["model_cfg"].get("text_cfg", {})
    if "hf_model_name" not in text:
        return {}
    name = str((folder / TEXT_CONFIG).resolve())
    return {"text_cfg": {**text, "hf_model_name": name, "hf_model_pretrained": False}}


def _sequence_first(clip: Any) -> Any:
    """Attention on [length, batch, width], as open_clip offers beside [batch, length, width].

    Under autocast, torch's batch-first attention copies its input weights once an image: bf16 on a CPU took twice
    the time. Results differ by rounding (3e-6 of 3.6 in float32).
    """
    from open_clip.transformer import Transformer

    for module in clip.modules():
        blocks = getattr(module, "resblocks", ())
        if type(module) is Transformer and all(isinstance(block.attn, nn.MultiheadAttention) for block in blocks):
            module.batch_first = False
            for block in blocks:
                block.attn.batch_first = False
    return clip


def _channels_last(tower: nn.Module) -> nn.Module:
    """Convolutions run faster on NHWC, the order that pixels come in; one that only cuts patches gains nothing."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in tower.modules())
    return tower.to(memory_format=torch.channels_last) if convolutions > 1 else tower


def device_of(leased: str | None) -> torch.device:
    """The device of a lease. Errors: `InputError` where torch cannot use the GPU: never a silent run on the CPU."""
    if leased is None:
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fault = f"torch {torch.__version__} cannot use it ({summary(error)})"
        remedy = "see `nvidia-smi`, install a torch that is built for its driver, or set `device: cpu` in the config"
        raise InputError(f"GPU {leased}: {fault}; {remedy}") from None
    return device


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """bf16 on a GPU or a CPU that computes in it (AMX, AVX512-BF16), float32 else or when asked for."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def to_float16(values: np.ndarray, what: str, first_row: int = 0) -> np.ndarray:
    """Cast for storage; a value that is not finite, before or after, is an error that names its row."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    bad = ~np.isfinite(stored).all(axis=1)
    if bad.any():
        rows = np.flatnonzero(bad)[:5] + first_row
        raise InputError(f"{what}: not finite in float16 for image rows {rows.tolist()}; try `precision: fp32`")
    return stored
