"""What XLA is told: the table, what changes it, and that it reaches the programs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import MODEL

from moejax import compiler
from moejax.checks import ConfigError
from moejax.compiler import ONCE, PROCESS, PROGRAM, check_accepted, in_force, program_options
from moejax.layout import Layout
from moejax.mesh import MeshConfig, abstract_mesh, build_mesh
from moejax.overrides import apply_overrides
from moejax.program import Program
from moejax.topology import TARGETS
from moejax.train.config import TrainConfig
from moejax.train.sample import generate
from moejax.train.step import make_train_step

CONFIG = TrainConfig(model=MODEL, layouts=(Layout(seq_len=8, batch_size=4),))
MERGER = "xla_gpu_dot_merger_threshold_mb"


def make_step(*items):
    config = dataclasses.replace(CONFIG, compiler_options=items)
    return make_train_step(config.make_program(devices=jax.devices()[:1]))


@pytest.mark.parametrize("platform", PROGRAM)
def test_every_option_says_why_and_from_where(platform):
    options = PROGRAM[platform] + PROCESS[platform] + ONCE
    assert len({option.name for option in options}) == len(options)
    for option in options:
        assert option.name.startswith("xla_")
        assert all((option.value, option.reason, option.source))
        assert not set(option.reason + option.source) & {"\n"}


@pytest.mark.parametrize("hardware", ["cpu", "a100_64gb", "h100", "tpu_v5p"])
def test_a_step_is_compiled_with_the_table_of_its_devices(hardware):
    layout = Layout(MeshConfig(hardware=hardware))
    options = Program(MODEL, layout, abstract_mesh(layout.mesh)).xla_options
    assert options == program_options(layout.mesh.platform)
    assert options.keys() == {option.name for option in PROGRAM[layout.mesh.platform]}


def test_items_come_after_the_table_and_the_later_wins():
    assert program_options("gpu")[MERGER] == "0"
    assert program_options("gpu", (f"{MERGER}=8", f"{MERGER}=16"))[MERGER] == "16"
    assert MERGER not in program_options("gpu", (f"{MERGER}=8", f"{MERGER}=default"))
    assert program_options("cpu", ("a=default", "b=")) == {"b": ""}
    assert program_options("cpu", ("a=b+c=d",)) == {"a": "b,c=d"}
    assert program_options("cpu", ("a=true", "b=false", "c=1")) == {"a": True, "b": False, "c": "1"}
    option = in_force("tpu", ("xla_tpu_enable_async_all_to_all=false",))[-1]
    assert (option.value, option.source) == ("false", "compiler_options")


def test_items_are_set_by_an_override():
    changed = apply_overrides(CONFIG, {"compiler_options": "xla_disable_hlo_passes=dce+cse, xla_gpu_x=default"})
    assert changed.compiler_options == ("xla_disable_hlo_passes=dce+cse", "xla_gpu_x=default")


@pytest.mark.parametrize("item", ["xla_gpu_x", "=true", "--xla_gpu_x=true", ""])
def test_what_is_no_option_is_refused_when_the_config_is_made(item):
    with pytest.raises(ConfigError, match=f"^compiler_options item {item!r} must be name=value, such as "):
        TrainConfig(compiler_options=("xla_gpu_x=1", item))


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ("xla_gpu_no_such_thing=1", "No such compile option: 'xla_gpu_no_such_thing'"),
        ("xla_gpu_enable_latency_hiding_scheduler=maybe", ".*'maybe' is not a valid bool value"),
        (f"{MERGER}=true", ".*"),
    ],
)
def test_what_the_compiler_refuses_is_named_before_a_step_is_traced(item, why):
    with pytest.raises(ConfigError, match=rf"^compiler option {item} is refused by the cpu compiler of .* \({why}\); "):
        make_step("xla_disable_hlo_passes=cse", item)


@pytest.mark.full
def test_options_reach_the_step_and_the_sampler(monkeypatch):
    """A wrong one that nobody stopped before is refused by the compiler of each."""
    monkeypatch.setattr(compiler, "check_accepted", lambda mesh, options: None)
    step = make_step("xla_no_such_thing=1")
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.state_shapes.params)
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_thing'")
    with refused:
        step.lower().compile()
    with refused:
        generate(step.program, params, [1], 1, vocab_size=2)


def test_a_smaller_step_keeps_them():
    step = make_step("xla_disable_hlo_passes=fusion")
    assert (
        step.with_capacity(2.0).program.xla_options == step.program.xla_options == {"xla_disable_hlo_passes": "fusion"}
    )
    assert step.program.without_drops().xla_options == step.program.xla_options


def test_accepted_options_pass_on_every_device():
    check_accepted(build_mesh(MeshConfig(expert=16), jax.devices()), {"xla_disable_hlo_passes": "cse,dce"})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_devices_own_compilers_accept_the_table_and_name_what_they_refuse(target):
    hardware = target.rsplit("_", 1)[0]
    program = (
        "import json, moejax.compiler as compiler\n"
        "from moejax.config import ConfigError\n"
        "from moejax.mesh import MeshConfig, build_mesh, platform\n"
        "from moejax.topology import compile_only_devices\n"
        f"mesh = build_mesh(MeshConfig(expert=16, hardware={hardware!r}), compile_only_devices({target!r}))\n"
        "compiler.check_accepted(mesh, compiler.program_options(platform(mesh)) | compiler.for_jit(compiler.ONCE))\n"
        "try:\n"
        "    compiler.check_accepted(mesh, {'xla_no_such_thing': True})\n"
        "except ConfigError as error:\n"
        "    print(json.dumps([platform(mesh), str(error)]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    platform, refusal = json.loads(done.stdout.splitlines()[-1])
    assert platform == {"cuda": "gpu", "tpu": "tpu"}[TARGETS[target].platform]
    assert refusal.startswith(f"compiler option xla_no_such_thing=true is refused by the {platform} compiler of jax ")
