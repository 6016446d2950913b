import dataclasses
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from scripts import SCRIPTS, load_script, run_script

from experiments.shared import common, loading
from moejax.checks import ConfigError
from moejax.compiler import PROGRAM
from moejax.config import MOVED_FIELDS
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import describe
from moejax.presets import mixtral_8x7b, small, tiny
from moejax.train.config import TrainConfig
from moejax.train.plan_file import load_layouts

ROOT = Path(__file__).resolve().parents[1]
FLAGS = common.ConfigFlags("What it does.")


def parse(*arguments):
    return FLAGS.parse_config(["script.py", *arguments])


def error_of(*arguments):
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults():
    config = parse()
    assert config == loading.load_config("quickstart").with_layout(mesh=MeshConfig(expert=4, pipeline=2, tensor=2))
    assert config.model == dataclasses.replace(tiny(), num_layers=2, vocab_size=config.data.tokenizer_vocab_size)


def test_names_and_overrides():
    config = parse("--config=small", "--config.steps=100", "--mesh=single", "--mesh.expert", "2")
    assert (config.model, config.steps) == (small(), 100)
    assert config.layout == loading.load_config("small").layout.replace(mesh=MeshConfig(expert=2))


def test_fields_of_the_layout():
    flags = ["seq_len=64", "remat=full", "grad_accumulation_steps=2", "dispatch.chunks=2", "dispatch.hierarchical=true"]
    config = parse("--config=tiny", *(f"--config.layout.{flag}" for flag in flags), "--mesh.hosts=2")
    expected = loading.load_config("tiny").layout.replace(
        mesh=MeshConfig(4, 2, 2, hosts=2), seq_len=64, remat="full", grad_accumulation_steps=2, chunks=2,
        hierarchical=True,
    )  # fmt: skip
    assert config.layouts == (expected,)


def test_the_mesh_of_a_layout_has_flags_of_its_own():
    assert error_of("--config.layout.mesh.expert=2") == "--config.layout.mesh.expert is --mesh.expert"
    assert not [path for path in common.field_paths() if path.startswith("--config.layout.mesh")]
    assert {"--mesh.expert", "--config.layout.seq_len", "--config.layout.dispatch.chunks"} <= {*common.field_paths()}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("accumulate", "layout.grad_accumulation_steps"),
        ("data.seq_len", "layout.seq_len"),
        ("data.batch_size", "layout.batch_size"),
        ("parallel.num_microbatches", "layout.num_microbatches"),
        ("parallel.repeats", "layout.pipeline_repeats"),
        ("parallel.gather", "layout.gather"),
        ("parallel.remat", "layout.remat"),
        ("parallel.bubble", "layout.bubble"),
        ("parallel.batch_split", "layout.batch_split"),
        ("dispatch.strategy", "layout.dispatch.strategy"),
        ("dispatch.capacity_factor", "layout.dispatch.capacity_factor"),
        ("dispatch.expert_axes", "layout.dispatch.expert_axes"),
        ("dispatch.hosts", "layout.dispatch.hierarchical"),
        ("dispatch.chunks", "layout.dispatch.chunks"),
        ("dispatch.payload", "layout.dispatch.wire_dtype"),
        *((f"model.{before}", f"model.{now}") for before, now in MOVED_FIELDS.items()),
    ],
)
def test_a_name_of_version_0_1_gives_the_one_of_today(before, now):
    assert error_of(f"--config.{before}=2") == f"--config.{before} is called --config.{now} now"
    assert f"--config.{now}" in common.field_paths()


def test_every_parse_starts_from_the_defaults():
    assert parse("--config=small", "--data=a") != parse()
    assert parse() == parse("--config=quickstart", "--mesh=cpu_16")


