import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import strict_json
from moejax.checks import ConfigError, check
from moejax.config import BalanceConfig, DataConfig, DispatchConfig, ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import apply_overrides, describe, from_record, load_config_file, split_overrides
from moejax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    low: int = 0
    high: int = 1
    limit: int | None = None
    either: int | str = 0
    table: dict = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    width: Literal[8, 16] = 8

    def __post_init__(self):
        check(self.low < self.high, f"low={self.low} must be less than high={self.high}")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    top: int = 10

    def __post_init__(self):
        check(self.inner.high <= self.top, f"inner.high={self.inner.high} must be at most top={self.top}")


@dataclasses.dataclass(frozen=True)
class Required:
    size: int
    top: int = 10


def error_of(config, overrides):
    with pytest.raises(ConfigError) as error:
        apply_overrides(config, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.num_layers", "8", 8),
        ("model.max_seq_len", "10_240", 10_240),
        ("model.tie_embeddings", "true", True),
        ("model.tie_embeddings", "False", False),
        ("model.dtype", "float16", "float16"),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("layout.seq_len", "64", 64),
        ("layout.dispatch.hierarchical", "true", True),
        ("layout.dispatch.expert_axes", "expert", ("expert",)),
        ("layout.dispatch.expert_axes", "expert, tensor", ("expert", "tensor")),
        ("data.paths", "a/*.py,b", ("a/*.py", "b")),
        ("data.paths", "", ()),
        ("data.tokenizer", "a=b.json", "a=b.json"),
        ("steps", "1000", 1000),
        ("seed", "-1", -1),
    ],
)
def test_text_becomes_the_type_of_the_field(path, text, expected):
    value = apply_overrides(TrainConfig(), {path: text})
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_other_types():
    assert apply_overrides(Inner(), {"limit": "3"}).limit == 3
    assert apply_overrides(Inner(limit=3), {"limit": "none"}).limit is None
    assert apply_overrides(Inner(), {"sizes": "1,2"}).sizes == (1, 2)
    assert apply_overrides(Inner(), {"width": "16"}).width == 16
    assert "either='1' cannot be set by an override" in error_of(Inner(), {"either": "1"})
    assert "table='1' cannot be set by an override" in error_of(Inner(), {"table": "1"})


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.num_layers", "four", "a whole number (int)"),
        ("model.num_layers", "4.0", "a whole number (int)"),
        ("model.num_layers", "", "a whole number (int)"),
        ("optimizer.learning_rate", "fast", "a finite number (float)"),
        ("optimizer.learning_rate", "inf", "a finite number (float)"),
        ("optimizer.learning_rate", "nan", "a finite number (float)"),
        ("model.tie_embeddings", "1", "true or false"),
        ("model.dtype", "int8", "one of float32, bfloat16, float16"),
        ("layout.dispatch.expert_axes", "expert,pipeline", "one of expert, tensor"),
    ],
)
def test_wrong_type_names_path_value_and_type(path, text, expected):
    message = error_of(TrainConfig(), {path: text})
    assert message.startswith(f"{path}=")
    assert text.split(",")[-1] in message
    assert message.endswith(f"must be {expected}")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "model.num_layer",
            ["model.num_layer does not exist", "did you mean model.num_layers", "d_model, attention, rope"],
        ),
        ("model.num_heads", ["model.num_heads does not exist; did you mean model.attention.num_heads? the fields"]),
        ("model.attention.heads", ["did you mean", "the fields of model.attention (AttentionConfig) are num_heads"]),
        (
            "modle.num_layers",
            ["modle does not exist", "did you mean model", "fields of TrainConfig are model, layout, balance"],
        ),
        ("zzz", ["zzz does not exist; the fields of TrainConfig are"]),
        ("model", ["model='1' cannot be set as a whole", "model.num_layers"]),
        ("layouts", ["layouts does not exist; did you mean layout? the fields of TrainConfig are"]),
        ("layout", ["layout='1' cannot be set as a whole; set one of layout.mesh, layout.seq_len, "]),
        ("layout.repeats", ["layout.repeats does not exist; did you mean ", "or layout.pipeline_repeats? the fields"]),
        ("layout.chunks", ["layout.chunks does not exist; did you mean layout.dispatch.chunks? the fields of layout"]),
        ("steps.more", ["steps.more='1' does not exist", "steps has no fields"]),
        ("model.", ["model='1' cannot be set as a whole"]),
        ("", ["does not exist"]),
        ("model.num_moe_layers", ["model.num_moe_layers does not exist"]),
    ],
)
def test_unknown_path_says_what_there_is(path, expected):
    message = error_of(TrainConfig(), {path: "1"})
    for part in expected:
        assert part in message


