"""Published models have their published sizes; layouts are read as people write them; predictions behave."""

import csv
import dataclasses

import pytest
from scripts import EXPERIMENTS, run_script

from experiments.published_runs.architecture import Architecture
from experiments.published_runs.memory import stage_memory, training_memory
from experiments.published_runs.models import architectures, find_architecture, what_is_missing
from experiments.published_runs.runs import number, parse_cluster, parse_device, parse_run
from experiments.published_runs.serving import predict_serving
from experiments.published_runs.training import distinct, predict_training, training_step, training_work
from moejax.checks import ConfigError
from moejax.planner.work import Matmul
from moejax.presets import PRESETS, mixtral_8x7b, olmoe_7b

SIZES = {  # billions of parameters: all, used by a token (with both tables), as papers and model cards have them
    "Llama-2-7B": (6.738, 6.738), "Llama-2-13B": (13.016, 13.016), "Llama-2-70B": (68.98, 68.98),
    "Llama-3.1-8B": (8.030, 8.030), "Llama-3.1-70B": (70.55, 70.55), "Llama-3.1-405B": (405.9, 405.9),
    "Mistral-7B": (7.242, 7.242), "Mixtral-8x7B": (46.70, 12.88), "Mixtral-8x22B": (140.6, 39.15),
    "OLMoE-1B-7B": (6.919, 1.282), "DBRX": (131.6, 36.5), "GPT-3 175B": (175.0, 175.0),
    "Qwen2.5-7B": (7.616, 7.616), "Qwen2.5-72B": (72.71, 72.71), "Qwen3-8B": (8.191, 8.191),
    "Qwen3-32B": (32.76, 32.76), "Qwen3-30B-A3B": (30.53, 3.35), "Qwen3-235B-A22B": (235.1, 22.19),
    "DeepSeek-V2-Lite": (15.71, 2.66), "Moonlight-16B-A3B": (15.96, 2.915), "DeepSeek-V3": (671.0, 37.55),
    "gpt-oss-20b": (20.91, 4.19), "gpt-oss-120b": (116.83, 5.71), "Nemotron-3-Super-120B-A12B": (120.67, 12.77),
}  # fmt: skip

ROW = {
    "id": "X", "kind": "train-moe", "model": "Qwen3-30B-A3B", "hardware": "H100 2x8", "n": "16", "dtype": "bf16",
    "layout": "TP1 PP1 EP16 DP16", "gbs": "256", "mbs": "1", "seq": "4096",
}  # fmt: skip


def run(**fields):
    return parse_run(ROW | {name: str(value) for name, value in fields.items()})


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name):
    model = find_architecture(name)
    total, active = SIZES[name]
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("DeepSeek-V3", []),
        ("Kimi-K2", []),
        ("Qwen3-30B-A3B", []),
        ("gpt-oss-120b", ["sliding-window attention", "attention sinks", "biases of feed-forward layers"]),
        ("Llama-3.1-8B", ["models without experts"]),
        ("Mixtral-8x22B", []),
        ("GPT-3 175B", ["biases of feed-forward layers", "models without experts", "feed-forward layers without a gate",
                        "LayerNorm", "learned positions"]),
    ],
)  # fmt: skip
def test_what_moejax_has_no_layer_for_is_named(name, missing):
    assert what_is_missing(find_architecture(name)) == missing


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_missing_of_what_moejax_trains(name):
    assert not what_is_missing(Architecture.from_config(PRESETS[name]()))


def test_every_name_finds_itself_and_flops_are_near_twice_the_active_parameters():
    for name, model in architectures().items():
        assert find_architecture(name) is model
        tables = model.embedding_parameters * (not model.tie_embeddings)
        assert model.flops_per_token(1) >= 1.9 * (model.active_parameters - tables)
        assert model.flops_per_token(8192) > model.flops_per_token(1024)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen3_30B_a3B", "qwen3-30b-a3b"), ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b"),
        ("LLAMA3.1_405B", "llama-3.1-405b"), ("LLaMA2-7B", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"), ("DeepSeekV3 (w/o MTP)", "deepseek-v3"),
        ("GPT OSS 120B", "gpt-oss-120b"), ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
    ],
)  # fmt: skip
def test_names_are_matched_tolerantly(text, name):
    assert find_architecture(text).name == name


def test_a_shape_can_be_spelled_out():
    model = find_architecture("GPT 7B-class L32 h4096 GQA8 V131k")
    assert (model.num_layers, model.d_model, model.vocab_size) == (32, 4096, 131 * 1024)
    assert model.parameters / 1e9 == pytest.approx(6.73, rel=0.01)
    moe = find_architecture("moe L16 h2048 E64 top8 f1024 swiglu V50304")
    assert moe.parameters / 1e9 == pytest.approx(6.92, rel=0.01)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ConfigError, match="model='Foo-9000' has no preset"):
        find_architecture("Foo-9000")