@pytest.mark.parametrize("name", ["quickstart", "tiny", "small", "mixed", "peer", "moe_16x10b", "mixtral_8x7b"])
@pytest.mark.parametrize("steps", [1, 20, 100_000])
def test_any_number_of_steps_can_be_asked_for_alone(name, steps):
    config = parse(f"--config={name}", f"--config.steps={steps}")
    assert config.optimizer.warmup(config.steps) == min(steps // 10, 500)


def test_a_plan_decides_the_layouts():
    config = parse("--config=mixed", "--plan=cpu_16_mixed", "--config.steps=20", "--config.data.seed=3")
    assert config.layouts == load_layouts(loading.PLANS / "cpu_16_mixed.py")
    assert [layout.seq_len for layout in config.layouts] == [1024, 2560, 5120]
    assert config.layouts[0].mesh != config.layout.mesh
    assert (config.steps, config.data.seed) == (20, 3)
    config.check_fits()


@pytest.mark.parametrize(
    "flag",
    [
        "--config.layout.seq_len=9", "--config.layout.remat=full", "--config.layout.dispatch.chunks=2",
        "--config.layout.grad_accumulation_steps=2", "--mesh.expert=2",
    ],
)  # fmt: skip
@pytest.mark.parametrize("layouts", ["several", "one"])
def test_what_a_plan_decides_cannot_be_changed(flag, layouts, tmp_path):
    plan = "cpu_16_mixed"
    if layouts == "one":
        plan = tmp_path / "plan.py"
        plan.write_text("from moejax import Layout\ndef get_layouts():\n    return (Layout(),)\n")
    name = flag.partition("=")[0]
    assert error_of(f"--plan={plan}", flag) == (
        f"{name} cannot be changed: --plan={plan} is a plan, which decides it; "
        "change the plan's file, or use --mesh instead of --plan"
    )


def test_a_plan_and_a_mesh_are_too_much():
    expected = "--mesh=cpu_16 and --plan=cpu_16_mixed both say where to run; give one"
    assert error_of("--plan=cpu_16_mixed", "--mesh=cpu_16") == expected


def test_a_plan_of_one_layout_is_a_configuration(tmp_path):
    plan = tmp_path / "plan.py"
    plan.write_text(
        "from moejax import Layout, MeshConfig\n"
        "def get_layouts():\n    return (Layout(MeshConfig(4, 2, 2), 64, 16, remat='full'),)\n"
    )
    expected = Layout(MeshConfig(4, 2, 2), 64, 16, remat="full")
    assert parse("--config=tiny", f"--plan={plan}") == dataclasses.replace(parse("--config=tiny"), layouts=(expected,))


@pytest.mark.full
def test_a_plan_brings_its_model():
    assert parse("--plan=cpu_16_mixed") == parse("--plan=cpu_16_mixed", "--config=mixed")
    assert parse("--plan=cpu_16_mixed", "--tokenizer=bpe").model.vocab_size == 4096


def test_a_plan_is_no_mesh(tmp_path):
    plan = tmp_path / "plan.py"
    plan.write_text("from moejax import Layout\ndef get_layouts():\n    return (Layout(),)\n")
    for name in ("cpu_16_mixed", plan):
        assert error_of(f"--mesh={name}") == f"--mesh={name} is a plan; write --plan={name}"
    plan.write_text("x = 1\n")
    assert error_of(f"--mesh={plan}") == f"{plan} has no get_config(); define get_config() -> MeshConfig"
    assert error_of(f"--plan={plan}").startswith(f"{plan} has no get_layouts(); a mesh file goes with --mesh")


@pytest.mark.parametrize("flag", ["--config=small", "--config.model.num_layers=6", "--config.model.dtype=bfloat16"])
def test_another_model_than_the_plans_is_refused(flag):
    message = error_of("--plan=cpu_16_mixed", flag)
    field = "dtype=float32, not bfloat16" if "dtype" in flag else "num_layers=2, not 6"
    assert message.startswith(f"--plan=cpu_16_mixed is for --config=mixed, with model.{field}; leave out the ")


@pytest.mark.parametrize(
    ("arguments", "vocab_size"),
    [
        ([], 2048),
        (["--tokenizer=bytes"], 256),
        (["--tokenizer=bpe"], 2048),
        (["--config=tiny"], 256),
        (["--config=tiny", "--tokenizer=bpe"], 4096),
        (["--config=tiny", "--config.data.tokenizer=bpe"], 4096),
        (["--tokenizer=bpe", "--config.data.tokenizer_vocab_size=1001"], 1004),  # over pipeline × tensor = 4
        (["--tokenizer=bpe", "--config.data.tokenizer_vocab_size=1001", "--mesh=single"], 1001),
        (["--tokenizer=bpe", "--config.model.vocab_size=5000"], 5000),
        (["--tokenizer=bpe", "--config.model.vocab_size=512"], 512),  # a corpus may yield few
        (["--config=moe_16x10b"], 32_000),
        (["--config=moe_16x10b", "--tokenizer=bpe"], 32_000),
        (["--config=moe_16x10b", "--config.data.tokenizer_vocab_size=50000"], 50_000),
        (["--config=small", "--data=~/texts", "--tokenizer=bpe"], 4096),
    ],
)
def test_the_vocabulary_follows_the_tokenizer(arguments, vocab_size, capsys):
    config = parse(*arguments)
    assert config.model.vocab_size == vocab_size
    config.layout.check(config.model, batch=False)
    own = parse(*(a for a in arguments if a.startswith("--config="))).model.vocab_size
    changed = vocab_size != own and not any("vocab_size" in a and "tokenizer" not in a for a in arguments)
    said = f"--config.model.vocab_size={vocab_size} follows --tokenizer={config.data.tokenizer}\n"
    assert capsys.readouterr().err == (said if changed else "")


def test_a_tokenizer_that_cannot_be_read_is_refused_with_the_flags():
    assert "tokenizer='none.json' cannot be read" in error_of("--tokenizer=none.json")


@pytest.mark.parametrize("name", ["gpt_oss_120b", "GPT-OSS-120B", "openai/gpt-oss-120b"])
def test_a_published_model_that_cannot_be_trained_says_why(name):
    message = error_of(f"--config={name}")
    assert message.startswith(f"--config={name} is known from published runs (gpt-oss-120b), but cannot be trained or ")
    assert "planned yet, because moejax does not support sliding-window attention, attention sinks" in message
    assert "mixtral_8x7b, moe_16x10b, olmoe_7b" in message
    assert run_script("plan", f"--model={name}", status=2).error == message.replace("--config=", "--model=", 1)


def test_a_published_model_without_a_preset_says_so():
    expected = (
        "(mixtral-8x22b), but has no preset; give the folder of its checkpoint, or describe it in a Python file "
        "with get_config(); did you mean mixtral"
    )
    assert expected in error_of("--config=mixtral_8x22b")


@pytest.mark.parametrize("script", ["train", "calibrate", "benchmarks/train", "memory", "load_balance"])
def test_hardware_that_is_not_there_is_one_line_in_every_script(script, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    arguments = ["--mesh=h100_8", *([f"--out={tmp_path / 'x.json'}"] if script == "calibrate" else [])]
    error = run_script(script, *arguments, status=2).error
    assert error.startswith(
        "--mesh.hardware=h100 is not what JAX found, 16 cpu devices; install JAX for it (pip install"
    )
    assert not list(tmp_path.iterdir())


def test_the_local_mesh_is_what_there_is():
    assert parse("--mesh=local").layout.mesh == MeshConfig(expert=16)
    assert parse("--mesh=local", "--mesh.expert=4", "--mesh.tensor=4").layout.mesh == MeshConfig(expert=4, tensor=4)


def test_commands_are_quoted_and_found_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert loading.command("train", "--mesh=a b.py") == "python experiments/train.py '--mesh=a b.py'"
    monkeypatch.chdir(tmp_path)
    assert loading.command("train") == f"python {ROOT / 'experiments' / 'train.py'}"


def test_a_preset_without_a_file_is_a_config():
    assert parse("--config=mixtral_8x7b").model == mixtral_8x7b()


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from moejax.mesh import MeshConfig\nget_config = lambda: MeshConfig(tensor=3)\n")
    assert parse("--mesh=mine.py").layout.mesh == MeshConfig(tensor=3)
    assert parse("--mesh=mesh_configs/single.py").layout.mesh == MeshConfig()  # from any folder


def test_data_shortcuts():
    data = parse("--data=a,b/*.txt", "--tokenizer=bpe").data
    assert (data.paths, data.tokenizer) == (("a", "b/*.txt"), "bpe")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config=tinny"],
            "--config=tinny does not exist; did you mean tiny? use one of load_balance, mixed, mixtral_8x7b,",
        ),
        (["--mesh=cpu16"], "--mesh=cpu16 does not exist; did you mean cpu_16? use one of a100_64gb_2x8,"),
        (
            ["--plan=cpu_16"],
            "--plan=cpu_16 does not exist; did you mean cpu_16_mixed? use one of cpu_16_mixed, or a path",
        ),
        (["--plan=no.py"], "--plan=no.py is no file; experiments/plan.py writes plans"),
        (["--config=tiny", "cpu_16_mixed"], "did you mean --plan=cpu_16_mixed?"),
        (["--parallel.remat=full"], "did you mean --config.layout.remat?"),
        (["--config.layouts.remat=full"], "--config.layouts does not exist; did you mean layout?"),
        (["--mesh=no.py"], "no.py does not exist; use a Python file with get_config() -> MeshConfig"),
        (["--config=mesh_configs/single.py"], "it must return a TrainConfig"),
        (["--config.model.num_layer=3"], "--config.model.num_layer does not exist; did you mean model.num_layers"),
        (["--config.model.num_layers=x"], "--config.model.num_layers='x' must be a whole number"),
        (["--config.steps"], "--config.steps needs a value"),
        (["--mesh.expert=0"], "--mesh.expert=0 must be positive"),
        (["--steps=3"], "--steps does not exist; did you mean --config.steps?"),
        (["--model.num_layers=3"], "did you mean --config.model.num_layers?"),
        (["--tokeniser=x"], "did you mean --tokenizer?"),
        (["--config=tiny", "positional"], "positional is no flag; flags start with --"),
        (["--nothing_like_it=x"], "--nothing_like_it does not exist; --help lists all"),
        (["--data=a", "--config.data.paths=b"], "--data and --config.data.paths are the same field"),
    ],
)
def test_errors_are_one_line(arguments, expected):
    assert expected in error_of(*arguments)


