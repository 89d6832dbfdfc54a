"""An architecture of open_clip or timm, and whether a checkpoint is one of it.

The line of models.tsv names the architecture, the library's registry says what that is, and the repository's own
configuration adds what a registry does not know: its preprocessing, its classes, its tokenizer.
"""

import difflib
import importlib.util
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import say
from clip_robustness.inference import checkpoints
from clip_robustness.inference.hub import Bring, Place, fetch_files
from clip_robustness.inference.load import CLASSIFIER, CONFIGS, TEXT_CONFIG, build_model, load_tokenizer, summary

TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")
TEXT = (".json", ".txt", ".model", ".jinja")  # what a small file may be: no pickle, no code
# What an open_clip configuration may hand to its tokenizer: not `trust_remote_code`, which would run a repository's.
TOKENIZER_OPTIONS = {"clean", "language", "strip_sep_token"}
NO_CODE = "name a repository of the same model that needs none"
# Keys of an open_clip configuration that decide what a model computes.
DECISIVE = {
    *("quick_gelu", "embed_dim", "image_size", "patch_size", "layers", "width", "head_width", "heads", "mlp_ratio"),
    *("context_length", "vocab_size", "timm_model_name", "timm_pool", "timm_proj", "hf_model_name", "pool_type"),
}


class Source(NamedTuple):
    """A checkpoint, the files of its folder by name, the chosen ones, and what the manifest says of their origin."""

    checkpoint: Path
    files: Mapping[str, Path]
    chosen: Sequence[str]
    facts: Mapping[str, Any]


def known_configuration(where: str, library: str, architecture: str) -> dict[str, Any]:
    """The library's own configuration of an architecture, or nothing where an open_clip repository may have one."""
    if library == "open_clip":
        import open_clip

        model_cfg = open_clip.get_model_config(architecture)
        _check_packages(where, model_cfg)
        return {"model_cfg": model_cfg} if model_cfg else {}
    import timm

    name, tag = timm.models.split_model_name_tag(architecture)
    if not timm.is_model(name):
        raise InputError(f"{where}: timm has no architecture '{name}'{nearest(name, timm.list_models())}")
    tagged = list(timm.models.get_arch_pretrained_cfgs(name))
    if tag and architecture not in tagged:
        raise InputError(f"{where}: timm has no tag '{tag}' of '{name}'{nearest(architecture, tagged)}")
    pretrained = timm.models.get_pretrained_cfg(architecture)
    return {"architecture": name, "pretrained_cfg": pretrained.to_dict(remove_source=True) if pretrained else {}}


def configuration(
    where: str,
    library: str,
    architecture: str,
    known: dict[str, Any],
    source: Source,
    shapes: Mapping[str, Sequence[int]],
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The configuration to seal, and where the repository's own differs from it: key -> [sealed, repository's]."""
    path = source.files.get(CONFIGS[library])
    theirs = read_configuration(where, path) if path else {}
    if library == "timm":
        if not theirs:
            return known | _classes(known, shapes), {}
        differs = {"architecture": [known["architecture"], theirs.get("architecture", known["architecture"])]}
        return theirs | {"architecture": known["architecture"]}, _told(where, differs)
    if known:
        differs = _differences(known["model_cfg"], theirs.get("model_cfg", known["model_cfg"]))
        return known | {"preprocess_cfg": theirs.get("preprocess_cfg", {})}, _told(where, differs)
    import open_clip

    unknown = f"open_clip has no architecture '{architecture}'{nearest(architecture, open_clip.list_models())}"
    if "model_cfg" not in theirs:
        raise InputError(f"{where}: {unknown}, and there is no open_clip_config.json beside the weights")
    say(f"{where}: {unknown}; the configuration beside the weights is taken")
    _check_packages(where, theirs["model_cfg"])
    return theirs, {}


def read_configuration(where: str, path: Path) -> dict[str, Any]:
    """A JSON file of a repository.

    Errors: `InputError` where it is no mapping, or names code, or other models' repositories where a name is expected.
    """
    config = io.read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{where}: {path.name} holds no mapping, so it is no configuration; fetch it again")
    if code := _code_in(config):
        raise InputError(f"{where}: {path.name} names code of the repository ({code}), which is not run; {NO_CODE}")
    return config


def _code_in(config: Any) -> str:
    """The key under which a configuration, or one inside it, names code, or ''."""
    if isinstance(config, list):
        return next((found for part in config if (found := _code_in(part))), "")
    if not isinstance(config, dict):
        return ""
    for key, value in config.items():
        is_kernel = "_implementation" in key and "/" in str(value)  # a repository of compiled code
        options = value if key == "tokenizer_kwargs" and isinstance(value, dict) else {}
        if key == "auto_map" or (key == "trust_remote_code" and value) or is_kernel:
            return key
        if set(options) - TOKENIZER_OPTIONS:
            return f"{key}: {min(set(options) - TOKENIZER_OPTIONS)}"
        if key in ("timm_model_name", "architecture") and ":" in str(value):
            return key
        if found := _code_in(value):
            return found
    return ""


def add_companions(where: str, folder: Path, config: Mapping[str, Any], source: Source, lock: Path) -> None:
    """Copy a linear head, and what a tokenizer or text tower of the transformers library is made from."""
    text = config["model_cfg"].get("text_cfg", {})
    companions = {}
    if head := source.files.get(CLASSIFIER):
        _check_head(where, head, config["model_cfg"]["embed_dim"])
        companions[CLASSIFIER] = head
    if name := text.get("hf_tokenizer_name"):
        own = {n: path for n, path in source.files.items() if n == "config.json" or is_tokenizer(n)}
        companions |= own if set(own) - {"config.json"} else _from_other(where, name, "tokenizer", lock)
    if name := text.get("hf_model_name"):
        (companions[TEXT_CONFIG],) = _from_other(where, name, "config", lock).values()
    for name, path in companions.items():
        if name.endswith("config.json"):
            read_configuration(where, path)
        shutil.copyfile(path, folder / name)
    if text.get("hf_tokenizer_name"):
        try:
            load_tokenizer(folder)(["a photo"])
        except Exception as error:  # whatever a library says of files that it cannot take
            raise InputError(f"{where}: its tokenizer cannot be built from its files ({summary(error)})") from error


def check_fit(
    where: str, library: str, architecture: str, folder: Path, shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[Any]]:
    """Load the folder on the meta device; what the library resizes itself: name -> [stored, loaded] shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that a copy to the meta device copies nothing
            built = build_model(folder, library, "meta").state_dict()
    except Exception as error:  # whatever a library says of weights that it cannot take
        fault = f"not of the architecture '{architecture}'; correct the line's architecture or weights"
        raise InputError(f"{where}: {fault}: {summary(error)}") from None
    pairs = {name: [list(shapes[name]), list(tensor.shape)] for name, tensor in built.items() if name in shapes}
    resized = {name: pair for name, pair in pairs.items() if math.prod(pair[0]) != math.prod(pair[1])}
    for name, (stored, loaded) in resized.items():
        say(f"{where}: '{name}' is resized from {stored} to {loaded} to fit the architecture '{architecture}'")
    return resized


