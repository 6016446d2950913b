"""The trainer and its script: resumed == uninterrupted, restored on another mesh == itself, stopped == saved."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scripts import run_script

from experiments.shared import loading
from moejax.balance import Figure
from moejax.batch import counted_targets
from moejax.checks import ConfigError, one_line
from moejax.data import ByteTokenizer, load_corpus
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides
from moejax.train import loop
from moejax.train.checkpoint import Checkpointer, CheckpointError
from moejax.train.loop import Trainer
from moejax.train.metrics import MetricsWriter, read_loads, read_metrics
from moejax.train.record import read_starts
from moejax.train.signals import Signals
from moejax.train.sizes import StepSizes
from moejax.train.step import TrainStep
from moejax.train.step_record import Evaluation, StepRecord, bits_per_byte

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = {
    "model.num_layers": "4",
    "model.d_model": "32",
    "model.attention.head_dim": "8",
    "model.attention.num_kv_heads": "4",
    "model.d_ff": "32",
    "layout.seq_len": "32",
    "layout.batch_size": "32",
    "steps": "8",
    "optimizer.warmup_steps": "2",
    "checkpoint.every": "2",
    "eval_every": "4",
    "eval_batches": "2",
    "sample_tokens": "4",
}
REQUIRED = {
    "step", "loss", "bits_per_byte", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second",
    "step_seconds", "load_cv", "load_cv_window_tokens", "load_max_over_mean", "dropped_fraction", "rounds",
    "window_steps", "window_tokens", "window_load_cv", "window_load_cv_worst", "window_load_cv_floor", "window_rounds",
    "window_dropped_fraction", "window_idle_experts", "window_router_entropy", "capacity_factor", "bucket_seq_len",
    "remat", "reshard_seconds", "device_memory_bytes",
}  # fmt: skip
TIMES = {"step_seconds", "tokens_per_second", "reshard_seconds"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few of Python's own sources."""
    folder = tmp_path_factory.mktemp("corpus")
    for document in load_corpus()[:12]:
        (folder / Path(document.name).name).write_text(document.text[:20_000])
    return folder


@pytest.fixture(scope="module")
def config(corpus):
    return apply_overrides(loading.load_config("tiny"), OVERRIDES | {"data.paths": str(corpus)})


def trainer_on(shape, config, workdir):
    """The trainer of a run on a mesh of this shape, of the first devices."""
    mesh = MeshConfig(*shape)
    return Trainer(config.with_layout(mesh=mesh), workdir, devices=jax.devices()[: mesh.num_devices])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run that was never stopped: its work directory and summary."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, trainer_on((4, 2, 2), config, workdir).run()


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


def test_a_run_learns_and_records_every_step(config, finished):
    workdir, summary = finished
    recorded = read_metrics(workdir)
    assert [line["step"] for line in recorded] == list(range(1, config.steps + 1))
    assert all(set(line) >= REQUIRED for line in recorded)
    assert recorded[-1]["loss"] < recorded[0]["loss"] - 0.5
    assert {line["step"] for line in recorded if "eval_bits_per_byte" in line} == {4, 8}
    assert summary.step == config.steps
    assert not summary.interrupted
    assert summary.eval_bits_per_byte < 8
    assert list((workdir / "tensorboard").iterdir())


def test_a_run_keeps_each_steps_loads(config, finished):
    steps_N, load_NLE = read_loads(finished[0])
    assert steps_N.tolist() == list(range(1, config.steps + 1))
    assert load_NLE.shape == (config.steps, config.model.num_moe_layers, config.model.num_experts)
    assert (load_NLE.sum(-1) == config.layout.tokens * config.model.experts_per_token).all()
    for line, load_LE in zip(read_metrics(finished[0]), load_NLE, strict=True):
        assert line["load_cv"] == pytest.approx((load_LE.std(-1) / load_LE.mean(-1)).mean(), rel=1e-5)
    window_LE = load_NLE.sum(0)  # the window is longer than the run
    assert line["window_load_cv_worst"] == pytest.approx((window_LE.std(-1) / window_LE.mean(-1)).max(), rel=1e-5)


