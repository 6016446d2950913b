"""Splits a test's parameters over the tiers: those that run with plain `pytest`, and those of the full suite."""

import pytest


def full_unless(fast, values, slow=lambda value: False):
    """Returns `values` as parameters of a test: fast those for which `fast(value)` holds, `full` or `slow` the others.

    A tuple is one value per argument.
    """

    def marks(value):
        return () if fast(value) else pytest.mark.slow if slow(value) else pytest.mark.full

    return [pytest.param(*value if isinstance(value, tuple) else (value,), marks=marks(value)) for value in values]
