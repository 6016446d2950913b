"""Counts a step from its program: FLOPs, bytes sent and parameters of one device. Nothing is compiled or run.

    counts = count_step(get_preset("moe_16x10b"), Layout(MeshConfig(expert=8, pipeline=2, hardware="h100"), 1024, 64))
    counts.flops["expert"], counts.sent_bytes["dispatch", "all_to_all", ("expert",)]

The program is the trainer's own, on a mesh that has only names, sizes and a platform (`moejax.mesh.abstract_mesh`), so
4,096 GPUs take as long as one: a second. `moejax.planner.jaxpr` says how it is counted, and `moejax.planner.program`
has the same figures in closed form.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import sharding
from moejax.checks import check
from moejax.config import BalanceConfig, ModelConfig
from moejax.layout import VOCAB_AXES, Layout
from moejax.mesh import abstract_mesh
from moejax.planner.jaxpr import Counts, count, device_program
from moejax.planner.work import Mode
from moejax.program import Program
from moejax.train.step import make_train_step


def count_step(model: ModelConfig, layout: Layout, mode: Mode = "train") -> Counts:
    """Counts the train step, or for prefill the forward pass to the logits of one position.

    Raises:
      ConfigError: the model does not fit the layout, or the mode is decoding, for which there is no step yet.
    """
    check(mode != "decode", "mode='decode' has no program to count yet; use 'train' or 'prefill'")
    if mode == "prefill":
        layout = layout.replace(grad_accumulation_steps=1)
    program = Program(model, layout, abstract_mesh(layout.mesh), BalanceConfig.suited_to(model))
    jaxpr = _forward_jaxpr(program) if mode == "prefill" else make_train_step(program).trace().jaxpr
    counts = count(device_program(jaxpr), layout.mesh.shape, training=mode == "train")
    leaves = jax.tree.leaves(program.table, is_leaf=lambda x: isinstance(x, sharding.Param))
    counts.param_bytes = sum(4.0 * math.prod(NamedSharding(program.mesh, p.spec).shard_shape(p.shape)) for p in leaves)
    return counts


def _forward_jaxpr(program: Program) -> core.Jaxpr:
    forward = program.sharded(
        program.next_token_logits,
        (program.param_specs, program.batch_spec, P()),
        P(program.layout.mesh.batch_axes, VOCAB_AXES),
    )
    tokens_BS = jax.ShapeDtypeStruct((program.layout.batch_size, program.layout.seq_len), jnp.int32)
    params = sharding.param_shapes(program.table, program.mesh)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(forward).trace(params, tokens_BS, position).jaxpr.jaxpr
