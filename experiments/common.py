"""What scripts share that take a model and a mesh: their flags, their configurations and how JAX is started.

A script reads:

    def main(argv: list[str]) -> None:
        config, mesh_config, _ = common.parse_configs(argv)
        common.setup_jax(mesh_config)
        ...

    if __name__ == "__main__":
        loading.run(main)
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
from absl import flags
from loading import MESH_CONFIGS, find, load_config, load_mesh_config

from moejax.compiler import in_force
from moejax.config import ConfigError, TrainConfig
from moejax.mesh import MeshConfig, use_virtual_devices
from moejax.overrides import apply_overrides, split_overrides
from moejax.train.schedule import DECIDES, Bucket, load_buckets

T = TypeVar("T")

_CONFIG = flags.DEFINE_string(
    "config", "tiny", "What to train: a name in experiments/configs, a preset, or a Python file with get_config()."
)
_MESH = flags.DEFINE_string(
    "mesh", "cpu_16", "What to run on: a name in mesh_configs, or a Python file with get_config(), such as a plan."
)
_DATA = flags.DEFINE_string(
    "data", None, "Files, globs or folders, separated by commas, to train on; short for --config.data.paths."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "bytes, bpe or the path of a tokenizer.json; short for --config.data.tokenizer."
)
_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Where compiled programs are kept for the next run; empty for nowhere. "
    "Default: $JAX_COMPILATION_CACHE_DIR, else moejax/xla in $XDG_CACHE_HOME or ~/.cache.",
)
_HELP = flags.DEFINE_boolean("help", False, "Show this help and every field that --config.* and --mesh.* can set.")


def parse_configs(argv: Sequence[str]) -> tuple[TrainConfig, MeshConfig, list[str]]:
    """Parses the flags and returns the two configurations, and `argv` without flags: its first item and positionals.

    `--config.a.b=value` and `--mesh.a=value` change fields of what `--config` and `--mesh` name. If `--mesh` is a plan,
    the configuration has what its first bucket decides, and no flag may change that: a plan holds as a whole.

    Raises:
      ConfigError: a flag, a name, a file or an override that is wrong.
    """
    config_overrides, remaining = split_overrides(argv, "config")
    mesh_overrides, remaining = split_overrides(remaining, "mesh")
    try:
        remaining = flags.FLAGS(remaining)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"--{error.flagname} does not exist; {_field_hint(error.flagname)}--help lists all") from None
    except flags.Error as error:
        raise ConfigError(f"{' '.join(str(error).split())}; --help lists all") from None

    for flag, path in ((_DATA, "data.paths"), (_TOKENIZER, "data.tokenizer")):
        if flag.value is None:
            continue
        if path in config_overrides:
            raise ConfigError(f"--{flag.name} and --config.{path} are the same field; give one of them")
        config_overrides[path] = flag.value

    config = _apply("config", load_config(_CONFIG.value), config_overrides)
    mesh_config = _apply("mesh", load_mesh_config(_MESH.value), mesh_overrides)
    buckets = plan_buckets()
    if buckets:
        _check_undecided(config_overrides, mesh_overrides)
    config = buckets[0].applied(config) if buckets else config
    if _HELP.value:
        print(_help(config, mesh_config))
        sys.exit(0)
    return config, mesh_config, remaining


def plan_buckets() -> tuple[Bucket, ...]:
    """The buckets of the plan that `--mesh` names; none if it is a mesh alone. For use after the flags are parsed."""
    path = find(_MESH.value, MESH_CONFIGS)
    return load_buckets(path) if path is not None else ()


def _check_undecided(config_overrides: dict[str, str], mesh_overrides: dict[str, str]) -> None:
    decided = [f"--mesh.{path}" for path in mesh_overrides]
    decided += [f"--config.{path}" for path in config_overrides if path.startswith(DECIDES)]
    if decided:
        raise ConfigError(
            f"{', '.join(decided)} cannot be changed: --mesh={_MESH.value} is a plan, which decides it; "
            "change the plan's file, or use a mesh without get_buckets()"
        )


def _field_hint(name: str) -> str:
    """ "did you mean ..." for a field that was written without its path, or for a flag that is nearly `name`."""
    fields = [
        line.split("=")[0].strip() for line in _fields(TrainConfig(), "--config") + _fields(MeshConfig(), "--mesh")
    ]
    matches = [field for field in fields if field.split(".")[-1] == name.split(".")[-1]]
    matches = matches or difflib.get_close_matches(f"--{name}", [*fields, *(f"--{flag}" for flag in flags.FLAGS)], n=1)
    return f"did you mean {' or '.join(matches)}? " if matches else ""


def _apply(prefix: str, config: T, overrides: dict[str, str]) -> T:
    try:
        return apply_overrides(config, overrides)
    except ConfigError as error:
        raise ConfigError(f"--{prefix}.{error}") from None


def _help(config: TrainConfig, mesh_config: MeshConfig) -> str:
    script = sys.modules["__main__"]
    for flag in (_CONFIG, _MESH, _DATA, _TOKENIZER, _CACHE_DIR, _HELP):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    parts = [
        (script.__doc__ or "").strip(),
        f"Flags:\n{flags.FLAGS.main_module_help()}",
        f"Fields, as --config={_CONFIG.value} and --mesh={_MESH.value} have them:",
        "\n".join(_fields(config, "--config") + _fields(mesh_config, "--mesh")),
        f"Options of XLA that a {mesh_config.platform} program is compiled with, --config.compiler_options included:",
        "\n".join(
            f"  {option.name}={option.value}\n      {option.reason} ({option.source})"
            for option in in_force(mesh_config.platform, config.compiler_options)
        )
        or "  none",
    ]
    return "\n\n".join(parts)


def _fields(config: object, prefix: str) -> list[str]:
    """One line `  --config.model.num_layers=4` a field."""
    lines: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, path = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            lines += _fields(value, path)
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"  {path}={text}")
    return lines


def setup_jax(mesh_config: MeshConfig) -> None:
    """Sets what must be set before JAX starts: virtual devices or the other hosts, and the compilation cache."""
    if mesh_config.hardware == "cpu":
        use_virtual_devices(mesh_config.num_devices)
        keep_freed_memory(mesh_config.num_devices)
    elif mesh_config.hosts > 1:
        jax.distributed.initialize()
    cache_dir = _CACHE_DIR.value
    if cache_dir is None:
        cache_dir = jax.config.jax_compilation_cache_dir or default_cache_dir()
    jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir).expanduser()) if cache_dir else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_freed_memory(num_devices: int) -> None:
    """Has glibc's allocator keep what is freed, where there is one.

    XLA's CPU client allocates a step's temporaries anew each time; returned to the system in between, every page of
    them is mapped and zeroed again. For the benchmark's shape that is 208,000 page faults and a third of the CPU time
    of a step (1.45 against 0.93 s).

    A thread's own arena holds 64 MB at most, and what is larger is mapped anew after all; so with one device, all
    threads share one arena (268 MB of a gradient: 37 against 138 ms of CPU time). The threads of 16 virtual devices
    would wait for each other there (15% of a step).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        if num_devices == 1:
            libc.mallopt(m_arena_max, 1)


def default_cache_dir() -> str:
    """`moejax/xla` in the user's cache folder."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(cache_home) / "moejax" / "xla")
