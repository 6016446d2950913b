"""The summary for people: short, in plain words, narrow enough for any terminal, and only what the run has."""

import dataclasses
import math
from pathlib import Path

import pytest

from moejax.mesh import MeshConfig
from moejax.train.sample import Sample
from moejax.train.summary import BucketSummary, Summary, describe, report

NUMBERS = {
    "step": 300, "resumed_from": 0, "interrupted": False, "loss": 1.5, "eval_loss": 1.6, "eval_bits_per_byte": 2.27,
    "tokens_per_second": 12_345.6, "step_seconds": 1.234, "first_step_seconds": 41.5, "total_seconds": 480.0,
    "window_tokens": 131_072.0, "window_load_cv": 0.051, "window_load_cv_worst": 0.09, "window_load_cv_floor": 0.01,
    "window_load_max_over_mean_worst": 1.2, "window_dropped_fraction": 0.0, "window_rounds": 1.25,
    "window_idle_experts": 0.0, "capacity_factor": 1.5, "capacity_switches": 3, "capacity_seconds_waited": 1.2,
    "device_memory_bytes": 46 * 2**20, "reshards": 0, "reshard_seconds": 0.0,
}  # fmt: skip
SUMMARY = Summary(**NUMBERS, buckets=(), sample=Sample("def f(", "x):"))
VIRTUAL = MeshConfig(expert=4, pipeline=2, tensor=2)


def test_rows_are_few_and_narrow_and_say_which_way_is_better():
    rows = describe(SUMMARY)
    assert len(rows) <= 12
    assert max(len(label) for label in rows) + max(map(len, rows.values())) + 4 <= 80
    assert rows["held-out loss"] == "2.270 bits per byte of text (lower is better)"
    assert rows["speed"] == "12,346 tokens/s, 1.234 s per step"
    assert rows["time to first step"] == "41.5 s"


def test_figures_that_a_run_lacks_are_left_out():
    stopped = dataclasses.replace(SUMMARY, eval_bits_per_byte=math.nan)
    assert describe(SUMMARY).keys() - describe(stopped).keys() == {"held-out loss"}
    over = dataclasses.replace(SUMMARY, tokens_per_second=math.nan, step_seconds=math.nan, first_step_seconds=math.nan)
    assert describe(SUMMARY).keys() - describe(over).keys() == {"speed", "time to first step"}


def test_each_length_of_several_has_a_row():
    bucket = BucketSummary(64, 16, {"expert": 4, "pipeline": 2, "tensor": 2}, "none", 2, 1, 10, 0.5, 2048.0, 2**20)
    mixed = dataclasses.replace(SUMMARY, buckets=(bucket, dataclasses.replace(bucket, seq_len=128)), reshards=4)
    more = describe(mixed).keys() - describe(SUMMARY).keys()
    assert more == {"moves between meshes", "16 × 64 tokens", "16 × 128 tokens"}


@pytest.mark.parametrize(
    ("mesh", "is_slower"),
    [
        (VIRTUAL, True),
        (MeshConfig(expert=1, pipeline=1, tensor=1), False),
        (dataclasses.replace(VIRTUAL, hardware="h100"), False),
    ],
)
def test_on_one_cpu_the_faster_way_is_named(mesh, is_slower):
    assert (
        any("--mesh=single trains about twice as fast" in line for line in report(SUMMARY, 300, Path("x"), mesh))
        == is_slower
    )


def test_a_sample_has_two_parts_and_a_stopped_run_says_how_to_go_on():
    lines = report(SUMMARY, 300, Path("runs/[a]"), VIRTUAL)
    assert lines[lines.index("sample, the prompt (held-out text):") + 1] == "def f("
    assert lines[lines.index("sample, how the model continues it:") + 1] == "x):"
    stopped = dataclasses.replace(SUMMARY, interrupted=True, sample=None)
    assert report(stopped, 300, Path("runs/[a]"), VIRTUAL)[-1] == "stopped and saved; go on with --workdir=runs/[a]"
