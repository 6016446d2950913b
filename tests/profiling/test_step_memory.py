"""Memory by hand: messages with known live ranges; a planted buffer; and a real step, whose sums are the compiler's."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import check_labels
from scripts import run_script

from moejax.config import AttentionConfig, ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner.hardware import get_device
from moejax.planner.memory import predict_memory
from moejax.plots import pyplot
from moejax.profiling import memory_report
from moejax.profiling.buffers import Block, Value, compile_with_buffers, read
from moejax.profiling.memory import GROUPS, WHOLE_TIME, StepMemory
from moejax.program import Program
from moejax.train.step import TrainState, make_train_step

ROOT = Path(__file__).resolve().parents[2]
TAKE, GIVE, SHARE = 0, 1, 2
F32, BF16, TUPLE = 11, 16, 13


def varint(value):
    low = value & 127
    return bytes([low | 128]) + varint(value >> 7) if value > 127 else bytes([low])


def message(*fields):
    """Fields (number, value) of protocol buffers: integers, texts, messages, lists of integers (packed)."""
    found = b""
    for number, value in fields:
        if isinstance(value, int):
            found += varint(number << 3) + varint(value)
            continue
        value = value.encode() if isinstance(value, str) else value
        value = b"".join(map(varint, value)) if isinstance(value, list) else value
        found += varint(number << 3 | 2) + varint(len(value)) + value
    return found


def shape(element, *dims, parts=()):
    return message((2, element), (3, list(dims)), *((4, part) for part in parts))


def instruction(key, name, result, opcode="add", called=()):
    return message((1, name), (2, opcode), (3, result), (35, key), *[(38, list(called))] * bool(called))


def value(key, size, made_by, index=(), space=0):
    return message((1, key), (2, size), (3, message((4, made_by), (3, list(index)))), (4, space))


def allocation(size, *values, **flags):
    numbers = {"thread_local": 3, "argument": 5, "parameter": 6, "live_out": 7, "space": 8, "constant": 12}
    chosen = [(numbers[name], number) for name, number in flags.items()]
    return message((2, size), *chosen, *((9, message((1, key))) for key in values))


def event(kind, key, other=0):
    return message((1, kind), (2, key), (3, "main"), (4, f"at{key}"), (5, other))


def proto(values, allocations, *traces):
    pair = shape(TUPLE, parts=[shape(F32, 2, 3), shape(BF16, 1 << 20)])
    main = message((5, 1), *((2, x) for x in [
        instruction(1, "x", shape(F32, 8), "parameter"), instruction(2, "pair", pair, "while"),
        instruction(3, "start", pair, "async-start", called=[2]),
    ]))  # fmt: skip
    wrapped = message((5, 2), (2, instruction(7, "inside", shape(F32, 6), "all-to-all")))
    assignment = message(
        *((1, v) for v in values), *((3, a) for a in allocations),
        *((4, message(*((1, e) for e in trace))) for trace in traces),
    )  # fmt: skip
    return message((1, message((3, wrapped), (3, main))), (3, assignment))


def test_live_ranges_shared_blocks_and_what_has_a_place_of_its_own():
    values = [value(1, 32, 1), value(2, 24, 2, [0]), value(3, 24, 2, [0]), value(4, 2 << 20, 2, [1]), value(5, 24, 7)]
    values += [value(6, 8, 2), value(7, 4, 2), value(8, 99, 2, space=1), value(9, 5, 2)]
    allocations = [
        allocation(32, 1, argument=1, parameter=3, live_out=1), allocation((2 << 20) + 100, 2, 3, 4, 5),
        allocation(8, 6, live_out=1), allocation(4, 7, constant=1), allocation(99, 8, space=1),
        allocation(5, 9, thread_local=1),
    ]  # fmt: skip
    trace = [event(TAKE, 2), event(SHARE, 3, 2), event(GIVE, 2), event(TAKE, 4), event(GIVE, 3), event(TAKE, 5)]
    trace += [event(GIVE, 4), event(GIVE, 5), event(SHARE, 3, 2), event(GIVE, 3)]
    on_chip = [event(kind, 8) for kind in (TAKE, GIVE) * 20]  # longer, but not of the main memory
    found = read(proto(values, allocations, on_chip, trace))
    first, pair = Value("pair", "f32", (2, 3)), Value("pair", "tuple", ())
    assert found.blocks == (
        Block(24, "temporary", (first, first, first), ((0, 4), (8, 9))),
        Block(2 << 20, "temporary", (Value("pair", "bf16", (1 << 20,)),), ((3, 6),)),
        Block(24, "temporary", (Value("start", "f32", (6,)),), ((5, 7),)),
        Block(32, "argument", (Value("x", "f32", (8,)),), ((0, 10),), parameter=3),
        Block(8, "output", (pair,), ((0, 10),)),
        Block(4, "constant", (pair,), ((0, 10),)),
    )
    assert found.moments[3] == ("main", "at4")
    assert found.heap_bytes == (2 << 20) + 100


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_any_set_of_live_ranges_is_read_as_it_is(spans):
    """Values one to a block, from `begin` for `length`; those that begin together are taken in order."""
    edges = sorted(
        [(b, 1, k) for k, (b, n) in enumerate(spans, 1)] + [(b + n, 0, k) for k, (b, n) in enumerate(spans, 1)]
    )
    trace = [event(TAKE if begins else GIVE, key) for _, begins, key in edges]
    where = {(begins, key): place for place, (_, begins, key) in enumerate(edges)}
    values = [value(key, 10 * key, 1) for key in range(1, len(spans) + 1)]
    found = read(proto(values, [allocation(10_000, *range(1, len(spans) + 1))], trace))
    live = {block.num_bytes: block.live for block in found.blocks}
    assert live == {10 * key: ((where[1, key], where[0, key]),) for key in range(1, len(spans) + 1)}


def test_what_is_no_buffer_assignment_is_refused():
    with pytest.raises(ValueError, match="no module with a buffer assignment"):
        read(message((1, message())))


def test_a_planted_buffer_is_found_in_its_phase_and_weights_are_told_from_gradients():
    def step(state, batch):
        def loss(params):
            x = batch["x"] @ params["w"]
            with jax.named_scope("expert"):
                planted = jnp.sin(jnp.broadcast_to(x[:, None, :], (64, 128, 32)) + batch["y"][:, :, None])
            with jax.named_scope("loss"):
                return (jnp.cumsum(planted, 1) ** 2).sum()

        grads = jax.grad(loss)(state.params)
        moved = jax.tree.map(lambda w, g: w - g, state.params, grads)
        return dataclasses.replace(state, params=moved, opt_state=jax.tree.map(jnp.add, state.opt_state, grads))

    params = {"w": jnp.ones((48, 32))}
    state = TrainState(jnp.zeros((), jnp.int32), params, params, None)
    batch = {"x": jnp.ones((64, 48)), "y": jnp.ones((64, 128))}
    memory = StepMemory.of(*compile_with_buffers(jax.jit(step).lower(state, batch)))
    sums = memory.by_group()
    assert (sums["parameters"][0], sums["moments"][0]) == (4 * 48 * 32,) * 2
    assert sums["batch"][0] == 4 * (64 * 48 + 64 * 128)
    planted = [b for b in memory.at_peak() if b.num_bytes == 4 * 64 * 128 * 32]
    assert {b.group for b in planted} <= {"expert", "loss"}
    assert "expert" in {b.group for b in planted}
    assert sums["expert"][0] >= 4 * 64 * 128 * 32
    assert memory.peak_bytes == memory.reported_bytes
    alike = [b for b in memory.buffers if b.words.endswith("like w") and b.group not in WHOLE_TIME]
    assert all(b.shape in ("f32[48,32]", "f32[32,48]") for b in alike)


MODEL = ModelConfig(num_layers=2, d_model=32, attention=AttentionConfig(4, 2, 8), d_ff=48, num_experts=16,
                    experts_per_token=2, vocab_size=256, dtype="float32")  # fmt: skip
LAYOUT = Layout(MeshConfig(4, 2, 2), 64, 16, num_microbatches=2)


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(Program(MODEL, LAYOUT))


@pytest.fixture(scope="module")
def step_memory(train_step):
    """Of a train step on 16 devices."""
    return StepMemory.of(*compile_with_buffers(train_step.lower()))


@pytest.mark.full
def test_everything_adds_up_to_what_the_compiler_reports(step_memory):
    peak = step_memory.peak_bytes
    assert peak == step_memory.reported_bytes
    assert step_memory.total_bytes - peak == step_memory.hole_bytes < 0.05 * peak
    for field, sums in (("group", step_memory.by_group()), ("content", step_memory.by_content())):
        assert sum(size for size, _ in sums.values()) == peak
        over = step_memory.over_schedule(field)
        total = sum(over.values())
        assert total.shape == (len(step_memory.moments),)
        assert (total.max(), total.argmax()) == (peak, step_memory.peak)
        assert {name: live[step_memory.peak] for name, live in over.items() if live[step_memory.peak]} == {
            name: size for name, (size, _) in sums.items() if size
        }


@pytest.mark.full
def test_every_leaf_of_the_state_and_the_batch_is_found(step_memory, train_step):
    def bytes_of(tree, prefix):
        return {
            prefix + jax.tree_util.keystr(path): math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    expected = {
        "parameters": bytes_of(train_step.state_shapes.params, "state.params"),
        "moments": bytes_of(train_step.state_shapes.opt_state, "state.opt_state"),
        "balancer": bytes_of(train_step.state_shapes.balance, "state.balance"),
        "batch": bytes_of(train_step.program.batch_shapes, "batch"),
        "other arguments": {"state.step": 4},
    }
    for group, leaves in expected.items():
        assert {b.name: b.num_bytes for b in step_memory.buffers if b.group == group} == leaves


@pytest.mark.full
def test_the_step_is_understood(step_memory):
    """Most of it has a phase; layers' inputs are saved, and each weight has a gradient, both by name."""
    sums, contents = step_memory.by_group(), step_memory.by_content()
    assert set(sums) <= set(GROUPS)
    assert sums.get("no phase", (0, 0))[0] < 0.05 * step_memory.peak_bytes
    assert contents["saved activations"][0] > 0
    assert contents["gradients"][0] == contents["gradients"][1] > 0.5 * sums["parameters"][0]
    words = " ".join(b.words for b in step_memory.buffers if b.content == "gradients")
    assert all(name in words for name in ("moe.experts.w_in_EDGF", "attention.w_q_DNH", "head.w_DV"))
    assert any("stacked by a loop of" in b.words for b in step_memory.buffers)


