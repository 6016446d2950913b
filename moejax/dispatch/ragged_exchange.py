"""The ragged exchange: rows sorted by expert to the devices that hold their experts, and back.

Every device makes the whole plan from the counts of all senders: integers, [n, e, s] in size.

Dimensions: N rows of a sender, R rows of a receiver's buffer, D model, E experts, e one device's experts, n devices
that exchange, s senders (the same devices), h hosts, i devices of one. In plans the destination is first: [n, e, s].
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import DispatchConfig
from moejax.dispatch import payload
from moejax.dispatch.exchange import host_groups
from moejax.kernels.manual import vary, varying
from moejax.nn.collectives import ragged_all_to_all


class Slices(NamedTuple):
    """Runs of rows, one for each that is sent or received: where they lie here, and there; int32 [slices]."""

    size: jax.Array
    here: jax.Array
    there: jax.Array


class Hop(NamedTuple):
    """What a device sends, by receiver, and what it gets, by sender; the other way round it is the way back."""

    sent: Slices
    received: Slices

    @property
    def back(self) -> Hop:
        return Hop(self.received, self.sent)


class Plan(NamedTuple):
    """The hops from the senders' sorted rows to the receivers' buffers, and the rows of each expert that arrive."""

    hops: tuple[Hop, ...]
    group_sizes_e: jax.Array


def _of_chunk(count: jax.Array, chunk: int, chunks: int) -> tuple[jax.Array, jax.Array]:
    """An equal part of every count: where it starts, and how many. A part of every sender, so that all send in each."""
    start = count * chunk // chunks
    return start, count * (chunk + 1) // chunks - start


def max_rows(count_sE: jax.Array, chunks: int) -> jax.Array:
    """The most rows that a device gets in one chunk, of the devices that hold E / s experts each."""
    parts = [_of_chunk(count_sE, chunk, chunks)[1] for chunk in range(chunks)]
    return jnp.stack([part.reshape(part.shape[0], part.shape[0], -1).sum((0, 2)).max() for part in parts]).max()


def make_plan(count_sE: jax.Array, first: jax.Array | int, rows: int, chunk: int, config: DispatchConfig) -> Plan:
    """The plan of one chunk: at each receiver, the `rows` rows from the `first` of those that the chunk has for it.

    Args:
        count_sE: int32, rows that each sender has for each expert.
        first: a row of the receiver's, all counted by expert and then by sender.
        rows: R.
        chunk: which of `config.chunks` equal parts of every count.
        config: the axes and hosts.
    """
    n = count_sE.shape[0]
    start_sE = jnp.cumsum(count_sE, axis=1) - count_sE
    skipped_sE, count_sE = _of_chunk(count_sE, chunk, config.chunks)

    def by_destination(a_sE: jax.Array) -> jax.Array:
        return jnp.moveaxis(a_sE.reshape(n, n, -1), 0, -1)

    all_nes = by_destination(count_sE)
    place_nes = _exclusive_cumsum(all_nes, 2)
    low_nes = jnp.clip(first - place_nes, 0, all_nes)
    size_nes = jnp.clip(first + rows - place_nes, 0, all_nes) - low_nes
    at_sender_nes = by_destination(start_sE + skipped_sE) + low_nes
    at_receiver_nes = jnp.clip(place_nes + low_nes - first, 0, rows)
    me = lax.axis_index(config.expert_axes)
    plan = _one_hop if config.hosts == 1 else partial(_two_hops, hosts=config.hosts)
    return Plan(plan(size_nes, at_sender_nes, at_receiver_nes, me), size_nes[me].sum(-1))


def _exclusive_cumsum(a: jax.Array, dims: int) -> jax.Array:
    """Over the last dims together, row-major."""
    flat = a.reshape(*a.shape[:-dims], -1)
    return (jnp.cumsum(flat, axis=-1) - flat).reshape(a.shape)


def _one_hop(
    size_nes: jax.Array, at_sender_nes: jax.Array, at_receiver_nes: jax.Array, me: jax.Array
) -> tuple[Hop, ...]:
    sent = [a[:, :, me].reshape(-1) for a in (size_nes, at_sender_nes, at_receiver_nes)]
    received = [a[me].T.reshape(-1) for a in (size_nes, at_receiver_nes, at_sender_nes)]
    return (Hop(Slices(*sent), Slices(*received)),)


def _two_hops(
    size_nes: jax.Array, at_sender_nes: jax.Array, at_receiver_nes: jax.Array, me: jax.Array, *, hosts: int
) -> tuple[Hop, ...]:
    """Inside the host to the counterpart of the destination, then across. In between, rows lie by (host, expert, sender
    inside the host), so that across the hosts an expert's rows of one host are one slice.
    """
    n, e, _ = size_nes.shape
    inside = n // hosts
    split = (hosts, inside, e, hosts, inside)  # destination's host and place in it, expert, sender's host and place
    size, at_sender, at_receiver = (a.reshape(split) for a in (size_nes, at_sender_nes, at_receiver_nes))
    my_host, my_place = me // inside, me % inside
    # On the counterpart, which is in the sender's host at the destination's place.
    between = _exclusive_cumsum(size.transpose(3, 1, 0, 2, 4), 3).transpose(2, 1, 3, 0, 4)

    sent = [a[:, :, :, my_host, my_place].transpose(1, 0, 2).reshape(-1) for a in (size, at_sender, between)]
    received = [a[:, my_place, :, my_host].transpose(2, 0, 1).reshape(-1) for a in (size, between, at_sender)]
    first = Hop(Slices(*sent), Slices(*received))

    size, between, at_receiver = size.sum(-1), between[..., 0], at_receiver[..., 0]
    sent = [a[:, my_place, :, my_host].reshape(-1) for a in (size, between, at_receiver)]
    received = [a[my_host, my_place].T.reshape(-1) for a in (size, at_receiver, between)]
    return first, Hop(Slices(*sent), Slices(*received))


class RaggedExchange(NamedTuple):
    """The exchange that a configuration asks for, with R rows in a receiver's buffer."""

    axes: tuple[str, ...]
    hosts: int
    payload: str
    rows: int

    def to_experts(self, x_ND: jax.Array, plan: Plan) -> jax.Array:
        """The sorted rows that the plan sends, from all senders: [N, D] -> [R, D], zeros behind the last."""
        return _to_experts(self, x_ND, plan)

    def to_senders(self, y_RD: jax.Array, into_ND: jax.Array, plan: Plan) -> jax.Array:
        """The way back, into the places that the rows came from; all others of `into_ND` stay as they are.

        Differentiable as long as no row is written twice by a chain of these.
        """
        return _to_senders(self, y_RD, into_ND, plan)

    def _move(self, x_ND: jax.Array, into: jax.Array, plan: Plan, *, back: bool) -> jax.Array:
        hops = [hop.back for hop in reversed(plan.hops)] if back else list(plan.hops)
        if self.hosts == 1:
            return _move_rows(x_ND, into, hops[0], self.axes, None)
        groups = host_groups(self.axes, self.hosts)
        between = jnp.zeros((self.hosts * self.rows, *x_ND.shape[1:]), x_ND.dtype)
        for hop, target, group in zip(hops, (between, into), groups[::-1] if back else groups, strict=True):
            x_ND = _move_rows(x_ND, target, hop, self.axes, group)
        return x_ND

    def _send(self, x_ND: jax.Array, plan: Plan) -> jax.Array:
        packed = payload.pack(x_ND) if self.payload == "float8" else x_ND
        zeros = jnp.zeros((self.rows, *packed.shape[1:]), packed.dtype)
        arrived = self._move(packed, zeros, plan, back=False)
        return payload.unpack(arrived, x_ND.dtype) if self.payload == "float8" else arrived


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_experts(exchange: RaggedExchange, x_ND: jax.Array, plan: Plan) -> jax.Array:
    return exchange._send(x_ND, plan)


