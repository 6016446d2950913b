"""Figures as people read them: three digits, and a unit that fits."""

from __future__ import annotations

import math

_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}


def quantity(value: float, unit: str) -> str:
    """Returns the value with three digits and a decimal prefix: 1.77e10 B/s is "17.7 GB/s"."""
    if not value:
        return f"0 {unit}"
    value = float(f"{value:.3g}")
    power = min(max(3 * math.floor(math.log10(abs(value)) / 3), min(_PREFIXES)), max(_PREFIXES))
    return f"{value / 10.0**power:.4g} {_PREFIXES[power]}{unit}"


def rounded(value: float) -> str:
    """Returns the value with its first three digits, or whole if it has more: 135,821 is "136,000"."""
    value = float(f"{value:.3g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Returns the unit for a table whose largest figure is `largest` bytes, as bytes and name: GB, MB or kB."""
    return next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if largest >= size), (1e3, "kB"))
