"""Measurements: what compiled programs would do (`overlap`), what runs did (`capture`, then `report`)."""

from moejax.profiling.capture import capture

__all__ = ["capture"]