def _to_experts_backward(
    exchange: RaggedExchange, residuals: tuple[Plan, int], d_RD: jax.Array
) -> tuple[jax.Array, None]:
    plan, num_rows = residuals
    zeros = jnp.zeros((num_rows, d_RD.shape[1]), d_RD.dtype)
    return exchange._move(d_RD, zeros, plan, back=True), None


_to_experts.defvjp(
    lambda exchange, x_ND, plan: (exchange._send(x_ND, plan), (plan, x_ND.shape[0])), _to_experts_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_senders(exchange: RaggedExchange, y_RD: jax.Array, into_ND: jax.Array, plan: Plan) -> jax.Array:
    return exchange._move(y_RD, into_ND, plan, back=True)


_to_senders.defvjp(
    lambda exchange, y_RD, into_ND, plan: (exchange._move(y_RD, into_ND, plan, back=True), plan),
    lambda exchange, plan, d_ND: (exchange._send(d_ND, plan), d_ND, None),
)


def _move_rows(
    x_ND: jax.Array, into_MD: jax.Array, hop: Hop, axes: tuple[str, ...], groups: list[list[int]] | None
) -> jax.Array:
    """One hop: the rows that arrive, written into `into_MD`."""
    into_MD = vary(into_MD, varying(x_ND))
    if jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu":
        return _by_all_gather(x_ND, into_MD, hop, axes, groups)
    sizes = (hop.sent.here, hop.sent.size, hop.sent.there, hop.received.size)
    return ragged_all_to_all(x_ND, into_MD, sizes, axes, groups)


def _by_all_gather(
    x_ND: jax.Array, into_MD: jax.Array, hop: Hop, axes: tuple[str, ...], groups: list[list[int]] | None
) -> jax.Array:
    """What `ragged_all_to_all` does, for CPUs, where XLA lacks it: all rows go to everyone, who takes its own."""
    x_GND = lax.all_gather(x_ND, axes, axis_index_groups=groups)
    num_senders, num_rows, _ = x_GND.shape
    sender = jnp.arange(hop.received.size.shape[0], dtype=jnp.int32) // (hop.received.size.shape[0] // num_senders)
    row_M1 = jnp.arange(into_MD.shape[0], dtype=jnp.int32)[:, None]
    offset_MJ = row_M1 - hop.received.here[None]
    in_slice_MJ = (offset_MJ >= 0) & (offset_MJ < hop.received.size[None])
    index_MJ = (sender * num_rows + hop.received.there)[None] + offset_MJ
    index_M = jnp.where(in_slice_MJ, index_MJ, 0).sum(-1)
    rows_MD = x_GND.reshape(-1, x_ND.shape[-1])[index_M]
    return jnp.where(in_slice_MJ.any(-1)[:, None], rows_MD, into_MD)
