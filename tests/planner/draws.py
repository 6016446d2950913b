"""Layouts drawn at random: every way to cut and place a tiny model's step. Slow ones to trace are drawn less often."""

from moejax.checks import ConfigError
from moejax.config import (
    AttentionConfig,
    DispatchConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    RopeScalingConfig,
    RouterConfig,
)
from moejax.layout import Layout
from moejax.mesh import MeshConfig


def draw_step(rng):
    """A legal (model, layout, mode); `rng` is a `random.Random`."""
    while True:
        try:
            model, layout, mode = _draw(rng)
            layout.check(model)
        except ConfigError:
            continue
        return model, layout, mode


def _draw(rng):
    one_of = lambda *choices: rng.choice(choices)  # noqa: E731
    expert, replica = one_of(1, 2, 4, 8), one_of(1, 1, 2)
    hosts = one_of(1, 1, *(n for n in (2, 4, 8) if expert % n == 0))
    mesh = MeshConfig(
        expert=expert,
        pipeline=one_of(1, 1, 2, 4),
        tensor=one_of(1, 1, 2, 4),
        replica=replica,
        hardware=one_of("h100", "h100", "h100", "tpu_v5p"),
        hosts=replica * hosts if hosts > 1 else 1,
    )
    repeats, dense = one_of(1, 1, 2), one_of(0, 0, 1, 2)
    chunks = repeats * mesh.pipeline
    heads, shared_d_ff, latent = one_of(4, 8), one_of(0, 0, 24), one_of(False, False, True)
    model = ModelConfig(
        num_layers=dense + one_of(chunks, 2 * chunks, rng.randint(chunks, 3 * chunks)),
        d_model=one_of(32, 64),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=one_of(12, 24),
            output_bias=one_of(False, True),
            latent=LatentConfig(
                kv_rank=one_of(32, 64), q_rank=one_of(0, 32, 96), rope_head_dim=4, value_head_dim=one_of(8, 12)
            ),
        )
        if latent
        else AttentionConfig(
            num_heads=heads,
            num_kv_heads=one_of(4, heads),
            head_dim=one_of(8, 16, 32),
            qk_norm=one_of("none", "none", "head", "projection"),
            bias=one_of(False, True),
            output_bias=one_of(False, True),
            multiplier=one_of(0.0, 0.0, 0.1),
        ),
        rope=RopeConfig(
            rotary_dim=0 if latent else one_of(0, 0, 4),
            scaling=one_of(RopeScalingConfig(), RopeScalingConfig("yarn", 4.0, 64)),
        ),
        d_ff=one_of(16, 48),
        num_experts=one_of(8, 16, 32),
        experts_per_token=one_of(1, 2, 3),
        router=RouterConfig(
            score=one_of("softmax", "sigmoid"),
            renormalize=one_of(True, False),
            bias=one_of(True, False),
            scaling=one_of(1.0, 2.5),
            num_groups=one_of(1, 2, 4),
        ),
        shared_d_ff=shared_d_ff,
        shared_gate=one_of(False, True) if shared_d_ff else False,
        num_dense_layers=dense,
        dense_d_ff=40 if dense else 0,
        vocab_size=one_of(256, 320, 251),
        tie_embeddings=one_of(True, False),
        embedding_multiplier=one_of(1.0, 12.0),
        residual_multiplier=one_of(1.0, 0.22),
        logits_divisor=one_of(1.0, 6.0),
        dtype=one_of("bfloat16", "bfloat16", "float32"),
    )
    layout = Layout(
        mesh,
        grad_accumulation_steps=one_of(1, 1, 1, 1, 1, 2, 3),
        num_microbatches=one_of(1, 2, 4),
        pipeline_repeats=repeats,
        gather=one_of("step", "layer"),
        remat=one_of("auto", "none", "minimal", "collectives", "full"),
        bubble=one_of("auto", "compute", "skip"),
        batch_split=one_of(0, 0, 0, 1, 1, 2, 3),
        dispatch=DispatchConfig(
            strategy=one_of("dropless", "dropless", "capacity", "ragged"),
            capacity_factor=one_of(1.0, 1.25, 1.5, 3.0),
            expert_axes=one_of(("expert",), ("expert", "tensor")),
            hierarchical=hosts > 1,
            chunks=one_of(1, 1, 1, 1, 2, 3),
            wire_dtype=one_of("compute", "compute", "float8"),
        ),
    )
    batch_size = layout.batch_unit(model) * one_of(1, 1, 2)
    layout = layout.replace(seq_len=mesh.tensor * one_of(4, 12, 33, 80), batch_size=batch_size)
    return model, layout, one_of("train", "train", "train", "prefill")
