"""The ragged exchange: rows sorted by expert to the devices that hold their experts, and back.

Every device works out where all rows go from the counts of all senders: integers, [n, e, s] in size.

Dimensions: N rows of a sender, R rows of a receiver's buffer, D model, E experts, e one device's experts, n devices
that exchange, s senders (the same devices). The destination is first: [n, e, s]. In two hops, both are a host and a
place in it: destination n = (h, i), sender s = (g, j).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import WireDtype
from moejax.dispatch import float8
from moejax.dispatch.exchange import Exchange, host_groups
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("hops", "group_sizes_e"),
    meta_fields=("rows", "axes", "hosts", "wire_dtype"),
)
@dataclasses.dataclass(frozen=True)
class Itinerary:
    """How one chunk's rows travel: from the senders' sorted rows to the receivers' buffers, and back."""

    hops: tuple[Hop, ...]
    group_sizes_e: jax.Array  # rows of each expert that arrive here
    rows: int  # R
    axes: tuple[str, ...]  # of the `Exchange`, as what follows
    hosts: int
    wire_dtype: WireDtype

    def to_experts(self, x_ND: jax.Array) -> jax.Array:
        """Sends sorted rows; returns those of all senders that arrive here: [N, D] -> [R, D], zeros behind the last."""
        return _to_experts(self, x_ND)

    def to_senders(self, y_RD: jax.Array, into_ND: jax.Array) -> jax.Array:
        """Sends the way back, into the places that the rows came from; all others of `into_ND` stay as they are.

        Differentiable as long as no row is written twice by a chain of these.
        """
        return _to_senders(self, y_RD, into_ND)

    def _move(self, x_ND: jax.Array, into: jax.Array, *, back: bool) -> jax.Array:
        hops = [hop.back for hop in reversed(self.hops)] if back else list(self.hops)
        if self.hosts == 1:
            return _move_rows(x_ND, into, hops[0], self.axes, None)
        groups = host_groups(self.axes, self.hosts)
        between = jnp.zeros((self.hosts * self.rows, *x_ND.shape[1:]), x_ND.dtype)
        for hop, target, group in zip(hops, (between, into), groups[::-1] if back else groups, strict=True):
            x_ND = _move_rows(x_ND, target, hop, self.axes, group)
        return x_ND

    def _send(self, x_ND: jax.Array) -> jax.Array:
        packed = float8.pack(x_ND) if self.wire_dtype == "float8" else x_ND
        zeros = jnp.zeros((self.rows, *packed.shape[1:]), packed.dtype)
        arrived = self._move(packed, zeros, back=False)
        return float8.unpack(arrived, x_ND.dtype) if self.wire_dtype == "float8" else arrived


@jax.custom_vjp
def _to_experts(itinerary: Itinerary, x_ND: jax.Array) -> jax.Array:
    return itinerary._send(x_ND)


def _to_experts_backward(residuals: tuple[Itinerary, int], d_RD: jax.Array) -> tuple[None, jax.Array]:
    itinerary, num_rows = residuals
    return None, itinerary._move(d_RD, jnp.zeros((num_rows, d_RD.shape[1]), d_RD.dtype), back=True)


_to_experts.defvjp(lambda itinerary, x_ND: (itinerary._send(x_ND), (itinerary, x_ND.shape[0])), _to_experts_backward)


@jax.custom_vjp
def _to_senders(itinerary: Itinerary, y_RD: jax.Array, into_ND: jax.Array) -> jax.Array:
    return itinerary._move(y_RD, into_ND, back=True)


_to_senders.defvjp(
    lambda itinerary, y_RD, into_ND: (itinerary._move(y_RD, into_ND, back=True), itinerary),
    lambda itinerary, d_ND: (None, itinerary._send(d_ND), d_ND),
)


def _of_chunk(count: jax.Array, chunk: int, chunks: int) -> tuple[jax.Array, jax.Array]:
    """An equal part of every count: where it starts, and how many. A part of every sender, so that all send in each."""
    start = count * chunk // chunks
    return start, count * (chunk + 1) // chunks - start


def max_rows(count_sE: jax.Array, chunks: int) -> jax.Array:
    """Returns the most rows that a device gets in one chunk, of the devices that hold E / s experts each."""
    parts = [_of_chunk(count_sE, chunk, chunks)[1] for chunk in range(chunks)]
    return jnp.stack([part.reshape(part.shape[0], part.shape[0], -1).sum((0, 2)).max() for part in parts]).max()


