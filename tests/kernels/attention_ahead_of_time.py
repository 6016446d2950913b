"""Compiles attention for 16 accelerators that are not there: `attention_ahead_of_time.py cuda|tpu SEQUENCE`.

A process of its own, for the plugins read their environment when jax starts. Prints one line of JSON.
"""

import json
import os
import re
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5p-32",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.attention import attention, attention_implementation

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(target: str, sequence: int) -> None:
    if target == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
    else:
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="2x1x8")
    mesh = Mesh(np.array(topology.devices).reshape(4, 2, 2), ("expert", "pipeline", "tensor"))
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
