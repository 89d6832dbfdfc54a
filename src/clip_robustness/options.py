"""The options of a verb: the parameters of the function behind it, as argparse takes them.

An option is named as its parameter, with hyphens, and means the same in every verb. It must be given unless the
parameter has a default or may be None. What a function takes by keyword only is no option: it is for other callers.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

HELP = {
    "accuracy": "table of accuracies (.parquet)",
    "adversarial": "table of accuracies under attack (.parquet)",
    "annotations": "the annotators' wheel, its unpacked form or their repository",
    "answers": "answers in text (.parquet)",
    "architecture": "the library's name of the model",
    "archive": "the archive's file: among those of the data set, or the one to write (.tar)",
    "attack": "name of the attack in the table of attacks",
    "attacks": "what attacks on one model found (.parquet, with its manifest .json beside it)",
    "base": "label space of the base (.json); none for a space of its own",
    "baselines": "table to write: the fitted lines (.parquet)",
    "batch_size": "images in a batch, or auto for what fits the memory",
    "cache": "folder of downloads that checkouts share",
    "candidates": "prompts tried in a step",
    "captions": "features of the images' captions (.npy), or folder of the figures' captions (.rst)",
    "captions_out": "file to write: the captions, filled in (.json)",
    "cards": "folder of model cards",
    "claims": "the claims to test (.yaml)",
    "compile": "run the image tower through torch.compile",
    "config": "the study's config",
    "control": "what the test set is for the search: planted, disjoint, or empty for neither",
    "copies": "features of planted copies (.npy, with their manifest .json beside them)",
    "copies_index": "index of planted copies (.parquet)",
    "corruptions": "types of corruption (default: all)",
    "dataset": "the data set's entry of datasets.yaml, and its name",
    "datasets": "label space and licence of each data set",
    "decode": "exact, or fast: one level of 255 apart, rarely two",
    "embeddings": "features of the images, or a classifier's logits (.npy, with their manifest .json beside them)",
    "entry": "the data set's field `derive` of datasets.yaml",
    "eps_space": "where perturbations are measured: pixel or normalized",
    "factors": "visual factors of images, or accuracies by factor (.parquet)",
    "false_positives": "share of distinct images that may pass, 0 to 1",
    "family": "the data set's family, which decides the protocol",
    "fast": "leave out the checksums",
    "fewest": "images that a factor needs",
    "figure": "name of the figure",
    "figures": "figures (.png)",
    "finetuned": "sealed weights folder of the fine-tuned model",
    "fits": "table to write: the fitted lines (.parquet)",
    "folder": "folder of published results (.csv)",
    "geometry": "depth, normals and masks of rendered images (.npz)",
    "head": "zero-shot head (.npz); none for a classifier",
    "heads": "zero-shot heads (.npz)",
    "held_out": "1 when half of the data set fits a temperature, and the other half is measured; else 0",
    "ids": "file that lists the images in order",
    "images": "how many of the images to take",
    "index": "index of the data set's images (.parquet)",
    "indexes": "indexes of data sets' images (.parquet)",
    "keep": "prompts to keep",
    "labels": "label space (.json); for heads, a search and imported predictions a base space",
    "lacking": "what the study leaves out, and why",
    "library": "library of the model: open_clip, timm, transformers or predictions",
    "limit": "images to keep at most",
    "lock": "file that pins revisions and checksums (.json)",
    "matches": "table of matches between images (.parquet, with its manifest .json beside it)",
    "metrics": "metric files (.json)",
    "model": "name of the model",
    "models": "table of models (.parquet), or its columns and rows",
    "name": "name that it gets here",
    "names": "names of the prompt sets, or of the references (default: as their files)",
    "natural": "the natural shifts that are averaged (default: of ImageNet seven, else all)",
    "normaliser": "model whose errors corruption errors are divided by (default: AlexNet's constants)",
    "on_error": "what an unreadable image does: fail or mask",
    "only": "patterns of names to take (default: any)",
    "out": "file or folder to write",
    "out_archive": "archive to write (.tar)",
    "out_index": "index to write (.parquet)",
    "parent": "weights folder of the model that it is made from",
    "pdf": "file to write (.pdf)",
    "pixels": "pixel caches (.npy), or indexes (.parquet) to decode as needed",
    "png": "file to write (.png)",
    "population": "group of the models that the baseline is fitted on",
    "precision": "arithmetic of the models: auto, fp32 or bf16",
    "predictions": "predictions of every image (.parquet), or a file that another program wrote",
    "preprocess": "the model's preprocessing spec",
    "prompts": "prompts.yaml",
    "prototypes": "also count the prototypes",
    "published": "folder of published tables",
    "quantise": "bits of quantised weights on a GPU: 0 (none), 4 or 8",
    "questions": "two-way questions (.parquet)",
    "recipe": "the model's line of models.tsv and the training settings",
    "reference": "the in-distribution data set (default: the one named *_val)",
    "reference_embeddings": "those of the in-distribution data set, by the same model",
    "reference_index": "that of the in-distribution data set",
    "reference_labels": "that of the in-distribution data set",
    "references": "what is compared with: features of corpora (.npy, or folders), or models' predictions (.parquet)",
    "released_labels": "the label space as released code filled it (.json)",
    "reports": "the studies' pages (.html)",
    "resamples": "bootstrap resamples",
    "results": "the study's folder, for manifests and times",
    "schema": "schema of the claims (.yaml)",
    "searched": "templates that a search found; none where no prompt set asks for them",
    "seed": "seed of random draws",
    "selector": "short name of the model that chose the wrong class",
    "settings": "settings of the attack",
    "share": "share of the fine-tuned model, 0 to 1",
    "shifts": "shifts by name, or NAME=PART+PART of those that are made of others",
    "source_embeddings": "those of the images without the word, by the same model",
    "source_index": "that of the images without the word",
    "sources": "archives or folders to index; features of what was copied (.npy); or kinds of accuracy (default: all)",
    "sources_index": "index of the images that were copied (.parquet)",
    "space": "the label space's entry of datasets.yaml",
    "spec": "preprocessing spec, such as resize(224,bicubic)|center_crop(224)",
    "specs": "the preprocessing spec of each pixel cache",
    "start": "words that the tokens begin as",
    "steps": "steps of the search",
    "stride": "stride of the features, in pixels; 0 is the tower's own",
    "study": "name of the study",
    "substitute": "weights, library and preprocess of the model whose gradients a transfer follows",
    "synonyms": "further names of classes that an answer may use (.json)",
    "tables": "the study's tables (.parquet), or their folder",
    "targets": "record of the words that are printed",
    "temperature": "the fitted temperature (.json)",
    "tests": "tests made side by side",
    "tflops": "sustained speed of one GPU, in TFLOP/s",
    "threshold": "the similarity that makes a copy (.json)",
    "title": "title of the page",
    "tokens": "learned tokens before the class name",
    "variations": "name of each index's variation",
    "weights": "sealed folder of weights; to fetch: hub:OWNER/NAME[@REVISION][:FILE], local:PATH or predictions:FOLDER",
    "without": "patterns of names to leave out",
    "work": "folder for finished parts, which a job that was killed takes up again",
    "workers": "processes that work side by side",
    "world": "settings of the rendered world",
}


def from_json(text: str) -> Any:
    """A value that is given as JSON; argparse shows where it is not."""
    try:
        return json.loads(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"not JSON ({fault}): {text!r}") from None


def number_or_auto(text: str) -> int | str:
    """A number, or `auto`; argparse shows this function's name for anything else."""
    return text if text == "auto" else int(text)


