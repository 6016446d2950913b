"""Time of a step: monotone, bounded by the roofline, additive, and near what was measured of collectives."""

import dataclasses

import pytest

from moejax.checks import ConfigError
from moejax.mesh import MeshConfig
from moejax.planner.costs import (
    Assumptions,
    collective_seconds,
    matmul_bytes,
    matmul_efficiency,
    matmul_seconds,
    rates,
)
from moejax.planner.hardware import Cluster, Constant, get_device
from moejax.planner.time import AxisSpans, StepFacts, predict_time
from moejax.planner.work import Collective, Matmul, MemoryOp

H100 = get_device("h100")
CLUSTER = Cluster("2x8", H100, 2, 8)
SPANS = AxisSpans({"expert": (16, 2), "tensor": (1, 1)})
WORK = [
    Matmul("attention", "forward", 4096, 4096, 3072, times=16),
    Matmul("expert", "forward", 1024, 4096, 3072, groups=2, times=16),
    Matmul("logits", "forward", 4096, 32000, 3072),
    MemoryOp("attention", "forward", 1e8, 16),
    MemoryOp("optimizer", "update", 8e9),
    Collective("dispatch", "forward", "all_to_all", ("expert",), 5e7, 16, times=16),
    Collective("gather", "forward", "all_gather", ("expert",), 1e6, 16, times=16),
    Collective("pipeline", "forward", "ppermute", ("pipeline",), 1e7, 2, times=4),
]


def faster(device, name, factor):
    """The device with one figure multiplied; a link's is named "inside.bytes_per_s"."""
    first, _, rest = name.partition(".")
    old = getattr(device, first)
    new = faster(old, rest, factor) if rest else Constant(old * factor, "assumed", "test")
    return dataclasses.replace(device, **{first: new})


@pytest.mark.parametrize(
    "name", ["matmul_flops", "copy_bytes_per_s", "inside.bytes_per_s", "inside.peak_bytes_per_s", "across.bytes_per_s"]
)
def test_a_faster_device_is_never_slower(name):
    before = predict_time(WORK, CLUSTER, SPANS).expected
    for factor in (1.5, 4):
        cluster = dataclasses.replace(CLUSTER, device=faster(H100, name, factor))
        after = predict_time(WORK, cluster, SPANS).expected
        assert after <= before
        before = after


@pytest.mark.parametrize(
    "step", [StepFacts(), StepFacts(bubble=0.2), StepFacts(bubble=0.2, bubble_counted=False, parts=4, load=1.3)]
)
def test_phases_and_categories_add_up_and_the_interval_holds_the_step(step):
    time = predict_time(WORK, CLUSTER, SPANS, step=step)
    assert sum(time.by_phase.values()) == pytest.approx(time.expected)
    assert sum(time.by_category.values()) == pytest.approx(time.expected)
    assert time.low < time.expected < time.high
    assert time.dominant in time.spreads
    assert 0 < time.busy < 1


@pytest.mark.parametrize("shape", [(4096, 4096, 4096), (16, 4096, 4096), (128, 14336, 64), (1, 1, 1)])
@pytest.mark.parametrize("name", ["h100", "tpu_v5p", "a100_64gb"])
def test_no_product_is_faster_than_the_roofline(shape, name):
    device = get_device(name)
    item = Matmul("expert", "forward", *shape, groups=2)
    seconds = max(matmul_seconds(item, rates(device, Assumptions())))
    assert seconds >= item.flops / device.peak_flops
    assert seconds >= matmul_bytes(item) / device.memory_bytes_per_s


@pytest.mark.parametrize("name", ["h100", "tpu_v6e"])
def test_efficiency_rises_with_every_dimension(name):
    for i in range(3):
        small, large = [512.0, 512.0, 512.0, 4.0], [512.0, 512.0, 512.0, 4.0]
        large[i] *= 2
        efficiency = [matmul_efficiency(*shape, rates(get_device(name), Assumptions())) for shape in (small, large)]
        assert 0 < efficiency[0] < efficiency[1] < 1


