"""Times one mixture-of-experts block on one device, against transformers' Mixtral block with the same weights.

    python experiments/benchmarks/moe.py --tokens=64,512,4096
    python experiments/benchmarks/moe.py --shape=mixtral_8x7b --tokens=8192 --peer=none

The peer is `MixtralSparseMoeBlock` with the experts implementation `grouped_mm` (needs torch and transformers). Results
and gradients are compared first. Then everything takes turns, so that whatever else the machine does falls on all, and
only one of the two thread pools has work at a time; figures are medians. The products of the experts are set against
plain products of the same FLOPs in the same framework, and the block is timed with experts that return what they get:
what route, dispatch and combine take. In a pipe, ends with one line of JSON.

Measured on two cores that a dozen processes shared, so in CPU seconds (the least of 3 to 5 rounds; wall times there
say little); moejax / peer, of which "outside" is moejax's without experts:

| tokens | forward       | forward and backward | outside, forward | plain products, jax / torch |
|--------|---------------|----------------------|------------------|-----------------------------|
| 64     | 0.093 / 0.415 | 0.48 / 1.27          | 0.000            | 0.021 / 0.039               |
| 512    | 0.234 / 0.606 | 0.95 / 1.77          | 0.001            | 0.163 / 0.181               |
| 4,096  | 1.279 / 1.903 | 4.11 / 5.31          | 0.054            | 1.327 / 1.253               |
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec as P

from experiments.shared import loading
from moejax import runtime
from moejax.checks import ConfigError, check
from moejax.config import DispatchConfig, ModelConfig
from moejax.dispatch import Assignments, Exchange, Experts, dispatch
from moejax.mesh import build_mesh, local_mesh_config
from moejax.moe import mixture_of_experts, route
from moejax.presets import PRESETS, tiny

FLAGS = loading.Flags(__doc__)
_TOKENS = FLAGS.define_numbers("tokens", [64, 512, 4096], "Tokens of a block, one measurement for each.")
_SHAPE = flags.DEFINE_string(
    "shape",
    "1024,2048,16,2",
    "d_model,d_ff,experts,experts per token; or a preset's name, for its shape.",
    flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "Of weights and tokens; float32 on CPUs and bfloat16 elsewhere by default.", flag_values=FLAGS
)
_PEER = flags.DEFINE_enum(
    "peer", "transformers", ["transformers", "none"], "What to compare with, on CPUs.", flag_values=FLAGS
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that everything takes its turn.", lower_bound=1, flag_values=FLAGS)

DISPATCH = DispatchConfig(strategy="ragged")
Step = Callable[[], Any]  # runs to the end and returns what it computed


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    runtime.keep_freed_memory(1)  # before JAX has threads
    runtime.setup_jax(local_mesh_config(jax.local_devices()[:1]))
    model = make_model(_SHAPE.value, _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    check_peer()
    p = make_weights(model)
    results = [measure(model, p, tokens) for tokens in _TOKENS.value]
    loading.print_json({"shape": _SHAPE.value, "dtype": model.dtype, "device": jax.devices()[0].device_kind,
                      "rounds": _ROUNDS.value, "jax": jax.__version__, "results": results})  # fmt: skip


def make_model(shape: str, dtype: str) -> ModelConfig:
    """A model whose MoE block has that shape, with Mixtral's router."""
    if shape in PRESETS:
        return _with_mixtrals_router(PRESETS[shape](), dtype)
    numbers = shape.split(",")
    known = ", ".join(PRESETS)
    check(
        len(numbers) == 4 and all(n.isdecimal() for n in numbers),
        f"--shape={shape} must be four numbers, d_model,d_ff,experts,experts per token, or one of {known}",
    )
    d_model, d_ff, num_experts, k = map(int, numbers)
    model = dataclasses.replace(tiny(), d_model=d_model, d_ff=d_ff, num_experts=num_experts, experts_per_token=k)
    return _with_mixtrals_router(model, dtype)


def _with_mixtrals_router(model: ModelConfig, dtype: str) -> ModelConfig:
    router = dataclasses.replace(model.router, score="softmax", bias=False)
    return dataclasses.replace(model, dtype=dtype, router=router)


def check_peer() -> None:
    if _PEER.value == "none":
        return
    check(jax.default_backend() == "cpu", "--peer=transformers runs on CPUs only; use --peer=none here")
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--peer=transformers needs {package}, which is not installed; use --peer=none")


