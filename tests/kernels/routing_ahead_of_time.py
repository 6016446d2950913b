"""Compiles routing for accelerators that are not there: `routing_ahead_of_time.py cuda|v5p|v5e CASE`, with a CASE
of T:E:K:SCORE:none|bias:GROUPS:GROUPS_PER_TOKEN.

A process of its own, for the compilers read their environment when they are loaded. Prints one line of JSON: of
each entry, forward and with its gradient, the implementation, the kernels in the program and its peak of memory.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.top_k_routing import route_tokens, routing_implementation, top_k_routing
from moejax.topology import compile_only_devices

TARGETS = {"cuda": "h100_2x8", "v5p": "tpu_v5p_16", "v5e": "tpu_v5e_16"}
D = 1024


def compile_case(mesh, entry, T, E, rules, bias, *, grad):
    picked = []

    def per_device(*args):
        *args, bias_E = args
        picked.append(routing_implementation())
        route = functools.partial(entry, num_sequences=4, **rules)
        routing, sums = route(*args, bias_E if bias else None)
        if not grad:
            return routing, jax.lax.psum(sums, ("expert", "tensor"))
        loss = jnp.cos(routing.gate_TK * routing.position_TK).sum() + jnp.square(sums.prob_bE).sum() + sums.z
        return jax.lax.psum(loss, ("expert", "tensor"))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = P(("expert", "tensor"))
    if entry is top_k_routing:
        args, specs = [array((T * 16, E), jnp.float32, rows)], [rows]
    else:
        args, specs = [array((T * 16, D), jnp.bfloat16, rows), array((D, E), jnp.bfloat16, P())], [rows, P()]
    out_specs = P() if grad else (rows, P())
    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=(*specs, P()), out_specs=out_specs)
    if grad:
        sharded = jax.value_and_grad(sharded, argnums=tuple(range(len(args))))
    compiled = jax.jit(sharded).lower(*args, array((E,), jnp.float32, P())).compile()
    return {
        "entry": entry.__name__,
        "gradient": grad,
        "implementation": picked[0],
        "kernels": sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))),
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
    }


def main(target, case):
    T, E, K, score, bias, *groups = case.split(":")
    numbers = dict(zip(("experts_per_token", "num_groups", "groups_per_token"), map(int, (K, *groups)), strict=True))
    mesh = Mesh(np.array(compile_only_devices(TARGETS[target])).reshape(8, 2), ("expert", "tensor"))
    compiled = [
        compile_case(mesh, entry, int(T), int(E), numbers | {"score": score}, bias == "bias", grad=grad)
        for entry in (top_k_routing, route_tokens)
        for grad in (False, True)
    ]
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
