"""Rows: how the tensors on disk make up one parameter, said once for reading, writing and checking.

    Row("layers.attention.w_q_DNH", "model.layers.{layer}.self_attn.q_proj.weight", "(N H) D")

A parameter's name ends with its dims, and `disk` has the stored tensor's in the notation of einops: (N H) is one dim
whose elements run over N, and over H inside. The tensor here is [heads × head_dim, D], and the parameter [D, N, H].

- {layer} and {expert} in a stored name: a tensor per layer, or per expert (dim E). With E in neither, it is every
  expert's: the feed-forward of a dense model.
- `part`: the row is for one index of the parameter's dim G: the key or the value, the gate or the up projection.
- 1 in `disk` is a dim of one element.
- `neighbors`: so many elements at the end of the parameter's last dim are rotated by RoPE, whose pairs are neighbors in
  the checkpoint; here each element of their first half makes a pair with one of the second.
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One way in which a parameter, or a part of it, is on disk; see the module."""

    param: str
    stored: str
    disk: str
    part: int | None = None
    neighbors: int = 0

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
        return dict(zip(self.dims, shape, strict=True)) | {"1": 1}

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
          tensor: as stored, such as a memory map: no more of it is read than the slice, or with `neighbors` than the
            slice with all of the last dim.
          shape: of one layer of the parameter.
          at: the range of each dim of the parameter.
        """
        sizes, last = self.sizes(shape), self.dims[-1]
        whole = {"1", last} if self.neighbors else {"1"}
        index = tuple(slice(None) if dim in whole else slice(at[dim].start, at[dim].stop) for dim in self.stored_dims)
        piece = tensor.reshape([sizes[dim] for dim in self.stored_dims])[index]
        dims = [dim for dim in self.dims if dim in self.stored_dims]
        ones = [i for i, dim in enumerate(self.stored_dims) if dim == "1"]
        piece = piece.transpose([*map(self.stored_dims.index, dims), *ones])
        piece = piece.reshape(piece.shape[: len(dims)])
        return piece[..., self._order(sizes[last])[at[last].start : at[last].stop]] if self.neighbors else piece

    def write(self, layer: np.ndarray, expert: int = 0) -> np.ndarray:
        """Returns a stored tensor, made of one layer of the parameter; the `expert`th where there is one per expert."""
        at: dict[str, Any] = {} if self.part is None else {"G": self.part}
        if not self.has_experts:
            at["E"] = expert
        piece = layer[tuple(at.get(dim, slice(None)) for dim in self.dims)]
        if self.neighbors:
            piece = piece[..., np.argsort(self._order(layer.shape[-1]))]
        dims = [dim for dim in self.dims if dim in self.stored_dims]
        piece = piece.transpose([dims.index(dim) for dim in self.stored_dims if dim != "1"])
        return piece.reshape(self.stored_shape(layer.shape))

    def _order(self, size: int) -> np.ndarray:
        """Returns where on disk the elements of the last dim are, which has `size` of them."""
        order = np.arange(size)
        rotated = order[size - self.neighbors :]
        return np.concatenate([order[: size - self.neighbors], rotated[::2], rotated[1::2]])
