"""Compiles a grouped product for 16 accelerators that are not there: `grouped_matmul_ahead_of_time.py cuda|tpu DTYPE`.

A process of its own, for the compilers read their environment when they are loaded. Prints one line of JSON.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_implementation
from moejax.topology import compile_only_devices

TARGETS = {"cuda": "h100_2x8", "tpu": "tpu_v5p_16"}
KERNELS = ("__gpu$xla.gpu.triton", "tpu_custom_call")


def main(target: str, dtype: str) -> None:
    devices = compile_only_devices(TARGETS[target])
    mesh = Mesh(np.array(devices).reshape(8, 2), ("expert", "tensor"))
    picked = []

    def per_device(x, w, size):
        picked.append([grouped_matmul_implementation(None, p) for p in ("forward", "dlhs", "drhs")])
        y = grouped_matmul(x, w, size)
        return jax.lax.psum((y.astype(jnp.float32) ** 2).sum(), ("expert", "tensor"))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows, experts = P(("expert", "tensor")), P("expert")
    x = array((16 * 1000, 3072), jnp.dtype(dtype), rows)
    w = array((16, 3072, 8192), jnp.dtype(dtype), experts)
    size = array((16,), jnp.int32, experts)
    loss = jax.shard_map(per_device, mesh=mesh, in_specs=(rows, experts, experts), out_specs=P())
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w, size).compile()
    text = compiled.as_text()
    report = {
        "implementations": picked[0],
        "kernels": {name: len(re.findall(f'custom_call_target="{re.escape(name)}"', text)) for name in KERNELS},
        "dots": len(re.findall(r" dot\(", text)),
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
