"""train.py with the --workdir of a run: its record decides, and flags change only what they name."""

import dataclasses

import pytest

from experiments import train
from experiments.shared import loading, resuming
from moejax.checks import ConfigError
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides
from moejax.train.config import TrainConfig
from moejax.train.record import append_start
from moejax.train.resume import compare, read_record

MESH = MeshConfig(2, 2, 1)
CONFIG = apply_overrides(
    TrainConfig(layouts=(Layout(MESH, remat="full"),)),
    {"steps": "12", "optimizer.warmup_steps": "2", "optimizer.learning_rate": "0.01", "model.vocab_size": "512"},
)
PLAN = dataclasses.replace(CONFIG, layouts=(Layout(MESH, 32, 16), Layout(MeshConfig(4), 64, 8)))


def record(workdir, config=CONFIG):
    workdir.mkdir(exist_ok=True)
    append_start(workdir, {"config": dataclasses.asdict(config), "data_fingerprint": "f00d"})
    return f"--workdir={workdir}"


@pytest.fixture
def flags():
    return resuming.RunFlags("Trains.", first={})


def test_with_the_workdir_alone_it_is_the_same_run(flags, tmp_path):
    assert flags.parse_config(["train.py", record(tmp_path / "run")]) == CONFIG


def test_a_plans_run_needs_no_plan(flags, tmp_path):
    workdir = record(tmp_path / "run", PLAN)
    assert flags.parse_config(["train.py", workdir]) == PLAN
    assert flags.parse_config(["train.py", workdir, "--config.steps=20"]) == dataclasses.replace(PLAN, steps=20)
    for flag in ("--config.layout.grad_accumulation_steps", "--mesh.expert"):
        why = r"the run in --workdir=\S+ follows a plan, which decides it; "
        with pytest.raises(ConfigError, match=f"^{flag} cannot be changed: {why}"):
            flags.parse_config(["train.py", workdir, f"{flag}=2"])


def test_a_plan_that_is_given_replaces_the_runs_layouts(flags, tmp_path):
    plan = tmp_path / "plan.py"
    plan.write_text("from moejax import Layout\ndef get_layouts():\n    return (Layout(seq_len=8),)\n")
    for config in (CONFIG, PLAN):
        workdir = record(tmp_path / "run", config)
        again = flags.parse_config(["train.py", workdir, f"--plan={plan}"])
        assert again == dataclasses.replace(config, layouts=(Layout(seq_len=8),))


def test_flags_change_only_what_they_name(flags, tmp_path):
    workdir = record(tmp_path / "run")
    changes = ["--config.steps=20", "--config.layout.seq_len=64", "--mesh.tensor=2", "--data=a"]
    texts = {"steps": "20", "layout.seq_len": "64", "layout.mesh.tensor": "2", "data.paths": "a"}
    assert flags.parse_config(["train.py", workdir, *changes]) == apply_overrides(CONFIG, texts)
    assert flags.parse_config(["train.py", workdir, "--mesh=single"]) == CONFIG.with_layout(mesh=MeshConfig())
    expected = loading.load_config("tiny").with_layout(mesh=MESH)
    assert flags.parse_config(["train.py", workdir, "--config=tiny"]) == expected


def test_a_tokenizer_that_is_given_again_leaves_the_vocabulary(flags, tmp_path):
    config = flags.parse_config(["train.py", record(tmp_path / "run"), "--tokenizer=bytes"])
    assert config.model.vocab_size == 512


def test_a_folder_without_a_run_starts_one(flags, tmp_path):
    (tmp_path / "notes.txt").write_text("something else")
    expected = loading.load_config("quickstart").with_layout(mesh=loading.load_mesh_config("cpu_16"))
    for workdir in (tmp_path, tmp_path / "new"):
        assert flags.parse_config(["train.py", f"--workdir={workdir}"]) == expected
    assert flags.parse_config(["train.py"]) == expected


def test_a_record_of_the_shape_of_a_mesh_alone_says_what_is_assumed(flags, tmp_path):
    start = {"config": dataclasses.asdict(CONFIG), "data_fingerprint": "f00d"}
    start["config"]["layouts"][0]["mesh"] = {"expert": 4, "pipeline": 1, "tensor": 2}
    append_start(tmp_path, start)
    assert flags.parse_config(["train.py", f"--workdir={tmp_path}"]).layout.mesh == MeshConfig(4, 1, 2)
    mesh = "config.layouts[0].mesh"
    assumed = f"{mesh}.replica=1, {mesh}.hardware=cpu, {mesh}.hosts=1, {mesh}.host_axis=expert"
    assert read_record(tmp_path).lines == (
        f"{tmp_path / 'run.json'}: {assumed} taken from the defaults: the record has no such field",
    )


@pytest.mark.parametrize(("more", "override"), [((), False), (("--override",), True)])
def test_the_trainer_gets_all_that_the_record_needs(tmp_path, monkeypatch, more, override):
    class StopError(Exception):
        pass

    def stop(config, workdir, around_step, *, override):
        raise StopError(config, workdir, override)

    monkeypatch.setattr(train, "Trainer", stop)
    monkeypatch.setattr(train.FLAGS.__class__, "setup_jax", lambda *_: None)
    monkeypatch.setattr(train, "build_mesh", lambda _: None)  # of 4 devices
    with pytest.raises(StopError) as stopped:
        train.main(["train.py", record(tmp_path / "run"), *more])
    assert stopped.value.args == (CONFIG, tmp_path / "run", override)


@pytest.mark.parametrize("config", [CONFIG, PLAN], ids=["one layout", "a plan"])
def test_a_run_that_is_asked_for_again_is_the_same(config, flags, tmp_path):
    workdir = record(tmp_path / "run", config)
    assert compare(read_record(tmp_path / "run").config, flags.parse_config(["train.py", workdir])) == []