# Annotation -> what reads a value of it, and how --help calls such a value.
KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    Path: (Path, "PATH"),
    str: (str, "TEXT"),
    int: (int, "N"),
    float: (float, "X"),
    int | str: (number_or_auto, "N|auto"),
    Mapping: (from_json, "JSON"),
}


def options_of(function: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Option -> what `ArgumentParser.add_argument` is told of it, in the order of the parameters.

    Errors: `KeyError` for a parameter whose name has no meaning in HELP, or whose annotation is not of KINDS.
    """
    hints = get_type_hints(function)
    return {
        f"--{parameter.name.replace('_', '-')}": _argument(parameter, hints[parameter.name])
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.KEYWORD_ONLY
    }


def _argument(parameter: inspect.Parameter, hint: Any) -> dict[str, Any]:
    default = parameter.default
    told: dict[str, Any] = {"help": HELP[parameter.name]}
    if hint is bool and default is False:
        return told | {"action": "store_true"}
    if NoneType in get_args(hint):
        (hint,) = set(get_args(hint)) - {NoneType}
        default = None if default is parameter.empty else default
    told |= {"required": True} if default is parameter.empty else {"default": default}
    if get_origin(hint) is Sequence:
        (hint,) = get_args(hint)
        told |= {"nargs": "+"}
    kind, name = KINDS[Mapping if get_origin(hint) is Mapping else hint]
    return told | {"type": kind, "metavar": name}


def parser_of(verb: str, help: str, function: Callable[..., Any]) -> argparse.ArgumentParser:
    """The parser of a verb's options; `help` is its line in the list of verbs."""
    parser = argparse.ArgumentParser(prog=f"python -m clip_robustness {verb}", description=help)
    for option, told in options_of(function).items():
        parser.add_argument(option, **told)
    return parser
