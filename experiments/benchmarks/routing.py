"""Times top-k routing, from logits to experts, gates, positions and sums, against what a device can copy.

    python experiments/benchmarks/routing.py
    python experiments/benchmarks/routing.py --tokens=65536 --experts=16,64,256 --experts_per_token=2

"bytes" are the fewest that must move: logits read and results written, for the backward pass logits read again and
their gradient written. They over the time, as a share of the bandwidth of a copy of as many bytes measured in the same
run, is "of copy". "plain" is `lax.top_k` and a cumulative sum of one-hot rows, differentiated by jax. Every figure is a
median over rounds in which each program has its turn. The logits of a small case stay in a cache, for the copy as well.
In a pipe, ends with one line of JSON.

Two CPU cores that others share heavily, jax 0.10.2, 8,192 tokens, fused against plain: 16 experts, top-2, forward 1.5
against 2.2 ms, with the backward pass 2.2 against 2.7; 64 experts, top-2, 3.3 against 6.3 and 4.9 against 7.0. At 256
tokens and 16 experts it is slower, 0.26 against 0.21 and 0.39 against 0.25: more and smaller operations. No figures of
a GPU yet; the aim there is 80% of copy.

Tried for the CPU (two idle cores, 8,192 tokens, 16 experts, top-2): positions by two sorts 4.7 ms, by a cumulative sum
of one-hot rows 1.0, by triangular products of 64 tokens 0.4; the choice by `lax.top_k` 0.9, by a maximum a choice 0.3.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments.shared import loading
from moejax.checks import check
from moejax.kernels.top_k_routing import routing_implementation, top_k_routing

FLAGS = loading.Flags(__doc__)
_TOKENS = FLAGS.define_numbers("tokens", [256, 8192, 65_536], "Tokens of a case.")
_EXPERTS = FLAGS.define_numbers("experts", [16, 64, 256], "Experts of a case.")
_EXPERTS_PER_TOKEN = FLAGS.define_numbers("experts_per_token", [2, 8], "Experts per token of a case.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 11, "Rounds of measurements, whose median counts.", lower_bound=1, flag_values=FLAGS
)
_CALLS = flags.DEFINE_integer(
    "calls",
    None,
    "Calls timed together, in one program; by default 1 on CPU and 50 elsewhere.",
    lower_bound=1,
    flag_values=FLAGS,
)

Routed = tuple[jax.Array, ...]  # gates, experts, positions, counts, probabilities, z, entropy


def fused(logits_TE: jax.Array, experts_per_token: int) -> Routed:
    """The kernel of this platform."""
    routing, sums = top_k_routing(logits_TE, experts_per_token=experts_per_token)
    return (*routing, sums.count_bE[0], sums.prob_bE[0], sums.z, sums.entropy)


def plain(logits_TE: jax.Array, experts_per_token: int) -> Routed:
    """The same, written as one would without a kernel; assumes that all logits are finite."""
    log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    log_prob_TE = logits_TE - log_z_T[:, None]
    prob_TE = jnp.exp(log_prob_TE)
    prob_TK, expert_TK = lax.top_k(prob_TE, experts_per_token)
    gate_TK = prob_TK / prob_TK.sum(-1, keepdims=True)
    chosen_TE = (expert_TK[..., None] == jnp.arange(logits_TE.shape[1])).any(1).astype(jnp.int32)
    position_TK = jnp.take_along_axis(jnp.cumsum(chosen_TE, 0) - chosen_TE, expert_TK, 1)
    entropy = lax.stop_gradient(-(prob_TE * log_prob_TE).sum())
    count_E = chosen_TE.sum(0).astype(jnp.float32)
    return gate_TK, expert_TK, position_TK, count_E, prob_TE.sum(0), jnp.square(log_z_T).sum(), entropy


def with_gradient(route: Callable[[jax.Array], Routed]) -> Callable[..., Any]:
    """`route`, and the gradient of the logits for given gradients of gates, probabilities and z."""

    def run(logits_TE: jax.Array, dgate_TK: jax.Array, dprob_E: jax.Array) -> Any:
        def differentiable(logits_TE: jax.Array) -> Any:
            gate_TK, expert_TK, position_TK, count_E, prob_E, z, entropy = route(logits_TE)
            return (gate_TK, prob_E, z), (expert_TK, position_TK, count_E, entropy)

        smooth, pull_back, rest = jax.vjp(differentiable, logits_TE, has_aux=True)
        return smooth, rest, pull_back((dgate_TK, dprob_E, jnp.ones_like(smooth[2])))

    return run


def repeated(function: Callable[..., Any], args: tuple[jax.Array, ...], calls: int) -> Callable[[], Any]:
    """`function(*args)`, `calls` times one after the other in one compiled program."""

    def run(args: tuple[jax.Array, ...]) -> Any:
        def call(_: int, carry: Any) -> Any:  # the barrier: a call has to wait for all results of the call before
            return function(*lax.optimization_barrier((args, carry))[0])

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
        return lax.fori_loop(0, calls, call, start)

    return functools.partial(jax.jit(run).lower(args).compile(), args)


def measure(programs: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds a call, each program in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def benchmark(T: int, E: int, K: int, calls: int) -> list[dict[str, Any]]:
    """The two rows of the table of a case."""
    check(1 <= K <= E, f"--experts_per_token={K} must be from 1 to the number of experts, {E}")
    rng = np.random.default_rng(0)
    logits_TE, dgate_TK, dprob_E = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((T, E), (T, K), (E,))
    )
    forward_bytes = 4 * (T * E + 3 * T * K)
    gradient_bytes = forward_bytes + 4 * (2 * T * E + 3 * T * K)
    programs = {}
    for name, route in (("fused", fused), ("plain", plain)):
        route = functools.partial(route, experts_per_token=K)
        programs[name, "forward"] = repeated(route, (logits_TE,), calls)
        programs[name, "forward+backward"] = repeated(with_gradient(route), (logits_TE, dgate_TK, dprob_E), calls)
    for passes, moved in (("forward", forward_bytes), ("forward+backward", gradient_bytes)):
        half = jnp.ones(moved // 8, jnp.float32)  # half is read, half is written
        programs["copy", passes] = repeated(lambda x: -x, (half,), calls)
    seconds = measure(programs, _ROUNDS.value, calls)
    return [
        {
            "tokens": T,
            "experts": E,
            "experts_per_token": K,
            "passes": passes,
            "bytes": moved,
            "fused_us": seconds["fused", passes] * 1e6,
            "plain_us": seconds["plain", passes] * 1e6,
            "copy_us": seconds["copy", passes] * 1e6,
            "copy_gb_per_s": moved / seconds["copy", passes] / 1e9,
            "of_copy": seconds["copy", passes] / seconds["fused", passes],
            "plain_over_fused": seconds["plain", passes] / seconds["fused", passes],
        }
        for passes, moved in (("forward", forward_bytes), ("forward+backward", gradient_bytes))
    ]


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    calls = _CALLS.value or (1 if jax.default_backend() == "cpu" else 50)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {routing_implementation()}, {calls} calls a measurement")
    print("  tokens experts  k passes              MB   fused us   plain us   copy GB/s  of copy  plain/fused")
    rows = []
    for T in _TOKENS.value:
        for E in _EXPERTS.value:
            for K in _EXPERTS_PER_TOKEN.value:
                for row in benchmark(T, E, K, calls):
                    rows.append(row)
                    print(
                        f"{T:8d} {E:7d} {K:2d} {row['passes']:16s} {row['bytes'] / 1e6:7.2f} {row['fused_us']:10.1f} "
                        f"{row['plain_us']:10.1f} {row['copy_gb_per_s']:11.1f} {row['of_copy']:8.1%} "
                        f"{row['plain_over_fused']:12.2f}",
                        flush=True,
                    )
    loading.print_json({"device": device, "implementation": routing_implementation(), "calls": calls, "cases": rows})


if __name__ == "__main__":
    loading.run(main, FLAGS)
