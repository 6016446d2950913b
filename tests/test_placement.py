"""Placement: all experts are there, slots are filled, copies are apart, and devices are loaded no worse than before."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.balance.placement import place_experts
from moejax.checks import ConfigError


@st.composite
def problems(draw):
    """(load_LE, slots, devices, hosts, groups) that fit together."""
    hosts = draw(st.sampled_from([1, 2]))
    devices = hosts * draw(st.integers(1, 4))
    groups = hosts * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 4))
    least = -(-max(experts, devices) // devices)
    slots = devices * draw(st.integers(least, least + 3))
    seed, spread = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.5, 2.0]))
    load_LE = np.random.default_rng(seed).lognormal(sigma=spread, size=(2, experts))
    return load_LE, slots, devices, hosts, groups


def place(problem):
    load_LE, slots, devices, hosts, groups = problem
    return place_experts(load_LE, slots, devices, num_hosts=hosts, num_groups=groups)


@given(problems())
def test_maps_agree_and_every_expert_is_there(problem):
    placement, (load_LE, slots, devices, *_) = place(problem), problem
    assert placement.expert_of_slot_LS.shape == (2, slots)
    for layer, expert_S in enumerate(placement.expert_of_slot_LS):
        np.testing.assert_array_equal(placement.copies_LE[layer], np.bincount(expert_S, minlength=load_LE.shape[1]))
        assert (placement.copies_LE[layer] >= 1).all()
        for expert, slots_C in enumerate(placement.slots_of_expert_LEC[layer]):
            assert sorted(slots_C[slots_C >= 0]) == list(np.flatnonzero(expert_S == expert))
    assert placement.device_load_LD.shape == placement.device_load_before_LD.shape == (2, devices)


@given(problems())
def test_loads_are_shared_evenly_by_copies_and_never_worse_than_in_a_row(problem):
    placement, (load_LE, _, devices, *_) = place(problem), problem
    for layer, expert_S in enumerate(placement.expert_of_slot_LS):
        share_E = load_LE[layer] / placement.copies_LE[layer]
        np.testing.assert_allclose(placement.device_load_LD[layer], share_E[expert_S].reshape(devices, -1).sum(1))
    np.testing.assert_allclose(placement.device_load_before_LD.sum(1), load_LE.sum(1))
    before_L, after_L = placement.max_over_mean()
    assert (after_L <= before_L * (1 + 1e-9)).all()


@given(problems())
def test_copies_are_on_different_devices(problem):
    """Unless there are more than devices, or apart they would load the busiest device more than experts in a row."""
    placement, (load_LE, slots, devices, hosts, _) = place(problem), problem
    before_L, after_L = placement.max_over_mean()
    for layer, expert_S in enumerate(placement.expert_of_slot_LS):
        apart = all(len(set(row)) == len(row) for row in expert_S.reshape(devices, -1))
        assert apart or slots > load_LE.shape[1] * devices // hosts or after_L[layer] == pytest.approx(before_L[layer])


def best_apart(load_E, devices, size):
    """The least load of the busiest device, by trying all placements without an expert twice on a device."""
    rows = list(itertools.combinations(range(len(load_E)), size))
    found = np.inf
    for placed in itertools.combinations_with_replacement(rows, devices):
        copies_E = np.bincount(np.ravel(placed), minlength=len(load_E))
        if copies_E.min() > 0:
            found = min(found, (load_E / copies_E)[np.asarray(placed)].sum(1).max())
    return found


@st.composite
def small_problems(draw):
    """(load_E, devices, slots of a device), which an expert need not be in twice."""
    devices, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size = draw(st.integers(-(-experts // devices), experts))
    loads = st.integers(0, 8).map(float) | st.floats(0.1, 100)
    load_E = draw(st.lists(loads, min_size=experts, max_size=experts).filter(any))
    return np.asarray(load_E), devices, size


@settings(max_examples=300)
@given(small_problems())
@example((np.array([0.0, 4.0, 2.0, 3.0]), 2, 3))
@example((np.array([5.0, 0.0, 4.0, 1.0, 0.0, 5.0]), 3, 4))
def test_no_expert_is_twice_on_a_device_where_that_is_no_worse_than_experts_in_a_row(problem):
    load_E, devices, size = problem
    placement = place_experts(load_E[None], devices * size, devices)
    in_a_row = placement.device_load_before_LD.max() * (1 + 1e-9)
    assert placement.device_load_LD.max() <= in_a_row
    apart = all(len(set(row)) == size for row in placement.expert_of_slot_LS[0].reshape(devices, -1))
    assert apart or best_apart(load_E, devices, size) > in_a_row


@given(problems())
def test_groups_stay_inside_their_host(problem):
    placement, (load_LE, _, _, hosts, groups) = place(problem), problem
    for expert_S in placement.expert_of_slot_LS:
        group_HS = expert_S.reshape(hosts, -1) // (load_LE.shape[1] // groups)
        found = [set(row) for row in group_HS] if hosts > 1 else []
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(found, 2))
        assert all(len(row) == groups // hosts for row in found)


@pytest.mark.parametrize(
    ("load", "slots", "devices", "best"),
    [
        ([4, 3, 2, 1], 4, 2, 5),  # 4 + 1, 3 + 2
        ([8, 1, 1, 1, 1], 8, 4, 3),  # four copies of the first, which are 2 each
        ([6, 2, 2, 1, 1], 6, 2, 6),  # two copies of the first, one on each
        ([5, 3, 3, 2, 2, 1], 6, 2, 8),  # 5 + 2 + 1, 3 + 3 + 2
    ],
)
def test_small_optima_are_found(load, slots, devices, best):
    placement = place_experts(np.asarray([load]), slots, devices)
    assert placement.device_load_LD.max() == pytest.approx(best)


def test_hot_experts_are_copied_and_devices_evened_out():
    load_LE = 1 / np.arange(1, 65)[None] ** 0.8
    placement = place_experts(load_LE, 80, 16)
    (before, after), (cv_before, cv_after) = placement.max_over_mean(), placement.load_cv()
    assert before > 3
    assert after < 1.1
    assert cv_after < 0.05 < cv_before
    assert placement.copies_LE[0, 0] == placement.copies_LE.max() > 2
    assert (np.diff(placement.copies_LE[0]) <= 0).all()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, r"load_LE has shape \(4,\); it must be \[layers, experts\]"),
        ((1, 4), {"num_slots": 3}, "num_slots=3 must be a multiple of num_devices=2 and at least the 4 experts"),
        ((1, 4), {"num_slots": 5}, "num_slots=5 must be a multiple of num_devices=2"),
        ((1, 4), {"num_hosts": 3}, "num_devices=2 must be a multiple of num_hosts=3"),
        ((1, 4), {"num_hosts": 2, "num_groups": 3}, "num_groups=3 must be a multiple of num_hosts=2 and divide the 4"),
    ],
)
def test_what_does_not_fit_is_told(shape, options, message):
    with pytest.raises(ConfigError, match=message):
        place_experts(np.ones(shape), **({"num_slots": 4, "num_devices": 2} | options))


def test_a_layer_without_load_is_told():
    with pytest.raises(ConfigError, match="more than 0 somewhere in every layer"):
        place_experts(np.asarray([[1.0, 1.0], [0.0, 0.0]]), 2, 2)
