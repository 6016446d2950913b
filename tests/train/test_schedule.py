"""Several layouts train in turn, and the state that moves between their meshes is the same."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from experiments.shared import loading
from moejax.checks import ConfigError
from moejax.config import DispatchConfig
from moejax.data import load_corpus, make_loader
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides
from moejax.train.loop import Trainer
from moejax.train.metrics import read_metrics
from moejax.train.reshard import reshard

OVERRIDES = {
    "model.num_layers": "2",
    "model.d_model": "32",
    "model.attention.head_dim": "8",
    "model.attention.num_kv_heads": "4",
    "model.d_ff": "32",
    "steps": "10",
    "optimizer.warmup_steps": "2",
    "balance.window": "4",
    "balance.capacity_factors": "",
    "checkpoint.every": "3",
    "eval_every": "5",
    "eval_batches": "1",
    "sample_tokens": "0",
    "data.block_steps": "2",
}
LAYOUTS = (
    Layout(MeshConfig(2, 2, 1), 32, 16, num_microbatches=2, remat="none"),
    Layout(MeshConfig(2, 2, 1), 64, 8, num_microbatches=1, remat="full"),
    Layout(MeshConfig(2, 1, 2), 128, 8, num_microbatches=1, remat="full", dispatch=DispatchConfig(chunks=2)),
)
TIMES = {"step_seconds", "tokens_per_second", "reshard_seconds"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pieces of Python's own sources, in documents of 20, 50 and 110 bytes, a layout each."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(document.text for document in load_corpus()[:12] if document.text.isascii())
    starts = np.cumsum([0, *[20, 20, 50, 110, 20, 20, 50, 110] * 25])
    assert len(text) > starts[-1]
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        (folder / f"{i}.txt").write_text(text[start:end])
    return folder


@pytest.fixture(scope="module")
def config(corpus):
    config = apply_overrides(loading.load_config("tiny"), OVERRIDES | {"data.paths": str(corpus)})
    return dataclasses.replace(config, layouts=LAYOUTS)


def trainer(config, workdir):
    return Trainer(config, workdir, devices=jax.devices()[:4])


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A mixed run that was never stopped: its work directory and summary."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, trainer(config, workdir).run()


@pytest.mark.full
def test_a_mixed_run_draws_every_length_and_says_what_ran(config, finished):
    workdir, summary = finished
    recorded = read_metrics(workdir)
    remats = {layout.seq_len: layout.remat for layout in LAYOUTS}
    assert {line["bucket_seq_len"] for line in recorded} == set(remats)
    assert all(line["remat"] == remats[line["bucket_seq_len"]] for line in recorded)
    assert [line["step"] for line in recorded] == list(range(1, config.steps + 1))
    meshes = [128, *(line["bucket_seq_len"] for line in recorded)]  # the longest layout's is where a run starts
    moved = [(a == 128) != (b == 128) for a, b in itertools.pairwise(meshes)]
    assert [line["reshard_seconds"] > 0 for line in recorded] == moved
    assert summary.reshards == sum(moved) >= 2
    assert summary.reshard_seconds == pytest.approx(sum(line["reshard_seconds"] for line in recorded))
    assert sum(bucket.steps for bucket in summary.buckets) == config.steps
    assert [(b.seq_len, b.batch_size, b.remat) for b in summary.buckets] == [
        (layout.seq_len, layout.batch_size, layout.remat) for layout in LAYOUTS
    ]
    assert all(bucket.device_memory_bytes > 0 for bucket in summary.buckets)
    assert recorded[-1]["eval_loss"] < recorded[config.eval_every - 1]["eval_loss"]
    assert sum(line["load_cv_window_tokens"] for line in recorded[-4:]) == summary.window_tokens


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(config, finished, tmp_path, monkeypatch):
    killed = trainer(config, tmp_path)
    check_finite = killed._check_finite

    def die_at_5(record, *rest):
        check_finite(record, *rest)
        if record.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(killed, "_check_finite", die_at_5)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = trainer(config, tmp_path).run()
    assert resumed.resumed_from == 3
    assert lines(tmp_path) == lines(finished[0])


@pytest.mark.full
def test_resuming_with_other_layouts_is_refused(config, finished):
    other = dataclasses.replace(config, layouts=(LAYOUTS[0].replace(batch_size=32), *LAYOUTS[1:]))
    with pytest.raises(ConfigError, match=r"^layouts: 16x32,\S+ in the run, 32x32,\S+ asked for; "):
        trainer(other, finished[0])
    other = apply_overrides(config, {"data.block_steps": str(config.data.block_steps + 1)})
    with pytest.raises(ConfigError, match=r"buckets of \[seq_len, batch_size, group\].* and must be \[\[32, 16, 0\]"):
        trainer(other, finished[0]).run()


@pytest.mark.slow
def test_the_same_parameters_evaluate_alike_on_every_mesh(config, finished):
    """And a state that went round all meshes is the one that set out, to the bit."""
    schedule = trainer(config, finished[0]).schedule
    first = schedule.train_steps[0]
    state = first.init(jax.random.key(1))
    start = jax.device_get(state)
    batch = {
        name: np.random.default_rng(0).integers(0, 256, (16, 32), dtype=np.int32) for name in ("tokens", "targets")
    }
    batch["segment_ids"] = np.ones((16, 32), np.int32)
    losses = []
    for step in (first, schedule.train_steps[-1], first):
        state = reshard(state, step.state_shapes, donate=True)
        losses.append(float(step.evaluate(state.params, step.put_batch(batch))["cross_entropy"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(state))


def test_batches_of_one_layout_are_the_plain_loaders(config, tmp_path):
    one = trainer(dataclasses.replace(config, layouts=LAYOUTS[:1]), tmp_path)
    assert one.program.layout == one.train_step.program.layout == LAYOUTS[0]
    plain = make_loader(
        config.data, one.data.train_documents, one.data.tokenizer,
        seq_len=LAYOUTS[0].seq_len, batch_size=LAYOUTS[0].batch_size,
    )  # fmt: skip
    batches = [next(one.schedule.make_loader(one.data)), next(plain)]
    assert batches[0].keys() == batches[1].keys()
    for name in batches[0]:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_a_layout_that_does_not_fit_its_mesh_is_refused(config, tmp_path):
    wrong = dataclasses.replace(config, layouts=(*LAYOUTS[:2], LAYOUTS[2].replace(batch_size=7)))
    with pytest.raises(ConfigError, match="batch_size=7 must be a multiple of 2 = expert 2"):
        trainer(wrong, tmp_path)
