"""Train one model of the mini zoo, from its line of models.tsv and the `training` block of the config.

    train_model(recipe, index, out, labels, parent)

CLIPs are open_clip's classes, tokenizer and losses; classifiers are timm's. One thread and explicit seeds: the same
recipe gives the same bytes on the same machine, whatever else the workflow runs beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_robustness.core.io import InputError, Progress, read_json, read_parquet, seal
from clip_robustness.mini import architectures
from clip_robustness.mini.dataset import read_images

LARGEST_LOGIT_SCALE = math.log(100)  # CLIP's bound, arXiv 2103.00020, section 2.5


def train_model(recipe: Mapping[str, Any], index: Path, out: Path, labels: Path, parent: Path | None = None) -> None:
    """Train what `recipe` says on the images of `index` and write the model's folder `out`.

    recipe   a row of models.tsv (model, library, architecture, finetuning, loss, train_images) and the settings of
             the `training` block (seed, fraction, and a block {epochs, batch_size, learning_rate, weight_decay,
             warmup} for each of clip, supervised, cross_entropy, contrastive, the last two with {templates}); epochs
             is a number or, where families learn at different speed, a number for each `family`
    labels   JSON of the label space
    parent   the folder of the CLIP that is fine-tuned
    Errors: `InputError` for a recipe that is unknown, lacks its parent, or gets too few images.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves 5 %
    torch.manual_seed(int(recipe["seed"]))
    kind = _kind(recipe, parent)
    columns, images = training_set(recipe, index, int(recipe[kind]["batch_size"]))
    classes = read_json(labels)["classes"]
    settings = dict(recipe[kind])
    if isinstance(settings["epochs"], Mapping):
        if recipe["family"] not in settings["epochs"]:
            raise InputError(f"model {recipe['model']}: training.{kind}.epochs says nothing of {recipe['family']!r}")
        settings["epochs"] = settings["epochs"][recipe["family"]]
    batches = Batches(images, settings, int(recipe["seed"]), str(recipe["model"]))
    target = torch.from_numpy(columns["label"].astype(np.int64))
    if kind == "supervised":
        model = architectures.build_classifier(recipe["architecture"], len(classes))
        fit_classifier(model, batches, target)
        architectures.save_classifier(model, recipe["architecture"], out)
        seal(out, model=recipe["model"])
        return
    if parent is None:
        model, architecture = architectures.build_clip(recipe["architecture"]), str(recipe["architecture"])
    else:
        model, architecture = architectures.load_clip(parent)
    if kind == "clip":
        fit_clip(model, batches, list(columns["caption"]), str(recipe["loss"]))
    elif kind == "contrastive":
        names, templates = np.array(classes)[columns["label"]], settings["templates"]
        captions = [templates[i % len(templates)].format(name) for i, name in enumerate(names)]
        fit_clip(model, batches, captions, str(recipe["loss"]))
    else:
        prompts = [[t.format(name) for t in settings["templates"]] for name in classes]
        head = fit_clip_classifier(model, batches, target, prompts)
        architectures.save_weights(head, out / "classifier.safetensors")
    architectures.save_clip(model, architecture, out)
    seal(out, model=recipe["model"])


def _kind(recipe: Mapping[str, Any], parent: Path | None) -> str:
    """The block of settings that a recipe trains by."""
    model, finetuning = recipe["model"], recipe.get("finetuning") or "none"
    if recipe["library"] == "timm":
        return "supervised"
    if finetuning == "none":
        return "clip"
    if finetuning not in ("cross_entropy", "contrastive"):
        raise InputError(f"model {model}: finetuning is {finetuning!r}, expected none, cross_entropy or contrastive")
    if parent is None:
        raise InputError(f"model {model}: fine-tuning needs a parent; name it in the column `parent`")
    return finetuning