def _check_packages(where: str, model_cfg: Mapping[str, Any] | None) -> None:
    needed = {"hf_model_name", "hf_tokenizer_name"} & set((model_cfg or {}).get("text_cfg", {}))
    if needed and importlib.util.find_spec("transformers") is None:
        raise InputError(f"{where}: its text tower needs the package 'transformers'; install it and run again")


def _classes(known: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The number of classes of a bare timm checkpoint, by its classifier's shape."""
    names = known["pretrained_cfg"].get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        if shape := shapes.get(f"{name}.weight"):
            return {"num_classes": shape[0]}
    return {}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    found = {}
    if bool(ours.get("quick_gelu")) != bool(theirs.get("quick_gelu")):
        found["quick_gelu"] = [bool(ours.get("quick_gelu")), bool(theirs.get("quick_gelu"))]
    for part in ("", "vision_cfg", "text_cfg"):
        a, b = (config.get(part, {}) if part else config for config in (ours, theirs))
        found |= {f"{part}.{key}".lstrip("."): [a[key], b[key]] for key in sorted(DECISIVE & set(a) & set(b))}
    return found


def _told(where: str, pairs: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The pairs that differ, told in the log too."""
    found = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    for key, (ours, theirs) in found.items():
        say(f"{where}: {key} is {ours} by the architecture of the line, {theirs} by the repository; the line decides")
    return found


def _check_head(where: str, head: Path, width: int) -> None:
    shapes = checkpoints.shapes_of(head, where)
    classes = shapes.get("bias", [0])[0]
    if shapes != {"weight": [classes, width], "bias": [classes]}:
        expected = f"a tensor 'weight' of classes x {width} and a 'bias' of classes"
        raise InputError(f"{where}: {head.name} has {shapes}, expected {expected}")
    checkpoints.check_finite(head, where)


def _from_other(where: str, repository: str, part: str, lock: Path) -> Mapping[str, Path]:
    """The tokenizer, or the configuration, of the repository that an open_clip configuration names."""

    def choose(names: Sequence[str], _: Bring) -> list[str]:
        chosen = [n for n in names if n == "config.json" or (part == "tokenizer" and is_tokenizer(n))]
        if not chosen:
            raise InputError(f"{where}: '{repository}', which has its {part}, has no config.json")
        return chosen

    return fetch_files(
        f"{where}, {part} of '{repository}'", f"{part}:{repository}", Place(repository), choose, lock
    ).files


def nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.4)
    return f"; the nearest is '{close[0]}'" if close else ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in patterns)


def is_tokenizer(name: str) -> bool:
    return matches(name, TOKENIZER) and Path(name).suffix in TEXT
