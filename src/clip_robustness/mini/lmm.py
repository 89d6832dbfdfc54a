"""Train the mini study's vision-language model: a LLaVA of transformers' own classes around a frozen mini CLIP.

    train_lmm(recipe, index, out, labels, parent)

The CLIP's image tower, as a CLIPVisionModel, a projector and a small Llama whose words are those of the questions. Only
the latter two learn, from questions about the images of a training world: which of two solids is it? As the tower is
frozen, its features are computed once. One thread and explicit seeds, as in `train`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clip_robustness.core.io import InputError, Progress, read_json, seal
from clip_robustness.mini import architectures
from clip_robustness.mini.train import Batches, descend, normalise, training_set

LANGUAGE: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128},
}
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
IMAGE = "<image>"
# LLaVA-1.5's own conversation.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LAYER_NAMES = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
}


def train_lmm(recipe: Mapping[str, Any], index: Path, out: Path, labels: Path, parent: Path | None) -> None:
    """Train what `recipe` says on the images of `index` and write the model's folder `out`, as transformers does.

    recipe   a row of models.tsv (model, train_images) and the settings of the `training` block: seed, fraction, and a
             block `lmm` {epochs, batch_size, learning_rate, weight_decay, warmup, questions}. A question is a text with
             two places for the options, or with none; the answer is the name of the class
    labels   JSON of the label space
    parent   the folder of the CLIP whose tower it sees through
    Errors: `InputError` for a recipe without a parent, a parent that is no ViT, or too few images.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves 5 %
    torch.manual_seed(int(recipe["seed"]))
    if parent is None:
        raise InputError(f"model {recipe['model']}: a LLaVA needs a CLIP to see through; name it in `parent`")
    settings, classes = recipe["lmm"], list(read_json(labels)["classes"])
    columns, images = training_set(recipe, index, int(settings["batch_size"]))
    processor = build_processor(classes, settings["questions"])
    model = build_llava(vision_tower(*architectures.load_clip(parent)), processor.tokenizer)
    prompts = [_prompts(processor, text, classes) for text in settings["questions"]]
    target = torch.from_numpy(columns["label"].astype(np.int64))
    batches = Questions(_features(model, images), target, len(classes), settings, int(recipe["seed"]), recipe["model"])
    fit_lmm(model, batches, prompts, _answers(processor.tokenizer, classes))
    _save(model, processor, out)
    seal(out, model=recipe["model"])


