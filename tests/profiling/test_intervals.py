"""Interval sets against sets of whole instants, and by hand."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from moejax.profiling.intervals import intersection, length, overlap, subtract, union

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda x: (x[0], x[0] + x[1])), max_size=12)


def instants(intervals):
    return {t for start, end in intervals for t in range(start, end)}


def is_a_set(intervals):
    return all(a < b for a, b in intervals) and all(a[1] <= b[0] for a, b in itertools.pairwise(intervals))


@given(INTERVALS, INTERVALS)
def test_they_are_operations_on_sets_of_instants(a, b):
    for found, expected in (
        (union(a), instants(a)),
        (intersection(union(a), union(b)), instants(a) & instants(b)),
        (subtract(union(a), union(b)), instants(a) - instants(b)),
    ):
        assert is_a_set(found)
        assert instants(found) == expected
        assert length(found) == len(expected)


def test_by_hand():
    compute = union([(5, 8), (0, 4), (2, 5), (10, 10)])
    assert compute == [(0, 8)]
    sent = union([(6, 9), (12, 15), (20, 20.5)])
    assert intersection(sent, compute) == [(6, 8)]
    assert subtract(sent, compute) == [(8, 9), (12, 15), (20, 20.5)]
    assert length(subtract(sent, compute)) == 4.5


@given(INTERVALS, st.integers(0, 50), st.integers(0, 20))
def test_the_part_of_one_interval_in_a_set(a, start, size):
    assert overlap(start, start + size, union(a)) == len(set(range(start, start + size)) & instants(a))
