"""Loss and every gradient equal the dense oracle's, however the model is spread over the mesh.

A handful of layouts together cover every option; one of them is fast. The grid of the slow tier is every factorization
of 16 into expert × pipeline × tensor, with folded and split experts, one and two repeats, each rematerialization policy
and both ways to gather:

    pytest -n 0 -m slow tests/test_equivalence.py

It prints its worst errors at the end, which the workers of `-n 2` would not show. Compiled programs are cached on disk,
so a grid that was stopped goes on quickly.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from cases import CI_CASES, VARIANT_CASES, Case, relative_error, tiered, variant
from reports import collect
from tiers import full_unless

from moejax.checks import ConfigError
from moejax.config import AttentionConfig

TOLERANCE = 1e-5  # of a parameter's largest gradient; float32 against float64
SLOW = [VARIANT_CASES[i] for i in (0, 3, 4, 6, 7)]  # the others cover nearly the same

GRID_MODEL = variant(num_layers=16, attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=4))
SIZES = (1, 2, 4, 8, 16)
OPTIONS = [
    {
        "folded": folded, "repeats": repeats, "remat": remat, "gather": gather,
        # CPUs skip the bubble and accelerators compute in it; of folded and split experts each one meets either.
        "bubble": "compute" if folded == (gather == "step") else "skip",
    }
    for folded in (True, False)
    for repeats in (1, 2)
    for remat in ("none", "minimal", "collectives", "full")
    for gather in ("step", "layer")
]  # fmt: skip
GRID = [
    Case(expert, pipeline, tensor, model=GRID_MODEL, num_microbatches=max(pipeline, min(2, 16 // expert)), **options)
    for expert, pipeline, tensor in itertools.product(SIZES, repeat=3)
    if expert * pipeline * tensor == 16
    for options in OPTIONS
]


@pytest.fixture(scope="module")
def report(request):
    """Collects errors by layout and name; prints the worst when the module is through."""
    yield from collect(request, worst)


def worst(found):
    loss, at = max((errors["loss"], case) for case, errors in found.items())
    gradients = [(error, name, case) for case, errors in found.items() for name, error in errors.items() if "[" in name]
    grad, name, grad_at = max(gradients)
    yield f"{len(found)} layouts against the oracle: loss within {loss:.1e} ({at}),"
    yield f"{len(gradients)} gradients within {grad:.1e} ({name} on {grad_at})"


def errors(case):
    """Relative error of the loss' parts and of every gradient, by name."""
    metrics, grads = case.result
    expected, expected_grads = case.oracle()
    parts = {name: relative_error(metrics[name], getattr(expected, name)) for name in ("loss", "cross_entropy")}
    parts |= {
        name: relative_error(metrics[name], getattr(expected, name)) for name in ("aux_loss", "sequence_loss", "z_loss")
    }
    grads = jax.tree.map(relative_error, case.unplace(grads), expected_grads)
    return parts | {jax.tree_util.keystr(path): error for path, error in jax.tree.leaves_with_path(grads)}


@pytest.mark.parametrize("case", tiered(CI_CASES), ids=str)
def test_loss_and_gradients_equal_the_oracle(case, report):
    report[str(case)] = found = errors(case)
    assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("case", full_unless(lambda case: False, VARIANT_CASES, slow=SLOW.__contains__), ids=str)
def test_variants_equal_the_oracle(case, report):
    report[f"variants-{case}"] = found = errors(case)
    assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_layout_equals_the_oracle(case, report):
    case = dataclasses.replace(case)  # its programs and results go when this test does
    if case.pipeline * case.repeats > GRID_MODEL.num_layers:
        with pytest.raises(ConfigError, match="num_layers=16 must be at least pipeline × pipeline_repeats = 32"):
            _ = case.program
        return
    report[str(case)] = found = errors(case)
    assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("case", tiered(CI_CASES), ids=str)
def test_loads_and_drops_are_the_oracles(case):
    metrics, _ = case.result
    expected, _ = case.oracle()
    router = metrics["router"]
    np.testing.assert_array_equal(np.asarray(router.count_E).reshape(expected.load_LE.shape), expected.load_LE)
    np.testing.assert_array_equal(np.asarray(router.dropped).reshape(-1), expected.dropped_L)
    assert (expected.dropped_L > 0).all() == case.drops
