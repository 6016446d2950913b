"""Loss and every gradient equal the dense oracle's, however the model is spread over the mesh.

A handful of layouts that together cover every option run by default. The full grid is every factorisation of 16 into
expert × pipeline × tensor, with folded and split experts, one and two repeats, each rematerialisation policy and both
ways to gather:

    python -m pytest tests/test_equivalence.py -m slow

It prints its worst errors at the end. Compiled programs are cached on disk, so that a grid that was stopped goes on
quickly.
"""

import jax
import numpy as np
import pytest
from layouts import CI_LAYOUTS, relative_error

TOLERANCE = 1e-5  # of a parameter's largest gradient; float32 against float64


def errors(layout):
    """Relative error of the loss' parts and of every gradient, by name."""
    metrics, grads = layout.result
    expected, expected_grads = layout.oracle()
    parts = {name: relative_error(metrics[name], getattr(expected, name)) for name in ("loss", "cross_entropy")}
    parts |= {name: relative_error(metrics[name], getattr(expected, name)) for name in ("aux_loss", "z_loss")}
    grads = jax.tree.map(relative_error, layout.unplace(grads), expected_grads)
    return parts | {jax.tree_util.keystr(path): error for path, error in jax.tree.leaves_with_path(grads)}


@pytest.mark.parametrize("layout", CI_LAYOUTS, ids=str)
def test_loss_and_gradients_equal_the_oracle(layout):
    assert {name: error for name, error in errors(layout).items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("layout", CI_LAYOUTS, ids=str)
def test_loads_and_drops_are_the_oracles(layout):
    metrics, _ = layout.result
    expected, _ = layout.oracle()
    np.testing.assert_array_equal(np.asarray(metrics["count_RPlE"]).reshape(expected.load_LE.shape), expected.load_LE)
    np.testing.assert_array_equal(np.asarray(metrics["dropped_RPl"]).reshape(-1), expected.dropped_L)
    assert (expected.dropped_L > 0).all() == layout.drops