def test_bits_per_byte_is_the_cross_entropy_in_another_unit(config, finished):
    held_out = read_metrics(finished[0])[-1]
    assert held_out["load_cv_window_tokens"] == config.layout.tokens
    # Bytes: a token is a byte, but for the separators between documents.
    assert held_out["eval_bits_per_byte"] == pytest.approx(held_out["eval_loss"] / np.log(2), rel=0.02)
    assert held_out["eval_bits_per_byte"] >= held_out["eval_loss"] / np.log(2)


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(config, finished, tmp_path, monkeypatch):
    trainer = trainer_on((4, 2, 2), config, tmp_path)
    check_finite = trainer._check_finite

    def stop_at_5(record, *rest):
        check_finite(record, *rest)
        if record.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "_check_finite", stop_at_5)
    stopped = trainer.run()
    assert stopped.interrupted
    assert stopped.step == 5
    resumed = trainer_on((4, 2, 2), config, tmp_path).run()
    assert resumed.resumed_from == 5
    assert lines(tmp_path) == lines(finished[0])
    assert resumed.sample == finished[1].sample
    np.testing.assert_array_equal(read_loads(tmp_path)[1], read_loads(finished[0])[1])
    assert [start["resumed_from"] for start in read_starts(tmp_path)] == [0, 5]
    assert not (tmp_path / "config.json").exists(), "run.json holds it"


@pytest.fixture(scope="module")
def short(config):
    """Two steps, the first with an evaluation, in a model with room for no more tokens than the training text has."""
    model = dataclasses.replace(config.model, max_seq_len=config.layout.seq_len)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=1)
    return dataclasses.replace(config, model=model, optimizer=optimizer, steps=2, eval_every=1, sample_tokens=128)


class Interrupted:
    """Sends Ctrl-C at chosen places of a run in this process, which a second one does not end: it is only noted."""

    def __init__(self, monkeypatch, capfd):
        self._monkeypatch, self._capfd, self._read = monkeypatch, capfd, ""
        self._answered = threading.Semaphore(0)
        monkeypatch.setattr("moejax.train.signals.os._exit", self._end)
        answer = Signals._answer

        def answered(*args):
            answer(*args)
            self._answered.release()

        monkeypatch.setattr(Signals, "_answer", answered)
        self.lines = []

    def at(self, target, name):
        """Sends Ctrl-C when `target.name` is called for the first time."""
        original, sent = getattr(target, name), []

        def interrupted(*args, **kwargs):
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGINT))
                assert self._answered.acquire(timeout=60)
                self.lines += [line for line in self._capfd.readouterr().err.splitlines() if line.startswith("stop")]
            return original(*args, **kwargs)

        self._monkeypatch.setattr(target, name, interrupted)

    def _end(self, status):
        os.write(2, f"stop {status}\n".encode())


@pytest.fixture
def ctrl_c(monkeypatch, capfd):
    return Interrupted(monkeypatch, capfd)


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_ends_at_once(short, ctrl_c, tmp_path):
    ctrl_c.at(loop, "load_data")
    trainer = trainer_on((1, 1, 1), short, tmp_path)
    assert ctrl_c.lines == ["stopped at once; nothing is lost", "stop 130"]
    ctrl_c.at(StepSizes, "use")
    trainer.run()
    assert ctrl_c.lines[2:] == ["stopped at once; nothing is lost", "stop 130"]


@pytest.mark.full
def test_ctrl_c_is_answered_with_what_is_awaited_and_with_what_is_lost(short, ctrl_c, tmp_path):
    ctrl_c.at(TrainStep, "evaluate")
    ctrl_c.at(Checkpointer, "save")
    ctrl_c.at(StepSizes, "close")
    summary = trainer_on((1, 1, 1), short, tmp_path).run()
    assert ctrl_c.lines == [
        "stopping after evaluating on held-out text and saving; Ctrl-C again to stop at once",
        *("stopped at once; no step is saved", "stop 130"),
        *("stopped at once; nothing is lost", "stop 130"),
    ]
    assert summary.interrupted
    assert summary.step == 1
    assert summary.sample is None
    assert Checkpointer(tmp_path / "checkpoints", keep=1, every=1).steps() == [1]


