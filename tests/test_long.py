"""Long sequences and bfloat16: the program runs, it does not only compile."""

import jax
import numpy as np
import pytest

from moejax.config import AttentionConfig, ModelConfig, OptimizerConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.program import Program
from moejax.train.step import make_train_step

MODEL = ModelConfig(num_layers=2, d_model=32, attention=AttentionConfig(2, 2, 8), d_ff=32, num_experts=8, vocab_size=64)


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "batch_size", "bubble"), [(10_240, 2, "skip"), (32, 32, "compute")])
def test_a_step_in_bfloat16_lowers_the_loss(seq_len, batch_size, bubble):
    layout = Layout(MeshConfig(2, 2, 2), seq_len, batch_size, num_microbatches=1, bubble=bubble)
    program = Program(MODEL, layout, build_mesh(layout.mesh, jax.devices()[:8]))
    assert program.resolved.remat == ("full" if seq_len > 2048 else "none")
    train_step = make_train_step(program, OptimizerConfig(warmup_steps=0, learning_rate=0.003), steps=10)
    state = train_step.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (batch_size, seq_len), dtype=np.int32)
    batch = train_step.put_batch({"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)})
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["cross_entropy"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.01
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
