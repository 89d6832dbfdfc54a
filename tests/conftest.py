"""Fixtures that many tests share."""

import signal
from pathlib import Path

import pytest

from .workflow.conftest import SMALL, SMALL_CONFIG, House, build_house

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def house(tmp_path, root) -> House:
    return build_house(tmp_path / "house", root)


@pytest.fixture(scope="session")
def small_house(tmp_path_factory, root) -> House:
    """The small mini study, run once, uninterrupted."""
    house = build_house(tmp_path_factory.mktemp("small") / "house", root)
    (house.path / "small.yaml").write_text(SMALL)
    house.snakemake(*SMALL_CONFIG)
    return house


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the small study is slow: it is run once, in the process that runs all slow tests."""
    for item in items:
        if "small_house" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
