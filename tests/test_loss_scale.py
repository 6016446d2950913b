"""Gradients of a float16 program are as good with many tokens as with few, and better than bfloat16's."""

import functools

import jax
import numpy as np
import pytest
from cases import make_batch, variant

from moejax.batch import Totals
from moejax.config import BalanceConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.nn.loss_scale import LARGEST, loss_scale, scale_gradient
from moejax.program import Program

LAYOUT = Layout(MeshConfig(expert=2), seq_len=16, batch_size=64, num_microbatches=1)
FEW, MANY = LAYOUT.tokens, 2**20


@functools.cache
def gradients(dtype, num_tokens, *, same=False):
    """Those of 1,024 tokens as a part of `num_tokens`, times the number of parts; `same`: one token, one target."""
    model = variant(num_layers=1, dtype=dtype)
    mesh = build_mesh(LAYOUT.mesh, jax.devices()[:2])
    program = Program(model, LAYOUT, mesh, BalanceConfig(z_loss_weight=0.0))
    totals = Totals(num_tokens // LAYOUT.seq_len, num_tokens, np.int32(num_tokens), np.int32(0))
    batch = make_batch(model.vocab_size, LAYOUT.batch_size, LAYOUT.seq_len)
    if same:
        batch = {name: np.full_like(x, 7) for name, x in batch.items()}
    function = program.sharded(
        jax.grad(lambda params, batch: program.share_of_loss(params, batch, totals)[0]),
        (program.param_specs, program.batch_spec),
        program.param_specs,
    )
    grads = jax.jit(function)(program.init(jax.random.key(0)), batch)
    return jax.tree.map(lambda g: np.asarray(g, np.float64) * (num_tokens / FEW), grads)


def error(dtype, num_tokens):
    """Of all gradients together, against float32's."""
    pairs = zip(*map(jax.tree.leaves, (gradients(dtype, num_tokens), gradients("float32", FEW))), strict=True)
    squares = [(np.square(got - right).sum(), np.square(right).sum()) for got, right in pairs]
    return (sum(wrong for wrong, _ in squares) / sum(whole for _, whole in squares)) ** 0.5


@pytest.mark.slow
def test_the_error_does_not_grow_with_the_tokens():
    assert error("float16", MANY) < 1.5 * error("float16", FEW)
    assert error("float16", MANY) < error("bfloat16", MANY) / 3


@pytest.mark.full
def test_gradients_that_all_tokens_agree_on_do_not_overflow():
    grads = gradients("float16", FEW, same=True)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_only_float16_is_scaled_by_a_power_of_two_of_at_most_the_tokens():
    assert [loss_scale("float16", n) for n in (1, 3, 4, 1000, LARGEST, 10**9)] == [1, 2, 4, 512, LARGEST, LARGEST]
    assert {loss_scale(dtype, 2**20) for dtype in ("float32", "bfloat16")} == {1}
    x = np.float32(3)
    assert scale_gradient(x, 1.0) is x
    value, gradient = jax.value_and_grad(lambda x: scale_gradient(x, 8.0) ** 2)(x)
    assert (value, gradient) == (9, pytest.approx(48))