def test_a_sample_is_cut_to_what_fits_and_ctrl_c_there_loses_nothing(short, ctrl_c, tmp_path):
    ctrl_c.at(loop, "sample_text")
    trainer = trainer_on((1, 1, 1), short, tmp_path)
    summary = trainer.run()
    assert ctrl_c.lines == ["stopping after writing a sample; Ctrl-C again to stop at once"]
    assert not summary.interrupted
    text = trainer.data.eval_documents[0].text
    assert summary.sample.prompt == text[: short.model.max_seq_len // 2 - 1], "a token is a byte, the first a separator"
    assert 0 < len(summary.sample.continuation) <= short.model.max_seq_len // 2


@pytest.mark.parametrize("error", [ConfigError("no room"), RuntimeError("out of\nmemory")])
def test_a_sample_that_fails_costs_a_run_nothing_else(short, tmp_path, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "sample_text", fail)
    trainer = trainer_on((1, 1, 1), short, tmp_path)
    monkeypatch.setattr(trainer, "_signals", SimpleNamespace(stop=False), raising=False)
    assert trainer._sample(SimpleNamespace(params=None)) is None
    assert caplog.messages == [f"the run has no sample: {one_line(error)}"]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 4, 2), marks=pytest.mark.full),
        pytest.param((16, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_restored_on_another_mesh_evaluates_the_same(config, finished, shape):
    workdir, summary = finished
    there = trainer_on(shape, config, workdir).run()
    assert there.resumed_from == config.steps
    assert there.eval_loss == pytest.approx(summary.eval_loss, rel=1e-5)
    assert there.window_load_cv == pytest.approx(summary.window_load_cv, rel=1e-5)
    assert there.window_tokens == summary.window_tokens == config.steps * config.layout.tokens
    assert lines(workdir)[-1]["step"] == config.steps


@pytest.mark.full
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(config, finished, tmp_path, caplog):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    newest = workdir / "checkpoints" / "8"
    victim = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    resumed = trainer_on((4, 2, 2), config, workdir).run()
    assert resumed.resumed_from == 6
    assert "Checkpoint of step 8 in" in caplog.text
    assert "bytes instead of" in caplog.text
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and path.suffix != ".txt" and not path.name.startswith("_"):
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        trainer_on((4, 2, 2), config, workdir).run()


def test_resuming_with_other_data_is_refused(config, finished, tmp_path):
    (tmp_path / "one.txt").write_text("Something else entirely.\n" * 500)
    other = apply_overrides(config, {"data.paths": str(tmp_path)})
    with pytest.raises(ConfigError, match="has another training text or tokenizer"):
        trainer_on((4, 2, 2), other, finished[0]).run()
    with pytest.raises(ConfigError, match=r"--config\.data\.seed: 0 in the run, 1 asked for"):
        trainer_on((4, 2, 2), apply_overrides(config, {"data.seed": "1"}), finished[0]).run()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=128 must be at least the tokenizer's 256"):
        trainer_on((4, 2, 2), apply_overrides(config, {"model.vocab_size": "128"}), tmp_path)


@pytest.mark.full
def test_divergence_is_reported_not_saved(config, tmp_path):
    wild = apply_overrides(config, {"optimizer.learning_rate": "1e30", "steps": "6"})
    with pytest.raises(FloatingPointError, match="training has diverged"):
        trainer_on((4, 2, 2), wild, tmp_path).run()


def run_on_two_devices(config, workdir, monkeypatch, **balance):
    """Six steps with windows of two: (summary, metrics, sizes that were compiled)."""
    compiled, lower = [], TrainStep.lower

    def counting(step):
        compiled.append(step.program.layout.dispatch.capacity_factor)
        return lower(step)

    monkeypatch.setattr(TrainStep, "lower", counting)
    balance = dataclasses.replace(config.balance, window=2, **balance)
    config = dataclasses.replace(config, steps=6, eval_every=6, sample_tokens=0, balance=balance)
    summary = trainer_on((2, 1, 1), config, workdir).run()
    return summary, read_metrics(workdir), compiled


@pytest.mark.slow
def test_buffers_change_size_without_compiling_again_and_without_changing_the_loss(config, tmp_path, monkeypatch):
    sizes = (1.5, 2.0, 4.0)
    fixed, lines_fixed, compiled = run_on_two_devices(config, tmp_path / "fixed", monkeypatch, capacity_factors=())
    assert compiled == [config.layout.dispatch.capacity_factor]
    assert fixed.capacity_switches == 0
    sized, lines_sized, compiled = run_on_two_devices(config, tmp_path / "sized", monkeypatch, capacity_factors=sizes)
    ran = [line["capacity_factor"] for line in lines_sized]
    assert ran[:2] == [1.5, 1.5]
    assert ran[2] == ran[3] == 4.0, "text is skewed before anything is learned"
    assert sized.capacity_switches >= 1
    assert sorted(compiled) == sorted(set(compiled)), "no size twice"
    assert lines_sized[2]["rounds"] < lines_fixed[2]["rounds"]
    for one, other in zip(lines_fixed, lines_sized, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)  # rounding, grown over six steps
        assert other["dropped_fraction"] == 0


@pytest.mark.slow
def test_a_bound_that_is_left_for_long_is_told_once(config, tmp_path, monkeypatch, caplog):
    balance = dataclasses.replace(config.balance, window=2)
    config = dataclasses.replace(config, balance=balance, steps=9, eval_every=9, sample_tokens=0)
    trainer = trainer_on((1, 1, 1), config, tmp_path)
    figure = Figure("load CV", 3, 0.9, 0.5, "less")
    monkeypatch.setattr(type(trainer.program.balancer), "figures", lambda *_: {"max_load_cv": figure})
    trainer.run()
    [warning] = [record.getMessage() for record in caplog.records if record.name == loop.__name__]
    assert warning.startswith("step 8, layer 3: load CV is 0.9, more than balance.max_load_cv=0.5")


def test_a_text_without_a_byte_has_no_bits_per_byte():
    tokenizer = ByteTokenizer()
    separators = {"targets": np.full((2, 4), tokenizer.separator, np.int32)}
    assert math.isnan(bits_per_byte(8.0, tokenizer.num_bytes(counted_targets(separators))))
    assert bits_per_byte(3 * math.log(2), 2) == pytest.approx(1.5)


def test_router_logits_that_are_not_finite_are_named(config, tmp_path):
    trainer = trainer_on((1, 1, 1), config, tmp_path)
    with (
        Checkpointer(tmp_path, keep=1, every=1) as checkpointer,
        pytest.raises(FloatingPointError, match="router logits that are not finite for 7 tokens"),
    ):
        trainer._check_finite(step_record(loss=1.0, grad_norm=1.0, invalid_tokens=7.0), checkpointer)


@pytest.mark.parametrize(
    ("scalars", "is_finite"), [({}, True), ({"loss": math.nan}, False), ({"grad_norm": math.inf}, False)]
)
def test_a_step_is_finite_when_all_of_it_is(scalars, is_finite):
    assert step_record(**{"loss": 1.0, "grad_norm": 1.0, "invalid_tokens": 0.0} | scalars).is_finite == is_finite


def test_a_steps_line_has_its_figures_and_its_evaluation():
    record = step_record(loss=1.0, next_capacity_index=2.0)
    line = record.line()
    assert record.next_capacity_index == 2
    assert line == {
        "loss": 1.0, "bits_per_byte": 2.0, "load_cv_window_tokens": 64, "step_seconds": 0.5, "tokens_per_second": 128,
        "bucket_seq_len": 32, "remat": "full", "reshard_seconds": 0.0, "device_memory_bytes": 7,
    }  # fmt: skip
    evaluated = dataclasses.replace(record, evaluation=Evaluation(3.0, 4.0))
    assert evaluated.line() == line | {"eval_loss": 3.0, "eval_bits_per_byte": 4.0}


def step_record(**scalars):
    return StepRecord(
        step=3, scalars=scalars, report=None, bits_per_byte=2.0, seq_len=32, num_tokens=64, remat="full", seconds=0.5,
        reshard_seconds=0.0, device_memory_bytes=7,
    )  # fmt: skip


@pytest.fixture
def fill_disk(disk, monkeypatch):
    """A function that has the disk full during these steps, for metrics and checkpoints alike."""

    go_on = MetricsWriter.write

    def fill(*steps):
        def write(self, step, *figures):
            disk.room = 0 if step in steps else float("inf")
            go_on(self, step, *figures)

        monkeypatch.setattr(MetricsWriter, "write", write)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("moejax.train.checkpoint.full_disk_error", lambda _: None if disk.room else full)
    return fill


@pytest.mark.full
def test_a_full_disk_costs_lines_and_one_checkpoint_but_not_the_run(config, finished, tmp_path, fill_disk, caplog):
    fill_disk(3, 4, 5)
    assert trainer_on((4, 2, 2), config, tmp_path).run().step == config.steps
    assert lines(tmp_path) == [line for line in lines(finished[0]) if line["step"] not in (3, 4, 5)]
    checkpoints = tmp_path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} <= {"2", "6", "8"}
    assert f"writing the checkpoint of step 4 failed: No space left on device: {checkpoints / '4'}" in caplog.text
    assert f"Step 3: metrics are not written whole: No space left on device: {tmp_path}/metrics.jsonl" in caplog.text
    assert "Step 6: metrics are written again" in caplog.text


@pytest.mark.slow
def test_a_last_state_that_cannot_be_saved_is_an_error_and_the_next_start_goes_on(
    config, finished, tmp_path, fill_disk, disk
):
    fill_disk(7, 8)
    with pytest.raises(CheckpointError, match=f"step 8 failed: No space left on device: {tmp_path}/checkpoints/8$"):
        trainer_on((4, 2, 2), config, tmp_path).run()
    for room, file in ((0, "run.lock"), (400, "(run.json|changes_)")):  # 400 bytes take the lock, but not the record
        disk.room = room
        with pytest.raises(ConfigError, match=rf"^workdir={tmp_path} cannot .* \(No space left .*: {tmp_path}/{file}"):
            trainer_on((4, 2, 2), config, tmp_path).run()
    disk.room = float("inf")
    fill_disk()
    assert trainer_on((4, 2, 2), config, tmp_path).run().resumed_from == 6
    assert lines(tmp_path) == lines(finished[0])


# The script, as a user starts it.


def arguments(workdir, corpus):
    flags = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    return ["--config=tiny", f"--workdir={workdir}", f"--data={corpus}", *flags]


def start(workdir, corpus, *more, python=(sys.executable,)):
    return subprocess.Popen(
        [*python, ROOT / "experiments/train.py", *arguments(workdir, corpus), *more],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    """Returns once the run has recorded the step."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


def wait_for_checkpoint(process, workdir):
    """Returns once there is a whole one; they are written beside the steps, which a busy machine does sooner."""
    while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


# Runs a script that never ends its last step: however late it is looked at, it has not come to its end.
HELD = f"""
    import pathlib, runpy, sys, threading
    from moejax.train.metrics import MetricsWriter

    def write(self, step, *figures, go_on=MetricsWriter.write):
        if step == {OVERRIDES["steps"]}:
            threading.Event().wait()
        go_on(self, step, *figures)

    MetricsWriter.write = write
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
def test_killed_at_a_random_step_and_resumed_equals_uninterrupted_to_the_bit(corpus, finished, tmp_path, seed):
    process = start(tmp_path, corpus, python=(sys.executable, "-c", textwrap.dedent(HELD)))
    wait_for_step(process, tmp_path, random.Random(seed).randint(3, 7))
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.communicate()
    resumed = start(tmp_path, corpus)
    stdout, stderr = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, stderr[-2000:]
    assert lines(tmp_path) == lines(finished[0])
    np.testing.assert_array_equal(read_loads(tmp_path)[1], read_loads(finished[0])[1])
    summary = json.loads(stdout.splitlines()[-1])
    assert 0 < summary["resumed_from"] < 8
    assert summary["sample"] == dataclasses.asdict(finished[1].sample)


@pytest.mark.full
def test_sigterm_saves_and_exits_cleanly(corpus, tmp_path):
    process = start(tmp_path, corpus, "--config.steps=100000", "--config.checkpoint.every=100000")
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr[-2000:]
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["interrupted"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == [str(summary["step"])]
    assert f"go on with --workdir={tmp_path}" in stderr.replace("\n", "")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_with_one_line(corpus, tmp_path):
    process = start(tmp_path, corpus, python=(sys.executable, "-c", textwrap.dedent(HELD)))
    wait_for_step(process, tmp_path, int(OVERRIDES["steps"]) - 1)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGINT)
    said = ""
    while "stopping after this step and saving; Ctrl-C again to stop at once\n" not in said:
        said += process.stderr.readline()
    process.send_signal(signal.SIGINT)  # the step never ends
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert re.fullmatch(r"stopped at once; steps after checkpoint [246] are not saved\n", stderr)
    assert stdout == ""


def test_a_wrong_flag_is_one_line_and_nothing_is_written(corpus, tmp_path):
    workdir = tmp_path / "run"
    done = run_script("train", *arguments(workdir, corpus), "--config.layout.batch_size=12", status=2)
    assert done.stdout == ""
    assert done.error.startswith("--config.layout.batch_size=12 must be a multiple of 8 = expert 4")
    assert not workdir.exists()
