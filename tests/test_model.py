"""What the model computes of a token depends on what it may depend on, and every device agrees on it.

Causality and isolation hold bit for bit as long as nothing is dropped. A drop couples the tokens of a sender: a later
token of a higher gate can take an earlier one's place.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from layouts import CI_LAYOUTS, Layout, per_device_values, relative_error, tiered
from reference import oracle

from moejax import model
from moejax.mesh import TENSOR
from moejax.sharding import Param

WITHOUT_DROPS = [layout for layout in CI_LAYOUTS if not layout.drops]


@functools.cache
def hidden(layout):
    """(params, tokens, segment_ids) -> final hidden states [B, S, D], in the batch's order."""
    program = layout.program

    def device(params, tokens_BS, segment_ids_BS):
        h_MbsD, _ = program.hidden(params, tokens_BS, segment_ids_BS)
        return h_MbsD.reshape(-1, *h_MbsD.shape[2:])

    specs = (program.param_specs, program.batch_spec, program.batch_spec)
    function = program.sharded(device, specs, P(program.batch_axes, TENSOR))
    params = layout.place(layout.logical_params)
    compiled = jax.jit(function)
    return lambda batch: np.asarray(compiled(params, *layout.place_batch((batch["tokens"], batch["segment_ids"]))))


def changed(batch, vocab_size, where):
    return batch | {"tokens": np.where(where, (batch["tokens"] + 1) % vocab_size, batch["tokens"])}


@pytest.mark.parametrize("layout", tiered(WITHOUT_DROPS), ids=str)
@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_token_changes_nothing_before_it(layout, position):
    batch = layout.batch | {"segment_ids": np.ones_like(layout.batch["tokens"])}
    here = np.arange(layout.seq_len)[None] == position
    before, after = hidden(layout)(batch), hidden(layout)(changed(batch, layout.model.vocab_size, here))
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()  # and each one from it on


@pytest.mark.parametrize("layout", tiered(WITHOUT_DROPS), ids=str)
def test_a_document_changes_no_other(layout):
    batch = dataclasses.replace(layout, packed=True).batch
    here = batch["segment_ids"] == 2
    assert here.any(1).sum() > 1
    before, after = hidden(layout)(batch), hidden(layout)(changed(batch, layout.model.vocab_size, here))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).any(-1).all()


@pytest.mark.parametrize("layout", tiered(CI_LAYOUTS), ids=str)
def test_no_device_disagrees_on_what_is_replicated(layout):
    """Metrics, and gradients where they are stored more than once (over `replica`)."""
    metrics, grads = layout.result
    for path, x in jax.tree.leaves_with_path((metrics, grads)):
        copies = layout.mesh.size // len(per_device_values(x))
        for values in per_device_values(x):
            assert len(values) == copies
            assert all(value.tobytes() == values[0].tobytes() for value in values), jax.tree_util.keystr(path)
    scalars = ("loss", "cross_entropy", "aux_loss", "sequence_loss", "z_loss")
    assert all(len(per_device_values(metrics[name])) == 1 for name in scalars)


@pytest.mark.full
def test_the_same_key_makes_the_same_model_on_every_mesh():
    model = CI_LAYOUTS[3].model
    layouts = [Layout(1, 1, 1, repeats=2, model=model), Layout(4, 2, 2, folded=False, model=model)]
    layouts.append(Layout(2, 2, 2, replica=2, repeats=2, gather="layer", model=model))
    first, *others = [layout.program.init(jax.random.key(7)) for layout in layouts]
    for layout, other in zip(layouts[1:], others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, layouts[0].unplace(first), layout.unplace(other))

    def has_its_deviation(p, w):
        if p.std is None:
            np.testing.assert_array_equal(w, 1)
        else:
            assert np.std(w) == pytest.approx(p.std, rel=5 / w.size**0.5)
            assert abs(np.mean(w)) < 5 * p.std / w.size**0.5

    jax.tree.map(has_its_deviation, layouts[0].program.table, first, is_leaf=lambda x: isinstance(x, Param))


@pytest.mark.parametrize("layout", tiered(CI_LAYOUTS[2:4]), ids=str)
def test_next_token_logits_are_the_oracles(layout):
    program = layout.program
    position = 11
    columns = P(program.batch_axes, ("pipeline", "tensor"))
    function = program.sharded(program.next_token_logits, (program.param_specs, program.batch_spec, P()), columns)
    batch = layout.batch | {"segment_ids": np.ones_like(layout.batch["tokens"])}
    expected = oracle.logits(layout.logical_params, batch, layout.model)[:, position]
    params, tokens = layout.place(layout.logical_params), layout.place_batch(batch["tokens"])
    actual = jax.jit(function)(params, tokens, np.int32(position))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("platform", "mesh", "wanted", "num_sequences", "parts"),
    [
        ("cpu", (4, 1, 1), 0, 2, 1),
        ("cpu", (4, 1, 1), 2, 2, 2),
        ("gpu", (4, 1, 1), 0, 2, 2),
        ("tpu", (1, 1, 4), 0, 6, 2),
        ("gpu", (4, 1, 1), 0, 3, 1),  # 2 does not divide 3
        ("gpu", (1, 4, 1), 0, 2, 1),  # nobody to exchange with
        ("gpu", (4, 1, 1), 4, 4, 4),
    ],
)
def test_a_microbatch_is_split_where_exchanges_can_overlap(monkeypatch, platform, mesh, wanted, num_sequences, parts):
    monkeypatch.setattr(model, "platform", lambda _: platform)
    program = Layout(*mesh, batch_split=wanted).program
    assert program.batch_split(num_sequences) == parts
