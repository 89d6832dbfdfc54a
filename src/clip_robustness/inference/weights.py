"""Weights into resources/weights/{model}, sealed with checksums, where there is a network.

A GPU node loads the sealed folder and needs no network. Only what a model needs is taken, safetensors first; a
pickled checkpoint is taken only where there is nothing else, and is later read with `weights_only=True`.
"""

import shutil
import tempfile
from pathlib import Path

from clip_robustness.core import io

CONFIGS = ("open_clip_config.json", "config.json")
SMALL = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "*.model")
WEIGHTS = {
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    "timm": ("model.safetensors", "pytorch_model.bin"),
}


def fetch_weights(model: str, library: str, weights: str, out: Path) -> None:
    """Fetch `hub:OWNER/NAME[@REVISION]` or copy `local:FOLDER` into `out` and seal it.

    Errors: `InputError` for a repository that is missing, gated or without this library's weights, and for no network.
    """
    out.mkdir(parents=True, exist_ok=True)
    scheme, _, place = weights.partition(":")
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name) / "weights"
        facts = (
            _from_hub(model, library, place, folder) if scheme == "hub" else _from_folder(model, library, place, folder)
        )
        for path in sorted(folder.iterdir()):
            if path.is_file():
                path.replace(out / path.name)
    io.seal(out, model=model, **facts)


def _from_hub(model: str, library: str, place: str, folder: Path) -> dict[str, str]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, revision = place.partition("@")
    where = f"model '{model}', weights 'hub:{place}'"
    try:
        info = HfApi().model_info(repository, revision=revision or None)
        names = [file.rfilename for file in info.siblings or []]
        chosen = [next((n for n in WEIGHTS[library] if n in names), "")]
        if not chosen[0]:
            raise io.InputError(f"{where}: the repository has none of {', '.join(WEIGHTS[library])}")
        chosen += [n for n in names if n in CONFIGS or any(Path(n).match(pattern) for pattern in SMALL)]
        for name in chosen:
            hf_hub_download(repository, name, revision=info.sha, local_dir=folder)
    except GatedRepoError:
        raise io.InputError(
            f"{where}: the repository is gated; accept its terms and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise io.InputError(f"{where}: no such repository or revision; check the line in models.tsv") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise io.InputError(f"{where}: cannot reach the model hub ({error}); run where there is a network") from None
    return {"repository": repository, "revision": str(info.sha)}


def _from_folder(model: str, library: str, place: str, folder: Path) -> dict[str, str]:
    source = Path(place).expanduser()
    chosen = [n for n in WEIGHTS[library] if (source / n).is_file()][:1]
    if not chosen:
        raise io.InputError(
            f"model '{model}', weights 'local:{place}': expected a folder with one of {', '.join(WEIGHTS[library])}"
        )
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name in (*chosen, *CONFIGS, "classifier.safetensors") or any(path.match(p) for p in SMALL):
            shutil.copyfile(path, folder / path.name)
    return {"copied_from": source.name}
