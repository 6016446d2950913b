"""What a model's mathematics costs, whatever runs it: FLOPs a token, and the throughput that they leave possible.

Model FLOPs count matrix products once: no rematerialization, no capacity's padding, no pipeline's bubble, and of causal
attention only the half that is not masked. They are the numerator of MFU; HFU counts what is executed.
"""

from __future__ import annotations

import dataclasses

from moejax.checks import check
from moejax.config import ModelConfig
from moejax.planner.hardware import Cluster
from moejax.planner.units import quantity, rounded


def forward_flops(m: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward pass for one token, mean over the positions of a sequence of `seq_len`."""
    a = m.attention
    return float(2 * _matmul_params(m) + _attention_flops(m, (seq_len + 1) / 2, a.head_dim + a.value_dim))


def decode_flops(m: ModelConfig, context: int) -> float:
    """FLOPs of one new token that sees `context` tokens before it.

    Latents are what it sees: to make every token's keys and values of them again would cost more.
    """
    a, latent = m.attention, m.attention.latent
    dims = 2 * a.head_dim if a.kind == "grouped" else 2 * latent.kv_rank + latent.rope_head_dim
    return float(2 * _matmul_params(m) + _attention_flops(m, context + 1, dims))


def _matmul_params(m: ModelConfig) -> int:
    """Parameters that a token is multiplied with."""
    attention = sum(inputs * outputs for inputs, outputs in m.attention.projections(m.d_model))
    moe = 3 * m.d_model * (m.experts_per_token * m.d_ff + m.shared_d_ff)
    moe += m.d_model * (m.num_experts + m.shared_gate)
    dense = 3 * m.d_model * m.dense_d_ff
    return m.num_layers * attention + m.num_moe_layers * moe + m.num_dense_layers * dense + m.d_model * m.vocab_size


def _attention_flops(m: ModelConfig, context: float, dims: int) -> float:
    """Queries by keys and weights by values, `dims` wide together, for a token that sees `context` tokens."""
    return m.num_layers * 2 * m.attention.num_heads * dims * context


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Tokens per millisecond that a cluster's arithmetic allows at a stated efficiency, and the figures behind them.

    A backward pass costs two forward passes, and full rematerialization one more.
    """

    num_devices: int
    flops_per_s: float  # a device's, achievable
    efficiency: float
    flops_per_token: float  # forward
    forward: float
    training: float
    training_with_full_remat: float

    def __str__(self) -> str:
        forward, training, full = (
            rounded(1e3 * rate) for rate in (self.forward, self.training, self.training_with_full_remat)
        )
        return (
            f"{self.num_devices} devices × {quantity(self.flops_per_s, 'FLOP/s')} × {self.efficiency:.0%} ÷ "
            f"{quantity(self.flops_per_token, 'FLOP')} per token = {forward} tokens/s forward; ÷ 3 = {training} in "
            f"training, ÷ 4 = {full} in training with full rematerialization"
        )


def ceilings(cluster: Cluster, flops_per_token: float, efficiency: float = 0.55) -> Ceilings:
    """The ceilings of a cluster for a model of so many forward FLOPs a token."""
    check(0 < efficiency <= 1, f"efficiency={efficiency} must be above 0 and at most 1")
    rate = float(cluster.device.matmul_flops)
    forward = cluster.num_devices * rate * efficiency / flops_per_token / 1e3
    return Ceilings(cluster.num_devices, rate, efficiency, flops_per_token, forward, forward / 3, forward / 4)
