"""Rows: how the tensors on disk make up one parameter, said once for reading, writing and checking.

    Row("layers.attention.w_q_DNH", "model.layers.{layer}.self_attn.q_proj.weight", "(N H) D")

A parameter's name ends with its dims, and `disk` has the stored tensor's in the notation of einops: (N H) is one dim
whose elements run over N, and over H inside. The tensor here is [heads × head_dim, D], and the parameter [D, N, H].

- {layer} and {expert} in a stored name: a tensor per layer, or per expert (dim E). With E in neither, it is every
  expert's: the feed-forward of a dense model.
- `part`: the row is for one index of the parameter's dim G: the key or the value, the gate or the up projection.
- In `disk`, h and r are the halves of H: element (r, h) of a head is r * H/2 + h. Checkpoints whose RoPE rotates
  neighbors (2h, 2h + 1) say "(N h r) D"; here RoPE rotates element h with h + H/2.
- 1 is a dim of one element.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SPLIT = {"H": ("r", "h")}  # dims that a row may name by their factors, outermost first; r has two elements


@dataclasses.dataclass(frozen=True)
class Row:
    """One way in which a parameter, or a part of it, is on disk; see the module."""

    param: str
    stored: str
    disk: str
    part: int | None = None

    @property
    def dims(self) -> str:
        """The parameter's dims, without those of the stack of layers."""
        return self.param.rsplit("_", 1)[1]

    @functools.cached_property
    def groups(self) -> list[list[str]]:
        """The dims of the stored tensor, each as the list of dims that it is made of."""
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", self.disk)]

    @functools.cached_property
    def stored_dims(self) -> list[str]:
        """The dims of the stored tensor with merged ones apart, in their order."""
        return [dim for group in self.groups for dim in group]

    @property
    def has_experts(self) -> bool:
        """Whether the stored tensor has all experts, or the parameter none; otherwise it has one, or one for all."""
        return "E" not in self.dims or "E" in self.stored_dims

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the size of each dim, for a parameter whose layers have this shape."""
        sizes = dict(zip(self.dims, shape, strict=True)) | {"1": 1}
        for dim, (outer, inner) in SPLIT.items():
            if dim in sizes:
                sizes |= {outer: 2, inner: sizes[dim] // 2}
        return sizes

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each stored tensor, for a parameter whose layers have this shape."""
        sizes = self.sizes(shape)
        return tuple(math.prod(sizes[dim] for dim in group) for group in self.groups)

    def stored_names(self, shape: tuple[int, ...], layers: range) -> Iterator[str]:
        """Returns the names of every stored tensor; `layers` are the numbers of the parameter's layers on disk."""
        experts = range(self.sizes(shape)["E"]) if "{expert}" in self.stored else [0]
        numbers = layers if "{layer}" in self.stored else [0]
        return (self.stored.format(layer=layer, expert=expert) for layer, expert in itertools.product(numbers, experts))

    def read(self, tensor: np.ndarray, shape: tuple[int, ...], at: Mapping[str, range]) -> np.ndarray:
        """Returns a slice of a stored tensor, with the dims of the parameter that it has, in their order.

        Args:
          tensor: as stored, such as a memory map: no more of it is read than the slice.
          shape: of one layer of the parameter.
          at: the range of each dim of the parameter. Dims that the row splits are taken whole.
        """
        sizes = self.sizes(shape)
        stored = self.stored_dims
        index = tuple(slice(at[dim].start, at[dim].stop) if dim in at else slice(None) for dim in stored)
        piece = tensor.reshape([sizes[dim] for dim in stored])[index]
        wanted = [dim for whole in self.dims for dim in self._as_stored(whole, stored)]
        piece = piece.transpose(
            [*(stored.index(dim) for dim in wanted), *(i for i, d in enumerate(stored) if d == "1")]
        )
        in_order = iter(piece.shape)
        merged = []
        for whole in self.dims:
            parts = [next(in_order) for _ in self._as_stored(whole, stored)]
            merged += [math.prod(parts)] if parts else []
        return piece.reshape(merged)

    def write(self, layer: np.ndarray, expert: int = 0) -> np.ndarray:
        """Returns a stored tensor, made of one layer of the parameter; the `expert`th where there is one per expert."""
        sizes = self.sizes(layer.shape)
        at: dict[str, Any] = {} if self.part is None else {"G": self.part}
        if not self.has_experts:
            at["E"] = expert
        piece = layer[tuple(at.get(dim, slice(None)) for dim in self.dims)]
        stored = self.stored_dims
        have = [dim for whole in self.dims for dim in self._as_stored(whole, stored)]
        piece = piece.reshape([sizes[dim] for dim in have])
        piece = piece.transpose([have.index(dim) for dim in stored if dim != "1"])
        return piece.reshape(self.stored_shape(layer.shape))

    @staticmethod
    def _as_stored(dim: str, stored: list[str]) -> tuple[str, ...]:
        """Returns what a dim of the parameter is in the stored tensor: itself, its factors, or nothing."""
        if dim in stored:
            return (dim,)
        factors = SPLIT.get(dim, ())
        return factors if factors and factors[0] in stored else ()