def make_itinerary(count_sE: jax.Array, first: jax.Array | int, rows: int, chunk: int, exchange: Exchange) -> Itinerary:
    """Returns how one chunk travels: at each receiver, the `rows` rows from the `first` that the chunk has for it.

    Args:
        count_sE: int32, rows that each sender has for each expert.
        first: a row of the receiver's, all counted by expert and then by sender.
        rows: R.
        chunk: which of `exchange.chunks` equal parts of every count.
        exchange: the axes, the hosts and the dtype on the wire.
    """
    n = count_sE.shape[0]
    start_sE = jnp.cumsum(count_sE, axis=1) - count_sE
    skipped_sE, count_sE = _of_chunk(count_sE, chunk, exchange.chunks)

    def by_destination(a_sE: jax.Array) -> jax.Array:
        return jnp.moveaxis(a_sE.reshape(n, n, -1), 0, -1)

    all_nes = by_destination(count_sE)
    place_nes = _exclusive_cumsum(all_nes, 2)
    low_nes = jnp.clip(first - place_nes, 0, all_nes)
    size_nes = jnp.clip(first + rows - place_nes, 0, all_nes) - low_nes
    at_sender_nes = by_destination(start_sE + skipped_sE) + low_nes
    at_receiver_nes = jnp.clip(place_nes + low_nes - first, 0, rows)
    me = lax.axis_index(exchange.axes)
    make_hops = _one_hop if exchange.hosts == 1 else partial(_two_hops, hosts=exchange.hosts)
    hops = make_hops(size_nes, at_sender_nes, at_receiver_nes, me)
    return Itinerary(hops, size_nes[me].sum(-1), rows, exchange.axes, exchange.hosts, exchange.wire_dtype)


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
    """Returns a hop inside the host, to the counterpart of the destination, and one across.

    In between, rows are in order of (host, expert, sender inside the host), so that across the hosts an expert's rows
    of one host are one slice. Say that host 0 has devices A and B, host 1 has C and D; experts a, b are on A, c, d on
    B, e, f on C, g, h on D; and each device has one row for each expert: Be is B's for e. Then

        A sends                 Aa Ab Ac Ad Ae Af Ag Ah
        A has after one hop     Aa Ba Ab Bb Ae Be Af Bf    the host's rows for A and for A's counterpart, C: h e j
        C has after one hop     Ca Da Cb Db Ce De Cf Df
        A has after both        Aa Ba Ca Da Ab Bb Cb Db    each host's rows for an expert in one piece: e g j

    Be goes from (g, j) = (0, 1) to the first expert of (h, i) = (1, 0), so in between it is on (g, i) = (0, 0), A.
    """
    n, e, _ = size_nes.shape
    inside = n // hosts
    split = (hosts, inside, e, hosts, inside)
    size_hiegj, sender_hiegj, receiver_hiegj = (a.reshape(split) for a in (size_nes, at_sender_nes, at_receiver_nes))
    my_host, my_place = me // inside, me % inside
    # On each counterpart (g, i), rows are counted in the order h, e, j.
    between_gihej = _exclusive_cumsum(size_hiegj.transpose(3, 1, 0, 2, 4), 3)
    between_hiegj = between_gihej.transpose(2, 1, 3, 0, 4)

    # I send as (g, j), for each i of my host by h, e: [h, i, e] -> i h e. I receive as (g, i): [h, e, j] -> j h e.
    ways = size_hiegj, sender_hiegj, between_hiegj
    sent = [a[:, :, :, my_host, my_place].transpose(1, 0, 2).reshape(-1) for a in ways]
    ways = size_hiegj, between_hiegj, sender_hiegj
    received = [a[:, my_place, :, my_host].transpose(2, 0, 1).reshape(-1) for a in ways]
    first = Hop(Slices(*sent), Slices(*received))

    # I send as (g, i), for each h by e: [h, e], all j in one slice. I receive as (h, i): [e, g] -> g e.
    size_hieg, between_hieg, receiver_hieg = size_hiegj.sum(-1), between_hiegj[..., 0], receiver_hiegj[..., 0]
    sent = [a[:, my_place, :, my_host].reshape(-1) for a in (size_hieg, between_hieg, receiver_hieg)]
    received = [a[my_host, my_place].T.reshape(-1) for a in (size_hieg, receiver_hieg, between_hieg)]
    return first, Hop(Slices(*sent), Slices(*received))


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
