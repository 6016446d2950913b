import dataclasses
import functools
import itertools
import re

import pytest

from moejax.config import AttentionConfig
from moejax.mesh import build_mesh
from moejax.planner import report
from moejax.planner import search as module
from moejax.planner.hardware import Cluster, get_device
from moejax.planner.predict import predict_layout
from moejax.planner.report import as_data, choice_table, describe, memory_table, time_table, why
from moejax.planner.search import DoesNotFitError, Request, default_batch_size, find_plan, follows_rules, meshes
from moejax.presets import mixtral_8x7b, moe_16x10b, tiny

REFERENCE = Cluster("a100_64gb_2x8", get_device("a100_64gb"), 2, 8)


def request(seq_len=1024, cluster=REFERENCE, model=None, **fields):
    batch_size = fields.pop("batch_size", default_batch_size(seq_len, cluster.num_devices))
    return Request(model or moe_16x10b(), cluster, seq_len, batch_size, **fields)


@functools.cache
def found(seq_len=1024, mode="train"):
    return find_plan(request(seq_len, mode=mode))


def with_memory(cluster, num_bytes):
    memory = type(cluster.device.memory_bytes)(num_bytes, "assumed", "this test")
    return dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, memory_bytes=memory))


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
@pytest.mark.parametrize("seq_len", [128, 10_240])
def test_the_best_plan_can_be_built_and_fits(seq_len, mode):
    choice = found(seq_len, mode)
    best = choice.best
    assert best.fits(REFERENCE.device.usable_bytes)
    assert best.layout.mesh.num_devices == 16
    assert best.time.low <= best.time.expected <= best.time.high
    assert predict_layout(moe_16x10b(), best.layout, REFERENCE, mode=mode) == best  # which checks that it can be built
    if choice.runner_up:
        assert choice.runner_up.layout.mesh.shape != best.layout.mesh.shape
        assert choice.margin >= 0


def test_on_a_small_cluster_no_plan_is_faster():
    """The two stages against every combination of what they choose."""
    cluster = Cluster("four", get_device("h100"), 1, 4)
    r = request(512, cluster, batch_size=16, model=dataclasses.replace(moe_16x10b(), num_layers=4))
    best = find_plan(r).best.time.expected
    every = itertools.chain.from_iterable(module._variants(r, layout) for layout in module._layouts(r, 1))
    times = [r.time(layout).expected for layout in every if r.memory(layout).peak_bytes <= r.limit_bytes]
    assert len(times) > 500
    assert best <= 1.01 * min(times)


@pytest.mark.full
def test_more_memory_is_never_slower():
    times = [
        find_plan(request(10_240, with_memory(REFERENCE, gigabytes * 1e9))).best.time.expected
        for gigabytes in (48, 64, 96, 200)
    ]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_what_does_not_fit_is_named_with_what_would():
    r = request(10_240, with_memory(REFERENCE, 20e9), model=mixtral_8x7b())
    with pytest.raises(DoesNotFitError) as error:
        find_plan(r)
    message = str(error.value)
    assert "\n" not in message
    assert "the largest part is optimizer, " in message
    assert message.endswith(" devices")
    assert "they would fit with " in message


def test_the_shorter_length_that_is_named_fits():
    cluster = with_memory(REFERENCE, 15.8e9)
    with pytest.raises(DoesNotFitError, match="seq_len=") as error:
        find_plan(request(10_240, cluster, batch_size=32))
    shorter = int(str(error.value).split("seq_len=")[1].split()[0])
    assert shorter < 10_240
    assert find_plan(request(shorter, cluster, batch_size=32)).best.fits(cluster.device.usable_bytes)


def test_a_flip_is_where_the_other_plan_becomes_faster():
    choice, r = found(10_240), request(10_240)
    other = choice.runner_up
    assert other
    for flip in module.flips(r, choice.best, other, most=64.0):
        lead = functools.partial(module._lead, r, choice.best, other, module._SCALED[flip.constant])
        assert lead(flip.factor) <= 0
        assert lead(flip.factor**0.5) > 0 or abs(flip.factor - 1) < 0.03


def test_every_flip_is_said_in_a_sentence():
    assert module._SCALED.keys() == report._FLIPS.keys()
    for name in module._SCALED:
        line = report._flip_line(module.Flip(name, 2e-6, 1e-6, "published"))
        assert re.fullmatch(r"- The plan .* if the [a-z ]+ were 1 µ\S+; the planner takes 2 µ\S+ \(published\)", line)


def test_rules_are_followed_or_the_price_is_told():
    choice = found(10_240)
    assert choice.by_rules
    assert follows_rules(choice.by_rules.layout)
    assert choice.by_rules.time.expected >= choice.best.time.expected


def test_meshes_take_every_device_and_cross_hosts_on_one_axis():
    for cluster, model in ((REFERENCE, moe_16x10b()), (Cluster("large", get_device("h100"), 512, 8), moe_16x10b())):
        every = list(meshes(cluster, model))
        assert len({(str(m.shape), m.host_axis) for m in every}) == len(every) > 10
        for mesh in every:
            assert mesh.num_devices == cluster.num_devices
            assert mesh.hosts_along(*mesh.axis_names) == cluster.hosts
            assert mesh.hosts_along("tensor") == 1


def test_a_planned_mesh_can_be_built(fake_devices):
    mesh = found().best.layout.mesh
    assert build_mesh(mesh, fake_devices(2, 8)).shape == mesh.shape


def test_batches_shrink_as_sequences_grow():
    assert [default_batch_size(n) for n in (1, 128, 1024, 4096, 10_240)] == [128, 128, 64, 32, 32]
    assert default_batch_size(1024, 64) == 256


def test_the_tables_hold_every_length():
    choices = {n: found(n) for n in (128, 10_240)}
    for text in (choice_table(choices), memory_table(choices), time_table(choices)):
        lines = text.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 3
    assert "10,240" in memory_table(choices)
    explained = why(request(10_240), choices[10_240])
    assert "10,240 tokens: compute limits the speed. " in explained
    assert all(line.startswith("- ") for line in explained.splitlines()[1:])
    data = as_data(choices[128])
    assert data["layout"] == dataclasses.asdict(choices[128].best.layout)
    assert data["description"] == describe(choices[128].best)
    assert sum(data["memory_bytes"].values()) == pytest.approx(data["peak_bytes"])
    assert sum(data["time_s"]["by_phase"].values()) == pytest.approx(data["step_s"])


def test_a_model_that_nothing_divides_says_so():
    odd = dataclasses.replace(tiny(), num_experts=7, num_layers=5, d_model=132, attention=AttentionConfig(3, 3, 32))
    with pytest.raises(DoesNotFitError, match="no mesh of 16 devices divides the model's 7 experts"):
        find_plan(request(model=odd, batch_size=3))
