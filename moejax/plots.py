"""Pictures need matplotlib, which training does not: the extra `plots`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moejax.config import check

SUFFIXES = (".png", ".svg", ".pdf")


def check_suffix(name: str, path: Path) -> None:
    """`ConfigError` where the argument `name` is no kind of picture that the experiments write."""
    check(path.suffix in SUFFIXES, f"{name}={path} must end in {', '.join(SUFFIXES)}")


def pyplot() -> Any:
    """The module `matplotlib.pyplot`, imported when a picture is drawn, for it is slow to import.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    installed = importlib.util.find_spec("matplotlib") is not None
    check(installed, "pictures need matplotlib, which is not installed; pip install 'moejax[plots]'")
    import matplotlib.pyplot as plt

    return plt