def training_set(recipe: Mapping[str, Any], index: Path, batch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first `train_images * fraction` rows and their pixels; rows are in random order already."""
    columns = read_parquet(index, ["image_id", "archive", "offset", "size", "label", "caption"])
    wanted = round(int(recipe["train_images"]) * float(recipe["fraction"]))
    columns = {name: column[:wanted] for name, column in columns.items()}
    count = len(columns["label"])
    if count < batch:
        raise InputError(
            f"{index}: {count} images for model {recipe['model']}, expected at least one batch of {batch}; "
            "raise `fraction`, `train_images` or the data set's `images`"
        )
    return columns, read_images(columns, index)


class Batches:
    """Shuffled batches, and the optimiser's settings that go with them."""

    def __init__(self, images: np.ndarray, settings: Mapping[str, Any], seed: int, name: str):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view, so the memory stays channels last
        self.settings, self.size, self.name = settings, int(settings["batch_size"]), name
        self.random = torch.Generator().manual_seed(seed)
        self.epochs = int(settings["epochs"])
        self.steps = self.epochs * (len(images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [b] and pixels [b, 3, 48, 48], half of them mirrored.

        Channels last: a CPU then convolves a third faster.
        """
        progress = Progress(f"train {self.name}", self.steps * self.size)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.images), generator=self.random)
            for start in range(0, len(order) - self.size + 1, self.size):
                rows = order[start : start + self.size]
                mirrored = torch.rand(len(rows), generator=self.random) < 0.5
                pixels = normalise(self.images[rows])
                yield rows, torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
                progress.update(self.size)


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to what the models see."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (architectures.MEAN, architectures.STD))
    return (images.float() / 255 - mean) / std


def descend(parameters: Mapping[str, nn.Parameter], batches: Batches, loss_of: Callable[..., Tensor]) -> float:
    """AdamW with warm-up and a cosine; return the mean loss of the last tenth of the steps."""
    settings = batches.settings
    peak, warmup = float(settings["learning_rate"]), float(settings["warmup"]) * batches.steps
    decayed = [p for p in parameters.values() if p.ndim > 1]
    other = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": float(settings["weight_decay"])}]
    groups.append({"params": other, "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    losses = []
    for step, (rows, pixels) in enumerate(batches):
        rate = peak * min(1.0, (step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / batches.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of(rows, pixels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*decayed, *other], 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, len(losses) // 10) :]
    if not math.isfinite(sum(last)):
        raise InputError(f"model {batches.name}: the loss is not finite; lower its learning_rate")
    return sum(last) / len(last)


def fit_classifier(model: nn.Module, batches: Batches, target: Tensor) -> float:
    """Supervised training by cross entropy; `target` [n] holds the labels."""
    model.to(memory_format=torch.channels_last).train()
    loss = descend(
        dict(model.named_parameters()),
        batches,
        lambda rows, pixels: functional.cross_entropy(model(pixels), target[rows]),
    )
    model.eval()
    return loss


def fit_clip(model: Any, batches: Batches, captions: list[str], loss: str) -> float:
    """Contrastive training with open_clip's softmax or sigmoid loss; `captions` has one string an image."""
    from open_clip import SimpleTokenizer
    from open_clip.loss import ClipLoss, SigLipLoss

    if loss not in ("softmax", "sigmoid"):
        raise InputError(f"model {batches.name}: loss is {loss!r}, expected softmax or sigmoid")
    criterion = ClipLoss() if loss == "softmax" else SigLipLoss()
    tokens = SimpleTokenizer(context_length=model.context_length)(captions)
    full, used = compact_vocabulary(model, tokens)
    tokens = torch.searchsorted(used, tokens)
    model.to(memory_format=torch.channels_last).train()

    def loss_of(rows: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokens[rows], normalize=True)
        extra = () if loss == "softmax" else (model.logit_bias,)
        return criterion(image, text, model.logit_scale.exp(), *extra)

    last = descend(dict(model.named_parameters()), batches, loss_of)
    restore_vocabulary(model, full, used)
    model.eval()
    return last


def fit_clip_classifier(model: Any, batches: Batches, target: Tensor, prompts: list[list[str]]) -> dict[str, Tensor]:
    """Fine-tune the image tower and a linear head that starts as the zero-shot head of `prompts` (a list a class).

    The head applies to the L2-normalised feature; the logit scale is folded in. Source: Wortsman et al., "Robust
    fine-tuning of zero-shot models", arXiv 2109.01903, section 2 (end-to-end fine-tuning).
    """
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=model.context_length)
    model.eval()
    with torch.no_grad():
        rows = [model.encode_text(tokenizer(texts), normalize=True).mean(dim=0) for texts in prompts]
        weight = functional.normalize(torch.stack(rows), dim=1) * model.logit_scale.exp()
    head = {"weight": nn.Parameter(weight), "bias": nn.Parameter(torch.zeros(len(prompts)))}
    model.visual.to(memory_format=torch.channels_last).train()

    def loss_of(rows: Tensor, pixels: Tensor) -> Tensor:
        feature = model.encode_image(pixels, normalize=True)
        return functional.cross_entropy(functional.linear(feature, head["weight"], head["bias"]), target[rows])

    descend({**dict(model.visual.named_parameters()), **head}, batches, loss_of)
    model.eval()
    return {name: parameter.detach() for name, parameter in head.items()}


def compact_vocabulary(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Give `model` a token embedding over only the ids that occur; return the full table and the sorted ids.

    Sorted, so that the end token stays the largest id and pooling by argmax stays right. Most of the 49,408 rows
    would be moved by no gradient and yet cost the optimiser its time.
    """
    used = tokens.unique()
    full = model.token_embedding.weight.detach().clone()
    model.token_embedding = nn.Embedding.from_pretrained(full[used], freeze=False)
    return full, used


def restore_vocabulary(model: Any, full: Tensor, used: Tensor) -> None:
    """Undo `compact_vocabulary`: the trained rows go back to their places in the full table."""
    full[used] = model.token_embedding.weight.detach()
    model.token_embedding = nn.Embedding.from_pretrained(full, freeze=False)
