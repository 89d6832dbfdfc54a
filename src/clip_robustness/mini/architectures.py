"""The mini zoo's architectures, and the two standard folders in which a trained model is kept.

A CLIP's folder is what `open_clip.create_model_from_pretrained("local-dir:FOLDER")` and
`open_clip.get_tokenizer("local-dir:FOLDER")` read; a classifier's what
`timm.create_model("local-dir:FOLDER", pretrained=True)` reads.
"""

from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError, atomic, read_json, write_json

SIZE = 48
MEAN = STD = (0.5, 0.5, 0.5)
CONTEXT = 20  # tokens; the longest caption fits, begin and end included
_TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
_VIT = {"image_size": SIZE, "patch_size": 12, "width": 96, "head_width": 32, "layers": 3}
_RESNET = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
_SIGMOID = {"init_logit_scale": 2.302585, "init_logit_bias": -10.0}  # as SigLIP begins: scale 10, bias -10

CLIPS: dict[str, dict[str, Any]] = {
    "mini_clip_vit": {"embed_dim": 64, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "mini_clip_vit_sigmoid": {"embed_dim": 64, "vision_cfg": _VIT, "text_cfg": _TEXT, **_SIGMOID},
    "mini_clip_resnet": {"embed_dim": 64, "vision_cfg": _RESNET, "text_cfg": _TEXT},
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {  # timm's name, and what makes it small
    "mini_resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_width": 16}),
    "mini_vit": (
        "vit_tiny_patch16_224",
        {"img_size": SIZE, "patch_size": 12, "embed_dim": 96, "depth": 3, "num_heads": 3},
    ),
    "mini_convnext": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [24, 48, 96, 128], "patch_size": 2}),
}


def build_clip(architecture: str) -> Any:
    """A freshly initialised `open_clip.CLIP`. Errors: `InputError` for an unknown architecture."""
    import open_clip

    if architecture not in CLIPS:
        raise InputError(f"architecture {architecture!r} is no mini CLIP; there are {', '.join(CLIPS)}")
    return open_clip.CLIP(**CLIPS[architecture])


def build_classifier(architecture: str, classes: int) -> Any:
    """A freshly initialised timm model. Errors: `InputError` for an unknown architecture."""
    import timm

    if architecture not in CLASSIFIERS:
        raise InputError(f"architecture {architecture!r} is no mini classifier; there are {', '.join(CLASSIFIERS)}")
    name, arguments = CLASSIFIERS[architecture]
    return timm.create_model(name, pretrained=False, num_classes=classes, **arguments)


def save_clip(model: Any, architecture: str, out: Path) -> None:
    """Write the folder of a CLIP; the weights go last, so that a folder with weights is whole."""
    preprocess = {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": CLIPS[architecture], "preprocess_cfg": preprocess}
    write_json(out / "open_clip_config.json", config)
    save_weights(model.state_dict(), out / "open_clip_model.safetensors")


def load_clip(folder: Path) -> tuple[Any, str]:
    """The model of a folder that `save_clip` wrote, and its architecture's name."""
    from safetensors.torch import load_file

    config = read_json(folder / "open_clip_config.json")["model_cfg"]
    names = [name for name, known in CLIPS.items() if known == config]
    if not names:
        raise InputError(f"{folder}: its open_clip_config.json is no mini architecture; train the parent again")
    model = build_clip(names[0])
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return model, names[0]


def save_classifier(model: Any, architecture: str, out: Path) -> None:
    """Write the folder of a timm classifier."""
    name, arguments = CLASSIFIERS[architecture]
    preprocess = {"input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    preprocess |= {"mean": MEAN, "std": STD, "num_classes": model.num_classes}
    preprocess |= {key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    config = {"architecture": name, "num_classes": model.num_classes, "num_features": model.num_features}
    write_json(out / "config.json", {**config, "model_args": arguments, "pretrained_cfg": preprocess})
    save_weights(model.state_dict(), out / "model.safetensors")


def save_weights(tensors: dict[str, Any], path: Path) -> None:
    """Write tensors as safetensors, sorted by name and without metadata: equal tensors give equal bytes."""
    from safetensors.torch import save

    data = save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})
    with atomic(path) as temporary:
        temporary.write_bytes(data)
