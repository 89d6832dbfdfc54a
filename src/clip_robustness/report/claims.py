"""The claims ledger: what the papers found, tested on the tables of any study.

    evaluate_claims(Path("config/claims.yaml"), Path("config/schemas/claims.schema.yaml"), tables, "mini", out)

A claim names a statistic and the values of it that the claim predicts. Kinds of statistic:

    mean         of a quantity over a selection of models
    difference   of that mean between `models` and `minus_models`; with matched: parent, of each model and the one
                 that it was fine-tuned from; with `minus`, of two quantities of the same models
    correlation  Pearson's r of the quantities x and y over models; with `within`, pooled over the groups that share
                 a column's value, each group centred on its own means
    sign_share   share of a quantity's cells (data sets and slices) whose mean over models (or whose difference from
                 `minus_models`) is above 0
    offset       mean distance of models from the line through the models `line`, of y on x

A verdict comes from the interval alone: `reproduced` when all of it lies where the claim says, `contradicted` when
none of it does, else `undecided`; without the numbers, `not measured here`. Holm's correction is over the claims of
the study that were tested, with the normal p value that belongs to the interval.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from clip_robustness.core.schema import check, load_yaml, stop
from clip_robustness.core.tables import read_frame
from clip_robustness.report.effects import KINDS, RESAMPLES, Effect, Lacking
from clip_robustness.report.tables import write_table

NOT_MEASURED = "not measured here"
COLUMNS = (
    *("id", "paper", "finding", "certainty", "source", "kind", "expected", "edge_low", "edge_high", "inside"),
    *("value", "low", "high", "n", "unit", "scale", "p", "verdict", "verdict_holm", "missing", "study"),
)
# What each kind of statistic needs, and what it may have.
_FIELDS = {
    "mean": ({"of", "models"}, set()),
    "difference": ({"of", "models"}, {"minus_models", "minus", "matched"}),
    "correlation": ({"x", "y", "models"}, {"within", "above_x"}),
    "sign_share": ({"of", "models"}, {"minus_models"}),
    "offset": ({"x", "y", "models", "line", "transform"}, {"above_x"}),
}


def evaluate_claims(claims: Path, schema: Path, tables: Sequence[Path], study: str, out: Path) -> None:
    """Test every claim of `claims` (YAML) on a study; write `out` (.parquet, and .csv beside it), one row a claim.

    schema: the JSON schema of `claims`. tables: the study's tables (.parquet), each named as claims name it; those
    that a study does not have may be absent. Columns: COLUMNS; value, low and high are fractions, correlations or
    (NLL) nats as `scale` says, and empty where the claim could not be tested: `missing` then says why.
    Errors: `InputError` for a claims file that does not hold, and for a table that is not whole.
    """
    entries = load_claims(claims, schema)
    frames = {Path(path).stem: read_frame(Path(path)) for path in tables}
    rows = [_row(claim, frames) | {"study": study} for claim in entries]
    for row, significant in zip(rows, _holm([row["p"] for row in rows]), strict=True):
        kept = significant or row["verdict"] in (NOT_MEASURED, "undecided")
        row["verdict_holm"] = row["verdict"] if kept else "undecided"
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n": "Int64"})
    write_table(table, out)


def caption_numbers(table: pd.DataFrame) -> dict[str, str]:
    """What the figure's caption says in numbers: claims, tested, by verdict, and how many outlast Holm's correction."""
    counts = table["verdict"].value_counts()
    decided = ("reproduced", "contradicted")
    return {
        "claims": f"{len(table):,}",
        "tested": f"{len(table) - int(counts.get(NOT_MEASURED, 0)):,}",
        **{name: f"{int(counts.get(name, 0)):,}" for name in (*decided, "undecided")},
        "holm": f"{int(table['verdict_holm'].isin(decided).sum()):,}",
    }


def load_claims(path: Path, schema: Path) -> list[dict[str, Any]]:
    """The claims of a file. Errors: `InputError` with a line for each problem: claim, field, what was expected."""
    problems: list[str] = []
    document = check(load_yaml(path), load_yaml(schema), str(path), problems)
    stop(problems)
    seen: set[str] = set()
    for claim in document["claims"]:
        where = f"{path}, claim {claim['id']}"
        if claim["id"] in seen:
            problems.append(f"{where}: the id stands there twice")
        seen.add(claim["id"])
        statistic = claim["statistic"]
        needed, allowed = _FIELDS[statistic["kind"]]
        given = set(statistic) - {"kind"}
        for field in sorted(needed - given):
            problems.append(f"{where}: a statistic of kind {statistic['kind']} needs the field '{field}'")
        for field in sorted(given - needed - allowed):
            problems.append(f"{where}: a statistic of kind {statistic['kind']} has no field '{field}'")
        if statistic["kind"] == "difference" and len(given & allowed) != 1:
            problems.append(f"{where}: a difference needs one of the fields minus_models, minus, matched")
    stop(problems)
    return document["claims"]


def _row(claim: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    edges = _edges(claim["expect"])
    row = {name: claim[name] for name in ("id", "paper", "finding", "certainty", "source")}
    row |= {"kind": claim["statistic"]["kind"], "scale": _scale(claim["statistic"]), "missing": ""}
    row |= {"expected": _expected(claim["expect"], row["scale"]), "inside": edges[2]}
    row["edge_low"], row["edge_high"] = (edge if math.isfinite(edge) else None for edge in edges[:2])
    try:
        effect = KINDS[claim["statistic"]["kind"]](claim["statistic"], frames)
    except Lacking as lacking:
        nothing = dict.fromkeys(("value", "low", "high", "n", "p"))
        return row | nothing | {"unit": "", "verdict": NOT_MEASURED, "missing": str(lacking)}
    return row | effect._asdict() | {"verdict": verdict(effect, *edges), "p": _p_value(effect, *edges[:2])}


def _edges(expect: Mapping[str, Any]) -> tuple[float, float, bool]:
    """The region that a claim predicts: inside (True) or outside (False) of (low, high)."""
    match next(iter(expect.items())):
        case ("above", edge):
            return edge, math.inf, True
        case ("below", edge):
            return -math.inf, edge, True
        case (where, (low, high)):
            return low, high, where == "between"
    raise AssertionError("the schema allows nothing else")


def _expected(expect: Mapping[str, Any], scale: str) -> str:
    (where, edges), factor = next(iter(expect.items())), 100 if scale == "points" else 1
    shown = [f"{factor * edge:g}" for edge in (edges if isinstance(edges, list) else [edges])]
    return f"{where} {' and '.join(shown)}"


def _scale(statistic: Mapping[str, Any]) -> str:
    if statistic["kind"] == "correlation":
        return "r"
    metric = str(statistic.get("of", statistic.get("y"))["metric"])
    return "share" if statistic["kind"] == "sign_share" else "nats" if metric.startswith("nll") else "points"


def verdict(effect: Effect, low: float, high: float, inside: bool) -> str:
    """reproduced, contradicted or undecided, of a claim that the value lies inside (or outside) of (low, high)."""
    if low < effect.low and effect.high < high:
        return "reproduced" if inside else "contradicted"
    if effect.high < low or high < effect.low:
        return "contradicted" if inside else "reproduced"
    return "undecided"


def _p_value(effect: Effect, low: float, high: float) -> float:
    """Two-sided normal p that goes with the interval: below 0.05 just where the verdict is not `undecided`.

    A value between the edges must be told from both, one outside from the nearer. Never below 1 / RESAMPLES.
    """
    from scipy.special import ndtr

    found = []
    for edge in (low, high):
        if math.isfinite(edge):
            distance = effect.value - effect.low if edge < effect.value else effect.high - effect.value
            ratio = abs(effect.value - edge) / distance if distance > 0 else math.inf
            found.append(max(float(2 * ndtr(-1.959964 * ratio)), 1 / RESAMPLES))
    between = low < effect.value < high
    return max(found) if between or len(found) == 1 else found[0 if effect.value <= low else 1]


def _holm(p: Sequence[float | None]) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects at 5 %; None: not tested."""
    tested = sorted((value, place) for place, value in enumerate(p) if value is not None)
    rejected = [False] * len(p)
    for step, (value, place) in enumerate(tested):
        if value * (len(tested) - step) >= 0.05:
            break
        rejected[place] = True
    return rejected
