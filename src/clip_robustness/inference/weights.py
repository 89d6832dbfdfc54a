"""Weights into resources/weights/{model}, sealed with checksums, where there is a network.

Whatever the source, the folder has a hub's layout, is safetensors only, and has been loaded once on the meta device:
a GPU node reads no pickle, asks no hub, and meets no tensor of another shape.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core import io
from clip_robustness.core.atomic import scratch
from clip_robustness.core.io import InputError
from clip_robustness.inference import checkpoints, image_text
from clip_robustness.inference.architectures import (
    TOKENIZER,
    Source,
    add_companions,
    check_fit,
    configuration,
    known_configuration,
    matches,
    nearest,
)
from clip_robustness.inference.hub import Bring, Place, fetch_files
from clip_robustness.inference.load import CONFIGS

# By preference. `model.safetensors` comes last for open_clip, since beside its own files it is another library's.
WEIGHTS = {
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
    ),
    "timm": ("model.safetensors", "pytorch_model.bin"),
}


Choose = Callable[[Place, Sequence[str], Bring], Sequence[str]]


class Wanted(NamedTuple):
    """File names of a repository or folder: checkpoints by preference, and patterns of small files."""

    weights: Sequence[str]
    small: Sequence[str]


def fetch_weights(model: str, library: str, architecture: str, weights: str, out: Path, lock: Path) -> None:
    """Bring the weights of a line of models.tsv into the folder `out`, and seal it.

    library: open_clip, timm or transformers. architecture: the library's name, which decides the model that is built;
    what the repository's own configuration says otherwise is recorded in the manifest, as `differs`. Of transformers
    it is the class that config.json names, and one that AutoModelForImageTextToText knows.
    weights: `hub:OWNER/NAME[@REVISION][:FILE]`, or `local:PATH` of a folder in a hub's layout or of one checkpoint; of
    transformers always a whole repository or folder.
    lock: the file that pins a hub's commits and checksums, under `weights`.
    Errors: `InputError` where the weights cannot be had, are damaged, hold code or values that are not finite, or do
    not fit the architecture.
    """
    where = f"models.tsv, line '{model}', weights '{weights}'"
    known = {} if library == "transformers" else known_configuration(where, library, architecture)
    source = find_source(where, _chooser(where, library, architecture, known), weights, lock)
    out.mkdir(parents=True, exist_ok=True)
    with scratch(out) as folder:
        linked, facts = weights.startswith("hub:"), dict[str, Any]()
        if library == "transformers":
            image_text.copy_model(where, architecture, source, folder, linked)
        else:
            shapes = _copy_checkpoint(where, library, source, folder, linked)
            config, differs = configuration(where, library, architecture, known, source, shapes)
            io.write_json(folder / CONFIGS[library], config)
            if library == "open_clip":
                add_companions(where, folder, config, source, lock)
            facts = {"differs": differs, "resized": check_fit(where, library, architecture, folder, shapes)}
        _replace(out, folder)
    io.seal(out, model=model, architecture=architecture, **facts, **source.facts)


def _copy_checkpoint(where: str, library: str, source: Source, folder: Path, linked: bool) -> dict[str, list[int]]:
    """A checkpoint, as safetensors, checked to be finite; tensor name -> shape."""
    target = folder / WEIGHTS[library][0]
    if not checkpoints.is_plain(source.checkpoint, where):
        checkpoints.to_safetensors(source.checkpoint, target, where)
    elif linked:
        io.place(source.checkpoint.resolve(), target)
    else:
        shutil.copyfile(source.checkpoint, target)
    checkpoints.check_finite(target, where)
    return checkpoints.shapes_of(target, where)


def blend_weights(model: str, parent: Path, finetuned: Path, share: float, out: Path) -> None:
    """Interpolate between a model and what was fine-tuned from it: (1 - share) * parent + share * finetuned.

    parent, finetuned: sealed folders of one architecture; floating-point tensors are interpolated in float32, other
    tensors are the fine-tuned model's. A linear head is interpolated too, so both have one or neither has.
    Source: WiSE-FT, Wortsman et al. 2022 (arXiv 2109.01903), section 3.
    Errors: `InputError` for a share outside 0..1 and for folders whose tensors or configurations differ.
    """
    where = f"models.tsv, line '{model}', blend of {parent} and {finetuned}"
    if not 0 <= share <= 1:
        raise InputError(f"{where}: the share is {share}, expected 0 to 1")
    manifests = [io.check_sealed(folder) for folder in (parent, finetuned)]
    tensors, others = _kinds(manifests[1])
    if tensors != _kinds(manifests[0])[0]:
        found = " and ".join(", ".join(_kinds(manifest)[0]) for manifest in manifests)
        raise InputError(f"{where}: expected the same files of weights in both folders, found {found}")
    for name in set(others) & set(CONFIGS.values()):
        if _model_part(parent / name) != _model_part(finetuned / name):
            raise InputError(f"{where}: {name} describes another model in each; only one architecture can be blended")
    out.mkdir(parents=True, exist_ok=True)
    with scratch(out) as folder:
        for name in tensors:
            checkpoints.blend(parent / name, finetuned / name, share, folder / name, where)
            checkpoints.check_finite(folder / name, where)
        for name in others:
            shutil.copyfile(finetuned / name, folder / name)
        _replace(out, folder)
    parts = {"parent": manifests[0]["files"], "finetuned": manifests[1]["files"]}
    io.seal(out, model=model, architecture=manifests[1].get("architecture", ""), share=share, blend_of=parts)


def _kinds(manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A sealed folder's files of tensors, and its other files."""
    names = sorted(manifest["files"])
    return [n for n in names if n.endswith(".safetensors")], [n for n in names if not n.endswith(".safetensors")]


