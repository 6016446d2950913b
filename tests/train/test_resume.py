"""Going on with a run: its record decides, what differs is said, and what would make it another run is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import pytest

from moejax.checks import ConfigError
from moejax.config import DataConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides, describe
from moejax.train.config import TrainConfig
from moejax.train.loop import Trainer
from moejax.train.metrics import read_metrics
from moejax.train.record import RECORD_FILE, append_start, read_starts
from moejax.train.resume import CHECKPOINTS, KINDS, Record, check_data, check_run, compare, read_record

# A valid value of each field that is not the default, and of those that must change with it.
LONGROPE = {
    "model.rope.scaling.kind": "longrope", "model.rope.scaling.original_max_seq_len": "128",
    "model.rope.rotary_dim": "8", "model.rope.scaling.short_factors": "1,1.5,2,2.5",
    "model.rope.scaling.long_factors": "1,2.5,4,8",
}  # fmt: skip
LATENT = {
    "model.attention.num_kv_heads": "4", "model.attention.latent.kv_rank": "16",
    "model.attention.latent.rope_head_dim": "8", "model.attention.latent.value_head_dim": "16",
}  # fmt: skip
OTHERS = {
    "model.num_layers": {"model.num_layers": "2"},
    "model.d_model": {"model.d_model": "64"},
    "model.attention.num_heads": {"model.attention.num_heads": "8"},
    "model.attention.num_kv_heads": {"model.attention.num_kv_heads": "4"},
    "model.attention.head_dim": {"model.attention.head_dim": "16"},
    "model.d_ff": {"model.d_ff": "512"},
    "model.num_experts": {"model.num_experts": "8"},
    "model.experts_per_token": {"model.experts_per_token": "3"},
    "model.attention.qk_norm": {"model.attention.qk_norm": "head"},
    "model.attention.bias": {"model.attention.bias": "true"},
    "model.attention.output_bias": {"model.attention.output_bias": "true"},
    "model.attention.multiplier": {"model.attention.multiplier": "0.1"},
    "model.rope.rotary_dim": {"model.rope.rotary_dim": "16"},
    "model.rope.scaling.kind": {"model.rope.scaling.kind": "linear"},
    "model.rope.scaling.factor": {"model.rope.scaling.factor": "2"},
    "model.rope.scaling.original_max_seq_len": {"model.rope.scaling.original_max_seq_len": "128"},
    "model.rope.scaling.low_freq_factor": {"model.rope.scaling.low_freq_factor": "2"},
    "model.rope.scaling.high_freq_factor": {"model.rope.scaling.high_freq_factor": "8"},
    "model.rope.scaling.beta_fast": {"model.rope.scaling.beta_fast": "16"},
    "model.rope.scaling.beta_slow": {"model.rope.scaling.beta_slow": "2"},
    "model.rope.scaling.truncate": {"model.rope.scaling.truncate": "false"},
    "model.rope.scaling.attention_factor": {"model.rope.scaling.attention_factor": "1.5"},
    "model.rope.scaling.short_factors": LONGROPE,
    "model.rope.scaling.long_factors": LONGROPE,
    "model.attention.latent.kv_rank": LATENT,
    "model.attention.latent.q_rank": LATENT | {"model.attention.latent.q_rank": "16"},
    "model.attention.latent.rope_head_dim": LATENT,
    "model.attention.latent.value_head_dim": LATENT,
    "model.router.scaling": {"model.router.scaling": "2.5"},
    "model.router.num_groups": {"model.router.num_groups": "4"},
    "model.router.groups_per_token": {"model.router.num_groups": "4", "model.router.groups_per_token": "2"},
    "model.shared_gate": {"model.shared_gate": "true", "model.shared_d_ff": "64"},
    "model.embedding_multiplier": {"model.embedding_multiplier": "12"},
    "model.residual_multiplier": {"model.residual_multiplier": "0.22"},
    "model.logits_divisor": {"model.logits_divisor": "6"},
    "model.router.score": {"model.router.score": "sigmoid"},
    "model.router.renormalize": {"model.router.renormalize": "false"},
    "model.router.bias": {"model.router.bias": "true", "balance.bias_update_rate": "0.01"},
    "model.shared_d_ff": {"model.shared_d_ff": "64"},
    "model.num_dense_layers": {"model.num_dense_layers": "1", "model.dense_d_ff": "64"},
    "model.dense_d_ff": {"model.num_dense_layers": "1", "model.dense_d_ff": "64"},
    "model.vocab_size": {"model.vocab_size": "512"},
    "model.tie_embeddings": {"model.tie_embeddings": "true"},
    "model.max_seq_len": {"model.max_seq_len": "512"},
    "model.rope.theta": {"model.rope.theta": "500"},
    "model.norm_eps": {"model.norm_eps": "0.1"},
    "model.dtype": {"model.dtype": "float32"},
    "layout.dispatch.strategy": {"layout.dispatch.strategy": "ragged"},
    "layout.dispatch.capacity_factor": {"layout.dispatch.capacity_factor": "2"},
    "layout.dispatch.expert_axes": {"layout.dispatch.expert_axes": "expert"},
    "layout.dispatch.hierarchical": {"layout.dispatch.hierarchical": "true"},
    "layout.dispatch.chunks": {"layout.dispatch.chunks": "2"},
    "layout.dispatch.wire_dtype": {"layout.dispatch.wire_dtype": "float8"},
    "balance.aux_loss_weight": {"balance.aux_loss_weight": "0.5"},
    "balance.sequence_loss_weight": {"balance.sequence_loss_weight": "0.5"},
    "balance.z_loss_weight": {"balance.z_loss_weight": "0.5"},
    "balance.bias_update_rate": {"model.router.bias": "true", "balance.bias_update_rate": "0.01"},
    "balance.window": {"balance.window": "16"},
    "balance.headroom": {"balance.headroom": "2"},
    "balance.capacity_factors": {"balance.capacity_factors": "1,2"},
    "balance.max_load_cv": {"balance.max_load_cv": "9"},
    "balance.max_dropped_fraction": {"balance.max_dropped_fraction": "0.5"},
    "balance.max_rounds": {"balance.max_rounds": "9"},
    "balance.max_idle_experts": {"balance.max_idle_experts": "9"},
    "layout.num_microbatches": {"layout.num_microbatches": "4"},
    "layout.pipeline_repeats": {"layout.pipeline_repeats": "2"},
    "layout.gather": {"layout.gather": "layer"},
    "layout.remat": {"layout.remat": "full"},
    "layout.bubble": {"layout.bubble": "skip"},
    "layout.batch_split": {"layout.batch_split": "2"},
    "optimizer.learning_rate": {"optimizer.learning_rate": "0.5"},
    "optimizer.warmup_steps": {"optimizer.warmup_steps": "7"},
    "optimizer.final_learning_rate_fraction": {"optimizer.final_learning_rate_fraction": "0.5"},
    "optimizer.b1": {"optimizer.b1": "0.5"},
    "optimizer.b2": {"optimizer.b2": "0.5"},
    "optimizer.eps": {"optimizer.eps": "0.5"},
    "optimizer.weight_decay": {"optimizer.weight_decay": "9"},
    "optimizer.clip_norm": {"optimizer.clip_norm": "9"},
    "data.paths": {"data.paths": "a,b"},
    "data.tokenizer": {"data.tokenizer": "bpe"},
    "data.tokenizer_vocab_size": {"data.tokenizer_vocab_size": "512"},
    "data.separator": {"data.tokenizer": "x.json", "data.separator": "<s>"},
    "layout.seq_len": {"layout.seq_len": "128"},
    "layout.batch_size": {"layout.batch_size": "64"},
    "data.eval_fraction": {"data.eval_fraction": "0.5"},
    "data.seed": {"data.seed": "1"},
    "data.block_steps": {"data.block_steps": "4"},
    "checkpoint.every": {"checkpoint.every": "7"},
    "checkpoint.keep": {"checkpoint.keep": "7"},
    "steps": {"steps": "77"},
    "layout.grad_accumulation_steps": {"layout.grad_accumulation_steps": "2"},
    "eval_every": {"eval_every": "7"},
    "eval_batches": {"eval_batches": "7"},
    "sample_tokens": {"sample_tokens": "7"},
    "memory_limit_bytes": {"memory_limit_bytes": "7"},
    "compiler_options": {"compiler_options": "a=b"},
    "seed": {"seed": "7"},
    "init": {"init": "elsewhere"},
    "upcycle": {"upcycle": "num_experts=4"},
}
RUN = TrainConfig()
LAYOUTS = (Layout(MeshConfig(2), 32, 16), Layout(MeshConfig(1, 2), 64, 8))
PLAN = TrainConfig(layouts=LAYOUTS)


def asked(**overrides):
    return apply_overrides(TrainConfig(), overrides)


def record_of(config, fingerprint="f00d", *, has_checkpoint=True):
    return Record(config, fingerprint, has_checkpoint, ())


def error_of(function, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_field_of_the_configuration_has_a_kind():
    paths = {field.path for field in describe(TrainConfig())}
    assert {path for path in paths if not path.startswith("layout.mesh.")} == set(KINDS) == set(OTHERS)


@pytest.mark.parametrize("path", KINDS)
def test_each_field_that_differs_is_said_or_refused_with_both_values(path, tmp_path):
    other = asked(**OTHERS[path])
    [difference] = [d for d in compare(RUN, other) if d.path == f"config.{path}"]
    line = str(difference)
    assert line.startswith(f"--config.{path}: ")
    assert line.endswith(f" in the run, {OTHERS[path][path]} asked for")
    arguments = record_of(RUN), other, tmp_path
    if difference.kind == "fixed":
        for allowed in (False, True):
            message = error_of(check_run, *arguments, override=allowed)
            assert line in message
            assert "cannot be resumed with this; leave it out, or use another workdir" in message
    elif difference.kind == "meaning" and len(OTHERS[path]) == 1:
        message = error_of(check_run, *arguments, override=False)
        assert message.startswith(
            f"{line}; this would make it another run than the one in {tmp_path}; leave it out, add --override"
        )
        assert check_run(*arguments, override=True) == [line]
    elif difference.kind == "data":
        assert line not in check_run(*arguments, override=False)
        message = error_of(check_data, record_of(RUN), other, "beef", tmp_path)
        assert line in message
        assert f"the run in {tmp_path} has another training text or tokenizer" in message
        assert line in check_data(record_of(RUN), other, "f00d", tmp_path)
    elif difference.kind == "free":
        assert check_run(*arguments, override=False) == [line]


def test_the_same_run_says_nothing(tmp_path):
    assert check_run(record_of(RUN), RUN, tmp_path, override=False) == []
    assert check_data(record_of(RUN), RUN, "f00d", tmp_path) == []
    assert "have changed since" in error_of(check_data, record_of(RUN), RUN, "beef", tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ({"strategy": "dropless"}, {"strategy": "ragged"}, "free"),
        ({"strategy": "dropless"}, {"strategy": "capacity"}, "meaning"),
        ({"strategy": "capacity"}, {"strategy": "ragged"}, "meaning"),
        ({"strategy": "ragged"}, {"strategy": "ragged", "capacity_factor": 3.0}, "free"),
        ({"strategy": "capacity"}, {"strategy": "capacity", "capacity_factor": 3.0}, "meaning"),
    ],
)
def test_a_dispatch_that_drops_tokens_is_another_run(before, after, kind):
    before, after = (TrainConfig().with_layout(**fields) for fields in (before, after))
    assert [d.kind for d in compare(before, after)] == [kind]


def test_many_differences_are_still_one_line(tmp_path):
    # But for those of latent attention, which the others don't go with.
    fixed = [OTHERS[path] for path, kind in KINDS.items() if kind == "fixed" and ".latent." not in path]
    other = asked(**{path: text for overrides in fixed for path, text in overrides.items()})
    message = error_of(check_run, record_of(RUN), other, tmp_path, override=True)
    assert message.count("asked for") == 8
    assert "; and 12 more; " in message
    paths = ",".join(f"/a/long/path/{i}" for i in range(100))
    [difference] = compare(RUN, asked(**{"data.paths": paths}))
    assert len(str(difference)) < 130


def test_another_mesh_may_go_on(tmp_path):
    other = RUN.with_layout(mesh=MeshConfig(expert=4, hardware="h100"))
    assert check_run(record_of(RUN), other, tmp_path, override=False) == [
        "--mesh.expert: 1 in the run, 4 asked for",
        "--mesh.hardware: cpu in the run, h100 asked for",
    ]


class TestLayouts:
    """A run that follows a plan."""

    def last(self, **fields):
        return dataclasses.replace(PLAN, layouts=(LAYOUTS[0], LAYOUTS[1].replace(**fields)))

    def test_the_same_plan_says_nothing(self, tmp_path):
        assert check_run(record_of(PLAN), self.last(), tmp_path, override=False) == []

    def test_other_lengths_cannot_go_on(self, tmp_path):
        for before, after in ((PLAN, RUN), (RUN, PLAN)):
            message = error_of(check_run, record_of(before), after, tmp_path, override=True)
            shapes = ["16x32,8x64" if run is PLAN else "none" for run in (before, after)]
            assert f"layouts: {shapes[0]} in the run, {shapes[1]} asked for; " in message

    def test_how_a_layout_is_spread_may_differ(self, tmp_path):
        spread = self.last(mesh=MeshConfig(2), remat="full")
        assert check_run(record_of(PLAN), spread, tmp_path, override=False) == [
            "layouts[1].mesh.expert: 1 in the run, 2 asked for",
            "layouts[1].mesh.pipeline: 2 in the run, 1 asked for",
            "layouts[1].remat: auto in the run, full asked for",
        ]

    @pytest.mark.parametrize(
        ("field", "value", "line"),
        [
            ("strategy", "capacity", "layouts[1].dispatch.strategy: dropless in the run, capacity asked for"),
            ("wire_dtype", "float8", "layouts[1].dispatch.wire_dtype: compute in the run, float8 asked for"),
            ("grad_accumulation_steps", 2, "layouts[1].grad_accumulation_steps: 1 in the run, 2 asked for"),
        ],
    )
    def test_what_a_layout_computes_is_its_meaning(self, tmp_path, field, value, line):
        arguments = record_of(PLAN), self.last(**{field: value}), tmp_path
        assert error_of(check_run, *arguments, override=False).startswith(f"{line}; this would make")
        assert check_run(*arguments, override=True) == [line]

    def test_a_plan_of_one_length_is_a_configuration_and_a_mesh(self):
        one = TrainConfig(layouts=LAYOUTS[1:])
        assert compare(TrainConfig().with_layout(**vars(LAYOUTS[1])), one) == []


class TestRecord:
    def start(self, config):
        return {"config": dataclasses.asdict(config), "data_fingerprint": "f00d"}

    def test_a_folder_without_a_run_has_none(self, tmp_path):
        assert read_record(tmp_path) is read_record(tmp_path / "missing") is None
        (tmp_path / "notes.txt").write_text("something else")
        (tmp_path / CHECKPOINTS).mkdir()
        assert read_record(tmp_path) is None

    def test_the_last_start_is_the_record(self, tmp_path):
        append_start(tmp_path, self.start(TrainConfig()))
        changed = dataclasses.replace(PLAN, steps=5000, data=DataConfig(paths=("a", "b")))
        append_start(tmp_path, self.start(changed))
        record = read_record(tmp_path)
        assert record.config == changed
        assert record.config.layouts == LAYOUTS
        assert (record.data_fingerprint, record.has_checkpoint, record.lines) == ("f00d", False, ())
        (tmp_path / CHECKPOINTS / "5").mkdir(parents=True)
        assert read_record(tmp_path).has_checkpoint

    def test_one_of_another_version_says_so(self, tmp_path):
        start = self.start(TrainConfig())
        del start["config"]["steps"], start["config"]["model"]["norm_eps"]
        start["config"]["data"]["shuffle"] = True
        append_start(tmp_path, start)
        assert check_run(read_record(tmp_path), RUN, tmp_path, override=False) == [
            f"{tmp_path / RECORD_FILE}: config.data.shuffle=True left out: this version has no such field",
            f"{tmp_path / RECORD_FILE}: config.model.norm_eps=1e-06, config.steps=300 taken from the defaults: "
            "the record has no such field",
        ]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{", "is not the record of a run (JSONDecodeError("),
            ("[]", "is not the record of a run (TypeError("),
            ("\udcff", "is not the record of a run (UnicodeDecodeError("),
            ('{"starts": []}', "is not the record of a run ("),
            ('{"starts": null}', "is not the record of a run ("),
            ('{"starts": "abc"}', "is not the record of a run ("),
            ('{"starts": [5]}', "is not the record of a run ("),
            ('{"starts": [{}]}', "is of another version, or was changed: KeyError("),
        ],
    )
    def test_one_that_cannot_be_read_is_one_line(self, tmp_path, text, expected):
        (tmp_path / RECORD_FILE).write_text(text, errors="surrogateescape")
        message = error_of(read_record, tmp_path)
        assert message.startswith(f"{tmp_path / RECORD_FILE} {expected}")
        assert message.endswith("or use another workdir")

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_a_record_that_is_no_file_is_one_line(self, tmp_path, make):
        make(tmp_path / RECORD_FILE)
        assert f"{RECORD_FILE} is not the record of a run (ValueError('not a regular file'))" in error_of(
            read_record, tmp_path
        )

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"layouts": 5}, "config.layouts=5 must be a list"),
            ({"layouts": []}, "config.layouts=() must hold one at least"),
            ({"layouts": [{"mesh": None}]}, "config.layouts[0].mesh=None must be the fields of a MeshConfig"),
            ({"layouts": [{"mesh": {"expert": "2"}}]}, "config.layouts[0].mesh.expert='2' must be of type int"),
            ({"layouts": [{"chunks": 0}, {"remat": 1}]}, "config.layouts[1].remat=1 must be one of auto, none"),
        ],
    )
    def test_a_field_that_is_something_else_is_one_line(self, tmp_path, change, expected):
        start = self.start(TrainConfig())
        start["config"] |= change
        append_start(tmp_path, start)
        message = error_of(read_record, tmp_path)
        assert message.startswith(f"{tmp_path / RECORD_FILE} is of another version, or was changed: {expected}")
        assert message.endswith("; restore it, or use another workdir")

    def test_a_fingerprint_that_is_no_text_is_one_line(self, tmp_path):
        append_start(tmp_path, self.start(TrainConfig()) | {"data_fingerprint": None})
        assert error_of(read_record, tmp_path) == (
            f"{tmp_path / RECORD_FILE} is of another version, or was changed: the fingerprint of the data, None, must "
            "be text; restore it, or use another workdir"
        )

    @pytest.mark.parametrize("closed", [False, True])
    def test_checkpoints_that_are_no_folder_of_ours_are_one_line(self, tmp_path, monkeypatch, closed):
        if closed:
            (tmp_path / CHECKPOINTS).mkdir()
            monkeypatch.setattr(os, "access", lambda *_: False)  # as root, every folder can be entered
        else:
            (tmp_path / CHECKPOINTS).write_text("")
        why = "Permission denied" if closed else "Not a directory"
        assert error_of(read_record, tmp_path).startswith(f"{tmp_path / CHECKPOINTS} ({why}) cannot be used")

    def test_only_numbers_are_checkpoints(self, tmp_path):
        (tmp_path / CHECKPOINTS / "²").mkdir(parents=True)
        assert read_record(tmp_path) is None

    @pytest.mark.parametrize(
        ("text", "expected"), [(None, "FileNotFoundError("), ("{", "JSONDecodeError("), ("[]", "TypeError(")]
    )
    def test_a_damaged_checkpoint_without_a_record_is_one_line(self, tmp_path, text, expected):
        path = tmp_path / CHECKPOINTS / "5" / "metadata" / "metadata"
        path.parent.mkdir(parents=True)
        if text is not None:
            path.write_text(text)
        assert (
            f"{tmp_path / RECORD_FILE} is missing, and {path} is of another version, or was changed: {expected}"
            in error_of(read_record, tmp_path)
        )

    def test_one_with_a_wrong_value_is_one_line(self, tmp_path):
        append_start(tmp_path, self.start(apply_overrides(TrainConfig(), {"steps": "400"})))
        path = tmp_path / RECORD_FILE
        path.write_text(path.read_text().replace("400", "-400"))
        assert error_of(read_record, tmp_path) == (
            f"{path} is of another version, or was changed: config.steps=-400 must be positive; "
            "restore it, or use another workdir"
        )

    def test_nothing_is_refused_before_there_is_a_checkpoint(self, tmp_path):
        record = record_of(RUN, has_checkpoint=False)
        other = asked(**{"model.num_experts": "8", "data.tokenizer": "bpe"})
        said = check_run(record, other, tmp_path, override=False)
        assert said == ["--config.model.num_experts: 16 in the run, 8 asked for"]
        said = check_data(record, other, "beef", tmp_path)
        assert said == ["--config.data.tokenizer: bytes in the run, bpe asked for"]


# The trainer.

OVERRIDES = {
    "model.num_layers": "2", "model.d_model": "32",
    "model.attention.head_dim": "8", "model.attention.num_kv_heads": "4",
    "model.d_ff": "32", "model.num_experts": "4", "layout.seq_len": "32", "layout.batch_size": "4",
    "balance.capacity_factors": "", "steps": "2", "optimizer.warmup_steps": "1", "eval_every": "100",
    "eval_batches": "1", "sample_tokens": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"{i + 1} times {j} is {(i + 1) * j}\n" for j in range(200)))
    return apply_overrides(TrainConfig(), OVERRIDES | {"data.paths": str(folder)})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train(config, workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a run that has ended after its two steps."""
    return shutil.copytree(finished, tmp_path / "run")