@pytest.mark.parametrize(("model", "name"), [(mixtral_8x7b(), "Mixtral-8x7B"), (olmoe_7b(), "OLMoE-1B-7B")])
def test_what_moejax_trains_has_an_architecture(model, name):
    mine, published = Architecture.from_config(model), find_architecture(name)
    assert mine.parameters == published.parameters
    assert mine.flops_per_token(4096) == published.flops_per_token(4096)


@pytest.mark.parametrize(
    ("hardware", "devices", "name", "hosts", "per_host"),
    [
        ("H100 2x8", 16, "h100", 2, 8), ("TPU v6e 4x4", 16, "tpu_v6e", 4, 4), ("TPU v6e-256", 256, "tpu_v6e", 64, 4),
        ("H100-96GB(2.4TB/s 500W) 1x8", 8, "h100_96gb", 1, 8), ("GB200", 256, "gb200", 4, 64),
        ("B200", 8, "b200", 1, 8),
        ("A100", 4, "a100_80gb", 1, 4), ("A100-40GB", 8, "a100_40gb", 1, 8), ("DGX-H100", 64, "h100", 8, 8),
        ("TPU v5p-256", None, "tpu_v5p", 32, 4), ("TPU v5e 4x4", None, "tpu_v5e", 2, 8),
    ],
)  # fmt: skip
def test_hardware_is_read(hardware, devices, name, hosts, per_host):
    cluster = parse_cluster(hardware, devices)
    assert (cluster.device.name, cluster.hosts, cluster.devices_per_host) == (name, hosts, per_host)


def test_stated_bandwidth_and_power_replace_the_datasheet():
    device, plain = parse_device("H100-96GB(2.4TB/s 500W)"), parse_device("H100-96GB")
    assert device.memory_bytes_per_s == 2.4e12
    assert device.matmul_flops == pytest.approx(plain.matmul_flops * (500 / 700) ** 0.5)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("TP1 PP1 EP16 DP16 HybridEP forced-balance", {"ep": 16, "deduplicated": True, "balanced": True}),
        ("TP1 PP2 EP32 sel-recompute cap1.10", {"pp": 2, "ep": 32, "recompute": "selective", "capacity": 1.1}),
        ("TP2 PP4 VP2 full recompute", {"tp": 2, "pp": 4, "vp": 2, "recompute": "full"}),
        ("FSDP16", {"sharded": True, "dp": 16}),
        ("tp=4, pp=2; interleaved", {"tp": 4, "pp": 2}),
        ("TP1 EP8 quantum-tunnelling", {"unknown": ("quantum", "tunnelling")}),
    ],
)
def test_layouts_are_read_and_what_is_not_understood_is_told(layout, expected):
    found = run(layout=layout, n=64 if "EP32" in layout else 16)
    assert {name: getattr(found, name) for name in expected} == expected


def test_an_inference_layout_is_read():
    found = run(kind="infer", layout="vLLM TP4 isl1024 osl8192 conc4", n=4, hardware="H100", gbs="", mbs="")
    assert (found.inference, found.tp, found.isl, found.osl, found.concurrency) == (True, 4, 1024, 8192, 4)
    other = run(kind="infer", layout="TRT-LLM TP8 EP8 2048x512 concurrency 16", n=8, gbs="", mbs="")
    assert (other.ep, other.etp, other.engine, other.isl, other.osl) == (8, 1, "trtllm", 2048, 512)


def test_experts_are_split_as_megatron_splits_them():
    assert run(layout="TP2 EP8", source="Megatron-LM").etp == 2
    assert run(layout="TP2 EP8 ETP1", source="Megatron-LM").etp == 1
    assert run(layout="TP2 EP8", source="Megatron-Bridge").etp == 1
    assert run(layout="TP2 EP16", source="Megatron-LM").etp == 1  # there are too few devices to split them


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hardware": "abacus"}, "hardware='abacus'"),
        ({"layout": "TP3"}, "must divide n=16"),
        ({"model": ""}, "model=''"),
    ],
)
def test_rows_that_cannot_be_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(**fields)
    assert "\n" not in str(error.value)


def test_numbers_in_cells():
    assert [number(text) for text in ("4096?", "<65", "1,024", "", None, "n/a", "0.5 s")] == [
        4096, 65, 1024, None, None, None, 0.5,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["TP1 PP1 EP16", "TP2 PP2 EP4", "TP1 PP4 VP3 EP4 full recompute", "FSDP16 EP4"])
