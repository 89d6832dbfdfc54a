"""What both sides of against_clip_benchmark.py are given: sets of images, a model, and CLIP_benchmark's environment."""

import argparse
import dataclasses
import importlib.metadata
import io as bytes_io
import os
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.preprocessing import Preprocessing

ARCHITECTURE = "ViT-B-32"
PREPROCESS = "resize(224,bicubic)|center_crop(224)|normalize(openai)"
SIZE = (500, 375)
SEED = 999_000_000  # of photos that are in no set
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # of CLIP_benchmark


@dataclasses.dataclass(frozen=True)
class Setup:
    """What both sides are given. `prompts`: the templates of the first and of the second evaluation."""

    work: Path
    classes: dict[str, list[str]]
    prompts: dict[str, list[str]]
    environment: Path

    @property
    def sets(self) -> list[str]:
        return list(self.classes)

    def folder(self, prompts: str) -> Path:
        return self.work / f"sets_{prompts}"

    @property
    def model(self) -> Path:
        return self.work / "model"


def photo(seed: int) -> bytes:
    """A JPEG whose spectrum is about a photo's: noise in octaves and a little grain; 60 to 80 KB at quality 92."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((SIZE[1], SIZE[0], 3), np.float32) + rng.uniform(70, 180, 3).astype(np.float32)
    for cells, strength in ((2, 90), (6, 70), (20, 45), (70, 25), (240, 14)):
        noise = rng.integers(0, 256, (cells * 3 // 4 + 1, cells, 3), np.uint8)
        smooth = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
        canvas += strength * (np.asarray(smooth, np.float32) / 127.5 - 1)
    canvas += rng.integers(-8, 9, (SIZE[1], SIZE[0], 1), np.int8)
    buffer = bytes_io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_shard(path: Path, images: int, classes: int, seed: int) -> None:
    with io.atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(images):
            for suffix, content in (("cls", str(i % classes).encode()), ("jpg", photo(seed * 1_000_000 + i))):
                info = tarfile.TarInfo(f"s{i:07d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, bytes_io.BytesIO(content))


def prepare(options: argparse.Namespace) -> Setup:
    """Sets (for each prompt set a folder of texts around the same shards), model and environment."""
    work = options.work.resolve()
    known = list(open_clip.IMAGENET_CLASSNAMES)
    first = {f"set_{k}": options.classes * k * options.own_classes for k in range(options.sets)}
    classes = {name: known[start : start + options.classes] for name, start in first.items()}
    if any(len(names) < options.classes for names in classes.values()):
        sys.exit(f"there are {len(known)} class names; ask for fewer classes or sets")
    pool = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    simple = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    prompts = {"first": pool[: options.templates], "second": simple[: options.second_templates]}
    setup = Setup(work, classes, prompts, work / "environment")
    for k, name in enumerate(classes):
        shard = work / f"shards/{options.images}x{options.classes}/{name}/0.tar"
        if not shard.is_file():
            print(f"making {shard}: {options.images:,} images", flush=True)
            write_shard(shard, options.images, options.classes, k)
        for prompt_set, templates in prompts.items():
            folder = setup.folder(prompt_set) / name
            (folder / "test").mkdir(parents=True, exist_ok=True)
            (folder / "test/0.tar").unlink(missing_ok=True)
            (folder / "test/0.tar").hardlink_to(shard)
            (folder / "test/nshards.txt").write_text("1")
            (folder / "dataset_type.txt").write_text("classification")
            (folder / "classnames.txt").write_text("\n".join(classes[name]))
            lines = [template.replace("{}", "{c}") for template in templates]
            (folder / "zeroshot_classification_templates.txt").write_text("\n".join(lines))
    make_model(setup.model)
    make_environment(setup.environment)
    return setup


def make_model(folder: Path) -> None:
    """One checkpoint that both load: CLIP_benchmark by its file, this project by its folder.

    The image tower's last bias makes the mean over some photos 0; without it a random model gives all the same class.
    """
    from safetensors.torch import save_file

    if (folder / "open_clip_config.json").is_file():
        return
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(ARCHITECTURE)
    photos = torch.stack([transform(Image.open(bytes_io.BytesIO(photo(SEED + i)))) for i in range(64)])
    pooled: list[torch.Tensor] = []
    model.visual.ln_post.register_forward_hook(lambda _module, _inputs, out: pooled.append(out[:, 0]))
    with torch.no_grad():
        model.eval().encode_image(photos)
        model.visual.ln_post.bias -= pooled[0].mean(dim=0)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    spec = Preprocessing.parse(PREPROCESS)
    seen = {"size": 224, "mean": spec.mean, "std": spec.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": seen}
    io.write_json(folder / "open_clip_config.json", config)


def make_environment(folder: Path) -> None:
    """NumPy below 2.3 and `requests` are what CLIP_benchmark 1.6.2 needs and does not ask for."""
    if (folder / "ready").is_file():
        return
    shared = [f"{name}=={version_of(name)}" for name in ("torch", "torchvision", "open_clip_torch", "pillow")]
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    wanted = ["clip-benchmark==1.6.2", "requests", "numpy<2.3", *shared]
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *wanted], check=True, env=ENVIRONMENT)
    (folder / "ready").write_text("\n".join(wanted))


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()


def version_of(name: str) -> str:
    return importlib.metadata.version(name).split("+")[0]
