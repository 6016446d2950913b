"""Overlap of hand-written schedules with known answers: a link of 1 KB/s, matrix products of 1 kFLOP/s."""

import jax
import pytest

from moejax import hlo
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.presets import tiny
from moejax.profiling.overlap import Overlap, attention_flops, measure
from moejax.program import Program
from moejax.train.step import make_train_step

SPEED = {"flops_per_s": 1000.0, "bytes_per_s": 1000.0}
GROUPS = "replica_groups={{{{0,1}}}}, dimensions={{0}}"

# f32[500] among two devices: 1000 bytes each, 1 s. A product of [1, 500] and [500, 1] is 1000 FLOPs, 1 s.
START = "%{0} = ((f32[500]), f32[500]) all-to-all-start(%x), " + GROUPS
DONE = "%{0}.done = f32[500] all-to-all-done(%{0})"
SYNC = "%{0} = f32[500] all-to-all(%x), " + GROUPS
DOT = "%{0} = f32[1,1] dot(%row, %column), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
HALF = "%{0} = f32[1,1] dot(%half.row, %half.column), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
ELEMENTWISE = "%{0} = f32[500] negate(%x)"
INPUTS = [
    "%x = f32[500] parameter(0)", "%row = f32[1,500] parameter(1)", "%column = f32[500,1] parameter(2)",
    "%half.row = f32[1,250] parameter(3)", "%half.column = f32[250,1] parameter(4)",
]  # fmt: skip


def program(*lines, inside=""):
    body = "\n".join(f"  {line}" for line in [*INPUTS, *lines])
    return hlo.parse(f"HloModule test, is_scheduled=true\n\n{inside}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


def lines(*schedule):
    """`("start a", "dot", "done a")` as instructions."""
    kinds = {"start": START, "done": DONE, "sync": SYNC, "dot": DOT, "half": HALF, "elementwise": ELEMENTWISE}
    return [
        kinds[kind].format(name[0] if name else f"line{i}")
        for i, (kind, *name) in enumerate(step.split() for step in schedule)
    ]


@pytest.mark.parametrize(
    ("schedule", "asynchronous", "overlapped", "waited_s"),
    [
        (("dot", "sync a", "dot"), 0, 0, 1),
        (("start a", "done a", "dot"), 1, 0, 1),
        (("start a", "elementwise", "done a"), 1, 0, 1),
        (("start a", "dot", "done a"), 1, 1, 0),
        (("start a", "dot", "dot", "done a"), 1, 1, 0),
        (("start a", "half", "done a"), 1, 1, 0.5),
        (("start a", "dot", "done a", "sync b"), 0.5, 0.5, 1),
        # One link: b is sent when a is through, and one product does not hide two transfers.
        (("start a", "start b", "dot", "done a", "done b"), 1, 1, 1),
        (("start a", "start b", "dot", "done a", "dot", "done b"), 1, 1, 0),
        (("start a", "start b", "done a", "dot", "done b"), 1, 0.5, 1),
        # What is sent synchronously waits for the link, too.
        (("start a", "sync b", "done a"), 0.5, 0, 2),
    ],
)
def test_schedules(schedule, asynchronous, overlapped, waited_s):
    found = measure(program(*lines(*schedule)), **SPEED)["all-to-all"]
    number = sum(step.startswith(("start", "sync")) for step in schedule)
    assert found == Overlap(number, 1000 * number, asynchronous, overlapped, 1 - waited_s / number, waited_s)


@pytest.mark.parametrize(("schedule", "waited_s"), [(("sync a", "dot"), 3), (("start a", "dot", "done a"), 0)])
def test_a_loop_counts_as_often_as_it_runs(schedule, waited_s):
    body = "\n".join(f"  {line}" for line in [*INPUTS, *lines(*schedule)])
    inside = f"%body () -> f32[] {{\n{body}\n}}\n"
    loop = '%loop = f32[] while(%x), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    found = measure(program(loop, inside=inside), **SPEED)["all-to-all"]
    assert (found.times, found.sent_bytes, found.waited_s) == (3, 3000, waited_s)
    around = measure(program(*lines("start a"), loop, *lines("done a"), inside=inside), **SPEED)["all-to-all"]
    assert around.waited_s == waited_s  # the loop's products hide what is sent around it


def test_done_is_found_past_updates_and_kinds_are_told_apart():
    wrapped = (
        "%wrapped (w: f32[500]) -> f32[500] {\n  %w = f32[500] parameter(0)\n"
        "  ROOT %y = f32[500] reduce-scatter(%w), replica_groups={{0,1}}, to_apply=%wrapped\n}\n"
    )
    schedule = [
        "%s = ((f32[500]), f32[250], s32[]) async-start(%x), calls=%wrapped",
        "%u = ((f32[500]), f32[250], s32[]) async-update(%s)",
        *lines("dot", "sync a"),
        "%d = f32[250] async-done(%u)",
    ]
    found = measure(program(*schedule, inside=wrapped), **SPEED)
    assert list(found) == ["all-to-all", "reduce-scatter"]
    assert found["reduce-scatter"] == Overlap(1, 1000, 1, 1, 1, 0)
    assert found["all-to-all"].hidden == 0


@pytest.mark.parametrize(
    ("name", "products"),
    [("mha_forward", 2), ("mha_backward", 5), ("splash_mha_fwd", 2), ("mha_preprocess_backward", 0), ("other", 0)],
)
def test_attention_kernels_have_the_flops_of_causal_attention(name, products):
    call = (
        '%k = bf16[3,2,64,8,16] custom-call(%x), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={bf16[3,2,64,8,16]{4,3,2,1,0}, s32[2,64]{1,0}}, "
        f'metadata={{op_name="jit(f)/{name}/pallas_call"}}'
    )
    flops = attention_flops(64)
    (found,) = hlo.parse(
        f"HloModule test, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n  {call}\n}}\n"
    ).computations["main"].values()  # fmt: skip
    assert flops(found) == products * 2 * (3 * 2 * 8) * 64 * 64 * 16 / 2


@pytest.mark.full
def test_the_train_step_exchanges_each_layers_tokens_there_and_back_and_their_gradients():
    """Compiled for CPUs, whose collectives are all synchronous."""
    m, layout = tiny(), Layout(MeshConfig(expert=4), 32, 16, num_microbatches=2)
    program = Program(m, layout, build_mesh(layout.mesh, jax.devices()[:4]))
    module = hlo.parse(make_train_step(program).lower().compile().as_text())
    found = measure(module, **SPEED)["all-to-all"]
    assert (found.asynchronous, found.overlapped, found.hidden) == (0, 0, 0)
    assert found.times == 4 * m.num_moe_layers * 2
    rows = m.num_experts * layout.dispatch.capacity(16 // 4 // 2 * 32, m)
    sent = found.times * rows * m.d_model * 3 / 4
    assert found.sent_bytes in (2 * sent, 4 * sent)  # CPUs may raise bfloat16 to float32
