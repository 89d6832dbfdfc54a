"""The settings of one attack, as config/attacks.yaml gives them.

The workflow checks them by config/schemas/attack.schema.yaml before it plans; a job, whose environment has no
jsonschema, checks what would change its meaning.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.core.schema import nearest

CHOICES = {
    "method": ("gradient", "score", "deepfool", "noise"),
    "norm": ("linf", "l2"),
    "losses": ("cross_entropy", "margin"),
    "starts": ("clean", "random"),
    "directions": ("gaussian", "signs"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Budgets are in 255ths for linf and plain for l2; `step` is a share of the budget. See the schema."""

    method: str
    budgets: tuple[float, ...]
    reported: float
    norm: str = "linf"
    substitute: bool = False
    bisections: int = 4
    steps: int = 10
    step: float = 0.15
    losses: tuple[str, ...] = ("cross_entropy",)
    starts: tuple[str, ...] = ("clean",)
    decay: float = 0.0
    diversity: float = 0.0
    smallest: float = 0.9
    pairs: int = 100
    sigma: float = 0.001
    directions: str = "gaussian"
    classes: int = 10
    overshoot: float = 0.02
    calibrated_size: int | None = None

    @classmethod
    def parse(cls, name: str, given: Mapping[str, Any]) -> "Settings":
        """Errors: `InputError` that names the attack and the field."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for field in given:
            if field not in fields:
                raise InputError(f"attack '{name}': unknown field '{field}'{nearest(field, fields)}")
        for field in ("method", "budgets", "reported"):
            if field not in given:
                raise InputError(f"attack '{name}': the field '{field}' is missing")
        for field, choices in CHOICES.items():
            chosen = given.get(field, choices[0])
            for value in chosen if isinstance(chosen, list | tuple) else [chosen]:
                if value not in choices:
                    raise InputError(f"attack '{name}': {field} is '{value}', expected {', '.join(choices)}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        made = cls(**values)
        for fits, fault in (
            (list(made.budgets) == sorted({*made.budgets} - {0}), f"budgets {[*made.budgets]}, expected to ascend"),
            (made.reported in made.budgets, f"reported {made.reported} is none of its budgets"),
            (made.norm == "linf" or made.method == "gradient", f"method {made.method} has norm linf alone"),
            (made.norm == "l2" or made.calibrated_size is None, "calibrated_size is for norm l2"),
            (not made.substitute or made.method == "gradient", f"method {made.method} takes no substitute"),
        ):
            if not fits:
                raise InputError(f"attack '{name}': {fault}")
        return made

    def radius(self, budget: float) -> float:
        """A budget in the units of the pixels' space."""
        return budget / 255 if self.norm == "linf" else budget
