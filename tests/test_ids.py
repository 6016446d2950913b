"""Targets of -100 are left out of the loss, on every layout; other ids out of range are refused, or else counted."""

import functools
import re

import jax
import numpy as np
import pytest
from cases import BALANCE, CI_CASES, SMALL, relative_error
from flax import nnx
from reference import oracle
from tiers import full_unless

from moejax.batch import counted_targets
from moejax.checks import ConfigError
from moejax.modules import Transformer
from moejax.train.sample import generate
from moejax.train.step import make_train_step

TOLERANCE = 1e-5  # of a parameter's largest gradient; float32 against float64
WITHOUT_DROPS = [SMALL, *(case for case in CI_CASES if not case.drops)]


def masked(batch):
    """The batch with targets left out: more and more of each sequence, so that no two devices count as many."""
    targets = batch["targets"].copy()
    num_sequences, seq_len = targets.shape
    for i in range(num_sequences):
        targets[i, (i * 7) % (seq_len + 1) :] = -100
    assert len(set((targets != -100).sum(1))) > num_sequences // 2
    return batch | {"targets": targets}


@pytest.mark.parametrize("case", full_unless(SMALL.__eq__, WITHOUT_DROPS, slow=WITHOUT_DROPS[2:].__contains__), ids=str)
def test_the_mean_and_its_gradient_are_over_counted_targets_of_the_global_batch(case):
    batch = masked(case.batch)
    (_, metrics), grads = case.value_and_grad(case.place(case.logical_params), case.place_batch(batch))
    result, expected = oracle.loss_and_grads(case.logical_params, batch, case.model, BALANCE)
    assert int(metrics["num_targets"]) == counted_targets(batch).size < batch["targets"].size
    assert int(metrics["out_of_range_ids"]) == 0
    for name in ("loss", "cross_entropy", "aux_loss", "z_loss"):
        assert relative_error(metrics[name], getattr(result, name)) < TOLERANCE, name
    errors = jax.tree.map(relative_error, case.unplace(grads), expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE, errors


def test_a_batch_without_a_counted_target_has_no_loss_and_moves_nothing_but_routers():
    case = SMALL
    batch = case.batch | {"targets": np.full_like(case.batch["targets"], -100)}
    (loss, metrics), grads = case.value_and_grad(case.place(case.logical_params), case.place_batch(batch))
    assert (float(metrics["cross_entropy"]), int(metrics["num_targets"])) == (0, 0)
    assert np.isfinite(float(loss))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.asarray(grads["head"]["w_DV"] if "w_DV" in grads["head"] else grads["head"]["norm_D"]).any()
    assert np.asarray(grads["layers"]["moe"]["w_router_DE"]).any()  # its losses count every token


CASE = SMALL


@functools.cache
def step_and_params():
    step = make_train_step(CASE.program, steps=100)
    return step, CASE.place(CASE.logical_params)


@pytest.mark.full
def test_evaluation_leaves_out_the_same_targets():
    step, params = step_and_params()
    batch = masked(CASE.batch)
    metrics = step.evaluate(params, step.put_batch(batch))
    logits_BSV = oracle.logits(CASE.logical_params, batch, CASE.model)
    log_prob_BSV = logits_BSV - np.log(np.exp(logits_BSV).sum(-1, keepdims=True))
    where = np.nonzero(batch["targets"] != -100)
    assert float(metrics["cross_entropy"]) == pytest.approx(-log_prob_BSV[*where, batch["targets"][where]].mean())


V = CASE.model.vocab_size
REFUSED = [
    ("targets", -1, "or -100 for a target to leave out"),
    ("targets", V, "or -100"),
    ("targets", 2**31 - 1, "or -100"),
    ("targets", -101, "or -100"),
    ("tokens", -100, f"must be from 0 to 255 with vocab_size={V}$"),
    ("tokens", V, f"must be from 0 to 255 with vocab_size={V}$"),
]


def changed(name, value, dtype=np.int32):
    x = CASE.batch[name].astype(dtype)
    x[2, 3] = value
    return CASE.batch | {name: x}


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_other_ids_out_of_range_are_refused_where_they_enter(name, value, message):
    step, params = step_and_params()
    model = Transformer.from_params(CASE.program, params)
    batch = changed(name, value)
    entrances = [step.put_batch, model.loss]
    if name == "tokens":
        entrances.append(lambda batch: model(batch["tokens"]))
    for enter in entrances:
        with pytest.raises(ConfigError, match=rf"^{name}(_BS)?\[2, 3\]={value} .*{message}") as error:
            enter(batch)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-100, V])
def test_a_prompt_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=rf"^prompt\[1\]={value} must be from 0 to 255 with vocab_size={V}$"):
        generate(CASE.program, None, [1, value], 1, vocab_size=V)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": CASE.batch["tokens"]}, "the batch has tokens and lacks targets, segment_ids"),
        (changed("tokens", 2**32 + 1, np.int64), "tokens[2, 3]=4294967297 must be from 0 to 255"),
        (changed("tokens", 1, np.float32), "tokens has dtype float32; ids must be integers"),
        (CASE.batch | {"targets": CASE.batch["targets"][:, 1:]}, "the batch's shapes"),
    ],
)
def test_batches_that_are_none_are_refused(batch, message):
    step, _ = step_and_params()
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        step.put_batch(batch)


@pytest.mark.parametrize(("name", "value", "_"), REFUSED)
def test_where_values_cannot_be_read_they_are_counted_and_the_loss_is_nan(name, value, _):
    step, params = step_and_params()
    metrics = step.evaluate(params, CASE.place_batch(changed(name, value)))
    assert int(metrics["out_of_range_ids"]) == 1
    assert np.isnan(float(metrics["loss"]))
    assert int(metrics["invalid_tokens"] > 0) == (name == "tokens")  # which stops a training run


def test_a_traced_token_out_of_range_gives_its_sequence_no_numbers():
    _, params = step_and_params()
    model = Transformer(CASE.program, rngs=nnx.Rngs(0))
    model.update(params)
    logits_BSV = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, changed("tokens", V)["tokens"]))
    assert np.isnan(logits_BSV[2, 3:]).all()
    assert np.isfinite(np.delete(logits_BSV, 2, axis=0)).all()
