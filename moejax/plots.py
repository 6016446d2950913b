"""Pictures need matplotlib, which training does not: the extra `plots`."""

from __future__ import annotations

import importlib.util
from typing import Any

from moejax.config import check


def pyplot() -> Any:
    """The module `matplotlib.pyplot`, imported when a picture is drawn, for it is slow to import.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    installed = importlib.util.find_spec("matplotlib") is not None
    check(installed, "pictures need matplotlib, which is not installed; pip install 'moejax[plots]'")
    import matplotlib.pyplot as plt

    return plt
