"""Sets of instants as sorted lists of disjoint intervals [start, end), so that times that overlap are counted once."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The instants in any of `intervals`, which may overlap and come in any order; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The instants in both of two sets, each sorted and disjoint as `union` returns it."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The instants of `a` that are not in `b`, each sorted and disjoint as `union` returns it."""
    found, j = [], 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        at = j
        while at < len(b) and b[at][0] < end:
            if start < b[at][0]:
                found.append((start, b[at][0]))
            start = max(start, b[at][1])
            at += 1
        if start < end:
            found.append((start, end))
    return found


def overlap(start: float, end: float, a: Sequence[Interval]) -> float:
    """How much of [start, end) is in `a`, sorted and disjoint as `union` returns it."""
    first = bisect.bisect_right(a, start, key=lambda interval: interval[1])
    total = 0.0
    for begin, stop in itertools.islice(a, first, None):
        if begin >= end:
            break
        total += min(stop, end) - max(begin, start)
    return total


def length(intervals: Iterable[Interval]) -> float:
    """Sum of the lengths; of a set from `union`, how long it is."""
    return sum(end - start for start, end in intervals)
