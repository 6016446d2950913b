"""What a model's mathematics costs, whatever runs it: FLOPs a token, and the throughput that they leave possible.

Model FLOPs count matrix products once: no rematerialisation, no capacity's padding, no pipeline's bubble, and of causal
attention only the half that is not masked. They are the numerator of MFU; HFU counts what is executed.
"""

from __future__ import annotations

import dataclasses

from moejax.config import ModelConfig, check
from moejax.planner.hardware import Cluster


def forward_flops(m: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward pass for one token, mean over the positions of a sequence of `seq_len`."""
    return float(2 * _matmul_params(m) + _attention_flops(m, (seq_len + 1) / 2))


def decode_flops(m: ModelConfig, context: int) -> float:
    """FLOPs of one new token that sees `context` tokens before it."""
    return float(2 * _matmul_params(m) + _attention_flops(m, context + 1))


def _matmul_params(m: ModelConfig) -> int:
    """Parameters that a token is multiplied with."""
    attention = m.d_model * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
    moe = 3 * m.d_model * (m.experts_per_token * m.d_ff + m.shared_d_ff) + m.d_model * m.num_experts
    dense = 3 * m.d_model * m.dense_d_ff
    return m.num_layers * attention + m.num_moe_layers * moe + m.num_dense_layers * dense + m.d_model * m.vocab_size


def _attention_flops(m: ModelConfig, context: float) -> float:
    """Queries by keys and weights by values, for a token that sees `context` tokens."""
    return m.num_layers * 2 * 2 * m.num_heads * m.head_dim * context


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Tokens a millisecond that a cluster's arithmetic allows at a stated efficiency, and what they are made of.

    A backward pass costs two forward passes, and full rematerialisation one more.
    """

    num_devices: int
    flops_per_s: float  # a device's, achievable
    efficiency: float
    flops_per_token: float  # forward
    forward: float
    training: float
    training_with_full_remat: float

    def __str__(self) -> str:
        return (
            f"{self.num_devices} devices × {self.flops_per_s / 1e12:.0f} TFLOP/s × {self.efficiency:.0%} ÷ "
            f"{self.flops_per_token / 1e9:.2f} GFLOP a token: {self.forward:.0f} tokens/ms forward, "
            f"÷ 3 = {self.training:.0f} training, ÷ 4 = {self.training_with_full_remat:.0f} with full rematerialisation"
        )


def ceilings(cluster: Cluster, flops_per_token: float, efficiency: float = 0.55) -> Ceilings:
    """The ceilings of a cluster for a model of so many forward FLOPs a token."""
    check(0 < efficiency <= 1, f"efficiency={efficiency} must be above 0 and at most 1")
    rate = float(cluster.device.matmul_flops)
    forward = cluster.num_devices * rate * efficiency / flops_per_token / 1e3
    return Ceilings(cluster.num_devices, rate, efficiency, flops_per_token, forward, forward / 3, forward / 4)
