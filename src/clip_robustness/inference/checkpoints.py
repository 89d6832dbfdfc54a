"""A checkpoint, as a training run or a hub has it, becomes one safetensors file of finite numbers.

A pickle is read here, where weights are fetched, and with `weights_only=True`; nothing later reads one.
"""

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import say

# Where training scripts put the state dict; the averaged weights come first, as in timm's own loader.
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
MOST_GROWTH, SMALL = 4, 1 << 20  # a tensor that others share is stored once, and written for each
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged")  # of OpenAI's files and averages


def to_safetensors(checkpoint: Path, target: Path, where: str) -> None:
    """Write the state dict of `checkpoint` to the safetensors file `target`, without the wrappers' prefixes.

    where: what error messages begin with. Errors: `InputError` for a checkpoint that is damaged, that holds code, or
    that holds no state dict, and for the formats that only code can read.
    """
    from safetensors.torch import save_file

    state = _state_of(_read(checkpoint, where), where)
    size, stored = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), checkpoint.stat().st_size
    if size > MOST_GROWTH * stored + SMALL:
        grows = f"its {stored:,} bytes would become {size:,} (views that repeat one value)"
        raise InputError(f"{where}: {checkpoint.name}: {grows}; save its state dict with tensors of their own")
    # Cloned: safetensors takes neither parts of other tensors nor two tensors that share their memory.
    plain = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(plain, target)


def is_plain(checkpoint: Path, where: str) -> bool:
    """Whether it is a safetensors file whose names need no change."""
    if checkpoint.suffix != ".safetensors":
        return False
    names = shapes_of(checkpoint, where)
    return bool(names) and not _prefix(names) and names.keys().isdisjoint(NOT_WEIGHTS)


def shapes_of(path: Path, where: str) -> dict[str, list[int]]:
    """Tensor name -> shape, of a safetensors file."""
    with _opened(path, where) as file:
        return {name: file.get_slice(name).get_shape() for name in file.offset_keys()}


def check_finite(path: Path, where: str) -> None:
    """Errors: `InputError` naming the first tensor of a safetensors file that holds a NaN or an infinity."""
    with _opened(path, where) as file:
        for name in file.offset_keys():
            if not file.get_tensor(name).isfinite().all():
                raise InputError(f"{where}: tensor '{name}' holds values that are not finite; take another checkpoint")


def blend(parent: Path, finetuned: Path, share: float, target: Path, where: str) -> None:
    """Write (1 - share) * parent + share * finetuned, tensor by tensor; what holds no fractions is `finetuned`'s."""
    from safetensors.torch import save_file

    shapes = [shapes_of(path, where) for path in (parent, finetuned)]
    if odd := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
        pair = " and ".join(str(shape.get(odd[0], "none")) for shape in shapes)
        raise InputError(f"{where}: {len(odd)} tensors differ in shape, '{odd[0]}' first: {pair}")
    blended = {}
    with _opened(parent, where) as first, _opened(finetuned, where) as second:
        for name in shapes[0]:
            a, b = first.get_tensor(name), second.get_tensor(name)
            blended[name] = torch.lerp(a.float(), b.float(), share) if b.is_floating_point() else b
    save_file(blended, target)


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {path.name} is no whole safetensors file ({error}); fetch it again") from None


def _read(checkpoint: Path, where: str) -> Any:
    """What the file holds: tensors in containers, and nothing that would have to be executed."""
    if checkpoint.suffix == ".safetensors":
        with _opened(checkpoint, where) as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    if checkpoint.suffix in (".npz", ".npy"):
        raise InputError(f"{where}: {checkpoint.name} is a JAX checkpoint; name a repository that has it converted")
    zipped = _is_zip(checkpoint)
    if zipped and _is_torchscript(checkpoint):
        remedy = "name the hub's safetensors of the same model instead, e.g. hub:timm/vit_base_patch32_clip_224.openai"
        raise InputError(f"{where}: {checkpoint.name} is a TorchScript archive, which holds code; {remedy}")
    try:
        # timm's training checkpoints keep their command line's arguments: a class with nothing but attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            remedy = "save its state dict alone, best as safetensors"
            raise InputError(
                f"{where}: {checkpoint.name} is a pickle with code in it ({code[1]}), which is not run; {remedy}"
            ) from None
        raise InputError(_damaged(where, checkpoint, error)) from None
    except Exception as error:  # torch raises a dozen types for broken files
        raise InputError(_damaged(where, checkpoint, error)) from None


def _is_zip(checkpoint: Path) -> bool:
    with contextlib.suppress(Exception):  # zipfile, of one that claims to be a part of several
        return zipfile.is_zipfile(checkpoint)
    return False


def _is_torchscript(checkpoint: Path) -> bool:
    with contextlib.suppress(Exception), zipfile.ZipFile(checkpoint) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False  # torch says what is wrong with it


def _damaged(where: str, checkpoint: Path, error: Exception) -> str:
    if is_out_of_memory(error):
        raise error
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{where}: {checkpoint.name} is no whole checkpoint ({first}); fetch or save it again"


def _state_of(content: Any, where: str) -> dict[str, Tensor]:
    holders = [name for name in HOLDERS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if holders:
        others = f", not {', '.join(holders[1:])}" if holders[1:] else ""
        say(f"{where}: the weights under '{holders[0]}' are taken{others}")
        content = content[holders[0]]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{where}: expected a state dict or one under {', '.join(HOLDERS)}; found neither")
    state = {name: tensor for name, tensor in content.items() if name not in NOT_WEIGHTS}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise InputError(f"{where}: expected a state dict, of tensors only; '{name}' is of the kind {kind}")
    prefix = _prefix(state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _prefix(names: Collection[str]) -> str:
    """The wrappers' prefix that all names have."""
    prefix = ""
    while more := next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), ""):
        prefix += more
    return prefix
