"""Compiles attention for 16 accelerators that are not there: `attention_ahead_of_time.py cuda|tpu SEQUENCE`.

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

from moejax.kernels.attention import attention, attention_implementation
from moejax.topology import compile_only_devices

TARGETS = {"cuda": "h100_2x8", "tpu": "tpu_v5p_16"}


def main(target: str, sequence: int) -> None:
    devices = compile_only_devices(TARGETS[target])
    mesh = Mesh(np.array(devices).reshape(4, 2, 2), ("expert", "pipeline", "tensor"))
    heads, rows = P("expert", None, "tensor"), P("expert")
    picked = []

    def per_device(q, k, v, segment_ids):
        picked.append(attention_implementation())
        policy = jax.checkpoint_policies.save_only_these_names("attention_out")
        layer = jax.checkpoint(lambda q: attention(q, k, v, segment_ids), policy=policy)
        q, _ = jax.lax.scan(lambda q, _: (layer(q), None), q, None, length=2)
        return jax.lax.psum((q.astype(jnp.float32) ** 2).sum(), ("expert", "tensor"))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q = array((4, sequence, 24, 128), jnp.bfloat16, heads)
    k = v = array((4, sequence, 8, 128), jnp.bfloat16, heads)
    segment_ids = array((4, sequence), jnp.int32, rows)
    loss = jax.shard_map(per_device, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=P())
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, v, segment_ids).compile()
    report = {
        "implementation": picked[0],
        "kernels": sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))),
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