def train(config, workdir, **overrides):
    config = apply_overrides(config, overrides)
    return trainer(config, workdir).run()


def trainer(config, workdir, **options):
    return Trainer(config, workdir, devices=jax.devices()[:1], **options)


def test_values_are_shown_as_flags_have_them():
    texts = {"optimizer.eps": "1e-07", "optimizer.clip_norm": "2.0", "data.paths": "texts/v1.0,b", "seed": "7"}
    lines = {str(difference).partition(" in the run, ")[2] for difference in compare(RUN, asked(**texts))}
    assert lines == {"texts/v1.0,b asked for", "1e-07 asked for", "2 asked for", "7 asked for"}


def test_the_record_holds_the_whole_run(config, finished):
    record = read_record(finished)
    assert record.config == config
    assert record.has_checkpoint
    assert record.lines == ()
    [start] = read_starts(finished)
    [layout] = start["config"]["layouts"]
    assert set(layout["mesh"]) == {field.name for field in dataclasses.fields(MeshConfig)}


def test_without_run_json_the_checkpoint_is_the_record(config, workdir):
    (workdir / RECORD_FILE).unlink()
    record = read_record(workdir)
    assert record.config == config
    assert record.has_checkpoint
    with pytest.raises(ConfigError, match=r"--config.model.rope.theta: 10000 in the run, 500 asked for"):
        train(config, workdir, **{"model.rope.theta": "500"})