@pytest.mark.parametrize("flag", ["--help", "-help", "-h", "--helpfull", "--helpshort", "help"])
def test_help_lists_flags_and_fields(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flag, "--config.steps=77")
    assert not stop.value.code
    printed = capsys.readouterr().out
    for part in ("--compilation_cache_dir", "--config.model.num_layers=2", "--config.steps=77", "--mesh.expert=4"):
        assert part in printed
    for part in (
        "num_layers=2 +layers in all",
        r"gather=step +when dense [^=]*\(step\s+\|\s+layer\)",
        "Meshes: .*single",
    ):
        assert re.search(part, printed)


def test_help_of_training_begins_with_the_flags_that_people_need():
    lines = run_script("train", "--help").stdout.splitlines()
    assert lines[0].startswith("Trains a sparse Mixture-of-Experts model")
    flags = ["--workdir=runs/a", "--config=small", "--mesh=single", "--data=~/texts", "--config.steps=1000"]
    assert [line.split()[0] for line in lines[3:8]] == flags
    assert all(len(line) > 40 for line in lines[3:8])
    assert "Configs: " in lines[9]


@pytest.mark.parametrize("config", [TrainConfig(), MeshConfig()], ids=["config", "mesh"])
def test_every_field_has_a_meaning(config):
    fields = describe(config)
    assert len(fields) >= 7
    assert [field.path for field in fields if len(field.meaning) < 8] == []


