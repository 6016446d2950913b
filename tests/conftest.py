"""Every test has 16 virtual CPU devices, strict promotion, and programs compiled quickly or by earlier runs."""

import ctypes
import dataclasses
import os
from pathlib import Path

import hypothesis
import jax
import pytest

from moejax.runtime import use_virtual_devices

# The compiler's time is most of the tests' time, and the mathematics is the same without its optimizations.
# Subprocesses inherit this, so that their results are the same to the bit. Must be set before JAX asks for a device.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
use_virtual_devices(16)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
jax.config.update("jax_compilation_cache_dir", str(Path(_cache_home) / "moejax" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile("moejax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("moejax")

LARGE = 2 << 30  # bytes


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drops compiled programs after a file that leaves this process large: without it, a worker reaches 6 GB.

    Programs that are needed again come from the disk. Nothing is dropped on systems other than Linux.
    """
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGE:
        jax.clear_caches()
        ctypes.CDLL(None).malloc_trim(0)  # the C library keeps what is freed otherwise


@pytest.fixture(scope="session")
def seed():
    """Returns the seed for what tests draw themselves: always the same one, unless MOEJAX_TEST_SEED names another."""
    return int(os.environ.get("MOEJAX_TEST_SEED", 0))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What `build_mesh` reads of a device; `jax.sharding.Mesh` takes any object."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


@pytest.fixture
def fake_devices():
    """Returns a function (hosts, devices per host, platform and kind) -> devices, in an order that is not theirs."""

    def make(hosts, per_host, *described):
        every = [FakeDevice(host * per_host + i, host, *described) for i in range(per_host) for host in range(hosts)]
        return every[::-1]

    return make
