"""A model that reads images and text and answers in text: how likely is each of two answers, and what does it write?

Any model that transformers' AutoModelForImageTextToText and AutoProcessor load from a folder, without code of its own.
"""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.io import InputError
from clip_robustness.inference.load import summary

# chenshuang-zhang/imagenet_d: the question of the paper's evaluation of vision-language models.
QUESTION = "What is the main object in this image? Choose from the following list: {}, {}."
PLAIN = "USER: <image>\n{} ASSISTANT:"  # where the processor has no chat template: LLaVA-1.5's own
BUFFERS = ("position_ids", "inv_freq")  # what old checkpoints store, and every model computes


class Answer(NamedTuple):
    """Log-likelihoods of the first and the second option, their numbers of tokens, and the model's own words."""

    logp: tuple[float, float]
    tokens: tuple[int, int]
    text: str | None


class Lmm:
    """A model and its processor from a folder. `quantise`: 8 or 4 bits by bitsandbytes, 0 for none.

    Errors: `InputError` for a folder without a processor, for weights that are missing, left over or misshapen, and
    for `quantise` without the package or a GPU.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, quantise: int = 0):
        self.device, self.dtype, self.folder = torch.device(device), dtype, folder
        self.processor = load_processor(folder)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = _load_model(folder, self.device, dtype, quantise)
        takes = inspect.signature(self.model.forward).parameters
        # Models with positions in the image's grid count their own.
        own_positions = hasattr(getattr(self.model, "model", None), "get_rope_index")
        self._positions = "position_ids" in takes and not own_positions
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        self._end = torch.tensor(end if isinstance(end, list) else [end], device=self.device)

    def prompt(self, first: str, second: str) -> str:
        """The question as the model was taught to read it, up to where its answer begins."""
        return write_prompt(self.processor, QUESTION.format(first, second))

    def option(self, prompt: str, name: str) -> list[int]:
        """The tokens of an option as the answer that follows `prompt`."""
        answer = name if prompt[-1:].isspace() else f" {name}"
        before, whole = (self.tokenizer(text, **self._special(prompt)).input_ids for text in (prompt, prompt + answer))
        # A tokenizer may merge across the border; the option's tokens are then its own.
        if whole[: len(before)] == before and len(whole) > len(before):
            return list(whole[len(before) :])
        return list(self.tokenizer(answer, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def answer(
        self, images: Sequence[Image.Image], pairs: Sequence[tuple[str, str]], max_new_tokens: int = 0
    ) -> list[Answer]:
        """Ask about each image; its options are named in the order of its pair. `max_new_tokens` 0: no text.

        Likelihoods are natural logarithms, of an option's tokens after the prompt; not finite where logits are not.
        """
        prompts = [self.prompt(*pair) for pair in pairs]
        options = [[self.option(prompt, name) for name in pair] for prompt, pair in zip(prompts, pairs, strict=True)]
        inputs = self.processor(
            images=[[image] for image in images],
            text=prompts,
            padding=True,
            return_tensors="pt",
            **self._special(prompts[0]),
        ).to(self.device, self.dtype)
        mask = inputs["attention_mask"]
        more = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)} if self._positions else {}
        out = self.model(**inputs, **more, **self._last, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1].float()
        logp = [self._score([pair[side] for pair in options], last, mask, cache) for side in (0, 1)]
        texts = self._write(last, mask, cache, max_new_tokens) if max_new_tokens else [None] * len(prompts)
        return [
            Answer((float(logp[0][i]), float(logp[1][i])), (len(options[i][0]), len(options[i][1])), texts[i])
            for i in range(len(prompts))
        ]

    def _score(self, options: Sequence[Sequence[int]], last: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Log-likelihood of each row's option [n] after the prompts in `cache`, which is left as it was."""
        longest = max(map(len, options))
        # Padded at the end, which no earlier token sees.
        ids = torch.tensor([[*option, *[0] * (longest - len(option))] for option in options], device=self.device)
        counts = torch.tensor([[i < len(option) for i in range(longest)] for option in options], device=self.device)
        logits = last[:, None]
        if longest > 1:
            logits = torch.cat([logits, self._extend(ids[:, :-1], mask, cache)], dim=1)
            cache.crop(-(longest - 1))
        each = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
        return torch.where(counts, each, 0.0).double().sum(dim=1)

    def _write(self, last: Tensor, mask: Tensor, cache: Any, most: int) -> list[str]:
        """Greedy answers, without what comes after their end."""
        open_, tokens = torch.ones(len(last), dtype=torch.bool, device=self.device), []
        for step in range(most):
            following = torch.where(open_, last.argmax(dim=1), self._end[0])
            open_ = open_ & ~torch.isin(following, self._end)
            tokens.append(following)
            if step + 1 == most or not open_.any():
                break
            last = self._extend(following[:, None], mask, cache)[:, -1]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        kept = [[t for t in row if t not in self._end.tolist()] for row in torch.stack(tokens, dim=1).tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]

    def _extend(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits [n, t, vocabulary] of tokens [n, t] that follow what `cache` holds and `mask` counts."""
        whole = torch.cat([mask, torch.ones_like(ids)], dim=1)
        more = {}
        if self._positions:
            more["position_ids"] = mask.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1], device=self.device)
        out = self.model(input_ids=ids, attention_mask=whole, past_key_values=cache, use_cache=True, **more)
        return out.logits.float()

    def _special(self, prompt: str) -> dict[str, bool]:
        """A template that writes the beginning of a text itself must not get a second one."""
        begin = self.tokenizer.bos_token
        return {"add_special_tokens": not (begin and prompt.startswith(begin))}


def write_prompt(processor: Any, text: str) -> str:
    """A question about one image, in the processor's own form of a conversation."""
    if not getattr(processor, "chat_template", None):
        return PLAIN.format(text)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def load_processor(folder: Path) -> Any:
    """The tokenizer and image processor of a folder. Errors: `InputError` where one of them cannot be built."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        missing = [part for part in ("tokenizer", "image_processor") if not hasattr(processor, part)]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
    except Exception as error:  # whatever a library says of files that it cannot take
        remedy = (
            "fetch the weights again with their processor_config.json, preprocessor_config.json and tokenizer files"
        )
        raise InputError(f"{folder}: no processor of images and text ({summary(error)}); {remedy}") from error
    return processor


def check_loaded(info: Mapping[str, Any]) -> None:
    """Errors: ValueError for tensors that are missing, misshapen or left over by transformers' report of a load."""
    shapes = [f"{name} {[*stored]} for {[*built]}" for name, stored, built in info["mismatched_keys"]]
    wrong = {"missing": info["missing_keys"], "mismatched": shapes, "unexpected": info["unexpected_keys"]}
    for kind, found in wrong.items():
        if names := sorted(name for name in found if not name.endswith(BUFFERS)):
            raise ValueError(f"{kind} keys: {', '.join(names[:3])} ({len(names)} in all)")


def _load_model(folder: Path, device: torch.device, dtype: torch.dtype, quantise: int) -> Any:
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if quantise:
        options |= _quantised(device, dtype, quantise)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
        model, info = loaded
        check_loaded(info)
        return (model if quantise else model.to(device)).eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise InputError(f"{folder}: out of {device.type} memory; set `quantise: 8` or 4") from None
        remedy = "Check the model's line in models.tsv, then delete the folder and run again."
        raise InputError(
            f"{folder}: these weights do not fit the folder's config.json: {summary(error)} {remedy}"
        ) from error


def _quantised(device: torch.device, dtype: torch.dtype, bits: int) -> dict[str, Any]:
    if bits not in (4, 8):
        raise InputError(f"quantise is {bits}, expected 0, 8 or 4 bits")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"quantise: {bits} needs the package {package}; install it, or set `quantise: 0`")
    if device.type != "cuda":
        raise InputError(f"quantise: {bits} needs a GPU, and there is none; set `quantise: 0`")
    from transformers import BitsAndBytesConfig

    choice = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": choice, "device_map": {"": 0}}
