"""Images with captions in Karpathy's splits: COCO (val2014.zip) and Flickr30k, for retrieval.

The captions come from one of two files, named by the option `annotations`, beside the archive of the images:

* ``dataset_coco.json`` or ``dataset_flickr30k.json`` of Karpathy's caption_datasets.zip (the images as
  ``{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}``);
* ``flickr_annotations_30k.csv`` as the model hub has it (columns `raw`, a JSON list, `split` and `filename`).

Images are found by their file name, whatever folder holds them; those of other splits are left out. Options:
`annotations`; `split` (default test: 5,000 images of COCO, 1,000 of Flickr30k); `per_image` (default 5): that many
captions an image, the first ones, since some COCO images have six or seven; 0 keeps them all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, caption_columns, find, label_of, parse_csv, parse_json, require
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label -1; id = the file name; attributes `captions` (a JSON list of texts) and `split`."""
    if not options.get("annotations"):
        raise InputError(f"{where}: set the option 'annotations' to the file of captions, such as dataset_coco.json")
    source, split = find(members, options["annotations"], where), options.get("split", "test")
    files: dict[str, Member] = {}
    for member in images(members):
        file = member.name.rpartition("/")[2]
        if file in files:
            raise InputError(f"{label_of(member)}: '{files[file].name}' has the same file name; remove one of them")
        files[file] = member
    rows = []
    for file, captions in _captions(source, split):
        if file not in files:
            lacks = f"the image '{file}' of the split '{split}' is not in the archives"
            raise InputError(f"{label_of(source)}: {lacks} of {where}; {AGAIN}")
        texts = caption_columns(captions, options.get("per_image", 5), f"{label_of(source)}, '{file}'")
        rows.append(Row(file, files[file], -1, texts | {"split": split}))
    if not rows:
        raise InputError(f"{label_of(source)}: has no image of the split '{split}'; correct the option 'split'")
    return rows


def _captions(source: Member, split: str) -> Iterator[tuple[str, list[str]]]:
    """(file name, captions) of every image of the split, in the order of the file."""
    if source.name.endswith(".csv"):
        yield from _captions_of_csv(source, split)
        return
    whole = require(parse_json(source), {"images": list}, label_of(source))
    for number, entry in enumerate(whole["images"]):
        where = f"{label_of(source)}, image {number}"
        require(entry, {"filename": str, "split": str, "sentences": list}, where)
        if entry["split"] == split:
            yield entry["filename"], [require(s, {"raw": str}, where)["raw"] for s in entry["sentences"]]


def _captions_of_csv(source: Member, split: str) -> Iterator[tuple[str, list[str]]]:
    for number, entry in enumerate(parse_csv(source, ("raw", "split", "filename")), 2):
        if entry["split"] == split:
            try:
                captions = json.loads(entry["raw"])
            except (ValueError, RecursionError):
                captions = None
            if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
                row = f"row {number}: 'raw' is no JSON list of texts"
                raise InputError(f"{label_of(source)}, {row}; {AGAIN}")
            yield entry["filename"], captions
