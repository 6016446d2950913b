"""Which implementation of a kernel a program gets: that of the platform that it is compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax

Implementation = TypeVar("Implementation", bound=str)


def implementation_for(
    operation: str, by_platform: Mapping[str, Implementation], platform: str | None
) -> Implementation:
    """The entry of `by_platform` for `platform`: "cpu", "cuda" (or "gpu") or "tpu".

    None means the platform that the surrounding program is for: the devices of the mesh in context, which is the mesh
    of the enclosing `shard_map`, else the default backend. The mesh comes first because a program compiled ahead of
    time is traced where its devices are not: on a CPU-only machine, under a mesh of H100s.

    Raises:
      ValueError: `by_platform` has no such platform; the message calls the kernel `operation`.
    """
    if platform is None:
        device = jax.sharding.get_abstract_mesh().abstract_device
        platform = device.platform if device is not None else jax.default_backend()
    if platform not in by_platform:
        raise ValueError(f"platform={platform!r} has no {operation}; use {', '.join(map(repr, by_platform))}")
    return by_platform[platform]
