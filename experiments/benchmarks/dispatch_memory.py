"""What a dispatch's buffers take: memory of one mixture-of-experts block, forward and backward, and of the whole step.

    python experiments/benchmarks/dispatch_memory.py                                         # virtual devices, and runs
    python experiments/benchmarks/dispatch_memory.py --config=moe_16x10b --target=h100_2x8   # compiled for 16 H100s

Compares designs that drop nothing: rounds of buffers with `--config.layout.dispatch.capacity_factor` times the balanced
load, and one round of buffers with room for the worst case, all of a sender's tokens for one expert. The block is that
of one microbatch. Figures are the compiler's, for one device. A program's buffers do not depend on the routing, so one
figure holds for every batch: on CPU one executable of the block is given a balanced batch and one whose tokens all pick
the same experts, and what comes out is compared with the worst-case design's. Of `ragged`, CPU's figure for the block
says nothing about accelerators: its exchange is a gather of all rows there. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.shared import common, loading
from moejax import sharding
from moejax.compiler import program_options
from moejax.config import DispatchConfig, ModelConfig
from moejax.dispatch import Exchange
from moejax.mesh import EXPERT, TENSOR, build_mesh, platform
from moejax.moe import mixture_of_experts
from moejax.topology import compile_only_devices
from moejax.train.config import TrainConfig
from moejax.train.memory_guard import MemoryUse
from moejax.train.step import make_train_step

FLAGS = common.ConfigFlags(__doc__)
_TARGET = flags.DEFINE_string(
    "target", None, "What to compile for, see moejax.topology; by default CPUs that are there.", flag_values=FLAGS
)
_OUT = FLAGS.define_output("out", "A Markdown file for the table.")

TOKENS = P(EXPERT, TENSOR)  # [B, S, D]


def main(argv: list[str]) -> None:
    config, target, devices = FLAGS.parse_config(argv), _TARGET.value, None
    if target is None:
        FLAGS.setup_jax(config.layout.mesh)
    else:
        config = FLAGS.for_target(target, config)
        devices = compile_only_devices(target)
    mesh = build_mesh(config.layout.mesh, devices)
    rows, results = [], {}
    for name, dispatch in designs(config).items():
        variant = config.with_layout(dispatch=dispatch)
        block = Block(variant, mesh)
        options = program_options(platform(mesh), config.compiler_options)
        compiled = block.program.lower(*block.shapes).compile(options)
        step = make_train_step(variant.make_program(devices=devices), config.optimizer).lower().compile()
        rows.append({"design": name, "block_bytes": memory(compiled), "step_bytes": memory(step)})
        if target is None:
            found = block.run(compiled)
            results = results or found
            rows[-1] |= {f"rounds_{batch}": rounds for batch, (rounds, _) in found.items()}
            rows[-1]["relative_error"] = max(error(found[batch][1], results[batch][1]) for batch in found)
    report = "\n".join([f"{FLAGS.config}: {setting(config)}", "", *table(rows), ""])
    print(report)
    if _OUT.value:
        _OUT.value.write_text(report)
    loading.print_json({"designs": rows, "mesh": config.layout.mesh.shape, "hardware": config.layout.mesh.hardware})


def error(actual: Any, expected: Any) -> float:
    """The largest error of results and gradients, each relative to its largest entry."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), actual, expected)
    return float(max(jax.tree.leaves(errors)))


def setting(config: TrainConfig) -> str:
    """The batch and the mesh in words."""
    layout = config.layout
    mesh = " × ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    batch = f"{layout.batch_size} sequences of {layout.seq_len} tokens"
    return f"{batch} in {layout.num_microbatches} microbatches on {layout.mesh.hardware}, {mesh}."


def designs(config: TrainConfig) -> dict[str, DispatchConfig]:
    """What is compared, by name."""
    m, dispatch = config.model, config.layout.dispatch
    factor, change = dispatch.capacity_factor, functools.partial(dataclasses.replace, dispatch)
    return {
        f"room for the worst case ({m.num_experts / m.experts_per_token:g} × balanced), one round": change(
            strategy="dropless", capacity_factor=m.num_experts / m.experts_per_token
        ),
        f"dropless, rounds of {factor:g} × balanced": change(strategy="dropless"),
        f"ragged, rounds of {factor:g} × balanced": change(strategy="ragged"),
    }


