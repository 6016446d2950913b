"""Commands that scripts print or show in their help work as they are."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from scripts import EXPERIMENTS, SCRIPTS, parse_command, run_script, write_model_folder

from experiments.shared import common
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.train.metrics import read_metrics
from moejax.train.plan_file import write_plan_file

EXAMPLE = re.compile(r"^    python experiments/([\w/]+)\.py(.*)$", re.MULTILINE)
EXAMPLES = [
    (script, arguments)
    for name in SCRIPTS
    for script, arguments in EXAMPLE.findall((EXPERIMENTS / f"{name}.py").read_text().split('"""')[1])
]
SHORT = (  # evaluated and saved less often than there are steps
    *("--config.steps=2", "--config.eval_every=9", "--config.eval_batches=1", "--config.checkpoint.every=9"),
    "--config.sample_tokens=0",
)


@pytest.mark.parametrize(("script", "arguments"), EXAMPLES)
def test_the_examples_of_help_are_understood(script, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model_folder(tmp_path / "models" / "mixtral")
    (tmp_path / "experiments" / "results").mkdir(parents=True)  # where some of them write
    write_plan_file("plan.py", (Layout(MeshConfig(16), 64, 32),), "moe_16x10b", "What the example before wrote.")
    parse_command(script, shlex.split(arguments, comments=True))


def test_there_are_examples():
    assert len(EXAMPLES) > 30


def printed_command(text):
    """The script and the arguments of the command that ends `text`."""
    python, script, *arguments = shlex.split(text.strip().partition("run it with ")[2])
    assert python == "python"
    assert Path(script).resolve().parent == EXPERIMENTS
    return Path(script).stem, arguments


@pytest.mark.slow
def test_a_printed_plan_trains_the_model_that_was_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small models").mkdir()
    Path("small models/mine.py").write_text(
        "import dataclasses\n"
        "from moejax.config import BalanceConfig\n"
        "from moejax.presets import tiny\n"
        "from moejax.train.config import TrainConfig\n"
        "def get_config():\n"
        "    model = dataclasses.replace(tiny(), num_layers=1, d_model=16, d_ff=16)\n"
        "    return TrainConfig(model=model, balance=BalanceConfig.suited_to(model))\n"
    )
    plan = ["--model=small models/mine.py", "--cluster=cpu_16", "--seq_len=16", "--batch_size=16", "--out=a plan[1].py"]
    script, arguments = printed_command(run_script("plan", *plan).stderr)
    assert script == "train"
    workdir = tmp_path / "elsewhere" / "run"
    workdir.parent.mkdir()
    run_script("train", *arguments, f"--workdir={workdir}", *SHORT)
    monkeypatch.chdir(workdir.parent)  # the plan finds its model from any folder
    config = common.ConfigFlags("").parse_config(["train", f"--plan={tmp_path / 'a plan[1].py'}"])
    assert (config.model.num_layers, config.model.d_model, config.layout.seq_len) == (1, 16, 16)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]


def test_a_printed_plan_of_a_preset_names_it(tmp_path):
    arguments = ["--model=small", "--cluster=cpu_16", "--seq_len=64", "--batch_size=16", f"--out={tmp_path / 's.py'}"]
    _, arguments = printed_command(run_script("plan", *arguments).stderr)
    config = common.ConfigFlags("").parse_config(["train", *arguments])
    small = common.ConfigFlags("").parse_config(["train", "--config=small"])
    assert (config.layout.seq_len, config.layout.batch_size) == (64, 16)
    assert dataclasses.replace(config, layouts=small.layouts) == small
