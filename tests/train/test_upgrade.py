"""Records of version 0.1, in run.json and in a checkpoint, become the configuration that they were."""

import copy
import dataclasses
import json

import pytest

from moejax.checks import ConfigError
from moejax.config import (
    AttentionConfig,
    DataConfig,
    DispatchConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RouterConfig,
)
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.train.config import TrainConfig
from moejax.train.record import RECORD_FILE, append_start, upgrade
from moejax.train.resume import CHECKPOINTS, read_record

CONFIG = """{
  "model": {
    "num_layers": 8, "d_model": 128, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "d_ff": 256, "num_experts": 16,
    "experts_per_token": 2, "router_score": "sigmoid", "router_renormalize": false, "router_bias": true,
    "shared_d_ff": 0, "num_dense_layers": 0, "dense_d_ff": 0, "vocab_size": 256, "tie_embeddings": false,
    "max_seq_len": 10240, "rope_theta": 500.0, "norm_eps": 1e-06, "dtype": "bfloat16"
  },
  "dispatch": {
    "strategy": "ragged", "capacity_factor": 2.0, "expert_axes": ["expert"], "hosts": 2, "chunks": 2,
    "payload": "float8"
  },
  "balance": {
    "aux_loss_weight": 0.01, "sequence_loss_weight": 0.0, "z_loss_weight": 0.001, "bias_update_rate": 0.0, "window": 32,
    "headroom": 1.5, "capacity_factors": [1.25, 1.5, 1.75, 2.0, 3.0, 4.0], "max_load_cv": 0.5,
    "max_dropped_fraction": 0.05, "max_rounds": 2.0, "max_idle_experts": 0
  },
  "parallel": {
    "num_microbatches": 4, "repeats": 2, "gather": "layer", "remat": "full", "bubble": "skip", "batch_split": 2
  },
  "optimizer": {
    "learning_rate": 0.01, "warmup_steps": null, "final_learning_rate_fraction": 0.1, "b1": 0.9, "b2": 0.95,
    "eps": 1e-08, "weight_decay": 0.1, "clip_norm": 1.0
  },
  "data": {
    "paths": ["a", "b"], "tokenizer": "bytes", "tokenizer_vocab_size": 4096, "separator": "", "seq_len": 64,
    "batch_size": 128, "eval_fraction": 0.05, "seed": 3, "block_steps": 4
  },
  "checkpoint": {"every": 100, "keep": 3},
  "steps": 400, "accumulate": 2, "eval_every": 100, "eval_batches": 8, "sample_tokens": 128, "memory_limit_bytes": 0,
  "compiler_options": [], "seed": 7
}"""
MESH = """{
  "expert": 4, "pipeline": 2, "tensor": 1, "replica": 1, "hardware": "cpu", "hosts": 1, "host_axis": "expert"
}"""
BUCKETS = """[
  {
    "seq_len": 32, "batch_size": 16,
    "mesh": {
      "expert": 2, "pipeline": 2, "tensor": 1, "replica": 1, "hardware": "cpu", "hosts": 1, "host_axis": "expert"
    },
    "parallel": {
      "num_microbatches": 2, "repeats": 1, "gather": "step", "remat": "auto", "bubble": "auto", "batch_split": 0
    },
    "dispatch": {
      "strategy": "dropless", "capacity_factor": 1.5, "expert_axes": ["expert", "tensor"], "hosts": 1, "chunks": 1,
      "payload": "full"
    },
    "accumulate": 1
  },
  {
    "seq_len": 64, "batch_size": 8,
    "mesh": {
      "expert": 2, "pipeline": 1, "tensor": 2, "replica": 1, "hardware": "cpu", "hosts": 1, "host_axis": "expert"
    },
    "parallel": {
      "num_microbatches": 1, "repeats": 1, "gather": "layer", "remat": "full", "bubble": "auto", "batch_split": 0
    },
    "dispatch": {
      "strategy": "ragged", "capacity_factor": 2.0, "expert_axes": ["expert", "tensor"], "hosts": 1, "chunks": 2,
      "payload": "float8"
    },
    "accumulate": 2
  }
]"""
EXPECTED = TrainConfig(
    model=ModelConfig(
        num_layers=8,
        attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=16),
        router=RouterConfig(score="sigmoid", renormalize=False, bias=True),
        rope=RopeConfig(theta=500.0),
    ),
    layouts=(
        Layout(
            MeshConfig(expert=4, pipeline=2, hosts=2),
            seq_len=64,
            batch_size=128,
            grad_accumulation_steps=2,
            num_microbatches=4,
            pipeline_repeats=2,
            gather="layer",
            remat="full",
            bubble="skip",
            batch_split=2,
            dispatch=DispatchConfig("ragged", 2.0, ("expert",), hierarchical=True, chunks=2, wire_dtype="float8"),
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=0.01),
    data=DataConfig(paths=("a", "b"), seed=3, block_steps=4),
    steps=400,
    seed=7,
)
PLAN = dataclasses.replace(
    EXPECTED,
    layouts=(
        Layout(MeshConfig(expert=2, pipeline=2), 32, 16, num_microbatches=2),
        Layout(
            MeshConfig(expert=2, tensor=2),
            seq_len=64,
            batch_size=8,
            grad_accumulation_steps=2,
            num_microbatches=1,
            gather="layer",
            remat="full",
            dispatch=DispatchConfig("ragged", 2.0, chunks=2, wire_dtype="float8"),
        ),
    ),
)
NEW = [  # what no model of version 0.1 had
    f"config.model.{field}"
    for field in (
        "attention.qk_norm=none", "attention.bias=False", "attention.output_bias=False", "attention.multiplier=0.0",
        "attention.latent", "rope.rotary_dim=0", "rope.scaling", "router.scaling=1.0", "router.num_groups=1",
        "router.groups_per_token=1", "shared_gate=False", "embedding_multiplier=1.0",
        "residual_multiplier=1.0", "logits_divisor=1.0",
    )
]  # fmt: skip
CASES = {"one layout": ("[]", EXPECTED), "a plan": (BUCKETS, PLAN)}