@dataclasses.dataclass(frozen=True)
class Block:
    """One mixture-of-experts feed-forward on one microbatch [B, S, D], forward and backward."""

    config: TrainConfig
    mesh: Mesh

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @functools.cached_property
    def params(self) -> Any:
        """The block's part of the table of parameters."""
        return sharding.moe_params(self.model, self.config.layout.dispatch)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Of the arguments: parameters, tokens, the gradient of the results."""
        layout = self.config.layout
        shape = (layout.batch_size // layout.num_microbatches, layout.seq_len, self.model.d_model)
        x = jax.ShapeDtypeStruct(shape, self.model.dtype, sharding=NamedSharding(self.mesh, TOKENS))
        return sharding.param_shapes(self.params, self.mesh), x, x

    @functools.cached_property
    def program(self) -> Any:
        """(params, x_BSD, dy_BSD) -> (y_BSD, gradients of params and x, rounds)."""

        def device(params: Any, x_bsD: jax.Array, dy_bsD: jax.Array) -> tuple[Any, ...]:
            def forward(params: Any, x_bsD: jax.Array) -> tuple[jax.Array, jax.Array]:
                p = sharding.gather(params, self.params)
                layout, num_tokens = self.config.layout, math.prod(x_bsD.shape[:2])
                exchange = Exchange.make(layout.dispatch, self.model, num_tokens, layout.exchange_hosts)
                y_bsD, stats, _ = mixture_of_experts(p, x_bsD, self.model, exchange)
                return y_bsD, jax.lax.pmax(stats.rounds, (EXPERT, TENSOR))

            y_bsD, vjp, rounds = jax.vjp(forward, params, x_bsD, has_aux=True)
            return y_bsD, vjp(dy_bsD), rounds

        specs = sharding.param_specs(self.params)
        in_specs, out_specs = (specs, TOKENS, TOKENS), (TOKENS, (specs, TOKENS), P())
        return jax.jit(jax.shard_map(device, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs))

    def batches(self) -> dict[str, tuple[np.ndarray, ...]]:
        """Tokens and gradients of results. The d-th feature of a token sends it to the d-th group of experts."""
        noise_BSD, dy_BSD = np.random.default_rng(0).standard_normal((2, *self.shapes[1].shape), np.float32)
        seq_len = noise_BSD.shape[1]
        found = {}
        for name, feature_S in (("balanced", np.arange(seq_len) % self.num_groups), ("single", np.zeros(seq_len, int))):
            x_BSD = 0.1 * noise_BSD
            x_BSD[:, np.arange(seq_len), feature_S] += 1
            found[name] = (x_BSD, dy_BSD)
        return found

    @property
    def num_groups(self) -> int:
        return self.model.num_experts // self.model.experts_per_token

    def run(self, compiled: Any) -> dict[str, tuple[int, Any]]:
        """By batch: the rounds it took, its results and every gradient."""
        params = sharding.init_params(self.params, self.mesh, jax.random.key(0))
        w_router_DE = np.zeros(params["w_router_DE"].shape, np.float32)
        for group, experts in enumerate(np.split(np.arange(self.model.num_experts), self.num_groups)):
            w_router_DE[group, experts] = 10
        params["w_router_DE"] = jax.device_put(w_router_DE, params["w_router_DE"].sharding)
        found = {}
        for name, batch in self.batches().items():
            args = [jax.device_put(a.astype(self.model.dtype), self.shapes[1].sharding) for a in batch]
            y_BSD, grads, rounds = compiled(params, *args)
            found[name] = (int(rounds), jax.tree.map(np.asarray, (y_BSD, grads)))
        return found


def memory(compiled: Any) -> int:
    """Bytes at the peak on one device, arguments and results included."""
    return compiled.memory_analysis().peak_memory_in_bytes if _TARGET.value else MemoryUse.of(compiled).total


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, with memory relative to the first design's, too."""
    lines = ["| design | block, MB | step, MB |", "|---|---|---|"]
    for row in rows:
        cells = [f"{row[key] / 1e6:,.1f} ({row[key] / rows[0][key]:.0%})" for key in ("block_bytes", "step_bytes")]
        lines.append(f"| {' | '.join([row['design'], *cells])} |")
    if "rounds_single" not in rows[0]:
        return lines
    lines += [
        "",
        "| design | rounds of a balanced batch | of one pair of experts | largest error |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["design"], row["rounds_balanced"], row["rounds_single"], f"{row['relative_error']:.1e}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    loading.run(main, FLAGS)
