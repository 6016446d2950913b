"""Sets up JAX for a mesh: virtual devices or other hosts, memory allocation, and the cache of compiled programs.

All of it must come before JAX starts, which it does when something first asks for a device. Importing moejax does not.
"""

from __future__ import annotations

import ctypes
import os
import sys

import jax

from moejax.cache import cache_folder
from moejax.checks import ConfigError, check, expand
from moejax.compiler import PROCESS, Platform
from moejax.mesh import MeshConfig

_MIN_COMPILE_SECONDS = 0.2  # programs that compile faster are not kept


def setup_jax(mesh_config: MeshConfig, *, compilation_cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Sets up JAX to run on the mesh of `mesh_config`; call it before anything asks for a device.

    A mesh of CPUs gets virtual devices, see `use_virtual_devices`. For a mesh of several hosts, this process joins the
    ones that a launcher has started on the other hosts. Calling it again for the same mesh is harmless.

    Args:
      mesh_config: the mesh.
      compilation_cache_dir: a folder that keeps compiled programs for the next run; "" for none. By default it is
        JAX's own setting, such as `JAX_COMPILATION_CACHE_DIR`, else `moejax/xla` in the user's cache folder.

    Raises:
      ConfigError: JAX has already started with other devices; the mesh has several hosts, but no launcher started this
        process; or there is no home folder to keep the cache in.
    """
    if mesh_config.platform == "cpu":
        use_virtual_devices(mesh_config.num_devices)
    elif mesh_config.hosts > 1 and not jax.distributed.is_initialized():
        _join_hosts(mesh_config)
    if compilation_cache_dir is None:
        compilation_cache_dir = jax.config.jax_compilation_cache_dir or cache_folder() / "xla"  # type: ignore[attr-defined]
    folder = str(expand(compilation_cache_dir, "compilation_cache_dir")) if compilation_cache_dir else None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def use_virtual_devices(number: int) -> None:
    """Makes JAX run on `number` virtual devices of this machine's CPU; call it before anything asks for a device.

    Two settings of the whole process go with it. XLA gets more patience with collectives, whose devices share cores
    (`moejax.compiler.PROCESS`), unless `XLA_FLAGS` says otherwise. And glibc keeps freed memory, which saves up to a
    third of the CPU time of a step; see `keep_freed_memory`.

    Raises:
      ConfigError: JAX has already started with other devices.
    """
    check(number > 0, f"number={number} of virtual devices must be positive")
    set_process_options("cpu")
    try:
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # JAX has started: fine if it has what is asked for
        if (jax.default_backend(), jax.device_count()) != ("cpu", number):
            raise _too_late(f"{number} virtual device{'s' * (number > 1)}") from None
    keep_freed_memory(number)


def set_process_options(platform: Platform) -> None:
    """Puts the options of `moejax.compiler.PROCESS` into the environment's `XLA_FLAGS`, but for those already there.

    XLA reads them once, when it first compiles or starts a device.
    """
    if jax.__version_info__[:2] > (0, 12):  # XLA aborts on a flag that it does not know; these are seen up to 0.12
        return
    present = os.environ.get("XLA_FLAGS", "")
    flags = [f"--{o.name}={o.value}" for o in PROCESS[platform] if f"--{o.name}=" not in present]
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([present, *flags]).strip()


def keep_freed_memory(num_devices: int) -> None:
    """Makes glibc's allocator keep what is freed, on Linux, where it is the allocator.

    XLA's CPU client allocates a step's temporaries anew each time; returned to the system in between, every page of
    them is mapped and zeroed again. For the benchmark's shape that is 208,000 page faults and a third of the CPU time
    of a step (1.45 against 0.93 s). In return, the process stays as large as it has been.

    A thread's own arena holds 64 MB at most, and what is larger is mapped anew after all; so with one device, all
    threads share one arena (268 MB of a gradient: 37 against 138 ms of CPU time). The threads of 16 virtual devices
    would wait for each other there (15% of a step).
    """
    if sys.platform != "linux":  # elsewhere there is no glibc; Windows does not even take a library without a name
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        if num_devices == 1:
            libc.mallopt(m_arena_max, 1)


def _join_hosts(mesh_config: MeshConfig) -> None:
    """Connects this process to those of the other hosts, which a launcher has started beside it."""
    hosts = mesh_config.hosts
    try:
        jax.distributed.initialize()
    except ValueError as error:  # JAX does not know how many processes there are
        have, why = jax.local_devices(), str(error).rstrip(".")
        raise ConfigError(
            f"mesh.hosts={hosts} needs {mesh_config.num_devices} devices in {hosts} processes, one per host, but there "
            f"is 1 process with {len(have)} {have[0].platform} device{'s' * (len(have) > 1)}, which no launcher "
            f"started ({why}); start one process per host with Slurm, Open MPI, Kubernetes or on a Cloud "
            "TPU slice, where JAX finds the others by itself, or use --mesh=local"
        ) from None
    except jax.errors.JaxRuntimeError:  # the others cannot be reached
        raise
    except RuntimeError:  # JAX has started
        raise _too_late(f"the {hosts} processes of mesh.hosts={hosts}") from None


def _too_late(wanted: str) -> ConfigError:
    have = jax.device_count()
    return ConfigError(
        f"it is too late for {wanted}: JAX has already started with {have} {jax.default_backend()} "
        f"device{'s' * (have > 1)}; restart the process (in a notebook, the kernel) and ask for them before anything "
        "asks for a device"
    )