def _save(model: Any, processor: Any, out: Path) -> None:
    """The folder that AutoModelForImageTextToText and AutoProcessor load."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors would keep its file from all other users


def vision_tower(clip: Any, architecture: str) -> Any:
    """The image tower of an open_clip ViT as transformers' CLIPVisionModel: the same numbers under other names.

    Its features come before the projection that CLIP compares with texts. Errors: `InputError` for another tower.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = architectures.CLIPS[architecture]["vision_cfg"]
    if "patch_size" not in shape:
        raise InputError(f"architecture {architecture!r} has no ViT; a LLaVA's parent must be one")
    width = shape["width"]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=shape["layers"],
        num_attention_heads=width // shape["head_width"],
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        hidden_act="gelu",
        projection_dim=architectures.CLIPS[architecture]["embed_dim"],
    )
    tower = CLIPVisionModel(config)
    tower.load_state_dict(_renamed(clip.visual.state_dict()))
    return tower.eval().requires_grad_(False)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open_clip VisionTransformer under the names of CLIPVisionModel."""
    renamed = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):  # the typing error is theirs
        renamed |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        layer, _, part = name.removeprefix("transformer.resblocks.").partition(".")
        target = f"encoder.layers.{layer}."
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for which, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{target}self_attn.{which}_proj.{kind}"] = third
        else:
            module, _, kind = part.rpartition(".")
            renamed[f"{target}{_LAYER_NAMES[module]}.{kind}"] = value
    return renamed


def build_processor(classes: Sequence[str], questions: Sequence[str]) -> Any:
    """A LlavaProcessor whose tokens are the words of the questions and of the classes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    # Words and single signs; tokenizers' own Whitespace would take a run of signs as one word.
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    texts = ["USER: ASSISTANT:", *questions, *classes]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.format("", ""))}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), IMAGE, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = split
    begin = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, vocabulary[begin])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[IMAGE], padding_side="left", **SPECIAL
    )
    side = {"height": architectures.SIZE, "width": architectures.SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": architectures.SIZE},
        crop_size=side,
        image_mean=list(architectures.MEAN),
        image_std=list(architectures.STD),
    )
    patch = architectures.CLIPS["mini_clip_vit"]["vision_cfg"]["patch_size"]
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,  # the class token, which "full" keeps
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def build_llava(tower: Any, tokenizer: Any) -> Any:
    """A freshly initialised LlavaForConditionalGeneration around `tower`, which is frozen.

    It sees the tower's last layer with its class token, the only one that the mini CLIP was trained to read out.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    language = LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE, **ends)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    tokens = (tower.config.image_size // tower.config.patch_size) ** 2 + 1
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=language,
            image_token_index=image,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=tokens,
        )
    )
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.update(**ends)
    return model


class Questions(Batches):
    """Shuffled batches of questions about images of which the frozen tower's features [2, n, t, d] are known."""

    def __init__(
        self, features: Tensor, target: Tensor, classes: int, settings: Mapping[str, Any], seed: int, name: str
    ):
        self.features, self.target, self.classes = features, target, classes
        self.settings, self.size, self.name = settings, int(settings["batch_size"]), name
        self.random = torch.Generator().manual_seed(seed)
        self.epochs = int(settings["epochs"])
        self.steps = self.epochs * (len(target) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [b] and features [b, t, d], half of them of the mirrored image."""
        progress = Progress(f"train {self.name}", self.steps * self.size)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.target), generator=self.random)
            for start in range(0, len(order) - self.size + 1, self.size):
                rows = order[start : start + self.size]
                mirrored = torch.randint(2, (len(rows),), generator=self.random)
                yield rows, self.features[mirrored, rows]
                progress.update(self.size)

    def options(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The two options [b] for the images of `rows`: the class and any other, in random order."""
        right = self.target[rows]
        other = torch.randint(1, self.classes, (len(rows),), generator=self.random)
        wrong = (right + other) % self.classes
        first = torch.rand(len(rows), generator=self.random) < 0.5
        return torch.where(first, right, wrong), torch.where(first, wrong, right)


def fit_lmm(model: Any, batches: Questions, prompts: Sequence[Tensor], answers: Tensor) -> float:
    """Train projector and language model by the answers' cross entropy; the mean loss of the last tenth of the steps.

    prompts: of each kind of question the tokens [classes, classes, t] by its two options. answers: tokens [classes, a].
    """
    image, count = model.config.image_token_index, answers.shape[1]
    model.train()

    def loss_of(rows: Tensor, features: Tensor) -> Tensor:
        kind = int(torch.randint(len(prompts), (1,), generator=batches.random))
        first, second = batches.options(rows)
        answer = answers[batches.target[rows]]
        ids = torch.cat([prompts[kind][first, second], answer[:, :-1]], dim=1)
        seen = model.model.multi_modal_projector(features)
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == image)[..., None], seen)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -count:]
        return functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), answer.flatten())

    learns = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = descend(learns, batches, loss_of)
    model.eval()
    return loss


@torch.no_grad()
def _features(model: Any, images: np.ndarray) -> Tensor:
    """What the frozen tower makes of the images and of the mirrored images, float32 [2, n, t, d]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    halves = []
    for flipped in (False, True):
        parts = []
        for some in pixels.split(256):
            shown = normalise(some.flip(-1) if flipped else some)
            parts.append(model.model.vision_tower(shown, output_hidden_states=True).hidden_states[-1])
        halves.append(torch.cat(parts))
    return torch.stack(halves)


def _prompts(processor: Any, question: str, classes: Sequence[str]) -> Tensor:
    """Tokens of a question for each two options [classes, classes, t]. Errors: `InputError` when lengths differ."""
    tokenizer, places = processor.tokenizer, architectures.SIZE // processor.patch_size
    table = []
    for first in classes:
        for second in classes:
            content = [{"type": "image"}, {"type": "text", "text": question.format(first, second)}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            table.append(tokenizer(text.replace(IMAGE, IMAGE * (places**2 + 1))).input_ids)
    return _square(table, "question").view(len(classes), len(classes), -1)


def _answers(tokenizer: Any, classes: Sequence[str]) -> Tensor:
    """Tokens of each class name and the end [classes, a]."""
    texts = [[*tokenizer(name, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for name in classes]
    return _square(texts, "answer")


def _square(tokens: Sequence[Sequence[int]], what: str) -> Tensor:
    if len({len(some) for some in tokens}) > 1:
        raise InputError(f"mini LLaVA: a {what} has as many tokens as another only when all class names are one word")
    return torch.tensor([list(some) for some in tokens])
