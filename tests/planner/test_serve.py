import dataclasses
from collections import Counter

import pytest

from moejax.config import DispatchConfig
from moejax.mesh import MeshConfig
from moejax.planner.flops import decode_flops
from moejax.planner.plan import Plan
from moejax.planner.serve import decode_work
from moejax.planner.work import Collective, Matmul, MemoryOp
from moejax.presets import moe_16x10b


def plan(expert=8, pipeline=2, tensor=1, **fields):
    fields = {"seq_len": 4096, "batch_size": 256} | fields
    return Plan(moe_16x10b(), MeshConfig(expert, pipeline, tensor), mode="decode", **fields)


def sent_bytes(found):
    """Bytes sent by (phase, kind, axes)."""
    total = Counter()
    for item in decode_work(found):
        if isinstance(item, Collective):
            total[item.phase, item.kind, item.axes] += item.sent_bytes
    return total


@pytest.mark.parametrize("sizes", [(8, 2, 1), (16, 1, 1), (4, 2, 2), (1, 16, 1), (2, 1, 8)])
def test_devices_together_do_the_model_once(sizes):
    found = plan(*sizes)
    total = 16 * sum(item.flops for item in decode_work(found) if isinstance(item, Matmul))
    assert total == pytest.approx(found.batch_size * decode_flops(found.model, found.seq_len))


def test_the_cache_is_read_once_a_token():
    """Of one device: keys and values of its sequences, layers and heads."""
    found = plan()
    m = found.model
    memory_ops = [item for item in decode_work(found) if isinstance(item, MemoryOp) and item.phase == "attention"]
    reads = sum(item.moved_bytes * item.times for item in memory_ops) - 4 * 16 * m.d_model * 2 * m.num_layers
    cache = found.batch_size * (found.seq_len + 1) * m.num_layers * 2 * m.num_kv_heads * m.head_dim * 2
    assert reads == pytest.approx(cache / 16)


def test_experts_that_no_token_picks_are_not_read():
    def weights(batch_size):
        items = [item for item in decode_work(plan(1, 1, 1, batch_size=batch_size)) if isinstance(item, Matmul)]
        return [item.groups for item in items if item.phase == "expert"]

    assert weights(1) == pytest.approx([2, 2])
    assert 2 < weights(4)[0] < 8
    assert weights(1024) == pytest.approx([16, 16])


def test_every_assignment_travels_and_returns():
    found = plan(16, 1, 1)
    m = found.model
    sent = sent_bytes(found)
    rows = found.batch_size / 16 * m.experts_per_token * 15 / 16
    for phase in ("dispatch", "combine"):
        assert sent[phase, "all_to_all", ("expert", "tensor")] == pytest.approx(rows * m.d_model * 2 * m.num_layers)


def test_one_device_sends_nothing():
    assert not [item for item in decode_work(plan(1, 1, 1)) if isinstance(item, Collective)]


def test_split_experts_meet_over_tensor():
    split = plan(4, 2, 2, dispatch=DispatchConfig(expert_axes=("expert",)))
    folded = dataclasses.replace(split, dispatch=DispatchConfig())
    assert ("expert", "all_gather", ("tensor",)) in sent_bytes(split)
    assert ("expert", "all_gather", ("tensor",)) not in sent_bytes(folded)