def test_fields_that_depend_on_each_other_change_together():
    together = {"inner.low": "6", "inner.high": "8"}
    assert apply_overrides(Outer(), together).inner == Inner(6, 8)
    assert apply_overrides(Outer(), dict(reversed(together.items()))).inner == Inner(6, 8)
    both_levels = apply_overrides(Outer(), {"top": "30", "inner.high": "20"})
    assert (both_levels.top, both_levels.inner.high) == (30, 20)
    model = apply_overrides(ModelConfig(), {"num_dense_layers": "1", "dense_d_ff": "512"})
    assert (model.num_dense_layers, model.dense_d_ff) == (1, 512)


def test_a_refused_value_keeps_its_path():
    assert error_of(Outer(), {"inner.low": "5"}) == "inner.low=5 must be less than high=1"
    assert error_of(Outer(), {"inner.high": "50"}) == "inner.high=50 must be at most top=10"
    message = error_of(TrainConfig(), {"model.attention.num_heads": "5"})
    assert message == "model.attention.num_heads=5 must be a multiple of num_kv_heads=2"


class TestLayouts:
    SEVERAL = TrainConfig(layouts=(Layout(seq_len=64), Layout(seq_len=128)))

    def test_paths_lead_to_the_only_one(self):
        texts = {"layout.remat": "full", "layout.dispatch.chunks": "2", "layout.mesh.expert": "4", "steps": "77"}
        expected = Layout(MeshConfig(expert=4), remat="full", dispatch=DispatchConfig(chunks=2))
        assert apply_overrides(TrainConfig(), texts) == TrainConfig(layouts=(expected,), steps=77)

    def test_fields_of_one_change_together(self):
        assert apply_overrides(TrainConfig(), {"layout.seq_len": "20000", "model.max_seq_len": "20000"})
        message = error_of(TrainConfig(), {"layout.seq_len": "20000"})
        assert message == "layout.seq_len=20000 must be at most model.max_seq_len=10240"

    def test_a_refused_value_keeps_its_path(self):
        assert error_of(TrainConfig(), {"layout.seq_len": "0"}) == "layout.seq_len=0 must be positive"
        message = error_of(TrainConfig(), {"layout.dispatch.chunks": "0"})
        assert message == "layout.dispatch.chunks=0 must be positive"

    def test_no_path_leads_to_one_of_several(self):
        message = error_of(self.SEVERAL, {"layout.remat": "full"})
        assert message == "layout.remat='full' cannot be set: there are 2 layouts"
        assert apply_overrides(self.SEVERAL, {"steps": "77"}) == dataclasses.replace(self.SEVERAL, steps=77)

    def test_only_fields_that_can_be_set_are_described(self):
        paths = {field.path for field in describe(TrainConfig())}
        assert {"layout.seq_len", "layout.dispatch.strategy", "layout.mesh.expert"} <= paths
        assert {path for path in paths if not path.startswith("layout.")} == {f.path for f in describe(self.SEVERAL)}


def test_nothing_to_do_and_the_original_stays():
    config = TrainConfig()
    assert apply_overrides(config, {}) == config
    apply_overrides(config, {"steps": "7000", "layout.seq_len": "16"})
    assert config == TrainConfig()


