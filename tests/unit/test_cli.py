"""`python -m clip_robustness` says what it can do, and a verb's options are the parameters of its function."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from clip_robustness import cli
from clip_robustness.core import provenance
from clip_robustness.core.io import InputError
from clip_robustness.options import HELP, options_of, parser_of

WINGS = ("data", "inference", "metrics", "figures", "report", "mini")
HEAVY = {"numpy", "torch", "pandas", "matplotlib", "pyarrow", "scipy", "snakemake"}


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_every_verb_is_listed_with_one_line_below_its_wing(arguments, capsys):
    try:
        assert cli.main(arguments) == 0
    except SystemExit as end:
        assert end.code == 0
    lines = capsys.readouterr().out.splitlines()
    wing, found = "", {}
    for line in lines:
        if line.partition(":")[0] in cli.WINGS:
            wing = line.partition(":")[0]
        elif line.startswith("  ") and line.split()[0] in cli.VERBS:
            found[line.split()[0]] = wing
    assert found == {name: where.partition(".")[0] for name, (where, _) in cli.VERBS.items()}
    assert max(map(len, lines)) <= 130


def test_a_misspelt_verb_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["embde", "--model", "x"])
    assert end.value.code == 2
    assert "'embde' is no verb; did you mean 'embed'?" in capsys.readouterr().err


def test_a_verb_shows_its_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["gather", "--help"])
    assert "python -m clip_robustness gather" in (shown := capsys.readouterr().out) and "--metrics PATH" in shown


def modules_after(code: str) -> set[str]:
    """What a fresh process has imported."""
    code += "\nimport sys\nprint(sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(provenance.ROOT.parent)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return set(ast.literal_eval(out.strip().splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_imports_no_wing_and_nothing_heavy(arguments):
    loaded = modules_after(
        f"import clip_robustness.cli as c\ntry: assert c.main({arguments}) == 0\nexcept SystemExit: pass"
    )
    assert "clip_robustness.cli" in loaded and not loaded & HEAVY
    assert not loaded & {f"clip_robustness.{wing}" for wing in WINGS}


def test_only_inference_and_mini_load_torch():
    light = [name for name, (where, _) in cli.VERBS.items() if where.partition(".")[0] not in ("inference", "mini")]
    loaded = modules_after(f"from clip_robustness.cli import function_of\nfor name in {light}: function_of(name)")
    assert len(light) > 30 and "clip_robustness.metrics" in loaded and "torch" not in loaded


def test_every_parameter_is_an_option_that_says_what_it_means():
    named = set()
    for verb, (_, line) in cli.VERBS.items():
        function = cli.function_of(verb)
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}, verb
        for option, told in options_of(function).items():
            named.add(option.removeprefix("--").replace("-", "_"))
            assert told["help"], f"{verb} {option}"
        assert parser_of(verb, line, function).format_help()
    assert named == set(HELP), "a name without a meaning, or a meaning that no verb needs"


def sample(
    index: Path,
    names: Sequence[str],
    entry: Mapping[str, Any],
    base: Path | None,
    share: float = 0.5,
    batch_size: int | str = "auto",
    labels: Sequence[Path] = (),
    settings: Mapping[str, Any] | None = None,
    compile: bool = False,
    *,
    clock: float = 1.0,
) -> None:
    """A parameter of every kind."""


def given(*values: str) -> dict[str, Any]:
    return vars(parser_of("sample", "", sample).parse_args(values))


REQUIRED = ("--index", "a/b", "--names", "x", "y", "--entry", '{"a": [1]}')


def test_a_parameter_becomes_an_option_by_its_annotation_and_default():
    least = {"index": Path("a/b"), "names": ["x", "y"], "entry": {"a": [1]}, "base": None, "share": 0.5}
    least |= {"batch_size": "auto", "labels": (), "settings": None, "compile": False}
    assert given(*REQUIRED) == least, "what is by keyword only is no option"
    more = given(*REQUIRED, "--base", "c", "--share", "1e-3", "--batch-size", "8", "--labels", "d", "--compile")
    assert more == {**least, "base": Path("c"), "share": 0.001, "batch_size": 8, "labels": [Path("d")], "compile": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (REQUIRED[2:], "the following arguments are required: --index"),
        ((*REQUIRED[:2], "--names", *REQUIRED[5:]), "argument --names: expected at least one argument"),
        ((*REQUIRED, "--settings", "{a: 1}"), "argument --settings: not JSON (Expecting property name"),
        ((*REQUIRED, "--batch-size", "many"), "argument --batch-size: invalid number_or_auto value: 'many'"),
        ((*REQUIRED, "--share", "half"), "argument --share: invalid float value: 'half'"),
        ((*REQUIRED, "--clock", "1"), "unrecognized arguments: --clock 1"),
    ],
)
def test_a_wrong_option_is_named(values, message, capsys):
    with pytest.raises(SystemExit) as end:
        given(*values)
    assert end.value.code == 2
    assert f"python -m clip_robustness sample: error: {message}" in re.sub(r"\s+", " ", capsys.readouterr().err)


def no_kind(index: set[Path]) -> None: ...
def no_meaning(unheard_of: Path) -> None: ...
def on_by_default(compile: bool = True) -> None: ...
def no_annotation(index) -> None: ...


@pytest.mark.parametrize("function", [no_kind, no_meaning, on_by_default, no_annotation])
def test_what_the_command_line_cannot_give_is_no_parameter_of_a_verb(function):
    with pytest.raises(KeyError):
        options_of(function)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (True, 0), (7, 0), (False, 1)])
def test_a_verb_fails_when_its_function_returns_false(result, code, monkeypatch):
    def study(config: Path) -> Any:
        return result

    monkeypatch.setattr(cli, "function_of", lambda verb: study)
    assert cli.main(["validate", "--config", "x"]) == code


def test_what_a_user_caused_is_told_without_a_traceback(monkeypatch, capsys):
    def study(config: Path) -> None:
        raise InputError(f"{config}: is wrong")

    monkeypatch.setattr(cli, "function_of", lambda verb: study)
    assert cli.main(["validate", "--config", "x.yaml"]) == 1
    assert capsys.readouterr().err == "error: x.yaml: is wrong\n"