def _model_part(path: Path) -> Any:
    """What a configuration says of the model, its training and preprocessing left out."""
    config = io.read_json(path)
    if "model_cfg" in config:
        return config["model_cfg"]
    if "architectures" in config:
        return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return [config.get(key) for key in ("architecture", "num_classes", "model_args")]


def find_source(where: str, choose: Choose, weights: str, lock: Path | None) -> Source:
    """Where the files of `weights` lie here, those of a hub fetched, and pinned in `lock`."""
    scheme, _, text = weights.partition(":")
    if scheme == "hub":
        place = Place.parse(text)
        commit, files = fetch_files(where, weights, place, functools.partial(choose, place), lock)
        checkpoint = place.file or next(iter(files))
        facts = {"repository": place.repository, "revision": commit, "file": checkpoint}
        return Source(files[checkpoint], files, list(files), facts)
    path = Path(text).expanduser()
    if scheme != "local" or not path.exists():
        raise InputError(f"{where}: expected hub:OWNER/NAME, or local:PATH of a folder or a checkpoint that exists")
    files = {file.name: file for file in ([path] if path.is_file() else path.iterdir()) if file.is_file()}
    place = Place(text, file=path.name if path.is_file() else "")
    chosen = choose(place, sorted(files), files.__getitem__)
    if path.is_file():
        return Source(path, {}, (), {"copied_from": path.name})
    return Source(files[chosen[0]], files, chosen, {"copied_from": path.name, "file": chosen[0]})


def _chooser(where: str, library: str, architecture: str, known: Mapping[str, Any]) -> Choose:
    """What picks the files of a repository."""
    if library == "transformers":
        image_text.check_architecture(where, architecture)
        return functools.partial(image_text.choose, where, architecture)
    # A tokenizer of its own is taken where the architecture has one, or may have one.
    with_tokenizer = library == "open_clip" and (not known or "hf_tokenizer_name" in known["model_cfg"]["text_cfg"])
    small = (CONFIGS[library], *((*TOKENIZER, "config.json") if with_tokenizer else ()))
    return functools.partial(_choose, where, Wanted(WEIGHTS[library], small))


def _choose(where: str, wanted: Wanted, place: Place, names: Sequence[str], _: Bring) -> list[str]:
    """The checkpoint's name, first, and those of the small files that may be needed with it."""
    if place.file and place.file not in names:
        raise InputError(f"{where}: no file '{place.file}' in {place.repository}{nearest(place.file, names)}")
    checkpoint = place.file or next((name for name in wanted.weights if name in names), "")
    if not checkpoint:
        others = [name for name in names if Path(name).suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
        hint = f"; it has {', '.join(others[:5])}: name one of these in the line" if others else ""
        raise InputError(f"{where}: {place.repository} has none of {', '.join(wanted.weights)}{hint}")
    return [checkpoint, *(name for name in names if matches(name, wanted.small))]


def _replace(out: Path, folder: Path) -> None:
    """Move the files of `folder` to `out`, and away with what an earlier fetch has left there."""
    names = {path.name for path in folder.iterdir()}
    for path in out.iterdir():
        written = path.suffix in (".safetensors", ".bin", ".json", ".jinja") or matches(path.name, TOKENIZER)
        if path.is_file() and path.name not in names and written:
            path.unlink()
    for path in sorted(folder.iterdir()):
        path.replace(out / path.name)
