"""A line of models.tsv from a library's own facts: to add a model is to copy what this prints."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.core.schema import nearest
from clip_robustness.core.study import Model


def describe_model(library: str, architecture: str, weights: str, name: str = "") -> None:
    """Print the header and a model's line; what a library cannot know (source, licence) is left to be filled in."""
    known_libraries = {"open_clip": _open_clip, "timm": _timm, "transformers": _transformers, "predictions": _nothing}
    if library not in known_libraries:
        raise InputError(
            f"library '{library}': expected {', '.join(known_libraries)}{nearest(library, known_libraries)}"
        )
    facts = known_libraries[library](architecture, weights)
    known = {
        "model": name or architecture.lower().replace("/", "-"),
        "title": architecture,
        "library": library,
        "architecture": architecture,
        "weights": weights,
        "group": {"open_clip": "clip_zero_shot", "transformers": "vlm"}.get(library, "standard"),
        "source": "FILL IN",
        "finetuning": "none",
        "loss": "softmax" if library == "open_clip" else "cross_entropy",
        "licence": "FILL IN",
        "listed": "own",
        **facts,
    }
    fields = [field.name for field in dataclasses.fields(Model)]
    print("\t".join(fields))
    print("\t".join(str(known.get(field, "")) for field in fields))


def gflops(tower: Any, size: int) -> float:
    """Forward cost of one `size` x `size` px image, 2 operations per multiply-add; `tower` is on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.eval().requires_grad_(False)(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9


def _nothing(architecture: str, weights: str) -> dict[str, Any]:
    """What is known of a model whose outputs another program made."""
    return {"family": "other"}


def _open_clip(architecture: str, weights: str) -> dict[str, Any]:
    import open_clip

    if open_clip.get_model_config(architecture) is None:
        raise InputError(f"open_clip has no architecture '{architecture}'; `open_clip.list_models()` names them")
    model = open_clip.create_model(architecture, device="meta", pretrained_hf=False)
    settings = {"size": model.visual.image_size, "resize_mode": "shortest", "interpolation": "bicubic"}
    settings |= _preprocessing_of(architecture, weights)
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    squash = settings["resize_mode"] == "squash"
    spec = Preprocessing(
        squash=(size, size) if squash else None,
        shorter_side=None if squash else size,
        crop=None if squash else (size, size),
        interpolation=settings["interpolation"],
        mean=tuple(settings.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(settings.get("std") or open_clip.OPENAI_DATASET_STD),
    )
    return _numbers(model, model.visual, size) | {"preprocess": str(spec)}


def _preprocessing_of(architecture: str, weights: str) -> dict[str, Any]:
    """What the weights' own folder says, else what open_clip's list of pretrained weights says of their repository."""
    import open_clip

    scheme, _, place = weights.partition(":")
    config = Path(place).expanduser() / "open_clip_config.json"
    if scheme == "local" and config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("preprocess_cfg", {})
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        listed = open_clip.get_pretrained_cfg(architecture, tag)
        if listed.get("hf_hub", "").strip("/") == place.partition("@")[0]:
            return {key: listed[key] for key in ("mean", "std", "interpolation", "resize_mode") if listed.get(key)}
    return {}


def _timm(architecture: str, weights: str) -> dict[str, Any]:
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(architecture)
    settings = timm.data.resolve_data_config(model=model, use_test_size=True)
    size, scaled = settings["input_size"][-1], int(settings["input_size"][-1] / settings["crop_pct"])
    squash = settings["crop_mode"] == "squash"
    spec = Preprocessing(
        squash=(scaled, scaled) if squash else None,
        shorter_side=None if squash else scaled,
        crop=(size, size),
        interpolation=settings["interpolation"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )
    return _numbers(model, model, size) | {
        "preprocess": str(spec),
        "licence": model.pretrained_cfg.get("license") or "",
    }


def _transformers(architecture: str, weights: str) -> dict[str, Any]:
    """Facts of the small files beside the weights, which are brought from the hub where they are not here."""
    import torch
    import transformers
    from PIL import Image

    from clip_robustness.inference import image_text
    from clip_robustness.inference.vision_language import QUESTION, load_processor, write_prompt
    from clip_robustness.inference.weights import find_source

    where = f"weights '{weights}'"
    image_text.check_architecture(where, architecture)
    choose = functools.partial(image_text.choose_small, where, architecture)
    folder = find_source(where, choose, weights, None).checkpoint.parent
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    processor = load_processor(folder)
    prompt, image = write_prompt(processor, QUESTION.format("a", "b")), Image.new("RGB", (512, 512))
    tokens = processor(images=[[image]], text=[prompt], return_tensors="pt").input_ids.shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    computing = parameters - model.get_input_embeddings().weight.numel()
    spec = _processors_spec(processor.image_processor)
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    return {
        "params_m": f"{parameters / 1e6:.2f}",
        "gflops": f"{2 * computing * tokens / 1e9:.4g}",  # about: each weight once a token of a question
        "image_size": size if isinstance(size, int) else max(spec.size) if spec else "FILL IN",
        "family": "vit" if hasattr(vision, "patch_size") else "FILL IN",
        "preprocess": spec or "",
    }


def _processors_spec(images: Any) -> Preprocessing | None:
    """What a processor does to an image, where it resizes to one size, perhaps crops, and normalises."""
    from PIL.Image import Resampling

    size, crop = (
        {k: v for k, v in dict(getattr(images, name, None) or {}).items() if v} for name in ("size", "crop_size")
    )
    crop = crop if getattr(images, "do_center_crop", False) else {}
    fixed, shorter = set(size) == {"height", "width"}, set(size) == {"shortest_edge"} and bool(crop)
    if not (images.do_resize and images.do_normalize and (fixed or shorter)):
        return None
    return Preprocessing(
        squash=(size["height"], size["width"]) if fixed else None,
        shorter_side=size["shortest_edge"] if shorter else None,
        crop=(crop["height"], crop["width"]) if crop else None,
        interpolation=Resampling(images.resample).name.lower(),
        mean=tuple(images.image_mean),
        std=tuple(images.image_std),
    )


def _numbers(model: Any, tower: Any, size: int) -> dict[str, Any]:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    family = type(getattr(tower, "trunk", tower)).__name__.lower()
    families = ("convnext", "resnet", "swin", "efficientnet", "eva", "vit")
    found = next((name for name in families if name in family.replace("visiontransformer", "vit")), family)
    return {
        "params_m": f"{millions:.2f}",
        "gflops": f"{gflops(tower, size):.2f}",
        "image_size": size,
        "family": found,
    }
