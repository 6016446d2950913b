"""Every check of config.py: the message names the field and its value and says what would be right."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moejax import config as config_module
from moejax.checks import ConfigError
from moejax.config import (
    AttentionConfig,
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    DispatchConfig,
    LatentConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RopeScalingConfig,
    RouterConfig,
)
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.train.config import TrainConfig

POSITIVE = {
    ModelConfig: "num_layers d_model d_ff num_experts experts_per_token vocab_size max_seq_len norm_eps "
    "embedding_multiplier residual_multiplier logits_divisor",
    AttentionConfig: "num_heads num_kv_heads head_dim",
    RouterConfig: "scaling num_groups groups_per_token",
    RopeScalingConfig: "low_freq_factor high_freq_factor beta_fast beta_slow",
    DispatchConfig: "capacity_factor chunks",
    BalanceConfig: "window",
    Layout: "seq_len batch_size grad_accumulation_steps num_microbatches pipeline_repeats",
    OptimizerConfig: "learning_rate eps clip_norm",
    DataConfig: "block_steps",
    CheckpointConfig: "every keep",
    TrainConfig: "steps eval_every eval_batches",
}
NOT_NEGATIVE = {
    ModelConfig: "shared_d_ff num_dense_layers dense_d_ff",
    AttentionConfig: "multiplier",
    LatentConfig: "kv_rank q_rank rope_head_dim value_head_dim",
    RopeConfig: "rotary_dim",
    RopeScalingConfig: "original_max_seq_len attention_factor",
    BalanceConfig: "aux_loss_weight sequence_loss_weight z_loss_weight bias_update_rate max_load_cv "
    "max_dropped_fraction max_idle_experts",
    Layout: "batch_split",
    OptimizerConfig: "warmup_steps weight_decay",
    TrainConfig: "sample_tokens memory_limit_bytes",
}
CHOICES = {
    ModelConfig: {"dtype": "'float32', 'bfloat16', 'float16'"},
    AttentionConfig: {"qk_norm": "'none', 'head', 'projection'"},
    RouterConfig: {"score": "'softmax', 'sigmoid'"},
    RopeScalingConfig: {"kind": "'none', 'linear', 'llama3', 'yarn', 'longrope'"},
    DispatchConfig: {"strategy": "'capacity', 'dropless', 'ragged'", "wire_dtype": "'compute', 'float8'"},
    Layout: {
        "gather": "'step', 'layer'",
        "remat": "'auto', 'none', 'minimal', 'collectives', 'full'",
        "bubble": "'auto', 'skip', 'compute'",
    },
}
LATENT = LatentConfig(kv_rank=16, rope_head_dim=8, value_head_dim=16)
RELATIONS = [
    (AttentionConfig, {"num_heads": 6, "num_kv_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
    (AttentionConfig, {"head_dim": 31}, "head_dim=31 must be even: RoPE rotates pairs"),
    (LatentConfig, {"kv_rank": 8}, "rope_head_dim=0 must be positive exactly when kv_rank=8 is"),
    (LatentConfig, {"value_head_dim": 8}, "value_head_dim=8 must be positive exactly when kv_rank=0 is"),
    (LatentConfig, {"q_rank": 8}, "q_rank=8 must be 0 with kv_rank=0"),
    (
        LatentConfig,
        {"kv_rank": 8, "rope_head_dim": 3, "value_head_dim": 8},
        "rope_head_dim=3 must be even: RoPE rotates pairs",
    ),
    (
        AttentionConfig,
        {"latent": LATENT},
        "num_kv_heads=2 must be num_heads=4 with latent.kv_rank=16: each head has keys of its own",
    ),
    (
        AttentionConfig,
        {"num_kv_heads": 4, "latent": LATENT, "qk_norm": "head"},
        "qk_norm='head' must be 'none' with latent.kv_rank=16, which has its own norms",
    ),
    (
        AttentionConfig,
        {"num_kv_heads": 4, "latent": LATENT, "bias": True},
        "bias=True must be False with latent.kv_rank=16",
    ),
    (
        AttentionConfig,
        {"num_kv_heads": 4, "latent": LATENT, "head_dim": 8},
        "latent.rope_head_dim=8 must be less than head_dim=8: it is a part of a head",
    ),
    (
        AttentionConfig,
        {"num_kv_heads": 4, "latent": LATENT, "head_dim": 12},
        "latent.value_head_dim=16 must be at most head_dim=12",
    ),
    (
        ModelConfig,
        {"attention": AttentionConfig(4, 4, 32, latent=LATENT), "rope": RopeConfig(rotary_dim=8)},
        "rope.rotary_dim=8 must be 0 with latent attention, where attention.latent.rope_head_dim=8 says what is "
        "rotated",
    ),
    (RouterConfig, {"groups_per_token": 2}, "groups_per_token=2 must be at most num_groups=1"),
    (
        ModelConfig,
        {"num_experts": 16, "router": RouterConfig(num_groups=3)},
        "router.num_groups=3 must divide num_experts=16 into groups of 2 or more",
    ),
    (
        ModelConfig,
        {"num_experts": 16, "router": RouterConfig(num_groups=16)},
        "router.num_groups=16 must divide num_experts=16 into groups of 2 or more",
    ),
    (
        ModelConfig,
        {"num_experts": 16, "experts_per_token": 5, "router": RouterConfig(num_groups=4)},
        "experts_per_token=5 must be at most 4, the experts in router.groups_per_token=1 of the groups",
    ),
    (RopeConfig, {"rotary_dim": 5}, "rotary_dim=5 must be even: RoPE rotates pairs"),
    (RopeConfig, {"theta": 1.0}, "theta=1.0 must be more than 1"),
    (RopeScalingConfig, {"factor": 0.5}, "factor=0.5 must be at least 1: sequences get longer"),
    (RopeScalingConfig, {"kind": "yarn"}, "original_max_seq_len=0 must be more than 1 with kind='yarn'"),
    (RopeScalingConfig, {"low_freq_factor": 4}, "low_freq_factor=4 must be less than high_freq_factor=4.0"),
    (RopeScalingConfig, {"beta_slow": 33}, "beta_slow=33 must be at most beta_fast=32.0"),
    (RopeScalingConfig, {"short_factors": (1.0, 0.0)}, "short_factors=(1.0, 0.0) must all be more than 0"),
    (
        ModelConfig,
        {"rope": RopeConfig(scaling=RopeScalingConfig("longrope", 2.0, 64, short_factors=(1.0,) * 16))},
        "rope.scaling.long_factors has 0 numbers; with kind='longrope' it must have 16, one for each pair of rotated "
        "dims",
    ),
    (
        ModelConfig,
        {"rope": RopeConfig(scaling=RopeScalingConfig(short_factors=(1.0,)))},
        "rope.scaling.short_factors has 1 numbers; with kind='none' it must have none",
    ),
    (
        ModelConfig,
        {"rope": RopeConfig(rotary_dim=64)},
        "rope.rotary_dim=64 must be at most attention.head_dim=32",
    ),
    (
        ModelConfig,
        {"shared_gate": True},
        "shared_gate=True has no shared expert to weigh with shared_d_ff=0; use shared_gate=False, or a shared_d_ff "
        "above 0",
    ),
    (
        ModelConfig,
        {"experts_per_token": 5, "num_experts": 4},
        "experts_per_token=5 must be at most num_experts=4",
    ),
    (
        ModelConfig,
        {"num_layers": 2, "num_dense_layers": 2, "dense_d_ff": 8},
        "num_dense_layers=2 must be less than num_layers=2",
    ),
    (
        ModelConfig,
        {"num_dense_layers": 1},
        "dense_d_ff=0 must be positive exactly when num_dense_layers=1 is",
    ),
    (ModelConfig, {"dense_d_ff": 8}, "dense_d_ff=8 must be positive exactly when num_dense_layers=0 is"),
    (
        DispatchConfig,
        {"expert_axes": ("tensor",)},
        "expert_axes=('tensor',) must be ('expert',) or ('expert', 'tensor')",
    ),
    (BalanceConfig, {"headroom": 0.9}, "headroom=0.9 must be 1 or more"),
    (BalanceConfig, {"max_rounds": 0.5}, "max_rounds=0.5 must be 1 or more"),
    (BalanceConfig, {"capacity_factors": (2.0, 1.5)}, "capacity_factors=(2.0, 1.5) must be positive and ascending"),
    (BalanceConfig, {"capacity_factors": (0.0, 1.5)}, "capacity_factors=(0.0, 1.5) must be positive and ascending"),
    (BalanceConfig, {"capacity_factors": (1.5, 1.5)}, "capacity_factors=(1.5, 1.5) must be positive and ascending"),
    (DispatchConfig, {"capacity_factor": 1e308}, "capacity_factor=1e+308 must be at most 1,000,000"),
    (BalanceConfig, {"capacity_factors": (1.0, 1e7)}, "capacity_factors=(1.0, 10000000.0) must be at most 1,000,000"),
    (OptimizerConfig, {"final_learning_rate_fraction": 2}, "final_learning_rate_fraction=2 must be between 0 and 1"),
    (OptimizerConfig, {"b1": -0.1}, "b1=-0.1 must be at least 0 and below 1"),
    (OptimizerConfig, {"b2": 1}, "b2=1 must be at least 0 and below 1"),
    (
        DataConfig,
        {"tokenizer_vocab_size": 256},
        "tokenizer_vocab_size=256 must be more than 256: BPE starts from the 256 bytes",
    ),
    (DataConfig, {"separator": "<s>"}, "separator='<s>' needs a tokenizer.json; tokenizer='bytes' has its own"),
    (DataConfig, {"eval_fraction": 0}, "eval_fraction=0 must be between 0 and 1"),
    (DataConfig, {"eval_fraction": 1}, "eval_fraction=1 must be between 0 and 1"),
    (
        TrainConfig,
        {"layouts": (Layout(seq_len=20_000),)},
        "layout.seq_len=20000 must be at most model.max_seq_len=10240",
    ),
    (TrainConfig, {"layouts": ()}, "layouts=() must hold one at least"),
    (
        TrainConfig,
        {"layouts": (Layout(seq_len=64), Layout(seq_len=64))},
        "layouts have seq_len=[64, 64], which must ascend",
    ),
    (
        TrainConfig,
        {"layouts": (Layout(seq_len=64), Layout(MeshConfig(expert=2), 128))},
        "layouts have mesh.num_devices=[1, 2], which must be the same for all",
    ),
    (
        TrainConfig,
        {"layouts": (Layout(seq_len=64), Layout(MeshConfig(hardware="h100"), 128))},
        "layouts have mesh.hardware=['cpu', 'h100'], which must be the same for all",
    ),
    (
        ModelConfig,
        {"experts_per_token": 1},
        "experts_per_token=1 with router.renormalize=True makes every gate 1, so that the router learns nothing from "
        "the text; use router.renormalize=False",
    ),
    (
        ModelConfig,
        {"num_heads": 4, "d_ff": 8, "head_dim": 8, "router_bias": True},
        "num_heads, head_dim, router_bias of ModelConfig moved into groups; write "
        "attention=AttentionConfig(num_heads=4, head_dim=8), router=RouterConfig(bias=True)",
    ),
    (
        TrainConfig,
        {"balance": BalanceConfig(bias_update_rate=0.1)},
        "balance.bias_update_rate=0.1 has no bias to move: use model.router.bias=True, or balance.bias_update_rate=0",
    ),
    (
        TrainConfig,
        {"steps": 50, "optimizer": OptimizerConfig(warmup_steps=50)},
        "optimizer.warmup_steps=50 must be less than steps=50; None is a tenth of the steps",
    ),
]


def each(table):
    return [(config, name) for config, names in table.items() for name in names.split()]


def message_of(config, fields):
    with pytest.raises(ConfigError) as error:
        config(**fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def configs():
    return [Layout, TrainConfig, *(value for value in vars(config_module).values() if dataclasses.is_dataclass(value))]


@pytest.mark.parametrize("config", configs())
def test_defaults_are_valid_and_frozen(config):
    made = config()
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, getattr(made, field))
    assert hash(made) == hash(config())


@pytest.mark.parametrize(("config", "name"), each(POSITIVE))
@pytest.mark.parametrize("value", [0, -1])
def test_positive(config, name, value):
    assert message_of(config, {name: value}) == f"{name}={value} must be positive"


@pytest.mark.parametrize(("config", "name"), each(NOT_NEGATIVE))
def test_not_negative(config, name):
    assert message_of(config, {name: -1}) == f"{name}=-1 must be 0 or more"


@pytest.mark.parametrize(
    ("config", "name", "choices"),
    [(config, name, choices) for config, names in CHOICES.items() for name, choices in names.items()],
)
def test_choices(config, name, choices):
    assert message_of(config, {name: "other"}) == f"{name}='other' must be one of {choices}"


@pytest.mark.parametrize(("config", "fields", "message"), RELATIONS)
def test_relations(config, fields, message):
    assert message_of(config, fields) == message


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (ModelConfig, {"experts_per_token": 1, "router": RouterConfig(renormalize=False)}),
        (ModelConfig, {"experts_per_token": 1, "num_experts": 1}),  # a dense model: there is nothing to learn
        (TrainConfig, {"model": ModelConfig(router=RouterConfig(bias=True))}),  # a bias that stays as it is
        (ModelConfig, {"num_dense_layers": 1, "dense_d_ff": 8}),
    ],
)
def test_what_means_something_is_allowed(config, fields):
    assert config(**fields)


# What has no effect beside some other value, and cannot be refused: the default may be what has none, or the mesh
# decides. The docstring says so in these words.
NO_EFFECT = [
    (DispatchConfig, "Where one device has all experts, no token travels: buffers, `chunks`, `wire_dtype` and"),
    (DispatchConfig, "`mesh.hosts` says how many hosts there are, and virtual CPU devices stand for any number"),
    (BalanceConfig, 'where the strategy is "capacity", the size is `dispatch.capacity_factor` throughout'),
    (BalanceConfig, "otherwise that is where it starts"),
    (BalanceConfig, "0 to leave it as it is"),
    (Layout, "With one stage, `pipeline_repeats` and `bubble` change nothing."),
    (DataConfig, '"bpe" (trained on the corpus to `tokenizer_vocab_size` and cached)'),
    (DataConfig, "Of a plan with several lengths, steps on the same mesh come `block_steps` in a row"),
    (CheckpointConfig, "and at the end"),
]


@pytest.mark.parametrize(("config", "words"), NO_EFFECT)
def test_what_has_no_effect_is_documented(config, words):
    assert words in " ".join(config.__doc__.split())


WRONG_TYPES = [
    (DataConfig, {"paths": Path("t.txt")}, f"paths={Path('t.txt')!r} must be a tuple"),
    (DataConfig, {"paths": None}, "paths=None must be a tuple"),
    (DataConfig, {"paths": "t.txt"}, "paths='t.txt' must be a tuple; write ('t.txt',)"),
    (DataConfig, {"paths": (1,)}, "paths[0]=1 must be a text (str)"),
    (Layout, {"batch_size": 32.0}, "batch_size=32.0 must be a whole number (int)"),
    (ModelConfig, {"d_model": 128.0}, "d_model=128.0 must be a whole number (int)"),
    (ModelConfig, {"d_model": True}, "d_model=True must be a whole number (int)"),
    (ModelConfig, {"tie_embeddings": 1}, "tie_embeddings=1 must be True or False"),
    (ModelConfig, {"dtype": ["bfloat16"]}, "dtype=['bfloat16'] must be one of 'float32', 'bfloat16', 'float16'"),
    (RopeConfig, {"theta": float("inf")}, "theta=inf must be a finite number (float)"),
    (BalanceConfig, {"max_load_cv": float("nan")}, "max_load_cv=nan must be a finite number (float)"),
    (OptimizerConfig, {"warmup_steps": 0.5}, "warmup_steps=0.5 must be a whole number (int)"),
    (TrainConfig, {"steps": 1e4}, "steps=10000.0 must be a whole number (int)"),
    (TrainConfig, {"steps": float("inf")}, "steps=inf must be a whole number (int)"),
    (TrainConfig, {"steps": "10"}, "steps='10' must be a whole number (int)"),
    (TrainConfig, {"steps": np.float32(10)}, "steps=10.0 must be a whole number (int)"),
    (TrainConfig, {"seed": None}, "seed=None must be a whole number (int)"),
    (TrainConfig, {"seed": 2**63}, "seed has 64 bits; it must be within ±2**63"),
    (DispatchConfig, {"capacity_factor": 10**5000}, "capacity_factor has 16610 bits; it must be within ±2**63"),
    (ModelConfig, {"attention": None}, "attention=None must be an AttentionConfig"),
    (TrainConfig, {"model": None}, "model=None must be a ModelConfig"),
    (MeshConfig, {"expert": 2.0}, "expert=2.0 must be a whole number (int)"),
    (Layout, {"mesh": None}, "mesh=None must be a MeshConfig"),
    (Layout, {"dispatch": "ragged"}, "dispatch='ragged' must be a DispatchConfig"),
    (TrainConfig, {"layouts": Layout()}, f"layouts={Layout()!r} must be a tuple"),
    (TrainConfig, {"layouts": (3,)}, "layouts[0]=3 must be a Layout"),
]


@pytest.mark.parametrize(("config", "fields", "message"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused(config, fields, message):
    assert message_of(config, fields) == message


def test_a_number_of_numpy_becomes_pythons():
    assert type(TrainConfig(steps=np.int64(300)).steps) is int


def test_a_bound_of_warnings_may_be_infinite():
    assert BalanceConfig(max_load_cv=float("inf"), max_rounds=float("inf"))


def test_no_number_is_left_unchecked():
    """A new numeric field gets a check here, or a reason why every number will do."""
    any_number = {(DataConfig, "seed"), (TrainConfig, "seed")}
    checked = {*each(POSITIVE), *each(NOT_NEGATIVE), *any_number}
    checked |= {(config, name) for config, fields, _ in RELATIONS for name in fields}
    for config in configs():
        for field in dataclasses.fields(config):
            value = getattr(config(), field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert (config, field.name) in checked, f"{config.__name__}.{field.name} has no test of its check"


def test_capacity_is_the_balanced_load_with_headroom():
    model = ModelConfig(num_experts=16, experts_per_token=2)
    assert DispatchConfig(capacity_factor=1.5).capacity(128, model) == 24
    assert DispatchConfig(capacity_factor=1.25).capacity(10, model) == 2
    assert DispatchConfig(capacity_factor=100.0).capacity(10, model) == 10  # a token visits an expert once at most


def test_a_configuration_of_one_length_changes_its_layout():
    config = TrainConfig(steps=77).with_layout(remat="full", chunks=2, mesh=MeshConfig(4))
    assert config == TrainConfig(
        layouts=(Layout(MeshConfig(4), remat="full", dispatch=DispatchConfig(chunks=2)),), steps=77
    )
    several = TrainConfig(layouts=(Layout(seq_len=64), Layout(seq_len=128)))
    assert several.layout == Layout(seq_len=128)
    with pytest.raises(ConfigError, match="with_layout changes the only layout, and there are 2"):
        several.with_layout(remat="full")


@pytest.mark.parametrize(
    ("name", "home"),
    [("ParallelConfig", "is moejax.layout.Layout now"), ("TrainConfig", "is in moejax.train.config now")],
)
def test_a_name_of_version_0_1_leads_to_its_home(name, home):
    with pytest.raises(ConfigError, match=rf"^moejax\.config\.{name} {home}"):
        getattr(config_module, name)
    with pytest.raises(AttributeError, match=r"module 'moejax\.config' has no attribute 'Nothing'"):
        _ = config_module.Nothing


def test_dense_layers_are_counted_among_the_layers():
    assert ModelConfig(num_layers=4, num_dense_layers=1, dense_d_ff=8).num_moe_layers == 3
