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

from moejax.config import DispatchConfig
from moejax.dispatch import payload
from moejax.nn.collectives import all_to_all


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange that a configuration asks for."""

    axes: tuple[str, ...]
    hosts: int
    payload: str

    @classmethod
    def from_config(cls, config: DispatchConfig) -> Exchange:
        return cls(config.expert_axes, config.hosts, config.payload)

    def to_experts(self, buffer_ECD: jax.Array) -> jax.Array:
        """[E, C, D] of this device's tokens -> [e, n * C, D] of every device's tokens for this device's experts."""
        if self.payload == "float8":
            return _to_experts_float8(self, buffer_ECD)
        return self._to_experts(buffer_ECD)

    def to_senders(self, buffer_eCD: jax.Array) -> jax.Array:
        """The way back: [e, n * C, D] -> [E, C, D]."""
        if self.payload == "float8":
            return _to_senders_float8(self, buffer_eCD)
        return self._to_senders(buffer_eCD)

    def _to_experts(self, buffer_ECD: jax.Array) -> jax.Array:
        if self.hosts == 1:
            return all_to_all(buffer_ECD, self.axes, 0, 1)
        E, C, D = buffer_ECD.shape
        inside, across = host_groups(self.axes, self.hosts)
        h, i = self.hosts, len(inside[0])
        # [destination host, destination inside it, e, C, D]; each hop puts a sender in the place of its destination.
        buffer_hieCD = buffer_ECD.reshape(h, i, E // (h * i), C, D)
        buffer_hieCD = all_to_all(buffer_hieCD, self.axes, 1, 1, inside)
        buffer_hieCD = all_to_all(buffer_hieCD, self.axes, 0, 0, across)
        return jnp.moveaxis(buffer_hieCD, 2, 0).reshape(E // (h * i), h * i * C, D)

    def _to_senders(self, buffer_eCD: jax.Array) -> jax.Array:
        if self.hosts == 1:
            return all_to_all(buffer_eCD, self.axes, 1, 0)
        e, rows, D = buffer_eCD.shape
        inside, across = host_groups(self.axes, self.hosts)
        h, i = self.hosts, len(inside[0])
        buffer_hieCD = jnp.moveaxis(buffer_eCD.reshape(e, h, i, rows // (h * i), D), 0, 2)
        buffer_hieCD = all_to_all(buffer_hieCD, self.axes, 0, 0, across)
        buffer_hieCD = all_to_all(buffer_hieCD, self.axes, 1, 1, inside)
        return buffer_hieCD.reshape(h * i * e, rows // (h * i), D)


def host_groups(axes: tuple[str, ...], hosts: int) -> tuple[list[list[int]], list[list[int]]]:
    """Device numbers along `axes`, major first: those of each host, and the counterparts in all hosts."""
    i = lax.axis_size(axes) // hosts
    inside = [[host * i + j for j in range(i)] for host in range(hosts)]
    return inside, [list(counterparts) for counterparts in zip(*inside, strict=True)]


def _send_float8(exchange: Exchange, buffer_ECD: jax.Array) -> jax.Array:
    return payload.unpack(exchange._to_experts(payload.pack(buffer_ECD)), buffer_ECD.dtype)


# What travels towards the experts is float8: tokens forward, gradients of results backward. What travels away from
# them is summed into tokens or their gradients, and stays as it is. Rounding has the gradient of the identity.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_experts_float8(exchange: Exchange, buffer_ECD: jax.Array) -> jax.Array:
    return _send_float8(exchange, buffer_ECD)


_to_experts_float8.defvjp(
    lambda exchange, buffer_ECD: (_send_float8(exchange, buffer_ECD), None),
    lambda exchange, _, d_eCD: (exchange._to_senders(d_eCD),),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_senders_float8(exchange: Exchange, buffer_eCD: jax.Array) -> jax.Array:
    return exchange._to_senders(buffer_eCD)


_to_senders_float8.defvjp(
    lambda exchange, buffer_eCD: (exchange._to_senders(buffer_eCD), None),
    lambda exchange, _, d_ECD: (_send_float8(exchange, d_ECD),),
)
