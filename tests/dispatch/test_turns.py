"""Turns order a compiled program and change none of its values; that they order is in test_topology.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch.turns import after, first_turn, moment


def test_after_a_moment_is_the_same_value_with_the_same_gradient():
    x_TD = jax.random.normal(jax.random.key(0), (4, 3))
    dy_TD = jax.random.normal(jax.random.key(1), (4, 3))
    y_TD, vjp = jax.vjp(lambda x_TD: after(x_TD, moment(x_TD)), x_TD)
    np.testing.assert_array_equal(y_TD, x_TD)
    np.testing.assert_array_equal(vjp(dy_TD)[0], dy_TD)


@pytest.mark.parametrize("of", [lambda x: moment(x), lambda _: first_turn().sent, lambda _: first_turn().arrived])
def test_a_moment_is_an_integer_zero(of):
    now = of(jnp.full((2, 2), jnp.nan))
    assert (now.shape, now.dtype, int(now)) == ((), jnp.int32, 0)
