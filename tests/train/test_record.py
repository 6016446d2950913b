"""A run's record: whole at every start, kept when it is resumed, right about git, and enough to start again from."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.overrides import apply_overrides, split_overrides
from moejax.train import record
from moejax.train.config import TrainConfig
from moejax.train.record import append_start, describe_start, git_state, read_starts

MESH = MeshConfig(expert=2, pipeline=2, tensor=1)
LAYOUTS = (Layout(MESH, 128, 32, num_microbatches=4), Layout(MESH, 256, 16))


def describe(config=None, resumed_from=0):
    mesh = build_mesh(MESH, jax.devices()[:4])
    return describe_start(config or TrainConfig(), mesh, resumed_from=resumed_from, data_fingerprint="f00d")


def git(folder, *command):
    name = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    return subprocess.run(["git", "-C", folder, *name, *command], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path):
    """With one file `package/module.py`, committed, and `ignored/` as a virtual environment would be."""
    git(tmp_path, "init", "--quiet")
    for folder in ("package", "ignored"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_start_says_what_ran_and_is_json(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config.seed=3"])
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    config = dataclasses.replace(TrainConfig(layouts=LAYOUTS), seed=3)
    start = json.loads(json.dumps(describe(config)))
    assert start["argv"] == ["train.py", "--config.seed=3"]
    assert start["environment"]["NCCL_ALGO"] == "Ring"
    assert start["environment"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert "SOME_TOKEN" not in start["environment"]
    assert start["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert start["config"]["seed"] == 3
    assert start["compiler_options"] == {}  # XLA's defaults, on a CPU
    layouts = start["config"]["layouts"]
    assert [(layout["seq_len"], layout["num_microbatches"]) for layout in layouts] == [(128, 4), (256, 2)]
    assert [layout["mesh"] for layout in layouts] == [dataclasses.asdict(MESH)] * 2
    assert start["devices"] == {"kind": "cpu", "ids": [d.id for d in jax.devices()[:4]], "processes": 1}
    assert start["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "moejax"} <= set(start["versions"])
    assert start["data_fingerprint"] == "f00d"


def test_the_flags_it_holds_make_the_configuration_again(monkeypatch):
    argv = ["train.py", "--config.seed=3", "--config.model.num_layers=6"]
    monkeypatch.setattr(sys, "argv", argv)
    start = describe(apply_overrides(TrainConfig(), split_overrides(argv, "config")[0]))
    again = apply_overrides(TrainConfig(), split_overrides(start["argv"], "config")[0])
    assert json.loads(json.dumps(dataclasses.asdict(again))) == json.loads(json.dumps(start["config"]))


def test_a_resumed_run_adds_to_its_record(tmp_path):
    for resumed_from in (0, 5, 9):
        append_start(tmp_path, describe(resumed_from=resumed_from))
    assert [start["resumed_from"] for start in read_starts(tmp_path)] == [0, 5, 9]
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".patch"} == {"run.json"}


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    append_start(tmp_path, {"resumed_from": 0})
    with pytest.raises(TypeError):
        append_start(tmp_path, {"resumed_from": object()})
    assert read_starts(tmp_path) == [{"resumed_from": 0}]


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_leaves_the_old_record_and_names_the_file(tmp_path, disk, room):
    append_start(tmp_path, {"resumed_from": 0})
    disk.room = room
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'run.json'}'"):
        append_start(tmp_path, {"resumed_from": 7})
    assert read_starts(tmp_path) == [{"resumed_from": 0}]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "what was begun takes no room"


def test_a_record_is_strict_json_whatever_the_configuration_holds(tmp_path):
    append_start(tmp_path, {"config": {"max_load_cv": float("inf")}})
    assert read_starts(tmp_path) == [{"config": {"max_load_cv": "Infinity"}}]


def test_git_tells_the_commit_and_what_was_changed_since(repository, tmp_path_factory):
    """From the commit and the patch come the sources as they were: changed, deleted and new ones."""
    (repository / "package" / "gone.py").write_text("y = 1\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "second")
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert git_state(repository / "package") == {"commit": commit, "patch": "", "untracked": []}

    (repository / "package" / "module.py").write_bytes("x = 'å'\r\n".encode("latin-1"))
    (repository / "package" / "gone.py").unlink()
    (repository / "new name.py").write_text("z = 3\n")
    (repository / "notes.txt").write_text("large")
    found = git_state(repository / "package")
    assert found["commit"] == commit
    assert found["untracked"] == ["notes.txt"]
    workdir = tmp_path_factory.mktemp("run")
    append_start(workdir, {"git": found})
    append_start(workdir, {"git": git_state(repository / "package") | {"patch": ""}})
    assert [start["git"]["patch"] for start in read_starts(workdir)] == ["changes_0.patch", ""]

    again = tmp_path_factory.mktemp("clone")
    git(again, "clone", "--quiet", repository, ".")
    git(again, "checkout", "--quiet", commit)
    git(again, "apply", "--whitespace=nowarn", workdir / "changes_0.patch")
    assert (again / "package" / "module.py").read_bytes() == (repository / "package" / "module.py").read_bytes()
    assert not (again / "package" / "gone.py").exists()
    assert (again / "new name.py").read_text() == "z = 3\n"


def test_git_state_is_absent_outside_a_repository_and_without_git(repository, tmp_path_factory, monkeypatch):
    assert git_state(tmp_path_factory.mktemp("elsewhere")) is None
    assert git_state(repository / "ignored") is None, "its files are not of that commit"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert git_state(repository / "package") is None
    assert describe()["git"] is None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(record, "PACKAGES", ("jax", "not-installed-at-all"))
    assert describe()["versions"]["not-installed-at-all"] is None
