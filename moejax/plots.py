"""Pictures need matplotlib, which training does not: the extra `plots`."""

from __future__ import annotations

import importlib.util
from typing import Any

from moejax.checks import check

SUFFIXES = (".png", ".svg", ".pdf")


def check_installed(picture: object = "a picture", instead: str = "") -> None:
    """Refuses `picture` if matplotlib is not installed, without importing it; `instead` is another way out.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    installed = importlib.util.find_spec("matplotlib") is not None
    check(installed, f"{picture} needs matplotlib, which is not installed; pip install 'moejax[plots]'{instead}")


def pyplot() -> Any:
    """Imports `matplotlib.pyplot` and returns it; only when a picture is drawn, for it is slow to import.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib.pyplot as plt

    return plt
