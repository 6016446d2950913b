"""A model's parameters beside the rows that say how they are on disk: what loading, writing and checking walk over."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.config import ModelConfig
from moejax.interop.families import Family
from moejax.interop.rows import Row
from moejax.sharding import Param, by_name


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """A parameter, its rows, and the number on disk of its first layer."""

    name: str  # "layers.attention.w_q_DNH"
    param: Param
    rows: tuple[Row, ...]  # none for the router of a dense model, which has one expert
    first_layer: int
    slices: int = 1  # experts that a stored feed-forward is cut into along its width

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.param.layer_shape

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """`layer_shape` with the width of a stored feed-forward, from which experts may be slices."""
        dims = self.name.rsplit("_", 1)[1]
        is_expert = "E" in dims and "F" in dims
        return tuple(
            size * self.slices if is_expert and dim == "F" else size
            for dim, size in zip(dims, self.layer_shape, strict=True)
        )

    @property
    def layers(self) -> range:
        """The numbers of its layers on disk, in the order that they are stacked in."""
        return range(self.first_layer, self.first_layer + self.param.num_layers)

    def stored_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Returns the name and shape of every tensor on disk."""
        for row in self.rows:
            shape = row.stored_shape(self.disk_shape)
            yield from ((name, shape) for name in row.stored_names(self.layer_shape, self.layers))


def stored_params(family: Family, m: ModelConfig, table: dict[str, Any], slices: int = 1) -> list[StoredParam]:
    """Returns the parameters of a `sharding.param_table`, in its order, each with the family's rows for it."""
    rows: dict[str, list[Row]] = collections.defaultdict(list)
    for row in family.rows(m):
        rows[row.param].append(row)
    params = by_name(table)
    differ = (params.keys() ^ rows.keys()) - set(family.made)
    if differ:
        raise AssertionError(f"{family.model_type}: rows and parameters differ in {differ}")
    return [
        StoredParam(name, param, tuple(rows[name]), m.num_dense_layers if name.startswith("layers.") else 0, slices)
        for name, param in params.items()
    ]
