"""Time of the eleven attacks and their yardsticks: python benchmarks/attacks.py [--weights FOLDER ...]

Without arguments the victim is the mini study's ViT with random weights, labelled by its own answers, so that all 200
images are attacked; the substitute is its ResNet. With `--weights`, `--substitute` (timm folders) and `--index`,
`--labels`, those. Settings are those of config/attacks.yaml with what config/mini.yaml replaces.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from clip_robustness.core import io
from clip_robustness.inference.attack import attack_images
from clip_robustness.inference.load import load_image_model
from clip_robustness.mini.architectures import SIZE, build_classifier, save_classifier

ROOT = Path(__file__).resolve().parents[1]
SPEC = f"resize({SIZE},bicubic)|center_crop({SIZE})|normalize(0.5,0.5,0.5;0.5,0.5,0.5)"
CLASSES = 10


def make(folder: Path, images: int) -> dict[str, Path]:
    """Two models with random weights, pictures, and labels that the first model gives them."""
    for name, architecture in (("victim", "mini_vit"), ("substitute", "mini_resnet")):
        torch.manual_seed(0)
        (folder / name).mkdir()
        save_classifier(build_classifier(architecture, CLASSES), architecture, folder / name)
        io.seal(folder / name, model=name)
    coarse = np.random.default_rng(0).integers(0, 256, (images, 6, 6, 3), np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(picture).resize((SIZE, SIZE))) for picture in coarse])
    with torch.no_grad():
        answers = load_image_model(folder / "victim", "timm", (0.5,) * 3, (0.5,) * 3)(torch.from_numpy(pixels))
    paths = [folder / f"{i:04d}.png" for i in range(images)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    columns = {"image_id": [path.stem for path in paths], "archive": [str(path) for path in paths]}
    numbers = {"offset": np.zeros(images, np.int64), "size": np.array([path.stat().st_size for path in paths])}
    io.write_parquet(
        folder / "set.parquet", {**columns, **numbers, "label": answers.argmax(1).numpy().astype(np.int32)}
    )
    space = {"classes": [str(i) for i in range(CLASSES)], "members": [[i] for i in range(CLASSES)], "pool": "max"}
    io.write_json(folder / "labels.json", space)
    return {name: folder / file for name, file in FILES.items()}


FILES = {"weights": "victim", "substitute": "substitute", "index": "set.parquet", "labels": "labels.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attacks", nargs="*", default=[])
    parser.add_argument("--settings", type=json.loads, default={}, help='such as {"nes": {"pairs": 10}}')
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = yaml.safe_load((ROOT / "config/attacks.yaml").read_text())
    changed = yaml.safe_load((ROOT / "config/mini.yaml").read_text()).get("attacks", {}).get("settings", {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = make(folder, arguments.images) if arguments.weights is None else vars(arguments)
        print("attack          seconds  of the CPU  accuracy  median distance   queries  faults")
        total = np.zeros(2)
        for attack in arguments.attacks or table:
            settings = {**table[attack], **changed.get(attack, {}), **arguments.settings.get(attack, {})}
            substitute = {"weights": given["substitute"], "library": "timm", "preprocess": SPEC}
            out = folder / f"{attack}.parquet"
            start = np.array([time.perf_counter(), time.process_time()])
            attack_images(
                model="victim",
                attack=attack,
                library="timm",
                preprocess=SPEC,
                weights=given["weights"],
                index=given["index"],
                labels=given["labels"],
                settings=settings,
                out=out,
                work=folder / "work",
                images=arguments.images,
                substitute=substitute if settings.get("substitute") else None,
            )
            seconds = np.array([time.perf_counter(), time.process_time()]) - start
            total += seconds
            found, manifest = io.read_parquet(out), io.read_json(out.with_suffix(".json"))
            accuracy = np.mean(found["distance"] > manifest["reported"] + 1e-6)
            median = np.median(found["distance"]) * (255 if manifest["norm"] == "linf" else 1)
            queries, faults = found["queries"].mean(), (found["fault"] > 0).mean()
            print(f"{attack:15} {seconds[0]:7.1f}  {seconds[1]:10.1f}  {accuracy:8.3f}", end="  ")
            print(f"{median:15.3f}  {queries:8,.0f}  {faults:6.3f}", flush=True)
        print(f"{'all':15} {total[0]:7.1f}  {total[1]:10.1f}")


if __name__ == "__main__":
    main()
