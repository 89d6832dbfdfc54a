"""Small models with random weights in a hub's layout, sealed as `fetch_weights` leaves them."""

from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file

from clip_robustness.core import io

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def clip_folder(path: Path, **overrides) -> Path:
    """A small CLIP with random weights in a hub's layout."""
    torch.manual_seed(0)
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **overrides}
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**config)
    path.mkdir(parents=True)
    full = {**config, "custom_text": True} if kind is open_clip.CustomTextCLIP else config
    io.write_json(path / "open_clip_config.json", {"model_cfg": full, "preprocess_cfg": {"size": 32}})
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    io.seal(path, model="clip")
    return path


def timm_folder(path: Path) -> Path:
    torch.manual_seed(0)
    path.mkdir(parents=True)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": arguments}
    io.write_json(path / "config.json", {**config, "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 7}})
    save_file(model.state_dict(), path / "model.safetensors")
    io.seal(path, model="vit")
    return path
