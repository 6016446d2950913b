"""What XLA is told beyond its defaults: one table, each option with its reason and source; and how to change it.

Options of a program are handed over when it is compiled, so that what is compiled ahead of time, audited or measured
for overlap is what a run uses. `moejax.runtime` puts options of the process into the environment's `XLA_FLAGS`, unless
it has them.

`TrainConfig.compiler_options` come after the table, items `name=value` of which the later wins; `name=default` takes an
option away. On a command line:

    --config.compiler_options=xla_gpu_dot_merger_threshold_mb=default,xla_disable_hlo_passes=dce+cse

where a comma stands between items and + for a comma inside a value. What a program is given wins over `XLA_FLAGS`.
`--help` of a script lists what is in force on its --mesh.

What is here is accepted by the compilers of jax 0.10.2 and 0.11.2 and, as compiled ahead of time, makes more
communication run beside matrix products or needs less memory. What XLA has on by itself, and what was tried and did not
help, is in experiments/results/overlap.md. Variables of NCCL (`NCCL_*`) change no program and are left to the cluster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checks import ConfigError, one_line

Platform = Literal["cpu", "gpu", "tpu"]
DEFAULT = "default"  # the value that takes an option away


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of XLA: `reason` is what it is good for here, `source` where that can be read or was measured."""

    name: str
    value: str
    reason: str
    source: str


PROGRAM: dict[Platform, tuple[Option, ...]] = {
    "cpu": (),
    "gpu": (
        Option(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "by default only Hopper and Blackwell have it, with their cost model; elsewhere most collectives are "
            "synchronous without it: on A100 12% of the exchanged bytes run beside products, with it 62%",
            "https://docs.jax.dev/en/latest/gpu_performance_tips.html; IsSupportedForModule in XLA's "
            "sol_latency_estimator.cc; experiments/results/overlap.md",
        ),
        Option(
            "xla_gpu_dot_merger_threshold_mb",
            "0",
            "products with the same weights would be merged (up to 32 MB) and wait for all of their operands, which "
            "undoes layout.dispatch.chunks and layout.batch_split: with two of each 31% of olmoe_7b's exchanged bytes "
            "run beside products on H100, not 62%",
            "experiments/results/overlap.md",
        ),
    ),
    "tpu": (
        Option(
            "xla_tpu_enable_async_all_to_all",
            "true",
            "all_to_all is synchronous otherwise, and nothing runs beside a dispatch or a combine",
            "experiments/results/overlap.md",
        ),
        *(
            Option(
                name,
                "true",
                "one of five that together fuse all-gathers with matrix products, which run in steps beside them: on "
                "v5p 75% of the exchanged bytes run beside products then, not 62%",
                "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py, "
                "CF_FOR_ALL_GATHER; experiments/results/overlap.md",
            )
            for name in (
                "xla_tpu_enable_async_collective_fusion",
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
                "xla_tpu_enable_async_collective_fusion_multiple_steps",
                "xla_tpu_overlap_compute_collective_tc",
                "xla_enable_async_all_gather",
            )
        ),
    ),
}

# Of programs that run once, on every platform, in place of PROGRAM's.
ONCE: tuple[Option, ...] = (
    Option(
        "xla_backend_optimization_level",
        "0",
        "what runs once gains nothing from fast code: a state of 12 parameters takes the compiler 1.6 s of CPU time in "
        "place of 7.6, and the run 0.19 s in place of 0.09",
        "measured on a CPU",
    ),
)

PROCESS: dict[Platform, tuple[Option, ...]] = {
    "cpu": (
        Option(
            "xla_cpu_collective_call_warn_stuck_timeout_seconds",
            "120",
            "virtual devices share cores and reach a collective one after another; by default each that waits 20 s "
            "is reported",
            "XLA, xla/debug_options_flags.cc",
        ),
        Option(
            "xla_cpu_collective_call_terminate_timeout_seconds",
            "1800",
            "by default the process ends when the last device comes 40 s after the first, as in a long step on two "
            "cores",
            "XLA, xla/debug_options_flags.cc",
        ),
    ),
    "gpu": (),
    "tpu": (),
}


def in_force(platform: Platform, items: Sequence[str] = ()) -> tuple[Option, ...]:
    """The options of a program: the table's, then `items`, which are those of `TrainConfig.compiler_options`."""
    options = {option.name: option for option in PROGRAM[platform]}
    for item in items:
        name, _, value = item.partition("=")
        options.pop(name, None)
        if value != DEFAULT:
            options[name] = Option(name, value.replace("+", ","), "asked for", "compiler_options")
    return tuple(options.values())


def program_options(platform: Platform, items: Sequence[str] = ()) -> dict[str, str | bool]:
    """`in_force`, for `jax.jit(..., compiler_options=)`."""
    return for_jit(in_force(platform, items))


def for_jit(options: Sequence[Option]) -> dict[str, str | bool]:
    """Name -> value as `jax.jit(..., compiler_options=)` takes them: truth as a bool, anything else as a text."""
    truth = {"true": True, "false": False}
    return {option.name: truth.get(option.value, option.value) for option in options}


def check_accepted(mesh: Mesh, options: Mapping[str, str | bool]) -> None:
    """Compiles next to nothing for the mesh with the options, so that a wrong one is known before anything else runs.

    Raises:
      ConfigError: naming the first one that the devices' compiler refuses, and why.
    """
    for name, value in options.items():
        if refusal := _refusal(mesh, name, value):
            text = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(
                f"compiler option {name}={text} is refused by the {mesh.devices.flat[0].platform} compiler of jax "
                f"{jax.__version__} ({refusal}); correct it, or leave it out with "
                f"compiler_options={name}={DEFAULT}"
            )


@functools.cache
def _refusal(mesh: Mesh, name: str, value: str | bool) -> str:
    """Why the mesh's compiler refuses the option; "" where it does not."""
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    lowered = jax.jit(lambda x: x).lower(nothing)
    try:
        lowered.compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        status, _, reason = str(error).partition(": ")
        if status != "INVALID_ARGUMENT":
            raise
        return one_line(reason).rstrip(".")
    return ""
