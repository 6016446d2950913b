"""Ragged dispatch: exactly the rows that go from one device to another travel, and experts work on no empty row.

Assignments are sorted by expert. Every device knows how many rows each sends to each expert (one `all_gather` of the
counts), so each works out by itself where its rows go and where those of others will lie: at an expert's device they
arrive by expert, and for one expert by sender, ready for a grouped matrix product. The receiver's buffer is bounded;
rows beyond it go in further rounds, as in `moejax.dispatch.rounds`, so nothing is dropped here either. On one device
nothing is sent, and what is left is a sort and a grouped product.

Dimensions: T tokens, K experts a token, N = T * K assignments, E experts, e this device's experts, n = E / e devices
that exchange, R rows of the receiver's buffer, t devices that share an expert's width, D model. In counts the first is
the destination: [n, e, s] rows for expert e of device n from sender s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import DispatchConfig
from moejax.dispatch import slots
from moejax.dispatch.contract import DispatchStats, Experts
from moejax.dispatch.ragged_exchange import RaggedExchange, make_plan, max_rows
from moejax.dispatch.rounds import in_rounds
from moejax.dispatch.slots import Queue
from moejax.dispatch.turns import Turn, after, moment
from moejax.kernels.top_k_routing import Routing
from moejax.mesh import EXPERT, TENSOR
from moejax.nn.collectives import all_gather, psum_scatter


def run(
    x_TD: jax.Array,
    routing: Routing,
    count_E: jax.Array,
    experts: Experts,
    weights: Any,
    *,
    capacity: int,
    config: DispatchConfig,
    turn: Turn,
) -> tuple[jax.Array, DispatchStats, Turn]:
    """See `moejax.dispatch.contract.Dispatcher`. A device's buffer has `capacity * E` rows for all that it receives."""
    with jax.named_scope("dispatch"):
        queue = slots.line_up(routing.expert_TK, routing.position_TK, count_E)
        dropped = (routing.expert_TK == count_E.shape[0]).sum(dtype=jnp.float32)
    if lax.axis_size((EXPERT, TENSOR)) == 1:
        y_TD = _on_one_device(queue, x_TD, routing.gate_TK, experts, weights)
        return y_TD, DispatchStats(dropped, jnp.ones_like(dropped)), turn

    num_devices = lax.axis_size(config.expert_axes)
    rows = min(capacity * count_E.shape[0] // config.chunks, num_devices * queue.order_N.shape[0])
    with jax.named_scope("dispatch"):
        count_sE = lax.all_gather(count_E, config.expert_axes)
        rounds = (max_rows(count_sE, config.chunks) + rows - 1) // rows
        rounds = jnp.maximum(lax.pmax(rounds, (EXPERT, TENSOR)), 1)
    exchange = RaggedExchange(config.expert_axes, config.hosts, config.payload, rows)
    one_round = partial(_one_round, experts=experts, exchange=exchange, config=config)
    y_TD, turn = in_rounds(one_round, rounds, (queue, count_sE, turn), x_TD, routing.gate_TK, weights)
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), turn


def _on_one_device(queue: Queue, x_TD: jax.Array, gate_TK: jax.Array, experts: Experts, weights: Any) -> jax.Array:
    with jax.named_scope("dispatch"):
        matching = slots.in_line(queue)
        x_ND = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
    y_ND = experts.on_groups(weights, x_ND, queue.count_E)
    with jax.named_scope("combine"):
        return slots.read_buffer(y_ND, matching, gate_TK)


def _one_round(
    index: jax.Array | int,
    plan: tuple[Queue, jax.Array, Turn],
    x_TD: jax.Array,
    gate_TK: jax.Array,
    weights: Any,
    *,
    experts: Experts,
    exchange: RaggedExchange,
    config: DispatchConfig,
) -> tuple[jax.Array, Turn]:
    queue, count_sE, turn = plan
    with jax.named_scope("dispatch"):
        matching = slots.in_line(queue)
        sent_ND = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
        x_ND = after(sent_ND, turn.arrived)
    y_ND = jnp.zeros_like(x_ND)
    for chunk in range(config.chunks):
        with jax.named_scope("dispatch"):
            hops = make_plan(count_sE, index * exchange.rows, exchange.rows, chunk, config)
            x_RD = exchange.to_experts(x_ND, hops)
        if TENSOR in config.expert_axes:
            y_RD = experts.on_groups(weights, x_RD, hops.group_sizes_e)
        else:
            with jax.named_scope("expert"):
                y_RD = _split_experts(experts, weights, x_RD, hops.group_sizes_e)
        with jax.named_scope("combine"):
            y_ND = exchange.to_senders(y_RD, y_ND, hops)
    with jax.named_scope("combine"):
        return slots.read_buffer(y_ND, matching, gate_TK), Turn(moment(sent_ND), moment(x_RD))


def _split_experts(experts: Experts, weights: Any, x_RD: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """Rows of all devices of `tensor`, each with a part of every expert's width; partial results summed, scattered."""
    group_sizes_te = lax.all_gather(group_sizes_e, TENSOR)
    merged_M, source_M = _merge(group_sizes_te, x_RD.shape[0])
    x_MD = slots.take_rows(all_gather(x_RD, TENSOR, dim=0), merged_M, source_M[:, None])
    y_MD = experts.on_groups(weights, x_MD, group_sizes_te.sum(0))
    return psum_scatter(slots.take_rows(y_MD, source_M, merged_M[:, None]), TENSOR, dim=0)


def _merge(group_sizes_te: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Rows sorted by expert in each of t buffers, to be sorted by expert over all: both directions, M = t * R.

    The first says for each row of the result where it comes from, the second for each row of the buffers where it
    goes; M stands for "nowhere".
    """
    num_buffers, num_experts = group_sizes_te.shape
    total = num_buffers * rows
    buffer_t1 = jnp.arange(num_buffers, dtype=jnp.int32)[:, None]
    start_te = buffer_t1 * rows + jnp.cumsum(group_sizes_te, axis=1) - group_sizes_te
    merged_et = jnp.cumsum(group_sizes_te.T.reshape(-1)).reshape(num_experts, num_buffers) - group_sizes_te.T

    def permutation(from_: jax.Array, to: jax.Array, size: jax.Array) -> jax.Array:
        row_M1 = jnp.arange(total, dtype=jnp.int32)[:, None]
        offset_MJ = row_M1 - from_.reshape(1, -1)
        in_run_MJ = (offset_MJ >= 0) & (offset_MJ < size.reshape(1, -1))
        index_M = jnp.where(in_run_MJ, to.reshape(1, -1) + offset_MJ, 0).sum(-1)
        return jnp.where(in_run_MJ.any(-1), index_M, total)

    return permutation(merged_et.T, start_te, group_sizes_te), permutation(start_te, merged_et.T, group_sizes_te)
