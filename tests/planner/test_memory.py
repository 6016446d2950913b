"""Predicted peak memory: what it must do whatever the figures are, and what the compilers said."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiers import full_unless

from experiments.shared import audit_cases
from moejax.config import AttentionConfig, DispatchConfig, LatentConfig, ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner import memory
from moejax.planner.memory import predict_memory
from moejax.presets import moe_16x10b, tiny
from moejax.profiling.step_counts import count_step
from moejax.program import Program
from moejax.train.step import make_train_step

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("full", "collectives", "minimal", "none")
MESHES = (
    MeshConfig(expert=8, pipeline=2, hardware="h100"),
    MeshConfig(expert=4, pipeline=2, tensor=2, hardware="tpu_v5p"),
    MeshConfig(expert=2, pipeline=4, tensor=2, hardware="a100_64gb"),
)


MODEL = moe_16x10b()
EVERYTHING = {
    "attention": AttentionConfig(4, 4, 32, qk_norm="projection", bias=True, output_bias=True),
    "num_dense_layers": 2, "dense_d_ff": 64, "shared_d_ff": 128, "shared_gate": True,
}  # fmt: skip
WITH_LATENT = EVERYTHING | {"attention": AttentionConfig(4, 4, 48, latent=LatentConfig(64, 32, 16, 32))}


@pytest.fixture(params=MESHES, ids=lambda mesh: f"{mesh.expert}x{mesh.pipeline}x{mesh.tensor}_{mesh.hardware}")
def layout(request):
    return Layout(request.param, 1024, 64, num_microbatches=4, remat="none")


def peak(layout, mode="train"):
    return predict_memory(MODEL, layout, mode).peak_bytes


def rising(values):
    return all(a < b for a, b in itertools.pairwise(values))


def test_the_peak_is_the_sum_of_its_categories(layout):
    found = predict_memory(MODEL, layout)
    assert found.peak_bytes == sum(found.categories.values())
    assert all(size >= 0 for size in found.categories.values())
    assert set(found.categories) == {field.name for field in dataclasses.fields(found)} - {"moment"}


def test_stronger_rematerialization_takes_less(layout):
    assert rising([peak(layout.replace(remat=policy)) for policy in POLICIES[:-1]])
    assert peak(layout.replace(remat="minimal")) <= peak(layout)


def test_more_microbatches_save_fewer_activations(layout):
    saved = [predict_memory(MODEL, layout.replace(num_microbatches=n)).activations for n in (8, 4, 2, 1)]
    assert rising(saved)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_sequences_and_longer_ones_take_more(layout, policy):
    layout = layout.replace(remat=policy)
    assert rising([peak(layout.replace(batch_size=size)) for size in (32, 64, 128, 256)])
    assert rising([peak(layout.replace(seq_len=length)) for length in (256, 1024, 4096, 8192)])


def test_more_layers_and_larger_experts_take_more(layout):
    for name, values in {
        "num_layers": (16, 32, 64),
        "d_ff": (2048, 4096, 8192),
        "vocab_size": (32_000, 64_000),
    }.items():
        variants = [dataclasses.replace(MODEL, **{name: value}) for value in values]
        assert rising([predict_memory(variant, layout).peak_bytes for variant in variants])


def test_larger_buffers_take_more(layout):
    assert rising([peak(layout.replace(capacity_factor=factor)) for factor in (1.0, 1.5, 2.0, 4.0)])


def test_gathering_layer_by_layer_takes_less(layout):
    assert peak(layout.replace(gather="layer")) < peak(layout)


def test_replicas_with_their_own_sequences_change_nothing(layout):
    mesh = dataclasses.replace(layout.mesh, replica=4)
    assert peak(layout.replace(mesh=mesh, batch_size=4 * layout.batch_size)) == peak(layout)


def test_decoding_holds_keys_and_values_of_all_that_was_read(layout):
    longer = layout.replace(seq_len=2 * layout.seq_len)
    found, m = predict_memory(MODEL, layout, "decode"), MODEL
    kv_dim = 2 * m.attention.num_kv_heads * m.attention.head_dim
    whole = m.num_layers * layout.batch_size * (layout.seq_len + 1) * kv_dim * 2
    assert found.kv_cache == whole / layout.mesh.num_devices
    uneven = dataclasses.replace(MODEL, num_layers=m.num_layers + 1)  # which one of two stages has
    wider = predict_memory(uneven, layout, "decode").kv_cache / found.kv_cache
    assert wider == pytest.approx((m.num_layers / layout.mesh.pipeline + 1) / (m.num_layers / layout.mesh.pipeline))
    assert 1.99 < predict_memory(MODEL, longer, "decode").kv_cache / found.kv_cache < 2
    assert found.optimizer == found.gradients == 0
    assert found.peak_bytes < peak(layout, "prefill") < peak(layout)


def test_latents_are_all_that_decoding_holds_whatever_is_split_over_tensor(layout):
    model = dataclasses.replace(MODEL, attention=AttentionConfig(24, 24, 192, latent=LatentConfig(512, 0, 64, 128)))
    whole = model.num_layers * layout.batch_size * (layout.seq_len + 1) * (512 + 64) * 2
    mesh = layout.mesh
    assert predict_memory(model, layout, "decode").kv_cache == whole / (mesh.expert * mesh.pipeline)


@pytest.mark.parametrize("sizes", [(4, 2, 2), (2, 2, 4), (16, 1, 1)], ids=str)
@pytest.mark.parametrize("expert_axes", [("expert",), ("expert", "tensor")], ids=len)
@pytest.mark.parametrize("changes", [{}, EVERYTHING, WITH_LATENT], ids=["plain", "everything", "latent"])
def test_what_is_stored_is_counted_exactly(sizes, expert_axes, changes):
    """Parameters and moments against the train state's shards; what is replicated is small."""
    model = dataclasses.replace(tiny(), **{"num_layers": 6, "attention": AttentionConfig(4, 4, 32)} | changes)
    layout = Layout(MeshConfig(*sizes), 64, 32).replace(expert_axes=expert_axes)
    shapes = make_train_step(Program(model, layout)).state_shapes
    held = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((shapes.params, shapes.opt_state))
    )
    found = predict_memory(model, layout)
    assert found.parameters + found.optimizer == pytest.approx(held, rel=2e-3)