def make_weights(m: ModelConfig) -> dict[str, Any]:
    """One layer of `moejax.sharding.moe_params`, random."""
    shapes = {"w_router_DE": (m.d_model, m.num_experts), "w_in_EDGF": (m.num_experts, m.d_model, 2, m.d_ff),
              "w_out_EFD": (m.num_experts, m.d_ff, m.d_model)}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    w = {
        name: 0.03 * jax.random.normal(key, shape, m.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"w_router_DE": w.pop("w_router_DE"), "experts": w}


def measure(m: ModelConfig, p: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Times everything for that many tokens, prints the table and returns the figures."""
    x, dy = jax.random.normal(jax.random.key(tokens), (2, 1, tokens, m.d_model), m.dtype)
    steps = moejax_steps(m, p, x, dy)
    if _PEER.value == "transformers":
        others = peer_steps(m, p, x, dy)
        error = largest_errors(steps["moejax, forward and backward"](), others["peer, forward and backward"]())
        print(f"largest difference to the peer's, over the largest entry: {error}")
        steps |= others
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # compiles
    for _ in range(_ROUNDS.value):
        for name, step in steps.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)
    return report(m, tokens, seconds, cpu_seconds)


def moejax_steps(m: ModelConfig, p: dict[str, Any], x: jax.Array, dy: jax.Array) -> dict[str, Step]:
    device = jax.local_devices()[:1]
    mesh = build_mesh(local_mesh_config(device), device)
    exchange = Exchange.make(DISPATCH, m, x.shape[1], hosts=1)

    def on_device(block: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return jax.shard_map(block, mesh=mesh, in_specs=P(), out_specs=P())

    def whole(p: dict[str, Any], x: jax.Array) -> jax.Array:
        return mixture_of_experts(p, x, m, exchange)[0]

    def without_experts(p: dict[str, Any], x: jax.Array) -> jax.Array:
        routing, sums = route(x[0], p, m, num_sequences=1)
        assignments = Assignments(*routing, sums.count_bE.sum(0).astype(jnp.int32))
        idle = Experts({}, apply_to_buffers=lambda _, x: x, apply_to_groups=lambda _, x, group_sizes: x)
        return dispatch(x[0], assignments, idle, exchange)[0][None]

    def plain(p: dict[str, Any], x: jax.Array) -> jax.Array:  # each row once for each of its experts, all by the first
        w_in, w_out = p["experts"]["w_in_EDGF"][0].reshape(m.d_model, -1), p["experts"]["w_out_EFD"][0]
        rows = jnp.repeat(x[0], m.experts_per_token, axis=0)
        gate, up = jnp.split(rows @ w_in, 2, axis=1)
        return (gate * up) @ w_out

    def forward(block: Callable[..., jax.Array], p: dict[str, Any] = p) -> Step:
        run = jax.jit(on_device(block))
        return lambda: jax.block_until_ready(run(p, x))

    def both(block: Callable[..., jax.Array], p: dict[str, Any] = p) -> Step:
        def value_and_gradients(p: dict[str, Any], x: jax.Array) -> tuple[jax.Array, Any]:
            y, vjp = jax.vjp(on_device(block), p, x)
            return y, vjp(dy)

        run = jax.jit(value_and_gradients)
        return lambda: jax.block_until_ready(run(p, x))

    router = {"w_router_DE": p["w_router_DE"]}  # alone, or zero gradients of the experts would be written, and timed
    return {
        "moejax, forward": forward(whole),
        "moejax, forward and backward": both(whole),
        "moejax without experts, forward": forward(without_experts, router),
        "moejax without experts, forward and backward": both(without_experts, router),
        "jax, plain products": forward(plain),
    }


def peer_steps(m: ModelConfig, p: dict[str, Any], x: jax.Array, dy: jax.Array) -> dict[str, Step]:
    """The same in torch; results come back in moejax's layout."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    def tensor(a: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(a.astype(jnp.float32))).to(getattr(torch, m.dtype))

    config = MixtralConfig(
        hidden_size=m.d_model, intermediate_size=m.d_ff, num_local_experts=m.num_experts,
        num_experts_per_tok=m.experts_per_token, experts_implementation="grouped_mm",
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config).to(getattr(torch, m.dtype))
    w_in, w_out = p["experts"]["w_in_EDGF"], p["experts"]["w_out_EFD"]
    with torch.no_grad():
        block.gate.weight.copy_(tensor(p["w_router_DE"].T))
        block.experts.gate_up_proj.copy_(tensor(w_in.reshape(*w_in.shape[:2], -1).swapaxes(1, 2)))
        block.experts.down_proj.copy_(tensor(w_out.swapaxes(1, 2)))
    x_torch, dy_torch = tensor(x).requires_grad_(), tensor(dy)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return block(x_torch)

    def both() -> tuple[torch.Tensor, Any]:
        block.zero_grad(set_to_none=True)
        x_torch.grad = None
        y = block(x_torch)
        y.backward(dy_torch)
        d_in = block.experts.gate_up_proj.grad.swapaxes(1, 2).unflatten(2, (2, -1))
        experts = {"w_in_EDGF": d_in, "w_out_EFD": block.experts.down_proj.grad.swapaxes(1, 2)}
        return y.detach(), ({"w_router_DE": block.gate.weight.grad.T, "experts": experts}, x_torch.grad)

    def plain() -> torch.Tensor:
        with torch.no_grad():
            rows = x_torch[0].repeat_interleave(m.experts_per_token, 0)
            gate, up = (rows @ block.experts.gate_up_proj[0].T).chunk(2, dim=1)
            return (gate * up) @ block.experts.down_proj[0].T

    return {"peer, forward": forward, "peer, forward and backward": both, "torch, plain products": plain}


def largest_errors(ours: tuple, theirs: tuple) -> dict[str, float]:
    """By array: the largest difference over the largest entry. Raises if one is more than rounding."""
    names = ["y", *(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(ours[1])[0])]
    errors = {}
    for name, a, b in zip(names, jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), b.float().numpy()
        errors[name] = float(np.abs(a - b).max() / np.abs(b).max())
        tolerance = 1e-4 if ours[0].dtype == jnp.float32 else 5e-2
        if errors[name] > tolerance:
            raise FloatingPointError(f"{name} differs from the peer's by {errors[name]:.1e} of its largest entry")
    return errors


def report(
    m: ModelConfig, tokens: int, seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]]
) -> dict[str, Any]:
    flops = 2 * 3 * tokens * m.experts_per_token * m.d_model * m.d_ff
    print(f"{tokens} tokens, {flops / 1e9:.1f} GFLOP of experts forward")
    print(f"{'':46}{'median ms':>10}{'min ms':>10}{'CPU ms':>10}{'GFLOP/s':>10}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        rate = "" if "without" in name else f"{flops * (3 if 'backward' in name else 1) / median[name] / 1e9:10.0f}"
        cpu = min(cpu_seconds[name])
        print(f"{name:46}{1e3 * median[name]:10.1f}{1e3 * min(times):10.1f}{1e3 * cpu:10.1f}{rate}")
    figures: dict[str, Any] = {"tokens": tokens, "expert_flops_forward": flops}
    for key, values in (("median_seconds", median), ("min_cpu_seconds", {n: min(t) for n, t in cpu_seconds.items()})):
        figures[key] = values
    figures["outside_experts_share"] = {}
    figures["peer_over_moejax"] = {}
    figures["peer_over_moejax_cpu"] = {}
    for part in ("forward", "forward and backward"):
        ours = median[f"moejax, {part}"]
        figures["outside_experts_share"][part] = median[f"moejax without experts, {part}"] / ours
        line = f"{part}: {figures['outside_experts_share'][part]:.0%} outside the experts"
        if f"peer, {part}" in median:
            pairs = zip(seconds[f"peer, {part}"], seconds[f"moejax, {part}"], strict=True)
            figures["peer_over_moejax"][part] = statistics.median(peer / own for peer, own in pairs)
            cpu = min(cpu_seconds[f"peer, {part}"]) / min(cpu_seconds[f"moejax, {part}"])
            figures["peer_over_moejax_cpu"][part] = cpu
            line += f"; the peer takes {figures['peer_over_moejax'][part]:.2f} times as long, {cpu:.2f} of CPU time"
        print(line)
    print(flush=True)
    return figures


if __name__ == "__main__":
    loading.run(main, FLAGS)
