"""Devices of accelerators that are not there, to compile for: 16 GPUs or TPU chips, on any machine, without a driver.

    devices = moejax.compile_only_devices("tpu_v5p_16")     # before anything else asks for a device
    program = moejax.Program(model, moejax.build_mesh(mesh_config, devices))
    compiled = moejax.make_train_step(program).lower(batch_size=64, seq_len=1024).compile()

The compilers are those of the real devices, so memory, collectives and the schedule are what would run. There are no
timings, and on GPU no out-of-memory error either: compare `compiled.memory_analysis().peak_memory_in_bytes` with what
the device has. They come with the extra `aot`: `pip install "moejax[aot]"`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies

from moejax.checks import ConfigError, check

# GpuTargetConfigProtos as text: what XLA would ask the driver about one A100 or H100 SXM.
A100_64GB = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 167936
  threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 1640000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: 68719476736 shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368
  name: "NVIDIA A100-SXM-64GB" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" device_interconnect_info { active_links: 12 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA A100-SXM-64GB"
"""
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


@dataclasses.dataclass(frozen=True)
class Target:
    """A cluster to compile for.

    `topology` is named as its plugin names it: chips along each dimension of a TPU slice, and for GPUs NVLink domains ×
    hosts of one × GPUs of a host. The chips of a GPU's are described by `chip`, a GpuTargetConfigProto as text.
    """

    platform: str
    topology: str
    accelerator_type: str = ""  # of a TPU slice
    chip: str = ""


TARGETS = {
    "a100_64gb_2x8": Target("cuda", "2x1x8", chip=A100_64GB),
    "h100_2x8": Target("cuda", "2x1x8", chip=H100),
    "tpu_v5p_16": Target("tpu", "v5p:2x2x4", "v5p-32"),  # counts cores, two a chip
    "tpu_v5e_16": Target("tpu", "v5e:4x4", "v5litepod-16"),
}
_PLUGINS = {"cuda": "jax_plugins.xla_cuda13", "tpu": "libtpu"}


def compile_only_devices(name: str) -> list[jax.Device]:
    """The devices of the target of that name, for `build_mesh`. They compile and cannot run anything.

    Has JAX run on this machine's CPU, and tells the TPU's compiler not to look for a real one.

    Raises:
      ConfigError: there is no such target, its compiler is not installed, or JAX runs on another platform already.
    """
    target = find_target(name)
    plugin, found = _PLUGINS[target.platform], None
    with contextlib.suppress(ModuleNotFoundError):  # of the package that the plugin would be in
        found = importlib.util.find_spec(plugin)
    check(found is not None, f"target={name} needs {plugin}, which is missing; pip install 'moejax[aot]'")
    if target.platform == "tpu":
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no lock: several processes may compile
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": target.accelerator_type,
        }
    jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != "cpu":
        raise ConfigError(
            f"compile_only_devices({name!r}) comes too late: JAX has already started on {jax.default_backend()}; "
            "call it before anything asks for a device"
        )
    if target.platform == "cuda":
        description = topologies.get_topology_desc(platform="cuda", target_config=target.chip, topology=target.topology)
    else:
        description = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    return list(description.devices)


def find_target(name: str) -> Target:
    """Returns the target of that name.

    Raises:
      ConfigError: there is none.
    """
    check(name in TARGETS, f"target={name} does not exist; use one of {', '.join(TARGETS)}")
    return TARGETS[name]
