"""Tiny LLaVAs of the real architecture: with random weights, and with weights that are worked out by hand."""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from clip_robustness.core import io
from clip_robustness.inference.vision_language import QUESTION
from tests.unit.samples import encoded

NAMES = ("cup", "desk lamp", "bow", "bow tie", "very old clock", "pen")
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 230), (230, 220, 40), (200, 40, 220), (30, 220, 220))
SIZE, PATCH, HIDDEN = 24, 8, 32
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} [/INST]{% endfor %}"
)
PIECES = r"<unk>|<pad>|<s>|</s>|\w+|[^\w\s]"


def llava(kind: str = "Llava", seed: int = 0, layers: int = 2, strategy: str = "default", names=NAMES):
    """(model, processor) that knows the words of `names`; kind: Llava or LlavaNext (LLaVA-1.5 and 1.6)."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(names)
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
        **{f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")},
    )  # fmt: skip
    grid = {"image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]} if kind == "LlavaNext" else {}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
        **grid,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    side = {"height": SIZE, "width": SIZE}
    images = getattr(transformers, f"{kind}ImageProcessor" if grid else "CLIPImageProcessor")(
        size={"shortest_edge": SIZE}, crop_size=side, **grid
    )
    processor = getattr(transformers, f"{kind}Processor")(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy=strategy, chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


def word_tokenizer(names) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    texts = [QUESTION.format(" ".join(names), ""), "USER: ASSISTANT: [INST] [/INST]"]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **SPECIAL)


def save(model, processor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    io.seal(folder, model="llava")
    return folder


def picture(colour, seed: int = 0, size: tuple[int, int] = (30, 26)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-9, 10, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_images(folder: Path, images: list[Image.Image], labels: list[int]) -> Path:
    """An index of PNGs in one file, as every adapter writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [encoded(image, "PNG") for image in images]
    (folder / "images.bin").write_bytes(b"".join(data))
    sizes = np.array([len(some) for some in data], np.int64)
    columns = {
        "image_id": [f"{i:03d}.png" for i in range(len(data))],
        "archive": [str(folder / "images.bin")] * len(data),
    }
    columns |= {"offset": np.cumsum(sizes) - sizes, "size": sizes, "label": np.array(labels, np.int32)}
    io.write_parquet(folder / "set.parquet", columns)
    return folder / "set.parquet"


def write_questions(path: Path, ids: list[str], truth: list[int], failure: list[int], selector: str = "clip") -> Path:
    columns = {"selector": [selector] * len(ids), "selector_model": ["m"] * len(ids), "image_id": ids}
    columns |= {"category": ["texture", "material"] * (len(ids) // 2) + ["texture"] * (len(ids) % 2)}
    columns |= {"label": np.array(truth, np.int32), "failure_label": np.array(failure, np.int32)}
    columns |= {"truth": [NAMES[i] for i in truth], "failure": [NAMES[i] for i in failure]}
    io.write_parquet(path, columns | {"selector_right": [i % 3 == 0 for i in range(len(ids))]})
    return path


def oracle(names: tuple[str, ...]):
    """A LLaVA that reads the colour of a picture and knows the class by it: no weight is trained.

    One layer that attends to all tokens alike and copies what image tokens carry; the projector is solved for, such
    that the features of each colour become the code of its class; the head reads the codes as the classes' words.
    """
    model, processor = llava(layers=1)
    tokenizer, part = processor.tokenizer, len(names)
    ids = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
    pixels = processor.image_processor(
        [picture(c, seed=s) for c in COLOURS[:part] for s in (1, 2)], return_tensors="pt"
    )
    core, layer = model.model, model.model.language_model.layers[0]
    with torch.no_grad():
        seen = core.vision_tower(**pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projector = core.multi_modal_projector
        hidden = projector.act(projector.linear_1(seen)).flatten(0, 1)
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1).double()
        codes = torch.eye(part).repeat_interleave(2 * seen.shape[1], dim=0)
        wanted = torch.cat([codes, torch.zeros(len(codes), HIDDEN - part)], dim=1).double()
        solved = torch.linalg.lstsq(hidden, wanted).solution.float()
        projector.linear_2.weight.copy_(solved[:-1].T)
        projector.linear_2.bias.copy_(solved[-1])
        for weight in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
            weight.weight.zero_()
        for weight in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            weight.weight.copy_(torch.eye(HIDDEN))
        core.language_model.embed_tokens.weight[:, :part] = 0  # words say nothing of the classes
        model.lm_head.weight.mul_(0.01)
        for code, words in zip(torch.eye(part), ids, strict=True):
            model.lm_head.weight[words, :part] += 50 * code
    return model, processor


def blind(model):
    """The same model, all of whose images look alike."""
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    return model
