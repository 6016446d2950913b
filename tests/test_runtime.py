"""How JAX is set up: virtual devices, other hosts, the allocator and the cache of compiled programs."""

import ctypes
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from moejax import runtime
from moejax.checks import ConfigError
from moejax.compiler import PROCESS
from moejax.mesh import MeshConfig
from moejax.runtime import keep_freed_memory, set_process_options, setup_jax, use_virtual_devices

ROOT = Path(__file__).resolve().parents[1]
CPUS = MeshConfig(expert=4, pipeline=2, tensor=2)
TWO_HOSTS = MeshConfig(expert=16, hardware="h100", hosts=2)


@pytest.fixture(autouse=True)
def _cache():
    """The compilation cache is global; each test leaves it as it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class TestVirtualDevices:
    def test_again_with_the_same_number(self):
        use_virtual_devices(16)
        setup_jax(CPUS)
        setup_jax(CPUS)
        assert jax.device_count() == 16

    @pytest.mark.parametrize("number", [0, -3])
    def test_their_number_must_be_positive(self, number):
        with pytest.raises(ConfigError, match=f"number={number}"):
            use_virtual_devices(number)

    @pytest.mark.parametrize("ask", [lambda: use_virtual_devices(8), lambda: setup_jax(MeshConfig(expert=8))])
    def test_too_late(self, ask):
        jax.devices()
        with pytest.raises(ConfigError, match=r"^it is too late for 8 virtual devices: .* 16 cpu devices; restart the"):
            ask()
        assert jax.config.jax_num_cpu_devices == 16

    def test_the_allocator_goes_with_them(self, monkeypatch):
        kept = []
        monkeypatch.setattr(runtime, "keep_freed_memory", kept.append)
        use_virtual_devices(16)
        assert kept == [16]


class TestOtherHosts:
    def test_without_a_launcher_is_one_line(self, monkeypatch):
        def initialize():
            raise ValueError("coordinator_address should be defined.")  # as JAX does outside a launcher

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        with pytest.raises(ConfigError) as error:
            setup_jax(TWO_HOSTS)
        assert str(error.value) == (
            "mesh.hosts=2 needs 16 devices in 2 processes, one per host, but there is 1 process with 16 cpu devices, "
            "which no launcher started (coordinator_address should be defined); start one process per host with Slurm, "
            "Open MPI, Kubernetes or on a Cloud TPU slice, where JAX finds the others by itself, or use --mesh=local"
        )

    def test_too_late(self):
        jax.devices()
        with pytest.raises(ConfigError, match=r"^it is too late for the 2 processes of mesh\.hosts=2: .* 16 cpu dev"):
            setup_jax(TWO_HOSTS)

    def test_that_cannot_be_reached_are_jaxs_error(self, monkeypatch):
        def initialize():
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE_EXCEEDED"):
            setup_jax(TWO_HOSTS)

    @pytest.mark.parametrize("mesh_config", [TWO_HOSTS, MeshConfig(expert=8, hardware="h100")])
    def test_are_joined_once_and_only_where_there_are_any(self, mesh_config, monkeypatch):
        joined = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda: joined.append(mesh_config.hosts))
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(joined))
        setup_jax(mesh_config)
        setup_jax(mesh_config)
        assert joined == [2] * (mesh_config is TWO_HOSTS)


class TestCompilationCache:
    def test_what_is_asked_for_comes_first_then_jaxs_own_setting(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        setup_jax(CPUS)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "moejax" / "xla")

        jax.config.update("jax_compilation_cache_dir", "/from/the/environment")
        setup_jax(CPUS)
        assert jax.config.jax_compilation_cache_dir == "/from/the/environment"

        setup_jax(CPUS, compilation_cache_dir=tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)

        setup_jax(CPUS, compilation_cache_dir="")
        assert jax.config.jax_compilation_cache_dir is None

    def test_the_default_is_in_the_home(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        setup_jax(CPUS)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "moejax" / "xla")

    def test_without_a_home_is_one_line(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME, for a user without an account
        jax.config.update("jax_compilation_cache_dir", None)
        with pytest.raises(
            ConfigError, match=r"^XDG_CACHE_HOME=~/.cache needs a home folder .*; write the whole path$"
        ):
            setup_jax(CPUS)


@pytest.mark.parametrize(("platform", "settings"), [("linux", [-3, -1, -8]), ("win32", []), ("darwin", [])])
def test_only_glibcs_allocator_is_set(platform, settings, monkeypatch):
    libc = types.SimpleNamespace(set=[])
    libc.mallopt = lambda name, value: libc.set.append(name)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    keep_freed_memory(num_devices=1)
    assert libc.set == settings


class TestProcessOptions:
    def test_keep_what_the_user_set(self, monkeypatch):
        (warn, terminate) = PROCESS["cpu"]
        monkeypatch.setenv("XLA_FLAGS", f"--{warn.name}=7")
        set_process_options("cpu")
        set_process_options("cpu")
        assert os.environ["XLA_FLAGS"] == f"--{warn.name}=7 --{terminate.name}={terminate.value}"
        monkeypatch.delenv("XLA_FLAGS")
        set_process_options("gpu")
        assert "XLA_FLAGS" not in os.environ

    def test_are_left_out_where_they_are_not_known_to_exist(self, monkeypatch):
        monkeypatch.delenv("XLA_FLAGS")
        monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
        set_process_options("cpu")
        assert "XLA_FLAGS" not in os.environ


@pytest.mark.full
def test_before_jax_starts_the_devices_and_timeouts_are_as_asked_for(tmp_path):
    program = (
        "import os, jax, moejax\n"
        "moejax.setup_jax(moejax.MeshConfig(expert=3))\n"
        f"moejax.setup_jax(moejax.MeshConfig(expert=2), compilation_cache_dir={str(tmp_path)!r})\n"
        "print(jax.device_count(), os.environ['XLA_FLAGS'])"
    )
    name = "--xla_cpu_collective_call_terminate_timeout_seconds"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": f"{name}=7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("2 ")
    assert done.stdout.count(name) == 1
    assert f"{name}=7" in done.stdout
    assert "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120" in done.stdout