def test_a_mesh_takes_overrides_too():
    assert apply_overrides(MeshConfig(), {"hardware": "h100", "expert": "8", "hosts": "2"}) == MeshConfig(
        expert=8, hardware="h100", hosts=2
    )


@given(
    st.integers(1, 10**9), st.floats(1e-12, 1e12), st.booleans(), st.lists(st.from_regex(r"[a-z./*]+", fullmatch=True))
)
def test_what_is_printed_is_what_is_read(whole, real, flag, paths):
    texts = {
        "model.d_model": str(whole),
        "optimizer.learning_rate": repr(real),
        "model.tie_embeddings": str(flag),
        "data.paths": ",".join(paths),
    }
    config = apply_overrides(TrainConfig(), texts)
    read = (config.model.d_model, config.optimizer.learning_rate, config.model.tie_embeddings, config.data.paths)
    assert read == (whole, real, flag, tuple(paths))


@pytest.mark.parametrize(
    ("argv", "overrides", "remaining"),
    [
        (["p", "--config.a.b=1", "x"], {"a.b": "1"}, ["p", "x"]),
        (["p", "--config.a.b", "1", "x"], {"a.b": "1"}, ["p", "x"]),
        (["p", "-config.a=1", "-config.b", "2"], {"a": "1", "b": "2"}, ["p"]),
        (["p", "--config.a=", "--config.b=c=d"], {"a": "", "b": "c=d"}, ["p"]),
        (["p", "--config.a", "-1", "--config.b", "-.5"], {"a": "-1", "b": "-.5"}, ["p"]),
        (["p", "--config.a=1", "--config.a=2"], {"a": "2"}, ["p"]),
        (["--config=tiny", "--mesh.a=1", "--configs.a=1"], {}, ["--config=tiny", "--mesh.a=1", "--configs.a=1"]),
        (["p", "config.a=1"], {}, ["p", "config.a=1"]),
        (["p", "--", "--config.a=1"], {}, ["p", "--", "--config.a=1"]),
        ([], {}, []),
    ],
)  # fmt: skip
def test_split(argv, overrides, remaining):
    assert split_overrides(argv, "config") == (overrides, remaining)


@pytest.mark.parametrize("argv", [["--config.flag"], ["--config.flag", "--steps=1"], ["--config.flag", "-v"]])
def test_an_override_needs_a_value(argv):
    with pytest.raises(ConfigError, match=r"--config\.flag needs a value; write --config\.flag=VALUE"):
        split_overrides(argv, "config")


def test_config_file_runs(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from moejax.config import DataConfig\ndef get_config():\n    return DataConfig(seed=7)\n")
    assert load_config_file(path, DataConfig) == DataConfig(seed=7)
    assert load_config_file(str(path), DataConfig).seed == 7


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "does not exist; use a Python file with get_config() -> DataConfig"),
        ("config = 1", "has no get_config(); define get_config() -> DataConfig"),
        ("get_config = 3", "has no get_config()"),
        ("def get_config():\n    return 3", "get_config() returned 3; it must return a DataConfig"),
        ("def get_config():\n    x = 1\n    return 1 / 0", "failed at line 3: ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass", ": get_config() returned None; it must return a DataConfig"),
        ("import sys\nsys.exit()", "failed at line 2: SystemExit"),
        ("import sys\ndef get_config():\n    sys.exit(3)", "failed at line 3: SystemExit: 3"),
        ("import nothing_of_that_name", "failed at line 1: ModuleNotFoundError"),
        ("\ndef get_config(:\n    pass", "failed at line 2: SyntaxError"),
        (
            "from moejax.config import DataConfig\ndef get_config():\n    return DataConfig(block_steps=0)",
            ": block_steps=0 must be positive",
        ),
        (
            "from moejax.config import ParallelConfig",
            ": moejax.config.ParallelConfig is moejax.layout.Layout now, which also has the mesh, the batch's shape",
        ),
        (
            "import moejax.config\nmoejax.config.TrainConfig()",
            ": moejax.config.TrainConfig is in moejax.train.config now",
        ),
        ("from moejax.config import Nothing", "failed at line 1: ImportError: cannot import name 'Nothing'"),
    ],
)
def test_config_file_that_cannot_be_used(tmp_path, source, expected):
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError) as error:
        load_config_file(path, DataConfig)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_is_known_of_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"^mine\.py failed at line 2: ZeroDivisionError"):
        load_config_file("mine.py", DataConfig)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_config_file_must_be_a_file(tmp_path, make):
    make(tmp_path / "mine.py")
    with pytest.raises(ConfigError, match=r"mine\.py is no file; use a Python file with get_config\(\) -> DataConfig"):
        load_config_file(tmp_path / "mine.py", DataConfig)


