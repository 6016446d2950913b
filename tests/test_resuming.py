"""train.py with the --workdir of a run: its record decides, and flags change only what they name."""

import dataclasses

import jax
import pytest

from experiments import train
from experiments.shared import loading, resuming
from moejax.config import ConfigError, TrainConfig
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides
from moejax.train.record import append_start
from moejax.train.resume import compare, read_record
from moejax.train.schedule import Bucket

CONFIG = apply_overrides(
    TrainConfig(),
    {"steps": "12", "optimizer.warmup_steps": "2", "optimizer.learning_rate": "0.01", "model.vocab_size": "512"},
)
MESH = MeshConfig(2, 2, 1)
BUCKETS = (Bucket(32, 16, MESH), Bucket(64, 8, MeshConfig(4)))


def record(workdir, config=CONFIG, mesh=None, buckets=()):
    buckets = [dataclasses.asdict(bucket) for bucket in buckets]
    mesh = mesh or dataclasses.asdict(MESH)
    start = {"config": dataclasses.asdict(config), "mesh": mesh, "buckets": buckets, "data_fingerprint": "f00d"}
    workdir.mkdir(exist_ok=True)
    append_start(workdir, start)
    return f"--workdir={workdir}"


@pytest.fixture
def flags():
    return resuming.RunFlags("Trains.", first={})


def test_with_the_workdir_alone_it_is_the_same_run(flags, tmp_path):
    assert flags.parse_configs(["train.py", record(tmp_path / "run")]) == (CONFIG, MESH)
    assert flags.plan_buckets() == ()


def test_a_plans_run_needs_no_plan(flags, tmp_path):
    config = BUCKETS[-1].applied(CONFIG)
    workdir = record(tmp_path / "run", config, buckets=BUCKETS)
    again, mesh_config = flags.parse_configs(["train.py", workdir])
    assert (flags.plan_buckets(), mesh_config) == (BUCKETS, MESH)
    assert BUCKETS[-1].applied(again) == config
    with pytest.raises(
        ConfigError, match=r"^--config.accumulate cannot be changed: the run in --workdir=\S+ is a plan"
    ):
        flags.parse_configs(["train.py", workdir, "--config.accumulate=2"])


def test_flags_change_only_what_they_name(flags, tmp_path):
    workdir = record(tmp_path / "run")
    config, mesh_config = flags.parse_configs(["train.py", workdir, "--config.steps=20", "--mesh.tensor=2", "--data=a"])
    assert config == apply_overrides(CONFIG, {"steps": "20", "data.paths": "a"})
    assert mesh_config == dataclasses.replace(MESH, tensor=2)
    assert flags.parse_configs(["train.py", workdir, "--mesh=single"]) == (CONFIG, MeshConfig())
    assert flags.parse_configs(["train.py", workdir, "--config=tiny"]) == (loading.load_config("tiny"), MESH)


def test_a_tokenizer_that_is_given_again_leaves_the_vocabulary(flags, tmp_path):
    config, _ = flags.parse_configs(["train.py", record(tmp_path / "run"), "--tokenizer=bytes"])
    assert config.model.vocab_size == 512


def test_a_folder_without_a_run_starts_one(flags, tmp_path):
    (tmp_path / "notes.txt").write_text("something else")
    expected = loading.load_config("quickstart"), loading.load_mesh_config("cpu_16")
    for workdir in (tmp_path, tmp_path / "new"):
        assert flags.parse_configs(["train.py", f"--workdir={workdir}"]) == expected
    assert flags.parse_configs(["train.py"]) == expected


def test_a_record_of_the_shape_of_a_mesh_alone_says_what_is_assumed(flags, tmp_path, capsys):
    workdir = record(tmp_path / "run", mesh={"expert": 4, "pipeline": 1, "tensor": 2})
    assert flags.parse_configs(["train.py", workdir])[1] == MeshConfig(4, 1, 2)
    assumed = "mesh.replica=1, mesh.hardware=cpu, mesh.hosts=1, mesh.host_axis=expert"
    line = f"the record in {tmp_path / 'run'}: {assumed} taken from the defaults: the record has no such field\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("more", "override"), [((), False), (("--override",), True)])
def test_the_trainer_gets_all_that_the_record_needs(tmp_path, monkeypatch, more, override):
    class StopError(Exception):
        pass

    def stop(config, mesh, workdir, buckets, around_step, *, mesh_config, override):
        raise StopError(config, dict(mesh.shape), workdir, buckets, mesh_config, override)

    monkeypatch.setattr(train, "Trainer", stop)
    monkeypatch.setattr(train.FLAGS.__class__, "setup_jax", lambda *_: None)
    monkeypatch.setattr(train, "build_mesh", lambda config: jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4]))
    with pytest.raises(StopError) as stopped:
        train.main(["train.py", record(tmp_path / "run"), *more])
    assert stopped.value.args == (CONFIG, {"expert": 4}, tmp_path / "run", (), MESH, override)


def test_a_run_that_is_asked_for_again_is_the_same(flags, tmp_path):
    """What parse_configs and describe_start do with a plan must meet in the record."""
    record(tmp_path / "run", BUCKETS[-1].applied(CONFIG), buckets=BUCKETS)
    found = read_record(tmp_path / "run").run
    config, mesh_config = flags.parse_configs(["train.py", f"--workdir={tmp_path / 'run'}"])
    again = type(found).of(config, dataclasses.asdict(mesh_config), flags.plan_buckets())
    assert compare(found, again) == []
