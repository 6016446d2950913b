"""Splits a test's parameters over the tiers: those that run with plain `pytest`, and those of the full suite."""

import pytest


def full_unless(fast, values):
    """Returns `values` as parameters of a test, with the mark `full` unless `fast(value)` holds.

    A tuple is one value per argument.
    """
    return [
        pytest.param(*value if isinstance(value, tuple) else (value,), marks=() if fast(value) else pytest.mark.full)
        for value in values
    ]
