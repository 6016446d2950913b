"""A plan: its file reads back, its buckets train in turn, and the state that moves between meshes is the same."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from experiments.shared import common, loading
from moejax.config import ConfigError, DispatchConfig, ParallelConfig
from moejax.data import load_corpus
from moejax.mesh import MeshConfig, build_mesh
from moejax.overrides import apply_overrides, load_config_file
from moejax.train.loop import Trainer
from moejax.train.metrics import read_metrics
from moejax.train.reshard import reshard
from moejax.train.schedule import Bucket, load_buckets, load_plan_model, write_plan_file

OVERRIDES = {
    "model.num_layers": "2",
    "model.d_model": "32",
    "model.head_dim": "8",
    "model.num_kv_heads": "4",
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
BUCKETS = (
    Bucket(32, 16, MeshConfig(2, 2, 1), ParallelConfig(num_microbatches=2, remat="none")),
    Bucket(64, 8, MeshConfig(2, 2, 1), ParallelConfig(num_microbatches=1, remat="full")),
    Bucket(128, 8, MeshConfig(2, 1, 2), ParallelConfig(num_microbatches=1, remat="full"), DispatchConfig(chunks=2)),
)
TIMES = {"step_seconds", "tokens_per_second", "reshard_seconds"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pieces of Python's own sources, in documents of 20, 50 and 110 bytes, a bucket each."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(document.text for document in load_corpus()[:12] if document.text.isascii())
    starts = np.cumsum([0, *[20, 20, 50, 110, 20, 20, 50, 110] * 25])
    assert len(text) > starts[-1]
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        (folder / f"{i}.txt").write_text(text[start:end])
    return folder


@pytest.fixture(scope="module")
def config(corpus):
    return apply_overrides(loading.load_config("tiny"), OVERRIDES | {"data.paths": str(corpus)})


class TestPlanFile:
    def test_written_and_read_back(self, tmp_path):
        path = tmp_path / "plan.py"
        long = Bucket(
            10_240,
            32,
            MeshConfig(8, 1, 2, hardware="a100_64gb", hosts=2, host_axis="expert"),
            ParallelConfig(num_microbatches=4, gather="layer", remat="collectives", batch_split=2),
            DispatchConfig("ragged", 1.25, ("expert",), hosts=2, chunks=4, payload="float8"),
            accumulate=2,
        )
        buckets = (dataclasses.replace(long, seq_len=128, accumulate=1), long)
        model = '/models/of "mine"/small \N{GRINNING FACE}\udcff.py'  # with a byte that is no Unicode
        write_plan_file(path, buckets, model, "Written by a test: two buckets.")
        assert load_buckets(path) == buckets
        assert load_plan_model(path) == model
        assert load_config_file(path, MeshConfig) == long.mesh
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 120
        write_plan_file(path, buckets, model, "Written by a test: two buckets.")
        assert path.read_text() == text

    def test_the_one_in_mesh_configs_is_as_written(self, tmp_path):
        """So that what is held of all files here (style, imports) is held of those that are written."""
        path = common.MESH_CONFIGS / "cpu_16_mixed.py"
        title = path.read_text().split('"""')[1]
        write_plan_file(tmp_path / "plan.py", load_buckets(path), "mixed", title.rstrip("\n"))
        assert (tmp_path / "plan.py").read_text() == path.read_text()

    def test_a_mesh_file_has_no_buckets_and_no_model(self):
        assert load_buckets(common.MESH_CONFIGS / "cpu_16.py") == ()
        assert load_plan_model(common.MESH_CONFIGS / "cpu_16.py") is None

    @pytest.mark.parametrize(
        ("buckets", "message"),
        [
            ((), r"buckets=\(\) must hold one"),
            (BUCKETS[::-1], r"seq_len=\[128, 64, 32\], which must ascend"),
            ((BUCKETS[0], Bucket(64, 8, MeshConfig(8))), r"mesh.num_devices=\[4, 8\], which must be the same"),
        ],
    )
    def test_buckets_that_cannot_go_together(self, tmp_path, buckets, message):
        with pytest.raises(ConfigError, match=message):
            write_plan_file(tmp_path / "plan.py", buckets, "tiny", "A plan.")
        with pytest.raises(ConfigError, match=r"title='one.*quotes"):
            write_plan_file(tmp_path / "plan.py", BUCKETS, "tiny", 'one "quoted" line')

    def test_a_model_without_a_name_is_refused(self, tmp_path):
        (tmp_path / "plan.py").write_text("def get_model():\n    return 3\n")
        with pytest.raises(ConfigError, match=r"get_model\(\) returned 3; it must return a name"):
            load_plan_model(tmp_path / "plan.py")

    def test_a_file_that_returns_something_else(self, tmp_path):
        (tmp_path / "plan.py").write_text("def get_buckets():\n    return [1]\n")
        with pytest.raises(ConfigError, match=r"get_buckets\(\) returned \[1\]; it must return a tuple of Buckets"):
            load_buckets(tmp_path / "plan.py")


