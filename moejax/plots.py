"""Pictures need matplotlib, which training does not: the extra `plots`."""

from __future__ import annotations

import importlib.util
from typing import Any

from moejax.config import check

SUFFIXES = (".png", ".svg", ".pdf")


def installed() -> bool:
    """Returns whether matplotlib is there, without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """Imports `matplotlib.pyplot` and returns it; only when a picture is drawn, for it is slow to import.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check(installed(), "pictures need matplotlib, which is not installed; pip install 'moejax[plots]'")
    import matplotlib.pyplot as plt

    return plt