@pytest.mark.full
def test_tables_and_figures_for_programs_tell_the_same(step_memory):
    predicted, device = predict_memory(MODEL, LAYOUT), get_device("cpu")
    data = json.loads(json.dumps(memory_report.as_data(step_memory, predicted, device, 7)))
    assert sum(data["by_phase_bytes"].values()) == sum(data["by_content_bytes"].values()) == data["peak_bytes"]
    assert data["peak_bytes"] == data["reported_bytes"] == step_memory.peak_bytes
    assert data["predicted_bytes"] == predicted.peak_bytes
    sizes = [b["num_bytes"] for b in data["largest"]]
    assert len(sizes) == 7
    assert sizes == sorted(sizes, reverse=True)
    text = memory_report.as_markdown(step_memory, predicted, device, 7)
    assert f"| live at the peak | {step_memory.peak_bytes / 1e6:,.3f} |" in text
    assert all(f"`{b['name']}`" in text for b in data["largest"])


@pytest.mark.full
@pytest.mark.parametrize("limit_over_peak", [1.2, 10])
def test_every_label_of_the_picture_can_be_read(step_memory, limit_over_peak):
    device = dataclasses.replace(
        get_device("cpu"), memory_bytes=limit_over_peak * step_memory.peak_bytes, reserved_bytes=0
    )
    fig = memory_report.figure(step_memory, device, "Memory")
    texts = check_labels(fig)
    assert any(text.startswith("limit of cpu") and ("off the scale" in text) == (limit_over_peak > 5) for text in texts)
    assert any(text.startswith("peak: ") for text in texts)
    areas = [np.ptp(c.get_paths()[0].vertices[:, 1]) for c in fig.axes[0].collections]
    assert max(areas) > 0
    pyplot().close(fig)


def test_bad_input_is_one_line():
    assert run_script("memory", "--out=memory.txt", status=2).error == "--out=memory.txt must end in .png, .svg, .pdf"


@pytest.mark.slow
@pytest.mark.parametrize(("target", "plugin"), [("h100_2x8", "jax_plugins.xla_cuda13"), ("tpu_v5p_16", "libtpu")])
def test_the_sum_is_the_compilers_peak_for_devices_that_are_not_there(target, plugin, tmp_path):
    found = None
    with contextlib.suppress(ModuleNotFoundError):  # of the package that the plugin would be in
        found = importlib.util.find_spec(plugin)
    assert found, f"{plugin} is missing, which compiles for {target} on any machine; pip install 'moejax[aot]'"
    script = [sys.executable, ROOT / "experiments/memory.py", "--config=tiny", f"--target={target}"]
    script += [f"--out={tmp_path / 'memory.png'}", f"--json={tmp_path / 'memory.json'}"]
    environment = os.environ | {"XLA_FLAGS": ""}  # without the virtual devices and settings of tests
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "memory.json").read_text())
    assert figures["peak_bytes"] == figures["reported_bytes"]
    assert sum(figures["by_content_bytes"].values()) == figures["peak_bytes"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
