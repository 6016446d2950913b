"""Writes data as strict JSON, which has no number for NaN and the infinities.

Python's `json` writes them bare, and strict readers (JSON.parse, Postgres, Go) then refuse the whole text. Here they
become the strings "NaN", "Infinity" and "-Infinity", which `float()` in Python and `Number()` in JavaScript turn back
into the number. A null would not say which of the three it was.
"""

from __future__ import annotations

import json
import math
from typing import Any

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def dumps(data: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """Returns `data` as JSON that every parser reads; the arguments are those of `json.dumps`.

    Raises:
      TypeError: JSON has nothing for a value, such as an array.
    """
    return json.dumps(_strict(data), indent=indent, separators=separators, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