NORMED = dataclasses.replace(MODEL.attention, qk_norm="projection", bias=True, output_bias=True)
LATENT = AttentionConfig(24, 24, 192, latent=LatentConfig(512, 1536, 64, 128))
COUNTED = {
    "none": {"remat": "none"},
    "minimal_tpu": {"remat": "minimal", "hardware": "tpu_v5p"},
    "collectives_split_experts": {"remat": "collectives", "expert_axes": ("expert",)},
    "minimal_ragged": {"remat": "minimal", "strategy": "ragged"},
    "full_repeats": {"remat": "full", "pipeline_repeats": 2},
    "shared_and_dense": {"remat": "minimal", "shared_d_ff": 2048, "num_dense_layers": 4, "dense_d_ff": 8192},
    "norms_of_heads": {"remat": "none", "attention": dataclasses.replace(NORMED, qk_norm="head")},
    "latent": {"remat": "none", "attention": LATENT},
    "latent_minimal": {"remat": "minimal", "attention": LATENT, "num_dense_layers": 4, "dense_d_ff": 8192},
    "norms_and_a_gate": {"remat": "minimal", "attention": NORMED, "shared_d_ff": 2048, "shared_gate": True},
}


@pytest.mark.parametrize(
    "choices", full_unless([COUNTED["none"], COUNTED["shared_and_dense"]].__contains__, COUNTED.values()), ids=COUNTED
)
def test_what_is_saved_is_what_the_program_stacks(choices):
    """The closed form of a policy against the jaxpr, but for integers, which `none` saves some of."""
    parts = {
        kind: {name: value for name, value in choices.items() if name in kind.__dataclass_fields__}
        for kind in (ModelConfig, MeshConfig, Layout, DispatchConfig)
    }
    mesh = MeshConfig(**{"expert": 4, "pipeline": 2, "tensor": 2, "hardware": "h100"} | parts[MeshConfig])
    model = dataclasses.replace(MODEL, **parts[ModelConfig])
    layout = Layout(mesh, 1024, 64).replace(**parts[Layout], **parts[DispatchConfig])
    sizes = memory.Sizes(model, layout)
    stacks = count_step(model, layout).saved
    loops = {"pipeline": (sizes.ticks, sizes.chunk), "dense": (model.num_dense_layers,)}
    found = {name: sum(b for (_, shape, _), b in stacks.items() if shape[: len(dims)] == dims and len(shape) > 3)
             for name, dims in loops.items() if dims != (0,)}  # fmt: skip
    assert found["pipeline"] == pytest.approx(sizes.ticks * sizes.chunk * sizes.saved_layer, rel=1e-3)
    if model.num_dense_layers:
        assert found["dense"] == pytest.approx(sizes.saved_dense, rel=1e-3)


AUDITED = audit_cases.recorded()


def test_the_record_has_what_was_promised():
    """Three models, four lengths, two targets, and a third of the cases held out."""
    cases = [audited.case for audited in AUDITED]
    assert len(cases) >= 40
    assert len({case.name for case in cases}) == 3
    assert {case.layout.seq_len for case in cases} == {128, 1024, 4096, 10_240}
    assert {case.layout.remat for case in cases} == set(POLICIES)
    assert sum(not case.used_for_fitting for case in cases) >= len(cases) / 3 - 1


def test_predictions_are_near_what_was_compiled():
    """The record is the compilers' of one jax version; experiments/audit.py makes it anew."""
    for name, group in audit_cases.summary(AUDITED).items():
        assert group["mean_error"] < 0.05, name
        assert group["worst_error"] < 0.10, name


@pytest.mark.slow
def test_the_compiler_still_says_so():
    """In a process of its own, for the compiler reads its environment when it is loaded."""
    command = [sys.executable, ROOT / "experiments/audit.py", "--lines=2,6", "--max_error=0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["groups"]["all"]["cases"] == 2