def test_scores_of_a_fused_attention_never_reach_memory():
    scores = Matmul("attention", "forward", 8192, 8192, 128, groups=32)
    values = Matmul("attention", "forward", 8192, 128, 8192, groups=32)
    assert matmul_bytes(scores) == matmul_bytes(values) == 2 * 8192 * 128 * 2 * 32
    decode = Matmul("attention", "forward", 1, 8192, 128, groups=32)
    assert matmul_bytes(decode) == pytest.approx(8192 * 128 * 2 * 32, rel=1e-3)


@pytest.mark.parametrize(("devices", "measured_us"), [(8, 1265), (16, 5774), (32, 8059), (64, 9164)])
def test_all_to_all_is_near_what_nccl_was_measured_at(devices, measured_us):
    """arXiv 2603.07685, table 7: 4,096 tokens of width 7,168 to 8 experts each, H100."""
    hosts = devices // 8
    item = Collective("dispatch", "forward", "all_to_all", ("expert",), 4096 * 8 * 7168 * 2, devices)
    seconds = collective_seconds(item, (8, hosts), rates(H100, Assumptions()))
    assert seconds * 1e6 == pytest.approx(measured_us, rel=0.15)


def test_two_hops_pay_where_messages_are_many_and_small():
    def seconds(size, hosts):
        item = Collective("dispatch", "forward", "all_to_all", ("expert",), size, 256, hosts=hosts)
        return collective_seconds(item, (8, 32), rates(H100, Assumptions()))

    assert seconds(1e6, 32) < seconds(1e6, 1)
    assert seconds(1e9, 32) >= seconds(1e9, 1)


def test_inside_a_host_is_faster_than_across():
    item = Collective("gather", "forward", "all_gather", ("expert",), 1e7, 8)
    inside = collective_seconds(item, (8, 1), rates(H100, Assumptions()))
    across = collective_seconds(item, (1, 8), rates(H100, Assumptions()))
    assert inside < across


def test_more_parts_expose_less_and_a_bubble_costs():
    one, four = (predict_time(WORK, CLUSTER, SPANS, step=StepFacts(parts=n)) for n in (1, 4))
    assert four.by_category["communication"] < one.by_category["communication"]
    assert four.expected < one.expected
    idle = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(bubble=0.5, bubble_counted=False))
    counted = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(bubble=0.5))
    assert idle.expected > one.expected == pytest.approx(counted.expected)
    assert counted.by_category["bubble"] == pytest.approx(idle.by_category["bubble"] / 2)


def test_a_slow_host_bounds_the_step():
    plain = predict_time(WORK, CLUSTER, SPANS).expected
    bound = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(host_s=10 * plain))
    assert bound.expected >= 10 * plain
    hidden = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(host_s=plain / 10))
    assert hidden.expected == pytest.approx(plain)
    waiting = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(host_s=plain / 10, host_waits=0.5))
    assert waiting.by_category["host"] == pytest.approx(plain / 20)


def test_throughput_and_utilization():
    time = predict_time(WORK, CLUSTER, SPANS, step=StepFacts(tokens=65536, model_flops=1e15))
    assert time.tokens_per_ms == pytest.approx(65536 / time.expected / 1e3)
    assert time.tokens_per_s_per_device == pytest.approx(time.tokens_per_ms * 1e3 / 16)
    assert time.mfu == pytest.approx(1e15 / 16 / time.expected / 989e12)


def test_placement_follows_the_mesh():
    spans = AxisSpans.of(MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline"))
    assert spans.span(("expert",), 8) == (8, 1)
    assert spans.span(("pipeline",), 2) == (1, 2)
    assert spans.span(("expert", "pipeline"), 16) == (8, 2)


@pytest.mark.parametrize("fields", [{"bubble": 1.0}, {"load": 0.5}, {"rounds": 0}, {"parts": 0}])
def test_a_step_that_cannot_be_is_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        StepFacts(**fields)