def mesh(bucket):
    return build_mesh(bucket.mesh, jax.devices()[: bucket.mesh.num_devices])


def trainer(config, workdir, buckets=BUCKETS):
    return Trainer(config, mesh(buckets[0]), workdir, buckets)


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A mixed run that was never stopped: its work directory and summary."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, trainer(config, workdir).run()


def test_a_mixed_run_draws_every_length_and_says_what_ran(config, finished):
    workdir, summary = finished
    recorded = read_metrics(workdir)
    remats = {bucket.seq_len: bucket.parallel.remat for bucket in BUCKETS}
    assert {line["bucket_seq_len"] for line in recorded} == set(remats)
    assert all(line["remat"] == remats[line["bucket_seq_len"]] for line in recorded)
    assert [line["step"] for line in recorded] == list(range(1, config.steps + 1))
    meshes = [128, *(line["bucket_seq_len"] for line in recorded)]  # the longest bucket's is where a run starts
    moved = [(a == 128) != (b == 128) for a, b in itertools.pairwise(meshes)]
    assert [line["reshard_seconds"] > 0 for line in recorded] == moved
    assert summary.reshards == sum(moved) >= 2
    assert summary.reshard_seconds == pytest.approx(sum(line["reshard_seconds"] for line in recorded))
    assert sum(bucket.steps for bucket in summary.buckets) == config.steps
    assert [(b.seq_len, b.batch_size, b.remat) for b in summary.buckets] == [
        (b.seq_len, b.batch_size, b.parallel.remat) for b in BUCKETS
    ]
    assert all(bucket.device_memory_bytes > 0 for bucket in summary.buckets)
    assert recorded[-1]["eval_loss"] < recorded[config.eval_every - 1]["eval_loss"]
    assert sum(line["load_cv_window_tokens"] for line in recorded[-4:]) == summary.window_tokens


@pytest.mark.full
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(config, finished, tmp_path, monkeypatch):
    killed = trainer(config, tmp_path)
    check_finite = killed._check_finite

    def die_at_5(step, *rest):
        check_finite(step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(killed, "_check_finite", die_at_5)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = trainer(config, tmp_path).run()
    assert resumed.resumed_from == 3
    assert lines(tmp_path) == lines(finished[0])


def test_resuming_with_other_buckets_is_refused(config, finished):
    other = (dataclasses.replace(BUCKETS[0], batch_size=32), *BUCKETS[1:])
    with pytest.raises(ConfigError, match=r"^buckets: 16x32,\S+ in the run, 32x32,\S+ asked for; "):
        trainer(config, finished[0], other)
    other = apply_overrides(config, {"data.block_steps": str(config.data.block_steps + 1)})
    with pytest.raises(ConfigError, match=r"buckets of \[seq_len, batch_size, group\].* and must be \[\[32, 16, 0\]"):
        trainer(other, finished[0]).run()


@pytest.mark.full
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


def test_a_plan_of_one_bucket_is_a_plain_run(config, tmp_path):
    bucket = BUCKETS[0]
    plan = trainer(config, tmp_path, (bucket,))
    plain = Trainer(bucket.applied(config), mesh(bucket), tmp_path)
    assert (plan.config, plan.program) == (plain.config, plain.program)
    assert plain.config.parallel == bucket.parallel
    assert plain.config.data.batch_size == bucket.batch_size
    batches = [next(which.schedule.make_loader(which.data)) for which in (plan, plain)]
    assert batches[0].keys() == batches[1].keys()
    np.testing.assert_array_equal(batches[0]["tokens"], batches[1]["tokens"])


def test_a_bucket_that_does_not_fit_its_mesh_is_refused(config, tmp_path):
    wrong = dataclasses.replace(BUCKETS[2], batch_size=7)
    with pytest.raises(ConfigError, match="batch_size=7 must be a multiple of 2 = expert 2"):
        trainer(config, tmp_path, (*BUCKETS[:2], wrong))
