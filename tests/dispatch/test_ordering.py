"""Ordering tokens change no value, and on GPUs alone make a part wait for the one before.

That exchanges then overlap with products, as compiled for real devices, is in test_topology.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P

from moejax.config import DispatchConfig, ModelConfig
from moejax.dispatch import STRATEGIES, Exchange
from moejax.dispatch.ordering import nothing_before, token_of, wait_for
from moejax.mesh import MeshConfig, abstract_mesh
from moejax.moe import mixture_of_experts
from moejax.sharding import gather, moe_params, param_shapes, param_specs

MODEL = ModelConfig(d_model=8, d_ff=8, num_experts=4, dtype="float32")


def test_waiting_changes_neither_value_nor_gradient():
    x_TD = jax.random.normal(jax.random.key(0), (4, 3))
    dy_TD = jax.random.normal(jax.random.key(1), (4, 3))
    y_TD, vjp = jax.vjp(lambda x_TD: wait_for(x_TD, token_of(x_TD)), x_TD)
    np.testing.assert_array_equal(y_TD, x_TD)
    np.testing.assert_array_equal(vjp(dy_TD)[0], dy_TD)


@pytest.mark.parametrize("of", [token_of, lambda _: nothing_before().filled, lambda _: nothing_before().arrived])
def test_a_token_is_an_integer_zero(of):
    token = of(jnp.full((2, 2), jnp.nan))
    assert (token.shape, token.dtype, int(token)) == ((), jnp.int32, 0)


@pytest.mark.parametrize("hardware", ["h100", "tpu_v5p", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_second_part_waits_for_the_first_on_gpus_alone(strategy, hardware):
    """The second part's tokens wait for a filled buffer, its own buffers for one that has arrived."""
    mesh, config = abstract_mesh(MeshConfig(expert=2, hardware=hardware)), DispatchConfig(strategy, chunks=2)
    table = moe_params(MODEL, config)

    def parts(params, first_bsD, second_bsD):
        p, exchange = gather(params, table), Exchange.make(config, MODEL, first_bsD.shape[1], hosts=1)
        _, _, exchange = mixture_of_experts(p, first_bsD, MODEL, exchange)
        y_bsD, _, _ = mixture_of_experts(p, second_bsD, MODEL, exchange)
        return exchange.wait_for_previous(second_bsD), y_bsD

    def device(*args):
        return jax.vjp(parts, *args)[0]  # looks into `custom_vjp`, of which all outputs would depend on all inputs

    x_spec, x_BSD = P("expert", "tensor"), jax.ShapeDtypeStruct((2, 16, MODEL.d_model), jnp.float32)
    layer = jax.shard_map(device, mesh=mesh, in_specs=(param_specs(table), x_spec, x_spec), out_specs=x_spec)
    jaxpr = jax.make_jaxpr(layer)(param_shapes(table, mesh), x_BSD, x_BSD).jaxpr
    for output in range(2):
        _, used = dce_jaxpr(jaxpr, [i == output for i in range(2)])
        assert used[-2:] == [hardware == "h100", True]
