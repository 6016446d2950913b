"""Pictures ask for matplotlib in one line where it is missing."""

import importlib.util

import pytest
from scripts import run_script

from moejax.checks import ConfigError
from moejax.plots import pyplot

MISSING = "needs matplotlib, which is not installed; pip install 'moejax[plots]'"


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_without_matplotlib_the_error_says_what_to_install(without_matplotlib):
    with pytest.raises(ConfigError) as error:
        pyplot()
    assert str(error.value) == f"a picture {MISSING}"


@pytest.mark.parametrize(
    ("command", "line"),
    [("load_balance", f"a picture {MISSING}"), ("read_trace .", f"timeline.png {MISSING}, or add --nopicture")],
)
def test_scripts_that_always_draw_say_so_first(command, line, without_matplotlib):
    assert run_script(*command.split(), status=2).error == line


def test_with_matplotlib_it_is_pyplot():
    assert pyplot().subplots
