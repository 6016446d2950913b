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

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.dispatch import slots
from moejax.dispatch.contract import Assignments, DispatchStats, Experts
from moejax.dispatch.exchange import SENDERS, Exchange
from moejax.dispatch.ordering import Order, token_of, wait_for
from moejax.dispatch.ragged_exchange import make_itinerary, max_rows
from moejax.dispatch.rounds import in_rounds
from moejax.dispatch.slots import Queue
from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter


def run(
    x_TD: jax.Array, assignments: Assignments, experts: Experts, exchange: Exchange
) -> tuple[jax.Array, DispatchStats, Exchange]:
    """See `moejax.dispatch.contract.Dispatcher`. A device's buffer has `capacity * E` rows for all that it receives."""
    gate_TK, expert_TK, position_TK, count_E = assignments
    with jax.named_scope("dispatch"):
        queue = slots.line_up(expert_TK, position_TK, count_E)
        dropped = (expert_TK == count_E.shape[0]).sum(dtype=jnp.float32)
    if lax.axis_size(SENDERS) == 1:
        y_TD = _on_one_device(queue, x_TD, gate_TK, experts)
        return y_TD, DispatchStats(dropped, jnp.ones_like(dropped)), exchange

    num_devices = lax.axis_size(exchange.axes)
    rows = min(exchange.capacity * count_E.shape[0] // exchange.chunks, num_devices * queue.order_N.shape[0])
    with jax.named_scope("dispatch"):
        count_sE = lax.all_gather(count_E, exchange.axes)
        rounds = (max_rows(count_sE, exchange.chunks) + rows - 1) // rows
        rounds = jnp.maximum(lax.pmax(rounds, SENDERS), 1)
    one_round = partial(_one_round, rows=rows)
    y_TD, exchange = in_rounds(one_round, rounds, (queue, count_sE, exchange), x_TD, gate_TK, experts)
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), exchange


def _on_one_device(queue: Queue, x_TD: jax.Array, gate_TK: jax.Array, experts: Experts) -> jax.Array:
    with jax.named_scope("dispatch"):
        matching = slots.in_line(queue)
        x_ND = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
    y_ND = experts.on_groups(x_ND, queue.count_E)
    with jax.named_scope("combine"):
        return slots.read_buffer(y_ND, matching, gate_TK)


def _one_round(
    index: jax.Array | int,
    given: tuple[Queue, jax.Array, Exchange],
    x_TD: jax.Array,
    gate_TK: jax.Array,
    experts: Experts,
    *,
    rows: int,
) -> tuple[jax.Array, Exchange]:
    queue, count_sE, exchange = given
    with jax.named_scope("dispatch"):
        matching = slots.in_line(queue)
        sent_ND = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
        x_ND = wait_for(sent_ND, exchange.order.arrived)
    y_ND = jnp.zeros_like(x_ND)
    for chunk in range(exchange.chunks):
        with jax.named_scope("dispatch"):
            itinerary = make_itinerary(count_sE, index * rows, rows, chunk, exchange)
            x_RD = itinerary.to_experts(x_ND)
        if TENSOR in exchange.axes:
            y_RD = experts.on_groups(x_RD, itinerary.group_sizes_e)
        else:
            with jax.named_scope("expert"):
                y_RD = _split_experts(experts, x_RD, itinerary.group_sizes_e)
        with jax.named_scope("combine"):
            y_ND = itinerary.to_senders(y_RD, y_ND)
    with jax.named_scope("combine"):
        y_TD = slots.read_buffer(y_ND, matching, gate_TK)
        return y_TD, dataclasses.replace(exchange, order=Order(token_of(sent_ND), token_of(x_RD)))


def _split_experts(experts: Experts, x_RD: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """Gathers the rows of all devices of `tensor`, each with a part of every expert's width; sums, scatters results."""
    group_sizes_te = lax.all_gather(group_sizes_e, TENSOR)
    merged_M, source_M = _merge(group_sizes_te, x_RD.shape[0])
    x_MD = slots.take_rows(all_gather(x_RD, TENSOR, dim=0), merged_M, source_M[:, None])
    y_MD = experts.on_groups(x_MD, group_sizes_te.sum(0))
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
