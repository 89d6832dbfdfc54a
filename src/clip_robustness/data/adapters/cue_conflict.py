"""Cue-conflict stimuli (Geirhos et al. 2019): the shape of one class with the texture of another.

Layout of rgeirhos/texture-vs-shape, stimuli/style-transfer-preprocessed-512: one folder a shape class, and
files such as ``airplane/airplane1-bicycle2.png`` = the shape of airplane 1 with the texture of bicycle 2.
The 1,280 images include 80 in which both are the same class; they stay in the index, and a metric that wants
conflicts leaves out the rows whose `texture_class` equals `label`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

FOLDER = "style-transfer-preprocessed-512"
FILE = re.compile(r"([a-z_]+)\d+-([a-z_]+)\d+\.\w+")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the shape; attribute `texture_class` = the label of the texture's class."""
    positions = {name: position for position, name in enumerate(space["classes"])}
    stimuli = images(members)
    inside = [member for member in stimuli if FOLDER in member.name.split("/")[:-1]]
    rows = []
    for member in inside or stimuli:  # a user's folder may be the stimuli folder itself
        shape, file = ("", *member.name.split("/"))[-2:]
        match = FILE.fullmatch(file)
        if not match or match[1] != shape:
            expected = "expected SHAPE/SHAPEi-TEXTUREj.png such as airplane/airplane1-bicycle2.png"
            raise InputError(f"{where}, '{member.name}': {expected}; name the folder '{FOLDER}'")
        texture = match[2]
        for name in (shape, texture):
            if name not in positions:
                known = f"a class of the label space '{space.get('name', '?')}' ({', '.join(positions)})"
                raise InputError(f"{where}, '{member.name}': '{name}' is not {known}")
        rows.append(Row(f"{shape}/{file}", member, positions[shape], {"texture_class": positions[texture]}))
    return rows