@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Moonlight-16B-A3B", "Nemotron-3-Nano-30B-A3B"])
def test_work_holds_the_models_flops_whatever_the_layout(model, layout):
    """Three forward passes' worth over all devices; more only where the last stage has the logits alone."""
    found = dataclasses.replace(run(model=model, layout=layout), predicts_more=False)
    useful = [item for item in training_work(found) if isinstance(item, Matmul) and item.pass_ != "recompute"]
    total = sum(item.flops for item in useful if item.phase != "logits") * found.devices
    logits = 6.0 * found.gbs * found.seq * found.model.vocab_size * found.model.d_model
    again = 1.25  # attention's scores again in the backward pass, and under full recompute in the forward
    assert 0.98 < total / (training_step(found).model_flops - logits) < again


def test_more_of_anything_slow_is_slower_and_of_anything_kept_is_larger():
    base = run()
    assert predict_training(run(gbs=512)).expected > predict_training(base).expected
    full = run(layout="TP1 PP1 EP16 full recompute")
    assert predict_training(full).expected > predict_training(base).expected
    assert sum(training_memory(full).values()) < sum(training_memory(base).values())
    assert sum(training_memory(run(mbs=2)).values()) > sum(training_memory(base).values())
    assert predict_training(run(layout="EP16 forced-balance")).expected < predict_training(base).expected
    assert predict_training(run(hardware="A100")).expected > predict_training(base).expected
    assert predict_training(run(dtype="fp8")).expected < predict_training(base).expected


def test_sharing_and_pipelines_divide_memory():
    base = training_memory(run(model="Llama-3.1-8B", layout="TP1 PP1"))
    sharded = training_memory(run(model="Llama-3.1-8B", layout="FSDP16"))
    piped = training_memory(run(model="Llama-3.1-8B", layout="TP1 PP4"))
    assert sharded["parameters"] < base["parameters"] > piped["parameters"]
    found = run(model="Llama-3.1-8B", layout="TP1 PP4")
    first, last = (stage_memory(found, last=at)["activations"] for at in (False, True))
    assert first == pytest.approx(base["activations"])  # 1F1B: as many microbatches in flight as stages
    assert last == pytest.approx(first / 4)
    assert piped == stage_memory(found, last=True)  # Megatron reports its last rank


def test_a_token_visits_fewer_devices_than_experts():
    assert distinct(1, 8) == 1
    assert 1 < distinct(2, 8) < 2
    assert distinct(1e6, 8) == pytest.approx(8, rel=1e-4)


def test_serving_times():
    row = {"kind": "infer", "model": "Llama-3.1-70B", "dtype": "fp8", "hardware": "H100", "gbs": "", "mbs": ""}

    def times(layout, n):
        return predict_serving(run(**row, n=n, layout=layout))

    base = times("TP4 isl1024 osl8192 conc4", 4)
    assert base.first_token > base.prefill
    assert base.per_token > base.decode
    assert times("TP8 isl1024 osl8192 conc4", 8).decode < base.decode
    assert times("TP4 isl4096 osl8192 conc4", 4).prefill > 3 * base.prefill
    assert times("TP4 isl1024 osl8192 conc64", 4).decode > base.decode
    weights = find_architecture("Llama-3.1-70B").parameters / 4
    assert base.decode > weights / parse_device("H100").memory_bytes_per_s


def test_the_script_on_the_projects_table():
    found = run_script("published_runs/planner_accuracy").figures
    assert found["coverage"] == 1.0
    assert found["mean_step_time_error"] < 0.25
    assert found["mean_memory_error"] < 0.10
    assert found["mean_step_time_error"] <= found["worst_step_time_error"]


def test_the_script_lists_what_it_cannot_do(tmp_path):
    path = tmp_path / "runs.csv"
    names = [*ROW, "step_s", "tok_s_per_dev", "tflops_per_dev", "peak_gib", "source"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerow(ROW | {"id": "fine", "tok_s_per_dev": "13,000", "peak_gib": "<500", "layout": "EP16 warp9"})
        writer.writerow(ROW | {"id": "strange", "model": "Foo-9000", "step_s": "1"})
        writer.writerow(ROW | {"id": "empty"})
        writer.writerow(ROW | {"id": "odd", "hardware": "abacus", "step_s": "1"})
    done = run_script("published_runs/planner_accuracy", f"--runs={path}", f"--out={tmp_path / 'table.md'}")
    found = done.figures
    assert found["coverage"] == 0.25
    assert found["mean_memory_error"] == 0.0  # the bound holds
    assert "Foo-9000" in done.stdout
    assert "warp9" in done.stdout
    assert (tmp_path / "table.md").read_text().startswith("| id |")


def test_the_script_refuses_bad_input_in_one_line(tmp_path):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    for path, message in ((wrong, "lacks the columns model"), (tmp_path / "none.csv", "cannot be read")):
        assert message in run_script("published_runs/planner_accuracy", f"--runs={path}", status=2).error


def test_the_tables_name_their_sources():
    tables = list((EXPERIMENTS / "published_runs").glob("*.csv"))
    assert len(tables) == 3
    for path in tables:
        rows = list(csv.DictReader(path.open()))
        assert all(row["source"] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
