"""Measures the present devices for the planner: matrix products, copies, collectives, and what starting them costs.

    python experiments/calibrate.py --out=calibration.json                  # 16 virtual devices of this machine
    python experiments/calibrate.py --mesh=h100_2x8 --out=calibration.json  # on the hosts themselves
    python experiments/plan.py --cluster=h100_2x8 --calibration=calibration.json

Takes under a minute. Every figure is a median over runs after a first that is not counted. On virtual devices all of
them work at once, for they share the cores. The all-to-all is over all devices: with several hosts its figures are the
flat exchange's across them, with one they are those inside a host. In a pipe, ends with one
line of JSON, which is also the file.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments.shared import common, loading
from moejax import strict_json
from moejax.mesh import build_mesh, platform

FLAGS = common.ConfigFlags(__doc__)
_OUT = FLAGS.define_output("out", "Where to save the figures, for plan.py --calibration.")
_SECONDS = flags.DEFINE_float(
    "seconds", 1.0, "How long each size is repeated, at most.", lower_bound=0.01, flag_values=FLAGS
)

DEVICES = "devices"  # the one axis that all devices are on here
_SIZES = {  # (widths of square products, bytes of copies, bytes of a device's part of an exchange)
    "cpu": ((64, 128, 256, 512), (2**16, 2**20, 2**23), (2**10, 2**14, 2**18, 2**21)),
    "accelerator": ((256, 1024, 4096, 8192), (2**20, 2**26, 2**30), (2**14, 2**18, 2**22, 2**26, 2**28)),
}


def main(argv: list[str]) -> None:
    mesh_config = FLAGS.parse_config(argv).layout.mesh
    FLAGS.setup_jax(mesh_config)
    mesh = Mesh(build_mesh(mesh_config).devices.reshape(-1), (DEVICES,))
    products, copies, exchanges = _SIZES["cpu" if platform(mesh) == "cpu" else "accelerator"]
    dtype = jnp.float32 if platform(mesh) == "cpu" else jnp.bfloat16
    console = Console(stderr=True)
    curves: dict[str, dict[int, float]] = {"product": {}, "copy": {}, "all_to_all": {}}
    for kind, sizes, measure in (
        ("product", products, lambda n: matmul_seconds(mesh, n, dtype)),
        ("copy", copies, lambda n: copy_seconds(mesh, n)),
        ("all_to_all", exchanges if mesh.size > 1 else (), lambda n: exchange_seconds(mesh, n)),
    ):
        for size in sizes:
            console.print(f"{kind} of {size:,}", highlight=False)
            curves[kind][size] = measure(size)
    figures = fit(curves, launch_seconds(mesh), crosses_hosts=mesh_config.hosts > 1)
    show(console, curves)
    saved = {
        "device": mesh.devices.flat[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "num_devices": mesh.size,
        "figures": figures,
        "curves_seconds": curves,
    }
    if _OUT.value and jax.process_index() == 0:
        _OUT.value.write_text(strict_json.dumps(saved, indent=1) + "\n")
    loading.print_json(saved)


def fit(curves: dict[str, dict[int, float]], launch_s: float, *, crosses_hosts: bool) -> dict[str, Any]:
    """The figures of `moejax.planner.hardware.Device` that the curves say: the best rates, and a line for the exchange.

    The exchange's latency is its smallest size's time; its rate is taken from the two largest sizes, for one line
    through all of them errs by a fifth.
    """
    figures: dict[str, Any] = {
        "matmul_flops": max(2 * n**3 / s for n, s in curves["product"].items()),
        "copy_bytes_per_s": max(2 * n / s for n, s in curves["copy"].items()),
        "launch_s": launch_s,
    }
    if curves["all_to_all"]:
        *_, (before, before_s), (last, last_s) = curves["all_to_all"].items()
        rate = (last - before) / (last_s - before_s) if last_s > before_s else last / last_s
        latency = min(curves["all_to_all"].values())
        figures["across" if crosses_hosts else "inside"] = {"bytes_per_s": rate, "latency_s": latency}
    return figures


def matmul_seconds(mesh: Mesh, width: int, dtype: Any) -> float:
    """A product of two square matrices of random numbers, on every device at once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((mesh.size, width, width), np.float32), dtype)
    return run_seconds(mesh, lambda x: x @ x, x)


def copy_seconds(mesh: Mesh, num_bytes: int) -> float:
    """Reading and writing so many bytes, on every device at once."""
    return run_seconds(mesh, lambda x: x + 1, jnp.zeros((mesh.size, num_bytes // 4), jnp.float32))


def exchange_seconds(mesh: Mesh, num_bytes: int) -> float:
    """An all-to-all of so many bytes a device."""
    columns = max(1, num_bytes // 4 // mesh.size)

    def exchange(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x.reshape(mesh.size, columns), DEVICES, 0, 0).reshape(x.shape)

    return run_seconds(mesh, exchange, jnp.zeros((mesh.size, mesh.size * columns), jnp.float32))


def launch_seconds(mesh: Mesh) -> float:
    """What an operation costs however small it is: the difference of two loops' lengths, over that of their trips."""
    few, many = 100, 1100

    def body(_: Any, x: jax.Array) -> jax.Array:
        return lax.sort(x, dimension=1)  # not fused with the loop's own arithmetic

    def loop(trips: int) -> float:
        return run_seconds(mesh, lambda x: lax.fori_loop(0, trips, body, x), jnp.zeros((mesh.size, 2)))

    return max(0.0, loop(many) - loop(few)) / (many - few)


def run_seconds(mesh: Mesh, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Median seconds of `function` on each device's row of x."""
    x = jax.device_put(x, NamedSharding(mesh, P(DEVICES)))
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(DEVICES), out_specs=P(DEVICES)))
    jax.block_until_ready(run(x))
    seconds: list[float] = []
    until = time.perf_counter() + _SECONDS.value
    while len(seconds) < 3 or (time.perf_counter() < until and len(seconds) < 50):
        began = time.perf_counter()
        jax.block_until_ready(run(x))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def show(console: Console, curves: dict[str, dict[int, float]]) -> None:
    """The curves, with the rates that they come to."""
    table = Table("what", "size", "median", "rate, one device")
    for kind, curve in curves.items():
        for size, seconds in curve.items():
            if kind == "product":
                name, rate = f"{size} × {size}", f"{2 * size**3 / seconds / 1e9:,.1f} GFLOP/s"
            else:
                factor = 2 if kind == "copy" else 1
                name, rate = f"{size:,} B", f"{factor * size / seconds / 1e9:,.3f} GB/s"
            table.add_row(kind, name, f"{seconds * 1e6:,.0f} µs", rate)
    console.print(table)


if __name__ == "__main__":
    loading.run(main, FLAGS)