def test_config_file_must_be_python(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: 1")
    with pytest.raises(ConfigError, match=r"must end in \.py"):
        load_config_file(path, DataConfig)


class TestFromRecord:
    @pytest.mark.parametrize(
        "config",
        [
            TrainConfig(),
            apply_overrides(
                TrainConfig(),
                {
                    "data.paths": "a,b",
                    "layout.dispatch.expert_axes": "expert",
                    "compiler_options": "a=b",
                    "optimizer.eps": "1",
                },
            ),
            TrainConfig(balance=BalanceConfig(max_load_cv=float("inf"), aux_loss_weight=0)),
            TestLayouts.SEVERAL,
            MeshConfig(2, 4, hardware="h100", hosts=2),
            Outer(Inner(limit=3, either="x", sizes=(1, 2), width=16), top=5),
        ],
    )
    def test_undoes_json(self, config):
        record = json.loads(strict_json.dumps(dataclasses.asdict(config)))
        again, lines = from_record(type(config), record, "config")
        assert again == config
        assert lines == []

    def test_tuples_of_dataclasses(self):
        again, _ = from_record(tuple[Inner, ...], [{"high": 5}, {"high": 6}], "inner")
        assert again == (Inner(high=5), Inner(high=6))

    def test_fields_that_came_or_went_are_a_line_each(self):
        record = {"inner": {"low": 0, "high": 3, "limit": None, "either": 0, "table": {}, "old": [1]}, "top": 9}
        again, lines = from_record(Outer, record, "config")
        assert again == Outer(Inner(high=3), top=9)
        assert lines == [
            "config.inner.old=[1] left out: this version has no such field",
            "config.inner.sizes=(), config.inner.width=8 taken from the defaults: the record has no such field",
        ]

    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            ({"top": "9"}, "config.top='9' must be of type int"),
            ({"top": True}, "config.top=True must be of type int"),
            ({"inner": [1]}, "config.inner=[1] must be the fields of a Inner"),
            ({"inner": {"limit": 1.5}}, "config.inner.limit=1.5 must be of type int or NoneType"),
            ({"inner": {"sizes": 3}}, "config.inner.sizes=3 must be a list"),
            ({"inner": {"sizes": [1, "x"]}}, "config.inner.sizes[1]='x' must be of type int"),
            ({"inner": {"width": 9}}, "config.inner.width=9 must be one of 8, 16"),
            ({"inner": {"low": 4}}, "config.inner.low=4 must be less than high=1"),
            ({"inner": {"high": 40}}, "config.inner.high=40 must be at most top=10"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, record, expected):
        with pytest.raises(ConfigError) as error:
            from_record(Outer, record, "config")
        assert str(error.value) == expected

    def test_a_field_without_a_default_cannot_be_missing(self):
        with pytest.raises(ConfigError, match=r"^items\[0\].size is missing, and has no default$"):
            from_record(tuple[Required, ...], [{"top": 8}], "items")
