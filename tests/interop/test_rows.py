"""Rows read any slice of a parameter from tensors on disk, and write what they read."""

import numpy as np
import pytest

from moejax.interop import Row

SIZES = {"D": 6, "N": 4, "K": 2, "H": 8, "E": 3, "F": 10, "G": 2, "V": 12, "J": 9}


def shape_of(row):
    return tuple(SIZES[dim] for dim in row.dims)


def parameter(row):
    shape = shape_of(row)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


WHOLE = [
    Row("a.w_q_DNH", "{layer}.q", "(N H) D"),
    Row("a.w_o_NHD", "{layer}.o", "D (N H)"),
    Row("a.w_in_EDGF", "{layer}.fused", "E (G F) D"),
    Row("a.w_in_EDGF", "{layer}.interleaved", "E D (F G)"),
    Row("a.w_gate_D", "{layer}.gate", "1 D"),
    Row("a.w_q_DNH", "{layer}.neighbors", "(N H) D", neighbors=8),
    Row("a.w_kv_down_DJ", "{layer}.some_neighbors", "J D", neighbors=4),
]


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.stored)
def test_a_slice_of_what_was_written_is_the_slice(row):
    whole = parameter(row)
    tensor = row.write(whole)
    assert tensor.shape == row.stored_shape(whole.shape)
    at = {dim: range(SIZES[dim] // 2, SIZES[dim]) for dim in row.dims}
    wanted = whole[tuple(slice(at[dim].start, at[dim].stop) for dim in row.dims)]
    np.testing.assert_array_equal(row.read(tensor, whole.shape, at), wanted)


def test_the_notation_is_that_of_einops():
    heads_first = np.arange(4 * 8 * 6).reshape(32, 6)
    read = WHOLE[0].read(heads_first, (6, 4, 8), {dim: range(SIZES[dim]) for dim in "DNH"})
    assert read[1, 2, 3] == heads_first[2 * 8 + 3, 1]
    gate_then_up = np.arange(3 * 20 * 6).reshape(3, 20, 6)
    read = WHOLE[2].read(gate_then_up, (3, 6, 2, 10), {dim: range(SIZES[dim]) for dim in "EDGF"})
    assert read[2, 1, 1, 4] == gate_then_up[2, 10 + 4, 1]


def test_neighbors_that_rope_rotates_become_halves():
    neighbors = np.arange(4 * 8 * 6).reshape(32, 6)
    read = WHOLE[-2].read(neighbors, (6, 4, 8), {dim: range(SIZES[dim]) for dim in "DNH"})
    assert [read[0, 0, i] // 6 for i in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_neighbors_at_the_end_of_a_dim_leave_the_rest_as_it_is():
    read = WHOLE[-1].read(np.arange(9 * 6).reshape(9, 6), (6, 9), {dim: range(SIZES[dim]) for dim in "DJ"})
    assert [read[0, i] // 6 for i in range(9)] == [0, 1, 2, 3, 4, 5, 7, 6, 8]


def test_tensors_per_expert_and_part():
    row = Row("a.w_in_EDGF", "layers.{layer}.{expert}.up", "F D", part=1)
    whole = parameter(row)
    assert list(row.stored_names(whole.shape, range(3, 5)))[:4] == [
        "layers.3.0.up", "layers.3.1.up", "layers.3.2.up", "layers.4.0.up",
    ]  # fmt: skip
    at = {"E": range(1, 3), "D": range(2, 5), "G": range(2), "F": range(10)}
    np.testing.assert_array_equal(row.read(row.write(whole, 2), whole.shape, at), whole[2, 2:5, 1])
