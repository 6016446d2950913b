"""Measurements: what compiled programs would do (`overlap`, `memory`), what runs did (`capture`, then `report`)."""

from moejax.profiling.capture import capture

__all__ = ["capture"]
