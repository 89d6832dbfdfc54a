"""A repository of a model that transformers' AutoModelForImageTextToText loads: its files, and whether they fit.

It is fetched in the layout that transformers saves: safetensors in one file, or in shards that an index lists, with the
configuration, the tokenizer and the processor. No pickle of it is read, and no code of its own is run.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import checkpoints
from clip_robustness.inference.architectures import TEXT, TOKENIZER, Source, matches, nearest, read_configuration
from clip_robustness.inference.hub import Bring, Place
from clip_robustness.inference.load import summary
from clip_robustness.inference.vision_language import check_loaded, load_processor

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SMALL = (CONFIG, "generation_config.json", "*processor_config.json", "chat_template*", *TOKENIZER)


def check_architecture(where: str, architecture: str) -> None:
    """Errors: `InputError` with the nearest name, for a class that AutoModelForImageTextToText does not know."""
    known = set(_classes().values())
    if architecture not in known:
        unknown = f"AutoModelForImageTextToText has no class '{architecture}'{nearest(architecture, sorted(known))}"
        raise InputError(f"{where}: {unknown}")


def choose(where: str, architecture: str, place: Place, names: Sequence[str], bring: Bring) -> list[str]:
    """The index or the one file of weights, first, then the shards and the small files.

    Small files are looked at before a shard of gigabytes is asked for.
    Errors: `InputError` as of `choose_small`, for weights that are pickles only, and for a shard that is not there.
    """
    small = choose_small(where, architecture, place, names, bring)
    if INDEX in names:
        return [INDEX, *_shards(where, bring(INDEX), names), *small]
    if WEIGHTS in names:
        return [WEIGHTS, *small]
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    found = f"only {pickles[0]}, a pickle, which is not read" if pickles else "neither"
    remedy = "name a revision or a repository that has it converted"
    raise InputError(f"{where}: {place.repository} has {found}; expected {WEIGHTS} or {INDEX}; {remedy}")


def choose_small(where: str, architecture: str, place: Place, names: Sequence[str], bring: Bring) -> list[str]:
    """The files beside the weights.

    Errors: `InputError` for a repository without config.json, whose config.json is of another architecture, of weights
    that are quantised, or that names code of its own.
    """
    if place.file:
        raise InputError(f"{where}: a model of transformers is a whole repository or folder, and not '{place.file}'")
    if CONFIG not in names:
        raise InputError(f"{where}: {place.repository} has no {CONFIG}")
    small = [name for name in names if matches(name, SMALL) and Path(name).suffix in TEXT]
    for name in small:
        if name.endswith("config.json"):
            read_configuration(where, bring(name))
    _check_configuration(where, architecture, read_configuration(where, bring(CONFIG)))
    return small


def copy_model(where: str, architecture: str, source: Source, folder: Path, linked: bool) -> None:
    """Put the chosen files into `folder`, flat, and check them there; `linked`: weights by hard links where possible.

    Errors: `InputError` for a shard that is not whole, for tensors that are missing, left over, misshapen or not
    finite, and for a tokenizer and processor that cannot be built.
    """
    for name in source.chosen:
        if linked and name.endswith(".safetensors"):
            io.place(source.files[name].resolve(), folder / name)
        else:
            shutil.copyfile(source.files[name], folder / name)
    shards = sorted(folder.glob("*.safetensors"))
    _check_fit(where, architecture, folder, {n: s for p in shards for n, s in checkpoints.shapes_of(p, where).items()})
    try:
        load_processor(folder)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), where)) from None
    for path in shards:
        checkpoints.check_finite(path, where)


def _classes() -> Mapping[str, str]:
    """Type of model, as in a config.json -> the class that AutoModelForImageTextToText makes of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _check_configuration(where: str, architecture: str, config: Mapping[str, Any]) -> None:
    found = config.get("architectures") or ["none"]
    if found != [architecture]:
        fault = f"{CONFIG} is of the architecture '{', '.join(found)}', the line says '{architecture}'"
        raise InputError(f"{where}: {fault}; correct the line's architecture or weights")
    if _classes().get(kind := config.get("model_type", "")) != architecture:
        raise InputError(f"{where}: {CONFIG} has the model_type '{kind}', which is not that of a '{architecture}'")
    if "quantization_config" in config:
        remedy = "name the repository of the whole ones; `quantise` makes them smaller when they are loaded"
        raise InputError(f"{where}: its weights are quantised; {remedy}")


def _shards(where: str, index: Path, names: Sequence[str]) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {INDEX} is no index of shards ({error!r}); fetch it again") from None
    for name in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{where}: {INDEX} lists '{name}', which is no safetensors file beside it")
        if name not in names:
            raise InputError(f"{where}: {INDEX} lists {name}, which is not there; the repository is not whole")
    return shards


def _check_fit(where: str, architecture: str, folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Let transformers load tensors of these names and shapes, which take no memory, as its own loader renames them."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # nothing is loaded
    plain = getattr(transformers, architecture)
    # What is missing would be initialised: gigabytes, for an error.
    built: Any = type(architecture, (plain,), {"__module__": plain.__module__, "initialize_weights": lambda self: None})
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in shapes.items()}
    options = {"state_dict": state, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        _, info = built.from_pretrained(None, config=config, output_loading_info=True, **options)
        check_loaded(info)
    except Exception as error:  # whatever a library says of weights that it cannot take
        fault = f"its tensors are not those of its {CONFIG}: {summary(error)}"
        raise InputError(f"{where}: {fault}; name a revision or a repository where they are") from None
