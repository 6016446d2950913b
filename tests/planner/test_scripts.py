"""The planner's scripts."""

import dataclasses
import json

import pytest
from scripts import run_script, write_model_folder

from experiments.shared.loading import load_model
from moejax.planner.hardware import get_device, load_calibration
from moejax.presets import get_preset
from moejax.train.plan_file import load_layouts, load_plan_model


def test_a_plan_is_written_as_a_file_that_trains(tmp_path):
    out, saved = tmp_path / "plan.py", tmp_path / "plan.json"
    done = run_script("plan", "--seq_len=1024,4096", f"--out={out}", f"--json={saved}")
    figures = done.figures
    assert json.loads(saved.read_text()) == figures
    assert list(figures["choices"]) == ["1024", "4096"]
    layouts = load_layouts(out)
    assert [layout.seq_len for layout in layouts] == [1024, 4096]
    assert load_plan_model(out) == "moe_16x10b"
    for layout, choice in zip(layouts, figures["choices"].values(), strict=True):
        assert layout.mesh.num_devices == 16
        assert json.loads(json.dumps(dataclasses.asdict(layout))) == choice["layout"]
    for part in ("| length |", "| memory, GB |", "| time, ms |", "tokens: ", "tokens/s forward"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq_len=12x"], "--seq_len=12x: '12x' must be a whole number of at least 1"),
        (["--batch_size=1,2"], "--batch_size=1,2 has 2 numbers for 4 lengths"),
        (["--cluster=h100"], "--cluster=h100 does not exist; did you mean h100_8?"),
        (["--model=moe"], "--model=moe does not exist"),
        (["--mode=serve"], "--mode=serve must be one of train, prefill, decode"),
        (["--seqlen=5"], "--seqlen does not exist; did you mean --seq_len?"),
        pytest.param(["--seq_len=10240", "--batch_size=65536"], "do not fit on a100_64gb_2x8", marks=pytest.mark.full),
    ],
)
def test_wrong_requests_are_one_line(arguments, message, tmp_path):
    out = tmp_path / "plan.py"
    assert message in run_script("plan", f"--out={out}", *arguments, status=2).error
    assert not out.exists()


def test_a_cluster_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\n"
        "from moejax.planner.hardware import Cluster, Constant, get_device\n"
        "def get_cluster():\n"
        "    memory = Constant(40e9, 'datasheet', 'mine')\n"
        "    return Cluster('mine', dataclasses.replace(get_device('h100'), name='mine', memory_bytes=memory), 1, 8)\n"
    )
    figures = run_script("plan", f"--cluster={path}", "--seq_len=1024", "--mode=decode").figures
    assert figures["choices"]["1024"]["layout"]["mesh"]["hardware"] == "custom"
    assert figures["choices"]["1024"]["peak_bytes"] < 40e9


def test_a_model_is_the_folder_of_a_hugging_face_checkpoint(tmp_path, monkeypatch):
    model = dataclasses.replace(get_preset("olmoe_7b"), vocab_size=50_303)
    write_model_folder(tmp_path / "olmoe", model)
    monkeypatch.chdir(tmp_path)
    arguments = "--model=olmoe", "--cluster=h100_2x8", "--seq_len=4096", "--batch_size=64"
    done = run_script("plan", *arguments, "--out=plan.py")
    assert done.figures["choices"]["4096"]["peak_bytes"] < 80e9
    assert load_plan_model("plan.py") == str(tmp_path / "olmoe")
    assert dataclasses.replace(load_model(str(tmp_path / "olmoe")), dtype=model.dtype) == model
    (tmp_path / "empty").mkdir()
    error = run_script("plan", "--model=empty", status=2).error
    assert "--model=empty has no config.json; name the folder of a Hugging Face checkpoint" in error


@pytest.mark.full
def test_calibration_measures_this_machine_and_the_planner_takes_it(tmp_path):
    path = tmp_path / "calibration.json"
    figures = run_script("calibrate", "--seconds=0.01", f"--out={path}").figures["figures"]
    device = load_calibration(path, get_device("cpu"))
    assert device.matmul_flops == figures["matmul_flops"] > 0
    assert device.inside.bytes_per_s == figures["inside"]["bytes_per_s"] > 0
    run_script("plan", "--model=tiny", "--cluster=cpu_16", "--seq_len=64", f"--calibration={path}")


def test_training_that_cannot_fit_is_refused_before_it_starts(tmp_path):
    workdir = tmp_path / "run"
    batch = ["--config.layout.seq_len=10240", "--config.layout.batch_size=256"]
    arguments = ["--config=moe_16x10b", "--mesh=h100_2x8", f"--workdir={workdir}", *batch]
    error = run_script("train", *arguments, "--config.memory_limit_bytes=14000000000", status=2).error
    assert "full rematerialization and the smallest microbatches, but a device has 14 GB; the largest " in error
    assert "would fit" in error
    assert not workdir.exists()