def test_help_lists_the_compilers_options_in_force_with_their_reasons(capsys):
    with pytest.raises(SystemExit):
        parse(
            "--help=full",
            "--mesh=h100_2x8",
            "--config.compiler_options=xla_gpu_dot_merger_threshold_mb=8,xla_gpu_x=a+b",
        )
    printed = capsys.readouterr().out
    for option in PROGRAM["gpu"][:1]:
        assert f"  {option.name}={option.value}\n      {option.reason} ({option.source})" in printed
    for part in ("  xla_gpu_dot_merger_threshold_mb=8\n      asked for", "  xla_gpu_x=a,b\n"):
        assert part in printed


def test_flags_change_the_mesh_of_a_target_too():
    config = parse("--mesh.pipeline=1", "--mesh.expert=16", "--mesh.host_axis=expert", "--config.layout.seq_len=64")
    expected = MeshConfig(expert=16, hardware="h100", hosts=2, host_axis="expert")
    assert FLAGS.for_target("h100_2x8", config) == config.with_layout(mesh=expected)
    config = parse("--mesh=single", "--mesh.expert=2")
    assert FLAGS.for_target("h100_2x8", config) == config
    assert config.layout.mesh == MeshConfig(expert=2)
    config = parse("--plan=cpu_16_mixed")
    assert FLAGS.for_target("h100_2x8", config) == config
    with pytest.raises(ConfigError, match=r"target=h100 does not exist"):
        FLAGS.for_target("h100", config)


def test_jax_is_set_up_with_the_cache_that_the_flag_names(monkeypatch):
    calls = []
    monkeypatch.setattr(common.runtime, "setup_jax", lambda mesh_config, **options: calls.append(options))
    for arguments in (["--compilation_cache_dir=here"], ["--compilation_cache_dir="], []):
        FLAGS.setup_jax(parse(*arguments).layout.mesh)
    assert calls == [{"compilation_cache_dir": folder} for folder in ("here", "", None)]


