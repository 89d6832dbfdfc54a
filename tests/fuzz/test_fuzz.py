"""A few spoiled inputs of every kind: they are refused with words, or accepted and right; nothing else happens.

The long run is ``make fuzz``; see `tests.fuzz.__main__`.
"""

import random
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from tests.fuzz.guided import Choices
from tests.fuzz.harness import Stray, Target, TooSlow, run_case
from tests.fuzz.mutations import spoil_bytes
from tests.fuzz.targets import TARGETS

GROWTH = 1 << 20  # kB that the process's largest memory may grow by in all cases of a target
EXAMPLES = 15


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_spoiled_inputs_are_refused_or_right(tmp_path: Path, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def hold(choices: random.Random) -> None:
        run_case(TARGETS[name], choices, tmp_path / "work")

    hold()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_other_inputs_too(tmp_path: Path, name: str) -> None:
    """Hypothesis begins with small choices; these are any."""
    for seed in range(EXAMPLES):
        run_case(TARGETS[name], random.Random(seed), tmp_path / "work")


def test_every_reader_accepts_and_refuses(tmp_path: Path) -> None:
    """A target that only ever refuses would try nothing but its first check."""
    for name in ("tar", "zip_in_place", "index", "embeddings", "published", "config_tables"):
        outcomes = {run_case(TARGETS[name], random.Random(seed), tmp_path / "work") for seed in range(40)}
        assert outcomes == {True, False}, name


def test_bytes_are_choices() -> None:
    """What libFuzzer's bytes become: the same bytes the same choices, none left the first of each."""
    spoiled = [spoil_bytes(b"x" * 600, Choices(data)) for data in (b"", b"\x40" * 64, b"\x40" * 64, bytes(range(64)))]
    assert spoiled[1] == spoiled[2] != spoiled[3] and len(set(spoiled)) == 3
    assert Choices(b"").choice("abc") == "a" and Choices(b"").random() == 0 and Choices(b"\xff" * 9).random() < 1


def test_the_harness_sees_what_it_is_there_for(tmp_path: Path) -> None:
    def escapes(choices: random.Random, folder: Path) -> None:
        (folder / ".." / "x").write_text("")

    def changes(choices: random.Random, folder: Path) -> None:
        (folder.parent / "canary").write_text("changed")

    def into_the_working_folder(choices: random.Random, folder: Path) -> None:
        Path("x").write_text("")

    def never_ends(choices: random.Random, folder: Path) -> None:
        while True:
            pass

    def says_nothing(choices: random.Random, folder: Path) -> None:
        raise InputError("")

    def refuses(choices: random.Random, folder: Path) -> None:
        io.read_json(folder / "gone.json")

    for run in (escapes, changes, into_the_working_folder):
        with pytest.raises(Stray):
            run_case(Target("x", run), random.Random(0), tmp_path / "work")
    with pytest.raises(AssertionError, match="without words"):
        run_case(Target("x", says_nothing), random.Random(0), tmp_path / "work")
    assert run_case(Target("x", refuses), random.Random(0), tmp_path / "work") is False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.harness.SECONDS", 0.05)
        with pytest.raises(TooSlow):
            run_case(Target("x", never_ends), random.Random(0), tmp_path / "work")