@pytest.mark.full
def test_a_resume_says_where_it_goes_on_and_what_differs(config, workdir, capsys):
    train(config, workdir, steps="3")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "--config.steps: 2 in the run, 3 asked for"
    assert f"resumed {workdir} at step 2" in said[1:]
    assert [start["config"]["steps"] for start in read_starts(workdir)] == [2, 3]


@pytest.mark.full
def test_what_is_allowed_by_override_is_the_run_from_then_on(config, workdir, capsys):
    other = apply_overrides(config, {"steps": "3", "optimizer.learning_rate": "0.5"})
    assert "add --override" in error_of(trainer, other, workdir)
    assert len(read_starts(workdir)) == 1
    trainer(other, workdir, override=True).run()
    assert "--config.optimizer.learning_rate: 0.003 in the run, 0.5 asked for" in capsys.readouterr().err
    assert read_metrics(workdir)[-1]["learning_rate"] > 0.04
    assert read_record(workdir).config == other
    trainer(other, workdir)  # is that run now


def test_a_model_that_cannot_go_on_is_refused_before_anything_is_built(config, workdir, monkeypatch):
    monkeypatch.setattr("moejax.train.loop.Schedule", None)
    message = error_of(train, config, workdir, **{"model.num_experts": "8"})
    assert message.startswith("--config.model.num_experts: 4 in the run, 8 asked for; the run in ")
    assert "router_bias_E" not in message


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        pytest.param({"balance.window": "2"}, "balance.window=32 became 2", marks=pytest.mark.slow),
        pytest.param({"balance.window": "64"}, "balance.window=32 became 64", marks=pytest.mark.slow),
        ({"balance.capacity_factors": "1,2"}, "balance.capacity_factors=() became (1.0, 2.0)"),
    ],
)
def test_the_balancers_windows_start_anew_where_they_cannot_go_on(config, workdir, capsys, overrides, line):
    summary = train(config, workdir, steps="3", **overrides)
    assert f"the balancer's windows start anew: {line}" in capsys.readouterr().err.splitlines()
    assert summary.window_tokens == config.layout.tokens, "of one step"
    assert [line["window_steps"] for line in read_metrics(workdir)] == [1, 2, 1]


