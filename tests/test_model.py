"""What the model computes of a token depends on what it may depend on, and every device agrees on it.

Causality and isolation hold bit for bit as long as nothing is dropped. A drop couples the tokens of a sender: a later
token of a higher gate can take an earlier one's place.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cases import CI_CASES, SMALL, Case, per_device_values, relative_error, tiered
from jax.sharding import PartitionSpec as P
from reference import oracle
from tiers import full_unless

from moejax import model
from moejax.mesh import TENSOR
from moejax.sharding import Param

WITHOUT_DROPS = [case for case in CI_CASES if not case.drops]


@functools.cache
def hidden(case):
    """(params, tokens, segment_ids) -> final hidden states [B, S, D], in the batch's order."""
    program = case.program

    def device(params, tokens_nS, segment_ids_nS):
        h_MbsD, _ = model.hidden(params, tokens_nS, segment_ids_nS, case.model, program.resolved, program.table)
        return h_MbsD.reshape(-1, *h_MbsD.shape[2:])

    specs = (program.param_specs, program.batch_spec, program.batch_spec)
    function = program.sharded(device, specs, P(case.layout.mesh.batch_axes, TENSOR))
    params = case.place(case.logical_params)
    compiled = jax.jit(function)
    return lambda batch: np.asarray(compiled(params, *case.place_batch((batch["tokens"], batch["segment_ids"]))))


def changed(batch, vocab_size, where):
    return batch | {"tokens": np.where(where, (batch["tokens"] + 1) % vocab_size, batch["tokens"])}


@pytest.mark.parametrize("case", tiered(WITHOUT_DROPS), ids=str)
@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_token_changes_nothing_before_it(case, position):
    batch = case.batch | {"segment_ids": np.ones_like(case.batch["tokens"])}
    here = np.arange(case.seq_len)[None] == position
    before, after = hidden(case)(batch), hidden(case)(changed(batch, case.model.vocab_size, here))
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()  # and each one from it on


@pytest.mark.parametrize("case", tiered(WITHOUT_DROPS), ids=str)
def test_a_document_changes_no_other(case):
    batch = dataclasses.replace(case, packed=True).batch
    here = batch["segment_ids"] == 2
    assert here.any(1).sum() > 1
    before, after = hidden(case)(batch), hidden(case)(changed(batch, case.model.vocab_size, here))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).any(-1).all()


@pytest.mark.parametrize("case", full_unless(SMALL.__eq__, (SMALL, *CI_CASES), slow=lambda case: True), ids=str)
def test_no_device_disagrees_on_what_is_replicated(case):
    """Metrics, and gradients where they are stored more than once (over `replica`)."""
    metrics, grads = case.result
    for path, x in jax.tree.leaves_with_path((metrics, grads)):
        copies = case.mesh.size // len(per_device_values(x))
        for values in per_device_values(x):
            assert len(values) == copies
            assert all(value.tobytes() == values[0].tobytes() for value in values), jax.tree_util.keystr(path)
    scalars = ("loss", "cross_entropy", "aux_loss", "sequence_loss", "z_loss")
    assert all(len(per_device_values(metrics[name])) == 1 for name in scalars)


@pytest.mark.slow
def test_the_same_key_makes_the_same_model_on_every_mesh():
    model = dataclasses.replace(CI_CASES[3].model, num_layers=6)  # 5 in the pipeline, which 2 stages don't divide
    cases = [Case(1, 1, 1, model=model), Case(4, 2, 2, folded=False, model=model)]
    cases.append(Case(2, 2, 2, replica=2, repeats=2, gather="layer", model=model))
    first, *others = [case.program.init(jax.random.key(7)) for case in cases]
    for case, other in zip(cases[1:], others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, cases[0].unplace(first), case.unplace(other))

    def has_its_deviation(p, w):
        if p.std is None:
            np.testing.assert_array_equal(w, 1)
        else:
            assert np.std(w) == pytest.approx(p.std, rel=5 / w.size**0.5)
            assert abs(np.mean(w)) < 5 * p.std / w.size**0.5

    jax.tree.map(has_its_deviation, cases[0].program.table, first, is_leaf=lambda x: isinstance(x, Param))


@pytest.mark.parametrize("case", full_unless(SMALL.__eq__, (SMALL, CI_CASES[3])), ids=str)
def test_next_token_logits_are_the_oracles(case):
    program = case.program
    position = 11
    columns = P(case.layout.mesh.batch_axes, ("pipeline", "tensor"))
    function = program.sharded(program.next_token_logits, (program.param_specs, program.batch_spec, P()), columns)
    batch = case.batch | {"segment_ids": np.ones_like(case.batch["tokens"])}
    expected = oracle.logits(case.logical_params, batch, case.model)[:, position]
    params, tokens = case.place(case.logical_params), case.place_batch(batch["tokens"])
    actual = jax.jit(function)(params, tokens, np.int32(position))
    assert relative_error(actual, expected) < 1e-5
