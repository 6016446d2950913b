"""The exchange: buffers to the devices that hold their experts, and back; in one hop or two, whole or in float8.

Two hops (arXiv 2201.05596, section 5.2; Tutel, 2206.03382): devices of one host first exchange what each will send to
the others' counterparts in all hosts, then counterparts exchange across hosts. The bytes that cross are the same, in as
many messages as there are hosts instead of devices. Rows arrive where the one-hop exchange puts them.

Dimensions: E experts, e this device's experts, n = E / e devices, h hosts, i = n / h devices of one, C rows a sender
reserves for an expert, D model.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import DispatchConfig, ModelConfig, Strategy, WireDtype
from moejax.dispatch import float8
from moejax.dispatch.ordering import Order, nothing_before, wait_for
from moejax.mesh import EXPERT, TENSOR
from moejax.nn.collectives import all_to_all

SENDERS = (EXPERT, TENSOR)  # whose tokens meet at an expert, also where its width is split over `tensor`


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("order",),
    meta_fields=("strategy", "axes", "hosts", "capacity", "chunks", "wire_dtype"),
)
@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the rows of one dispatch travel. Its only arrays are the ordering tokens.

    Parts of a layer that work side by side dispatch one after another: each gets the exchange that the dispatch before
    it returned.
    """

    strategy: Strategy
    axes: tuple[str, ...]  # that the experts are spread over
    hosts: int  # between which there is a hop of its own; 1: one hop goes everywhere
    capacity: int  # rows that a device sends to one expert at a time; a multiple of `chunks`
    chunks: int  # parts of a buffer that travel and compute by themselves
    wire_dtype: WireDtype  # of rows on their way to experts; "compute": as they are
    order: Order = dataclasses.field(default_factory=nothing_before)  # of the dispatch before this one

    @classmethod
    def make(cls, config: DispatchConfig, model: ModelConfig, num_tokens: int, hosts: int) -> Exchange:
        """Returns the exchange of devices that dispatch `num_tokens` tokens each, with no dispatch before it."""
        capacity = config.capacity(num_tokens, model)
        return cls(config.strategy, config.expert_axes, hosts, capacity, config.chunks, config.wire_dtype)

    def wait_for_previous(self, x: jax.Array) -> jax.Array:
        """Returns `x`, once the dispatch before this one has filled its first buffer."""
        return wait_for(x, self.order.filled)

    def to_experts(self, buffer_ECD: jax.Array) -> jax.Array:
        """Sends [E, C, D] of this device's tokens; returns [e, n * C, D] of all devices' for this device's experts."""
        send = _to_experts_float8 if self.wire_dtype == "float8" else _to_experts
        return send(self.axes, self.hosts, buffer_ECD)

    def to_senders(self, buffer_eCD: jax.Array) -> jax.Array:
        """Sends results the way back: [e, n * C, D] -> [E, C, D]."""
        send = _to_senders_float8 if self.wire_dtype == "float8" else _to_senders
        return send(self.axes, self.hosts, buffer_eCD)


def host_groups(axes: tuple[str, ...], hosts: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns device numbers along `axes`, major first: those of each host, and the counterparts in all hosts."""
    i = lax.axis_size(axes) // hosts
    inside = [[host * i + j for j in range(i)] for host in range(hosts)]
    return inside, [list(counterparts) for counterparts in zip(*inside, strict=True)]


def _to_experts(axes: tuple[str, ...], hosts: int, buffer_ECD: jax.Array) -> jax.Array:
    if hosts == 1:
        return all_to_all(buffer_ECD, axes, 0, 1)
    E, C, D = buffer_ECD.shape
    inside, across = host_groups(axes, hosts)
    h, i = hosts, len(inside[0])
    # [destination host, destination inside it, e, C, D]; each hop puts a sender in the place of its destination.
    buffer_hieCD = buffer_ECD.reshape(h, i, E // (h * i), C, D)
    buffer_hieCD = all_to_all(buffer_hieCD, axes, 1, 1, inside)
    buffer_hieCD = all_to_all(buffer_hieCD, axes, 0, 0, across)
    return jnp.moveaxis(buffer_hieCD, 2, 0).reshape(E // (h * i), h * i * C, D)


def _to_senders(axes: tuple[str, ...], hosts: int, buffer_eCD: jax.Array) -> jax.Array:
    if hosts == 1:
        return all_to_all(buffer_eCD, axes, 1, 0)
    e, rows, D = buffer_eCD.shape
    inside, across = host_groups(axes, hosts)
    h, i = hosts, len(inside[0])
    buffer_hieCD = jnp.moveaxis(buffer_eCD.reshape(e, h, i, rows // (h * i), D), 0, 2)
    buffer_hieCD = all_to_all(buffer_hieCD, axes, 0, 0, across)
    buffer_hieCD = all_to_all(buffer_hieCD, axes, 1, 1, inside)
    return buffer_hieCD.reshape(h * i * e, rows // (h * i), D)


# What travels towards the experts is float8: tokens forward, gradients of results backward. What travels away from
# them is summed into tokens or their gradients, and stays as it is. Rounding has the gradient of the identity.


def _send_float8(axes: tuple[str, ...], hosts: int, buffer_ECD: jax.Array) -> jax.Array:
    return float8.unpack(_to_experts(axes, hosts, float8.pack(buffer_ECD)), buffer_ECD.dtype)


_to_experts_float8 = jax.custom_vjp(_send_float8, nondiff_argnums=(0, 1))
_to_experts_float8.defvjp(
    lambda axes, hosts, buffer_ECD: (_send_float8(axes, hosts, buffer_ECD), None),
    lambda axes, hosts, _, d_eCD: (_to_senders(axes, hosts, d_eCD),),
)

_to_senders_float8 = jax.custom_vjp(_to_senders, nondiff_argnums=(0, 1))
_to_senders_float8.defvjp(
    lambda axes, hosts, buffer_eCD: (_to_senders(axes, hosts, buffer_eCD), None),
    lambda axes, hosts, _, d_ECD: (_send_float8(axes, hosts, d_ECD),),
)