def test_recorded_data_that_is_gone_says_where_its_name_is_from(config, workdir):
    path, (old,) = workdir / RECORD_FILE, config.data.paths
    path.write_text(path.read_text().replace(old, "gone"))
    gone = read_record(workdir).config
    assert error_of(train, gone, workdir).endswith(f" (the run in {workdir} recorded this value)")
    assert "recorded" not in error_of(train, config, workdir, **{"data.paths": "elsewhere"})


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_recorded(config, workdir):
    before = (workdir / RECORD_FILE).read_text()
    fewer = apply_overrides(config, {"steps": "1", "optimizer.warmup_steps": "0"})
    assert error_of(trainer(fewer, workdir, override=True).run) == (
        f"--config.steps=1 is less than the 2 steps that the run in {workdir} has done; ask for as many or more, "
        "or use another workdir"
    )
    assert (workdir / RECORD_FILE).read_text() == before


def test_a_run_that_is_going_on_is_not_touched(config, workdir, monkeypatch):
    before = json.dumps(read_starts(workdir))
    with trainer(config, workdir)._lock:
        assert "is in use by process" in error_of(train, config, workdir)
        monkeypatch.setattr("moejax.train.workdir.WorkdirLock.check_possible", lambda _: None)
        assert "is in use by process" in error_of(train, config, workdir)
    assert json.dumps(read_starts(workdir)) == before
