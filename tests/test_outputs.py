"""What scripts write: an output that cannot be written is refused before the work, and leaves nothing behind."""

import importlib.util
import os
import sys

import pytest
from scripts import run_script

from experiments.shared import common, loading
from moejax.checks import ConfigError
from moejax.train.plan_file import load_plan_model

FLAGS = loading.Flags("Writes.")
FILE = FLAGS.define_output("file", "A file.")
PICTURE = FLAGS.define_output("picture", "A picture.", ".png", ".svg", ".pdf")
FOLDER = FLAGS.define_output("folder", "A folder.", folder=True)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A file, a folder, a link to nothing and one to itself, which are there after each test as they were."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    yield
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "link", "loop"}
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--file=", "--file= needs the name of a file"),
        ("--folder=", "--folder= needs the name of a folder"),
        ("--file=link", "--file=link is a link that leads nowhere; give another file"),
        ("--file=loop", "--file=loop is a link that leads nowhere; give another file"),
        ("--folder=loop/x", "--folder=loop/x cannot be a folder (a link leads nowhere); give another"),
        ("--file=folder", "--file=folder is a folder; give a file"),
        ("--file=/dev/full", "--file=/dev/full is not a regular file; give a file"),
        ("--file=no/x", "--file=no/x is in a folder that does not exist; make no first"),
        ("--file=file/x", "--file=file/x is in a folder that does not exist; make file first"),
        ("--file=/proc/x", "--file=/proc/x cannot be written ("),
        ("--file=" + 300 * "x", "cannot be written (File name too long); give another file"),
        ("--file=~nosuchuser/x", "--file=~nosuchuser/x needs a home folder that is not known; write the whole path"),
        ("--picture=x.jpg", "--picture=x.jpg must end in .png, .svg, .pdf"),
        ("--folder=file", "--folder=file cannot be a folder (file is a file); give another"),
        ("--folder=file/x", "--folder=file/x cannot be a folder ("),
        ("--folder=/proc/x/y", "--folder=/proc/x/y cannot be a folder ("),
    ],
)
def test_what_cannot_be_written_is_one_line(argument, message):
    with pytest.raises(ConfigError) as error:
        FLAGS.parse(["script.py", argument])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_changed_is_refused(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"--file=file cannot be written \(Permission denied\); give another file"):
        FLAGS.parse(["script.py", "--file=file"])


def test_two_outputs_are_two_files():
    with pytest.raises(ConfigError, match=r"--file and --picture are both x\.png; give two files"):
        FLAGS.parse(["script.py", "--file=x.png", "--picture=x.png"])


def test_a_pipe_is_no_output(tmp_path_factory):
    os.mkfifo(pipe := tmp_path_factory.mktemp("other") / "pipe")
    with pytest.raises(ConfigError, match=r"--file=.*pipe is not a regular file; give a file"):
        FLAGS.parse(["script.py", f"--file={pipe}"])
    FLAGS.parse(["script.py", "--file=/dev/null"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --model=mine.py --out=mine.py", "--out=mine.py is the file that --model reads; give another file"),
        ("plan --model=mine.py --json=./other/../mine.py", "is the file that --model reads; give another file"),
        ("plan --cluster=mine.py --out=link.py", "--out=link.py is the file that --cluster reads; give another file"),
        ("plan --calibration=mine.py --json=hard.py", "--json=hard.py is the file that --calibration reads; give"),
        (f"plan --out={loading.MESH_CONFIGS}/h100_2x8.py --cluster=h100_2x8", "is the file that --cluster reads; give"),
        ("memory --data=a,mine.py --json=mine.py", "--json=mine.py is the file that --data reads; give another file"),
        (
            "memory --config.data.paths=mine.py --json=mine.py",
            "is the file that --config.data.paths reads; give another",
        ),
        ("plan --out=new.py --json=other/../new.py", "--out and --json are both other/../new.py; give two files"),
    ],
)
def test_no_script_writes_over_what_it_reads(arguments, message, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("inputs")
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text("kept")
    (folder / "other").mkdir()
    (folder / "link.py").symlink_to("mine.py")
    (folder / "hard.py").hardlink_to(folder / "mine.py")
    assert message in run_script(*arguments.split(), status=2).error
    assert (folder / "mine.py").read_text() == "kept"
    assert not (folder / "new.py").exists()


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--picture=x\.png needs matplotlib, which is not installed; pip"):
        FLAGS.parse(["script.py", "--picture=x.png"])


def test_what_can_be_written_is_a_path(tmp_path):
    FLAGS.parse(["script.py", f"--file={tmp_path / 'new'}", "--picture=x.svg", "--folder=new/deep"])
    assert FILE.value == tmp_path / "new"
    assert (PICTURE.value.name, FOLDER.value.parts) == ("x.svg", ("new", "deep"))
    FLAGS.parse(["script.py", "--file=file", "--folder=folder"])
    assert (FILE.value.name, FOLDER.value.name, PICTURE.value) == ("file", "folder", None)


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("audit", "out"), ("benchmarks/dispatch_memory", "out"), ("calibrate", "out"), ("load_balance", "out"),
        ("memory", "out"), ("memory", "json"), ("memory", "markdown"), ("overlap", "out"), ("plan", "out"),
        ("plan", "json"), ("plan", "plot"), ("published_runs/planner_accuracy", "out"), ("plot_load", "out"),
        ("reference_table", "out"),
    ],
)  # fmt: skip
def test_every_script_refuses_its_output_first(script, flag, monkeypatch):
    monkeypatch.setattr(common.runtime, "setup_jax", None)  # what comes first must not need it
    suffix = {"plot": ".png", "json": ".json"}.get(flag, ".py" if script == "plan" else ".png")
    error = run_script(script, f"--{flag}=no/x{suffix}", status=2).error
    assert error == f"--{flag}=no/x{suffix} is in a folder that does not exist; make no first"


@pytest.mark.parametrize(
    ("script", "flag"), [("load_balance", "workdir"), ("overlap", "text"), ("read_trace", "out"), ("train", "workdir")]
)
def test_every_script_refuses_its_folder_first(script, flag):
    assert run_script(script, f"--{flag}=file/x", status=2).error.startswith(f"--{flag}=file/x cannot be a folder (")


def test_a_plan_has_a_title_whatever_the_files_are_called(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("names")
    monkeypatch.chdir(folder)
    for name in ('a"b\\', "\udcff", 150 * "x"):
        (folder / f"{name}.py").write_text((loading.CONFIGS / "tiny.py").read_text())
        run_script("plan", f"--model={name}.py", "--cluster=cpu_16", "--seq_len=64", "--out=out.py")
        assert load_plan_model("out.py") == str(folder / f"{name}.py")


def test_a_plan_of_decoding_is_not_written():
    error = run_script("plan", "--mode=decode", "--out=x.py", status=2).error
    assert error == "--out=x.py is for train.py; use it with --mode=train, not decode"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_of_json_is_for_programs(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    loading.print_json({"a": 1})
    assert capsys.readouterr().out == ("" if terminal else '{"a": 1}\n')
