"""Pictures ask for matplotlib in one line where it is missing."""

import importlib.util

import pytest

from moejax.config import ConfigError
from moejax.plots import pyplot


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'moejax\[plots\]'"):
        pyplot()


def test_with_matplotlib_it_is_pyplot():
    assert pyplot().subplots