@pytest.mark.parametrize("flag", ["config", "mesh"])
def test_a_file_in_a_closed_folder_is_one_line(flag, monkeypatch):
    stat = Path.stat

    def closed(path, **options):  # as root, every folder can be entered
        if path.name == "mine.py":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    assert "closed/mine.py cannot be read (Permission denied); use a Python file with" in error_of(
        f"--{flag}=closed/mine.py"
    )


@pytest.mark.parametrize(
    ("raised", "status"), [(ConfigError("a=1 must be 2"), 2), (None, 0)], ids=["config error", "success"]
)
def test_run_turns_a_config_error_into_one_line(raised, status, capsys):
    def main(argv):
        if raised:
            raise raised

    with pytest.raises(SystemExit) as stop:
        loading.run(main, FLAGS)
    assert (stop.value.code or 0) == status
    assert capsys.readouterr().err == ("error: a=1 must be 2\n" if raised else "")


def _write(stream):
    """Has a script print × to `stream`; returns its status."""
    with mock.patch.object(sys, "stdout", stream), pytest.raises(SystemExit) as stop:
        loading.run(lambda argv: print("2 × 8"), FLAGS)
    return stop.value.code or 0


def test_a_reader_that_leaves_ends_a_script_quietly(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        assert _write(stream) == 141
    assert capsys.readouterr().err == ""


def test_an_output_on_a_full_disk_is_one_line(capsys):
    with open("/dev/full", "w") as stream:
        assert _write(stream) == 1
    assert capsys.readouterr().err == "error: an output cannot be written (No space left on device)\n"


def test_standard_output_may_be_closed_or_ascii(capsys):
    assert _write(None) == 0
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert _write(stream) == 0
    assert stream.buffer.getvalue() == b"2 ? 8\n"
    assert capsys.readouterr().err == ""


@pytest.mark.full
def test_a_script_runs_on_virtual_devices(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f'"""What it does."""\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n'
        "import jax, moejax\n"
        "from experiments.shared import common, loading\n"
        "FLAGS = common.ConfigFlags(__doc__)\n"
        "def main(argv):\n"
        "    config = FLAGS.parse_config(argv)\n"
        "    FLAGS.setup_jax(config.layout.mesh)\n"
        "    print(moejax.build_mesh(config.layout.mesh).size)\n"
        "loading.run(main, FLAGS)\n"
    )
    command = [sys.executable, str(script), f"--compilation_cache_dir={tmp_path / 'cache'}", "--mesh.expert=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["12"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_asked_for_help(script):
    done = run_script(script, "--help")
    assert "    python experiments/" in done.stdout
    assert not done.stderr


@pytest.mark.full
@pytest.mark.parametrize("script", ["plot_load", "benchmarks/routing"])
def test_a_script_works_from_any_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert f"python experiments/{script}.py" in done.stdout


@pytest.mark.parametrize("alias", loading.ALIASES)
def test_names_of_other_programs_lead_to_flags_and_fields(alias):
    known = {*FLAGS, *(path[2:] for path in common.field_paths())}
    for script in SCRIPTS:
        known |= set(load_script(script).FLAGS)
    assert set(loading.ALIASES[alias]) <= known


def test_flags_of_scripts_are_apart():
    run_script("overlap", "--help")
    run_script("train", "--help")
    overlap, train = load_script("overlap"), load_script("train")
    assert "chunks" in overlap.FLAGS
    assert "chunks" not in train.FLAGS
    assert overlap.FLAGS.config == "moe_16x10b"
    assert train.FLAGS.config == "quickstart"


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"config": {}, "row": {"load_cv": 1}}'])
def test_a_broken_row_of_the_table_is_one_line(text, tmp_path):
    file = tmp_path / "none-dropless" / "row.json"
    file.parent.mkdir()
    file.write_text(text)
    arguments = [f"--workdir={tmp_path}", "--methods=none", "--capacities=dropless", "--mesh=cpu_16"]
    error = run_script("load_balance", *arguments, status=2).stderr.splitlines()[-1]  # after the run's headline
    assert error.startswith(f"error: {file} ")
    assert error.endswith("remove it to read the run's figures again")
