import dataclasses
from collections import Counter

import pytest

from moejax.config import AttentionConfig, LatentConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner.flops import decode_flops
from moejax.planner.serve import decode_work
from moejax.planner.work import Collective, Matmul, MemoryOp
from moejax.presets import moe_16x10b

MODEL = moe_16x10b()
LATENT = dataclasses.replace(MODEL, attention=AttentionConfig(24, 24, 192, latent=LatentConfig(512, 1536, 64, 128)))


def layout(expert=8, pipeline=2, tensor=1, batch_size=256):
    return Layout(MeshConfig(expert, pipeline, tensor), 4096, batch_size)


def sent_bytes(found):
    """Bytes sent by (phase, kind, axes)."""
    total = Counter()
    for item in decode_work(MODEL, found):
        if isinstance(item, Collective):
            total[item.phase, item.kind, item.axes] += item.sent_bytes
    return total


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        *((MODEL, sizes) for sizes in ((8, 2, 1), (16, 1, 1), (4, 2, 2), (1, 16, 1), (2, 1, 8))),
        (LATENT, (8, 2, 1)),
        (LATENT, (1, 16, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else value.attention.kind,
)
def test_devices_together_do_the_model_once(model, sizes):
    total = 16 * sum(item.flops for item in decode_work(model, layout(*sizes)) if isinstance(item, Matmul))
    assert total == pytest.approx(256 * decode_flops(model, 4096))


def test_only_what_makes_latents_is_done_by_every_device_of_tensor():
    split, whole = (
        16 * sum(item.flops for item in decode_work(LATENT, layout(*sizes)) if isinstance(item, Matmul))
        for sizes in ((8, 1, 2), (16, 1, 1))
    )
    m, latent = LATENT, LATENT.attention.latent
    down = 2 * m.d_model * (latent.q_rank + latent.kv_rank + latent.rope_head_dim)
    assert split - whole == pytest.approx(256 * m.num_layers * down)


@pytest.mark.parametrize(("m", "numbers"), [(MODEL, 2 * 8 * 128), (LATENT, 512 + 64)], ids=["grouped", "latent"])
def test_the_cache_is_read_once_a_token(m, numbers):
    """Of one device: keys and values of its sequences, layers and heads."""
    work = decode_work(m, layout())
    memory_ops = [item for item in work if isinstance(item, MemoryOp) and item.phase == "attention"]
    reads = sum(item.moved_bytes * item.times for item in memory_ops) - 4 * 16 * m.d_model * 2 * m.num_layers
    cache = 256 * (4096 + 1) * m.num_layers * numbers * 2
    assert reads == pytest.approx(cache / 16)


def test_experts_that_no_token_picks_are_not_read():
    def weights(batch_size):
        items = [item for item in decode_work(MODEL, layout(1, 1, 1, batch_size)) if isinstance(item, Matmul)]
        return [item.groups for item in items if item.phase == "expert"]

    assert weights(1) == pytest.approx([2, 2])
    assert 2 < weights(4)[0] < 8
    assert weights(1024) == pytest.approx([16, 16])


def test_every_assignment_travels_and_returns():
    m, sent = MODEL, sent_bytes(layout(16, 1, 1))
    rows = 256 / 16 * m.experts_per_token * 15 / 16
    for phase in ("dispatch", "combine"):
        assert sent[phase, "all_to_all", ("expert", "tensor")] == pytest.approx(rows * m.d_model * 2 * m.num_layers)


def test_one_device_sends_nothing():
    assert not [item for item in decode_work(MODEL, layout(1, 1, 1)) if isinstance(item, Collective)]


def test_split_experts_meet_over_tensor():
    folded = layout(4, 2, 2)
    split = folded.replace(expert_axes=("expert",))
    assert ("expert", "all_gather", ("tensor",)) in sent_bytes(split)
    assert ("expert", "all_gather", ("tensor",)) not in sent_bytes(folded)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_tokens_cross_hosts_in_a_hop_of_their_own_where_the_dispatch_has_two(hierarchical):
    mesh = MeshConfig(8, 2, hosts=4)
    work = decode_work(MODEL, Layout(mesh, 4096, 256).replace(hierarchical=hierarchical))
    exchanges = [item for item in work if isinstance(item, Collective) and item.kind == "all_to_all"]
    assert [item.hosts for item in exchanges] == [4 if hierarchical else 1] * 2
