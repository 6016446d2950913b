"""Figures of recorded loads by hand, and a picture in which everything can be read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from pictures import check_labels
from scripts import run_script

from moejax.balance import load_cv_floor
from moejax.checks import ConfigError
from moejax.config import BalanceConfig, ModelConfig
from moejax.plots import pyplot
from moejax.profiling.loads import LoadHistory, figure
from moejax.train.config import TrainConfig
from moejax.train.metrics import LOADS_FILE, MetricsWriter
from moejax.train.record import RECORD_FILE, append_start

ROOT = Path(__file__).resolve().parents[2]


def record(workdir, load_NLE, first=1, **balance):
    """A run's directory with these loads; the scalars of its steps are of no account."""
    _, layers, experts = load_NLE.shape
    model = ModelConfig(num_layers=layers, num_experts=experts)
    config = TrainConfig(model=model, balance=BalanceConfig(**balance))
    names = ("rounds", "window_rounds", "window_rounds_worst", "window_load_cv", "window_load_cv_worst")
    with MetricsWriter(workdir) as writer:
        for step, load_LE in enumerate(load_NLE, start=first):
            line = dict.fromkeys(names, 1 + 1 / step) | {"window_load_cv_floor": 0.1}
            writer.write(step, line, load_LE)
    append_start(workdir, {"config": dataclasses.asdict(config)})
    return workdir


def random_loads(steps, layers, experts):
    """Skewed, the more so the earlier; the first expert gets nothing."""
    rng = np.random.default_rng(0)
    logit_NLE = rng.normal(size=(layers, experts)) * 2 / np.arange(1, steps + 1)[:, None, None]
    load_NLE = np.int64(1000 * np.exp(logit_NLE))
    load_NLE[:, 0, 0] = 0
    return load_NLE


def test_the_last_window_by_layer(tmp_path):
    load_NLE = np.full((5, 2, 4), 7)
    load_NLE[0] = 1000  # before the window
    load_NLE[1:, 1] = [[10, 0, 10, 20], [10, 0, 10, 20], [10, 0, 20, 10], [10, 0, 10, 20]]
    history = LoadHistory.read(record(tmp_path, load_NLE, window=4))
    even, skewed = history.by_layer()
    assert even == {"layer": 0, "load_cv": 0, "max_over_mean": 1, "busiest_expert": 0, "min_over_mean": 1,
                    "idle_experts": 0}  # fmt: skip
    share_E = np.array([40, 0, 50, 70]) / 40
    assert skewed["load_cv"] == pytest.approx(share_E.std())
    assert (skewed["busiest_expert"], skewed["max_over_mean"]) == (3, 70 / 40)
    assert (skewed["min_over_mean"], skewed["idle_experts"]) == (0, 1)
    assert history.window_steps == 4
    assert history.window_tokens == (4 * 28 + 160) / 2 / 2  # the mean of the layers, two experts a token
    assert history.window_cv_floor == load_cv_floor(history.window_tokens, 2, 4)


def test_columns_are_groups_of_steps_that_keep_every_assignment(tmp_path):
    load_NLE = np.random.default_rng(0).integers(1, 100, (7, 2, 4))
    history = LoadHistory.read(record(tmp_path, load_NLE, first=11))
    share_CLE, edges = history.columns(most=3)
    assert edges.tolist() == [10.5, 13.5, 16.5, 17.5]
    for share_LE, group in zip(share_CLE, (load_NLE[:3], load_NLE[3:6], load_NLE[6:]), strict=True):
        np.testing.assert_allclose(share_LE, group.sum(0) / group.sum(0).mean(-1, keepdims=True))
    share_CLE, edges = history.columns(most=7)
    assert len(share_CLE) == 7
    assert edges.tolist() == np.arange(10.5, 18).tolist()


def test_a_run_that_is_none_or_has_no_step_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run\.json; give the --workdir of a run"):
        LoadHistory.read(tmp_path)
    record(tmp_path, random_loads(0, 2, 4))
    with pytest.raises(ConfigError, match="has not ended a step yet"):
        LoadHistory.read(tmp_path)


def run_json(*starts):
    return json.dumps({"starts": starts})


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (RECORD_FILE, run_json(), r"run\.json is not the record of a run \(.*starts must be a list"),
        (RECORD_FILE, run_json(5), r"run\.json is not the record of a run \(.*must be a JSON object"),
        (RECORD_FILE, run_json({"config": None}), r"run\.json has no config\.model; give"),
        (RECORD_FILE, run_json({"config": {"model": {}}}), r"run\.json has no config\.balance; give"),
        (
            RECORD_FILE,
            run_json({"config": {"model": {}, "balance": {"window": "x"}}}),
            r"run\.json: .*\.window='x' must",
        ),
        (LOADS_FILE, '{"step": 1}\n', r"line 1 has no load_LE of layers × experts"),
        (LOADS_FILE, '{"step": 1, "load_LE": [[1, 2], [3]]}\n', r"line 1 has no load_LE"),
        (LOADS_FILE, '{"step": 1, "load_LE": [[1, 2]]}\n{"step": 2, "load_LE": [[1]]}\n', r"line 2 has no load_LE"),
    ],
)
def test_a_broken_file_of_a_run_is_one_line_that_names_it(file, text, message, tmp_path):
    (record(tmp_path, random_loads(2, 2, 4)) / file).write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path}.*{message}"):
        LoadHistory.read(tmp_path)


@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 2, 16), (250, 16, 16), (12, 40, 64)])
def test_every_label_of_the_picture_can_be_read(tmp_path, shape):
    fig = figure(LoadHistory.read(record(tmp_path, random_loads(*shape))))
    check_labels(fig)
    axes = [ax for ax in fig.axes if ax.get_title()]
    assert len(axes) == 4
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)
    legends = [text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    assert {"bound, balance.max_load_cv=0.5", "bound, balance.max_rounds=2"} <= set(legends)
    assert any("sampling floor" in text for text in legends)
    pyplot().close(fig)


def test_the_scale_of_the_cv_has_labels_where_no_power_of_ten_is_in_sight(tmp_path):
    history = LoadHistory.read(record(tmp_path, random_loads(6, 2, 8)))
    for line in history.metrics:
        line |= {"window_load_cv_floor": 0.12, "window_load_cv": 0.3, "window_load_cv_worst": 0.4}
    fig = figure(history)
    assert {"0.2", "0.5"} <= set(check_labels(fig))
    pyplot().close(fig)


def test_the_script_draws_and_tells(tmp_path):
    record(tmp_path, random_loads(9, 2, 16))
    out = tmp_path / "out.png"
    arguments = ["plot_load", f"--workdir={tmp_path}", f"--out={out}"]
    figures = run_script(*arguments).figures
    assert (figures["last_step"], figures["window_steps"]) == (9, 9)
    assert [layer["idle_experts"] for layer in figures["layers"]] == [1, 0]
    assert out.read_bytes().startswith(b"\x89PNG")
    out.unlink()
    out.mkdir()
    assert run_script(*arguments, status=2).error == f"--out={out} is a folder; give a file"
