"""`python -m clip_robustness` says what it can do."""

import pytest

from clip_robustness import cli


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
    assert found == {name: verb.function.partition(".")[0] for name, verb in cli.VERBS.items()}
    assert max(map(len, lines)) <= 130


def test_a_misspelt_verb_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["embde", "--model", "x"])
    assert end.value.code == 2
    assert "'embde' is no verb; did you mean 'embed'?" in capsys.readouterr().err


def test_a_verb_shows_its_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["gather", "--help"])
    assert "python -m clip_robustness gather" in (shown := capsys.readouterr().out) and "--metrics" in shown
