"""Decoding in closed form: what a device does to make one token for each of its sequences.

There is no serving step yet to trace; this is what it will do. Weights lie in bfloat16, dense ones gathered over
`expert` once and for all. The sequences of a device are in as many groups as there are stages, one a stage at any time,
so that no stage waits: a step gives every sequence one token and takes each group through all stages. As sequences are
over `tensor` between attention blocks in training, so here are the group's tokens, of which there is one a sequence.

Latent attention does not make keys and values of what the cache holds: the matrices that would make them are applied to
the queries and to the results instead (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Dimensions: b sequences of a group, T = b / tensor tokens of a device between attention blocks, n and k query and
key-value heads of a device, H head, S tokens seen, D model, E experts, e those of a device, F expert width. Of latent
attention: C latent of keys and values, R rotated part of a key, W width of a head's values.
"""

from __future__ import annotations

import math

from moejax.config import ModelConfig
from moejax.layout import VOCAB_AXES, Layout
from moejax.mesh import PIPELINE, TENSOR
from moejax.planner.work import Collective, Kind, Matmul, MemoryOp, Phase, Work

BYTES = 2  # of an activation, a weight, a key or a value


def decode_work(model: ModelConfig, layout: Layout) -> Work:
    """One token for each sequence of the batch, after `layout.seq_len` tokens of each; of one device."""
    m, mesh, d = model, layout.mesh, layout.dispatch
    stages, tensor = mesh.pipeline, mesh.tensor
    b = max(1, math.ceil(layout.batch_size / (layout.batch_shards * stages)))
    T = max(1, math.ceil(b / tensor))
    layers = stages * math.ceil(m.num_moe_layers / stages)  # groups × layers of a stage
    heads, kv_heads = m.attention.num_heads / tensor, m.attention.num_kv_heads / tensor
    H, D, context = m.attention.head_dim, m.d_model, layout.seq_len + 1

    def matmul(phase: Phase, rows: float, n: float, k: float, times: float, groups: float = 1) -> Matmul:
        return Matmul(phase, "forward", rows, n, k, groups, times, m.dtype)

    def collective(
        phase: Phase, kind: Kind, axes: tuple[str, ...], rows: float, times: float, hosts: int = 1
    ) -> Collective:
        size = math.prod(mesh.shape[axis] for axis in axes)
        return Collective(phase, "forward", kind, axes, rows * D * BYTES, size, times, hosts)

    def cached(groups: float, rows: float, key_dim: int, value_dim: int, cache_dim: int, times: float) -> Work:
        """A few queries by every key and value of the cache: it takes as long as reading them, not as its products."""
        scores = Matmul("attention", "forward", rows, context, key_dim, groups, times, m.dtype, filled=0)
        values = Matmul("attention", "forward", rows, value_dim, context, groups, times, m.dtype, filled=0)
        return [scores, values, MemoryOp("attention", "forward", groups * context * cache_dim * BYTES, times)]

    def qk_norm(times: float) -> Work:
        if m.attention.qk_norm != "projection":
            return []
        return [Collective("attention", "forward", "all_reduce", (TENSOR,), 4 * b, tensor, 2 * times)]  # of squares

    def grouped(times: float) -> Work:
        return [
            matmul("attention", b, (heads + 2 * kv_heads) * H, D, times),
            *qk_norm(times),
            *cached(b * kv_heads, heads / kv_heads, H, H, 2 * H, times),
        ]

    def latent(times: float) -> Work:
        *queries, down, _, _ = m.attention.projections(D, tensor)
        C, R, W = m.attention.latent.kv_rank, m.rotary_dim, m.attention.value_dim
        return [
            *(matmul("attention", b, outputs, inputs, times) for inputs, outputs in (*queries, down)),
            matmul("attention", b, C, H - R, times, groups=heads),
            *cached(b, heads, C + R, C, C + R, times),
            matmul("attention", b, W, C, times, groups=heads),
        ]

    def attention(times: float) -> Work:
        return [
            MemoryOp("attention", "forward", 4 * T * D * BYTES, times),  # the norm and the residual
            collective("attention", "all_gather", (TENSOR,), T, times),
            *(latent if m.attention.kind == "latent" else grouped)(times),
            matmul("attention", b, D, heads * m.attention.value_dim, times),
            collective("attention", "reduce_scatter", (TENSOR,), T * tensor, times),
        ]

    def feed_forward(width: int, times: float) -> Work:
        return [matmul("expert", T, 2 * width, D, times), matmul("expert", T, D, width, times)]

    # What meets at an expert: the group's tokens of all devices that exchange.
    senders = mesh.expert * tensor
    held = m.num_experts / math.prod(mesh.shape[axis] for axis in d.expert_axes)
    touched = held * (1 - (1 - m.experts_per_token / m.num_experts) ** (senders * T))
    rows = senders * T * m.experts_per_token / m.num_experts * held / touched  # of a touched expert
    width = m.d_ff if TENSOR in d.expert_axes else m.d_ff / tensor
    sent = T * m.experts_per_token
    work = [
        collective("embed", "all_reduce", (PIPELINE,), T, stages),
        *attention(layers),
        MemoryOp("route", "forward", 4 * T * D * BYTES, layers),
        matmul("route", T, m.num_experts, D, layers),
        MemoryOp("dispatch", "forward", 2 * sent * D * BYTES, layers),
        collective("dispatch", "all_to_all", d.expert_axes, sent, layers, layout.exchange_hosts),
        matmul("expert", rows, 2 * width, D, layers, groups=touched),
        matmul("expert", rows, D, width, layers, groups=touched),
        collective("combine", "all_to_all", d.expert_axes, sent, layers, layout.exchange_hosts),
        MemoryOp("combine", "forward", 2 * sent * D * BYTES, layers),
        collective("pipeline", "ppermute", (PIPELINE,), T, stages),
        matmul("logits", b, m.padded_vocab_size / (stages * tensor), D, stages),
        collective("logits", "all_gather", (TENSOR,), T, stages),
        Collective(
            "loss", "forward", "all_reduce", VOCAB_AXES, b * 8, stages * tensor, stages
        ),  # the most likely token
    ]
    if TENSOR not in d.expert_axes:
        gathered = touched * rows / tensor
        work += [
            collective("expert", "all_gather", (TENSOR,), gathered, layers),
            collective("expert", "reduce_scatter", (TENSOR,), gathered * tensor, layers),
        ]
    if m.shared_d_ff:
        work += feed_forward(m.shared_d_ff, layers)
    if m.shared_gate:
        work.append(matmul("expert", T, 1, D, layers))
    if m.num_dense_layers:
        work += attention(stages * m.num_dense_layers) + feed_forward(m.dense_d_ff, stages * m.num_dense_layers)
    return [item for item in work if not isinstance(item, Collective) or item.num_devices > 1]
