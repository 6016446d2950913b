"""What goes from mesh to mesh, or to another stacking of layers, is the same to the bit, and lies as asked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh import MeshConfig, build_mesh
from moejax.train.reshard import reshard

# Axes, and how 6 layers are stacked. Between the first two, some shards stay on their devices and others move. The last
# two have places without a layer.
LAYOUTS = [
    ((8, 2, 1), (1, 2, 3)), ((4, 2, 2), (1, 2, 3)), ((8, 1, 2), (1, 1, 6)), ((4, 4, 1), (1, 4, 2)),
    ((2, 4, 2), (2, 4, 1)),
]  # fmt: skip
VALUES = {"layers": np.arange(6 * 16 * 8, dtype=np.float32), "step": np.arange(1), "table": np.arange(64.0 * 32)}


def template(axes, stack):
    mesh = build_mesh(MeshConfig(*axes))
    leaves = {
        "layers": ((*stack, 16, 8), P(None, "pipeline", None, ("expert", "tensor"))),
        "step": ((1,), P()),
        "table": ((64, 32), P(("pipeline", "tensor"), "expert")),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in leaves.items()
    }


@pytest.mark.parametrize("donate", [True, False])
def test_every_pair_of_layouts_and_back(donate):
    start = template(*LAYOUTS[0])
    tree = {
        name: jax.device_put(np.float32(VALUES[name]).reshape(leaf.shape), leaf.sharding)
        for name, leaf in start.items()
    }
    for pair in itertools.combinations(LAYOUTS, 2):
        for wanted in map(template, *zip(*pair, strict=True)):
            before, tree = tree, reshard(tree, wanted, donate=donate)
            for name, leaf in tree.items():
                assert (leaf.shape, leaf.sharding) == (wanted[name].shape, wanted[name].sharding)
                values, filler = np.split(np.asarray(leaf).ravel(), [VALUES[name].size])
                np.testing.assert_array_equal(values, VALUES[name])
                assert not filler.any()
                if not donate:
                    np.testing.assert_array_equal(np.asarray(before[name]).ravel()[: VALUES[name].size], VALUES[name])