def start(buckets="[]", **mesh):
    """An entry of run.json as version 0.1 wrote it."""
    parts = {"config": CONFIG, "mesh": MESH, "buckets": buckets}
    record = {name: json.loads(text) for name, text in parts.items()} | {"resumed_from": 0, "data_fingerprint": "f00d"}
    record["mesh"] |= mesh
    return record


@pytest.mark.parametrize(("buckets", "expected"), CASES.values(), ids=CASES)
def test_run_json_is_the_run_that_it_was(buckets, expected, tmp_path):
    append_start(tmp_path, start(buckets))
    record = read_record(tmp_path)
    assert record.config == expected
    line = f"{tmp_path / RECORD_FILE}: {', '.join(NEW)} taken from the defaults: the record has no such field"
    assert (record.data_fingerprint, record.has_checkpoint, record.lines) == ("f00d", False, (line,))


@pytest.mark.parametrize(("buckets", "expected"), CASES.values(), ids=CASES)
def test_a_checkpoints_metadata_is_the_run_that_it_was(buckets, expected, tmp_path):
    """Its mesh has the sizes of the axes alone."""
    path = tmp_path / CHECKPOINTS / "5" / "metadata" / "metadata"
    path.parent.mkdir(parents=True)
    metadata = {"config": json.loads(CONFIG), "mesh": {"expert": 4, "pipeline": 2, "tensor": 1}}
    metadata |= {"buckets": json.loads(buckets), "draws": [], "data": "f00d", "versions": {"jax": "0.10.2"}}
    path.write_text(json.dumps(metadata))
    record = read_record(tmp_path)
    assert record.config == expected
    assert (record.data_fingerprint, record.has_checkpoint) == ("f00d", True)
    assumed = "replica=1 hardware=cpu host_axis=expert" if buckets == "[]" else ""
    defaults = ", ".join([*NEW, *(f"config.layouts[0].mesh.{field}" for field in assumed.split())])
    assert record.lines == (f"{path}: {defaults} taken from the defaults: the record has no such field",)


@pytest.mark.parametrize(
    ("mesh", "hosts", "expected", "hierarchical"),
    [
        ({}, 1, MeshConfig(4, 2), False),
        ({}, 4, MeshConfig(4, 2, hosts=4), True),  # virtual devices stood for any number of hosts
        ({"replica": 2}, 2, MeshConfig(4, 2, replica=2, hosts=4), True),
        ({"hardware": "h100", "hosts": 2}, 1, MeshConfig(4, 2, hardware="h100", hosts=2), False),
        ({"hardware": "h100", "hosts": 2}, 2, MeshConfig(4, 2, hardware="h100", hosts=2), True),
        ({"hardware": "h100", "hosts": 4}, 2, MeshConfig(4, 2, hardware="h100", hosts=4), True),
    ],
)
def test_the_hosts_of_a_dispatch_are_the_meshs(tmp_path, mesh, hosts, expected, hierarchical):
    record = start(**mesh)
    record["config"]["dispatch"]["hosts"] = hosts
    append_start(tmp_path, record)
    layout = read_record(tmp_path).config.layout
    assert (layout.mesh, layout.dispatch.hierarchical) == (expected, hierarchical)
    assert (layout.exchange_hosts > 1) == hierarchical


def test_a_record_stays_as_it_is_and_one_of_today_needs_no_upgrade():
    for record in (start(), start(BUCKETS)):
        before = copy.deepcopy(record)
        upgraded = upgrade(record)
        assert record == before
        assert upgrade({"config": upgraded}) == upgraded


def test_one_that_lacks_a_field_is_one_line(tmp_path):
    record = start()
    del record["config"]["accumulate"]
    append_start(tmp_path, record)
    message = rf"^{tmp_path / RECORD_FILE} is of another version, or was changed: KeyError\('accumulate'\)"
    with pytest.raises(ConfigError, match=message):
        read_record(tmp_path)
