"""Layouts: each "auto" on each platform, sizes by hand, and what is said of one that cannot be."""

import dataclasses

import pytest

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, DispatchConfig, LatentConfig, ModelConfig
from moejax.layout import Layout, check_layouts
from moejax.mesh import MeshConfig

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
MODEL = ModelConfig(num_layers=4, d_model=32, attention=ATTENTION, d_ff=16, vocab_size=256)
PLATFORMS = [("cpu", "cpu"), ("h100", "gpu"), ("mi300x", "gpu"), ("custom", "gpu"), ("tpu_v5p", "tpu")]
ON_EVERY_PLATFORM = pytest.mark.parametrize(("hardware", "platform"), PLATFORMS, ids=[name for name, _ in PLATFORMS])


class TestResolve:
    @ON_EVERY_PLATFORM
    @pytest.mark.parametrize(("seq_len", "remat"), [(1, "none"), (2048, "none"), (2049, "full"), (10_240, "full")])
    def test_remat_depends_on_the_length(self, hardware, platform, seq_len, remat):
        layout = Layout(MeshConfig(4, hardware=hardware), seq_len)
        assert layout.resolve().remat == layout.resolve(platform).remat == remat

    @ON_EVERY_PLATFORM
    def test_bubbles_are_skipped_on_cpus_alone(self, hardware, platform):
        layout = Layout(MeshConfig(pipeline=2, hardware=hardware))
        bubble = "skip" if platform == "cpu" else "compute"
        assert layout.resolve().bubble == layout.resolve(platform).bubble == bubble

    @ON_EVERY_PLATFORM
    @pytest.mark.parametrize(
        ("sizes", "sequences", "parts"),
        [  # of the mesh, of a microbatch on a device, on accelerators
            ((4, 1, 1), 2, 2),
            ((4, 1, 1), 6, 2),
            ((4, 1, 1), 3, 1),
            ((4, 1, 1), 1, 1),
            ((1, 1, 4), 2, 2),
            ((1, 4, 1), 2, 1),  # one device has all experts
            ((1, 1, 1), 2, 1),
        ],
        ids=str,
    )
    def test_a_microbatch_is_halved_where_an_exchange_can_be_hidden(self, hardware, platform, sizes, sequences, parts):
        mesh = MeshConfig(*sizes, hardware=hardware)
        layout = Layout(mesh, batch_size=2 * 3 * mesh.expert * sequences, grad_accumulation_steps=3)
        assert layout.sequences_per_microbatch == sequences
        expected = 1 if platform == "cpu" else parts
        assert layout.resolve().batch_split == layout.resolve(platform).batch_split == expected

    @pytest.mark.parametrize("hardware", ["cpu", "h100", "tpu_v5p"])
    @pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
    def test_a_platform_that_is_given_counts_for_the_meshs_own(self, hardware, platform):
        found = Layout(MeshConfig(4, hardware=hardware)).resolve(platform)
        assert (found.bubble, found.batch_split) == (("skip", 1) if platform == "cpu" else ("compute", 2))
        assert found.mesh.hardware == hardware

    @ON_EVERY_PLATFORM
    def test_a_choice_stays(self, hardware, platform):
        for bubble, remat, parts in (("skip", "none", 1), ("compute", "collectives", 4)):
            layout = Layout(MeshConfig(2, hardware=hardware), 4096, 16, remat=remat, bubble=bubble, batch_split=parts)
            assert layout.resolve() == layout.resolve(platform) == layout

    @ON_EVERY_PLATFORM
    def test_nothing_else_changes_and_once_is_enough(self, hardware, platform):
        layout = Layout(MeshConfig(4, 2, 2, hardware=hardware), 512, 64, gather="layer")
        found = layout.resolve()
        assert found.resolve() == found.resolve(platform) == found
        assert "auto" not in (found.remat, found.bubble)
        assert found.batch_split > 0
        assert dataclasses.replace(found, remat="auto", bubble="auto", batch_split=0) == layout


# 2 replicas of 4 × 2 × 2 devices; 768 sequences in 3 passes over 8 shards: 32 of a device, 8 of a microbatch, 4 of a
# part, each of 48 tokens on a device.
LAYOUT = Layout(
    MeshConfig(4, 2, 2, replica=2), 96, 768, grad_accumulation_steps=3, num_microbatches=4, pipeline_repeats=2,
    batch_split=2,
)  # fmt: skip


class TestSizes:
    def test_by_hand(self):
        assert LAYOUT.tokens == 73_728
        assert LAYOUT.batch_shards == 8
        assert LAYOUT.sequences_per_slice == 32
        assert LAYOUT.sequences_per_microbatch == 8
        assert LAYOUT.sequences_per_part == 4
        assert LAYOUT.local_seq_len == 48
        assert LAYOUT.tokens_per_part == 192
        assert LAYOUT.ticks == 9  # 2 chunks of 4 microbatches, and one to fill the second stage
        assert LAYOUT.layers_per_chunk(dataclasses.replace(MODEL, num_layers=12)) == 3
        assert LAYOUT.layers_per_chunk(dataclasses.replace(MODEL, num_layers=13, num_dense_layers=1, dense_d_ff=8)) == 3
        assert LAYOUT.layers_per_chunk(dataclasses.replace(MODEL, num_layers=13)) == 4
        assert LAYOUT.idle_share(dataclasses.replace(MODEL, num_layers=12)) == pytest.approx(1 / 9)
        # A stage has time for 9 ticks of 4 layers. Of 13 layers, the second stage has 6, and all do 4 microbatches.
        assert LAYOUT.idle_share(dataclasses.replace(MODEL, num_layers=13)) == pytest.approx(1 - 4 * 13 / (2 * 36))

    def test_every_part_of_a_slice_is_some_devices(self):
        layout = LAYOUT
        sequences = layout.batch_split * layout.num_microbatches * layout.sequences_per_part
        assert sequences * layout.grad_accumulation_steps * layout.batch_shards == layout.batch_size
        assert layout.tokens_per_part * layout.mesh.tensor == layout.sequences_per_part * layout.seq_len

    @pytest.mark.parametrize(
        ("fields", "rows"),
        [  # 192 tokens with 2 of 16 experts each: 24 a balanced expert
            ({}, 36),
            ({"capacity_factor": 1.25, "chunks": 4}, 32),
            ({"capacity_factor": 1.01}, 25),
            ({"capacity_factor": 100.0}, 192),
            ({"capacity_factor": 100.0, "chunks": 5}, 195),
            ({"batch_split": 1}, 72),
            ({"num_microbatches": 8}, 18),
        ],
    )
    def test_capacity(self, fields, rows):
        model = dataclasses.replace(MODEL, num_experts=16, experts_per_token=2)
        assert LAYOUT.replace(**fields).capacity(model) == rows

    def test_the_unit_of_a_batch(self):
        assert LAYOUT.batch_parts(MODEL) == {
            "replica": 2, "expert": 4, "num_microbatches": 4, "batch_split": 2, "grad_accumulation_steps": 3,
        }  # fmt: skip
        assert LAYOUT.batch_unit(MODEL) == 192
        assert LAYOUT.replace(batch_split=0).batch_unit(MODEL) == 96
        dense = dataclasses.replace(MODEL, num_layers=5, num_dense_layers=1, dense_d_ff=8)
        assert LAYOUT.batch_unit(dense) == 2 * 192  # the stages share them
        for unit in (192, 384, 768):
            LAYOUT.replace(batch_size=unit).check(MODEL)

    @pytest.mark.parametrize(
        ("sizes", "exchanges"), [((1, 1, 1), False), ((1, 4, 1), False), ((2, 1, 1), True), ((1, 1, 2), True)]
    )
    def test_tokens_are_exchanged_over_expert_and_tensor(self, sizes, exchanges):
        assert Layout(MeshConfig(*sizes, replica=2)).exchanges == exchanges


def test_fields_of_the_dispatch_can_be_replaced_like_its_own():
    layout = LAYOUT.replace(seq_len=8, strategy="capacity", chunks=2)
    dispatch = DispatchConfig("capacity", chunks=2)
    assert layout == dataclasses.replace(LAYOUT, seq_len=8, dispatch=dispatch)
    assert layout.replace(hierarchical=True, dispatch=DispatchConfig()).dispatch == DispatchConfig(hierarchical=True)
    with pytest.raises(TypeError, match="capacity"):
        LAYOUT.replace(capacity=3)


def wrong(message, sizes=(1, 1, 1), *, model=None, replica=1, of_batch=False, **fields):
    return pytest.param(message, sizes, replica, model or {}, of_batch, fields, id=message[:60])


WRONG = [
    wrong(
        "num_experts=6 must be a multiple of expert × tensor = 4; try num_experts=8, or expert × tensor = 1, 2 or 3",
        (2, 1, 2), model={"num_experts": 6},
    ),
    wrong(
        "num_experts=6 must be a multiple of expert = 4; try num_experts=8, or expert = 1, 2 or 3",
        (4, 1, 1), model={"num_experts": 6}, expert_axes=("expert",),
    ),
    wrong(
        "attention.num_heads=6 must be a multiple of tensor = 4; try attention.num_heads=8, or tensor = 1, 2 or 3",
        (1, 1, 4), model={"attention": AttentionConfig(6, 2, 8)},
    ),
    wrong(
        "attention.num_kv_heads=2 must be a multiple of tensor = 4; try attention.num_kv_heads=4, or tensor = 1 or 2",
        (1, 1, 4),
    ),
    wrong(
        "d_model=36 must be a multiple of expert = 8; try d_model=40, or expert = 1, 2, 3, 4 or 6",
        (8, 1, 1), model={"d_model": 36},
    ),
    wrong(
        "d_ff=9 must be a multiple of tensor = 2; try d_ff=10, or tensor = 1",
        (1, 1, 2), model={"d_ff": 9}, expert_axes=("expert",),
    ),
    wrong(
        "d_model=36 must be a multiple of expert × tensor = 8; try d_model=40, or expert × tensor = 1, 2, 3, 4 or 6",
        (4, 1, 2), model={"d_model": 36, "shared_d_ff": 8},
    ),
    wrong(
        "d_model=60 must be a multiple of expert × tensor = 8; try d_model=64, or",
        (4, 1, 2), model={"d_model": 60, "attention": AttentionConfig(4, 4, 8, latent=LatentConfig(8, 8, 4, 8))},
    ),
    wrong(
        "attention.latent.kv_rank=6 must be a multiple of expert = 4; try attention.latent.kv_rank=8, or expert = ",
        (4, 1, 1), model={"attention": AttentionConfig(4, 4, 8, latent=LatentConfig(6, 8, 4, 8))},
    ),
    wrong(
        "attention.latent.q_rank=12 must be a multiple of expert × pipeline = 8; try attention.latent.q_rank=16, or",
        (4, 2, 1),
        model={
            "attention": AttentionConfig(4, 4, 8, latent=LatentConfig(8, 12, 4, 8)), "num_layers": 5,
            "num_dense_layers": 1, "dense_d_ff": 8,
        },
    ),
    wrong(
        "d_model=36 must be a multiple of expert × pipeline × tensor = 8; try d_model=40, or",
        (4, 2, 1), model={"d_model": 36, "num_layers": 5, "num_dense_layers": 1, "dense_d_ff": 8},
    ),
    wrong(
        "vocab_size=250 has 256 rows with padding, which must be a multiple of pipeline × tensor = 6; use another "
        "mesh, or a multiple of 48",
        (1, 3, 2), model={"vocab_size": 250},
    ),
    wrong(
        "num_layers=4 must be at least pipeline × pipeline_repeats = 8",
        (1, 4, 1), pipeline_repeats=2, num_microbatches=4,
    ),
    wrong(
        "num_layers - num_dense_layers=3 must be at least pipeline × pipeline_repeats = 4",
        (1, 4, 1), model={"num_dense_layers": 1, "dense_d_ff": 8},
    ),
    wrong("num_layers=4 must be a multiple of pipeline_repeats = 3", pipeline_repeats=3),
    wrong(
        "num_microbatches=1 must be at least the pipeline's 2 stages when pipeline_repeats=2",
        (1, 2, 1), pipeline_repeats=2, num_microbatches=1,
    ),
    wrong("seq_len=10241 must be at most max_seq_len=10240", seq_len=10_241, of_batch=True),
    wrong("seq_len=127 must be a multiple of tensor axis 2", (1, 1, 2), seq_len=127, of_batch=True),
    wrong(
        "batch_size=30 must be a multiple of 16 = replica 2 × expert 4 × num_microbatches 2; try 16",
        (4, 1, 1), replica=2, batch_size=30, of_batch=True,
    ),
    wrong(
        "batch_size=6 must be a multiple of 8 = expert 2 × num_microbatches 2 × grad_accumulation_steps 2; try 8",
        (2, 1, 1), batch_size=6, grad_accumulation_steps=2, of_batch=True,
    ),
    wrong(
        "batch_size=10 must be a multiple of 8 = expert 2 × num_microbatches 2 × batch_split 2; try 8",
        (2, 1, 1), batch_split=2, batch_size=10, of_batch=True,
    ),
    wrong(
        "batch_size=20 must be a multiple of 8 = expert 2 × num_microbatches 2 × "
        "pipeline (leading dense layers run data-parallel over it) 2; try 16",
        (2, 2, 1), model={"num_layers": 5, "num_dense_layers": 1, "dense_d_ff": 8}, batch_size=20, of_batch=True,
    ),
]  # fmt: skip


class TestCheck:
    @pytest.mark.parametrize(("message", "sizes", "replica", "model", "of_batch", "fields"), WRONG)
    def test_what_does_not_fit_is_told_what_would(self, message, sizes, replica, model, of_batch, fields):
        layout = Layout(MeshConfig(*sizes, replica=replica)).replace(**fields)
        model = dataclasses.replace(MODEL, **model)
        for batch in (True, False):
            if of_batch and not batch:
                layout.check(model, batch=False)
                continue
            with pytest.raises(ConfigError) as error:
                layout.check(model, batch=batch)
            assert str(error.value).startswith(message)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("mesh", "expert_axes", "repeats"),
        [
            (MeshConfig(4, 2, 2), ("expert", "tensor"), 1),
            (MeshConfig(16, 1, 1), ("expert", "tensor"), 2),
            (MeshConfig(2, 2, 4), ("expert",), 2),
            (MeshConfig(2, 2, 2, replica=2), ("expert",), 1),
        ],
    )
    def test_what_fits_passes(self, mesh, expert_axes, repeats):
        everything = dataclasses.replace(
            MODEL, num_layers=6, attention=AttentionConfig(4, 4, 8), num_dense_layers=2, dense_d_ff=24,
            shared_d_ff=16, d_model=64, num_experts=16,
        )  # fmt: skip
        layout = Layout(mesh, 128, 64, grad_accumulation_steps=2, pipeline_repeats=repeats)
        layout.replace(expert_axes=expert_axes).check(everything)


HOSTS = [  # mesh, and the hosts that its expert axis crosses
    (MeshConfig(expert=8, hardware="h100"), 1),
    (MeshConfig(expert=8, hardware="h100", hosts=4), 4),
    (MeshConfig(expert=8, hardware="h100", hosts=8), 8),
    (MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline"), 1),
    (MeshConfig(expert=8, replica=2, hardware="h100", hosts=2, host_axis="replica"), 1),
    (MeshConfig(expert=8, replica=2, hardware="h100", hosts=2), 1),  # each replica takes a host
    (MeshConfig(expert=8, replica=2, hardware="h100", hosts=4), 2),
    (MeshConfig(expert=8), 1),
    (MeshConfig(expert=8, hosts=4), 4),  # virtual devices stand for any number
    (MeshConfig(expert=4, replica=2, hosts=4), 2),
]


class TestHosts:
    @pytest.mark.parametrize(("mesh", "hosts"), HOSTS)
    def test_two_hops_go_between_the_hosts_that_the_expert_axis_crosses(self, mesh, hosts):
        layout = Layout(mesh)
        assert layout.exchange_hosts == 1  # one hop takes tokens anywhere
        layout.check(dataclasses.replace(MODEL, num_experts=16))
        assert layout.replace(hierarchical=True).exchange_hosts == hosts

    @pytest.mark.parametrize(("mesh", "hosts"), HOSTS)
    def test_without_hosts_to_go_between_they_are_refused(self, mesh, hosts):
        model, layout = dataclasses.replace(MODEL, num_experts=16), Layout(mesh).replace(hierarchical=True)
        if hosts > 1:
            layout.check(model)
            return
        with pytest.raises(ConfigError) as error:
            layout.check(model, batch=False)
        assert str(error.value) == (
            f"dispatch.hierarchical=True has no hosts to go between: the expert axis of mesh.hosts={mesh.hosts}, "
            f"mesh.host_axis={mesh.host_axis} is inside one host; use dispatch.hierarchical=False"
        )


def ladder(batch_size=8, num_layers=2, **fields):
    fields = {"num_microbatches": 1} | fields
    layout = Layout(MeshConfig(4, 2, 2), 64, batch_size).replace(**fields)
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    below = list(layout.smaller(model))
    cuts = [(s.num_microbatches, s.grad_accumulation_steps, s.remat) for s in below]
    for smaller, (microbatches, slices, remat) in zip(below, cuts, strict=True):
        assert smaller == layout.replace(num_microbatches=microbatches, grad_accumulation_steps=slices, remat=remat), (
            "nothing else changes"
        )
        smaller.check(model)
    return cuts


class TestSmaller:
    def test_every_rung_in_turn(self):
        remat = [(1, 4, "minimal"), (1, 4, "collectives"), (1, 4, "full")]
        assert ladder(16) == [(2, 1, "auto"), (4, 1, "auto"), (2, 2, "auto"), (1, 4, "auto"), *remat]

    def test_any_number_of_sequences_comes_down_to_one(self):
        assert ladder(4 * 3 * 5, remat="full") == [(3, 1, "full"), (15, 1, "full"), (5, 3, "full"), (1, 15, "full")]

    def test_it_starts_where_the_layout_is(self):
        assert ladder(num_microbatches=2, remat="collectives") == [(1, 2, "collectives"), (1, 2, "full")]

    def test_auto_is_the_policy_that_it_stands_for(self):
        below = Layout(MeshConfig(4), 4096, 4, num_microbatches=1).smaller(MODEL)
        assert list(below) == [], "one sequence, in full"
        below = Layout(MeshConfig(4), 2048, 4, num_microbatches=1).smaller(MODEL)
        assert [layout.remat for layout in below] == ["minimal", "collectives", "full"]

    def test_what_changes_the_loss_is_left_out(self):
        remat = [(1, 1, "minimal"), (1, 1, "collectives"), (1, 1, "full")]
        assert ladder(strategy="capacity") == remat, "drops are counted in a microbatch"

    def test_parts_of_a_microbatch_have_a_sequence_each(self):
        assert ladder(64, num_microbatches=4, batch_split=2, remat="full")[:2] == [(8, 1, "full"), (4, 2, "full")]
        assert ladder(64, num_microbatches=4, batch_split=2)[0] == (8, 1, "auto")

    def test_stages_share_the_sequences_of_dense_layers(self):
        dense = dataclasses.replace(MODEL, num_layers=5, num_dense_layers=1, dense_d_ff=8)
        layout = Layout(MeshConfig(4, 2, 2), 64, 16, num_microbatches=1, remat="full")
        assert [s.num_microbatches for s in layout.smaller(dense)] == [2, 1]
        assert [s.num_microbatches for s in layout.smaller(MODEL)] == [2, 4, 2, 1]

    def test_interleaving_keeps_a_microbatch_a_stage(self):
        below = ladder(16, num_layers=4, num_microbatches=4, pipeline_repeats=2)
        assert below == [(2, 2, remat) for remat in ("auto", "minimal", "collectives", "full")]


class TestLayouts:
    """What `check_layouts` says of those of one run."""

    A, B = Layout(MeshConfig(4, 2, 2), 64), Layout(MeshConfig(16), 128)

    def test_lengths_ascend_on_the_same_devices(self):
        check_layouts((self.A,))
        check_layouts((self.A, self.B))

    @pytest.mark.parametrize(
        ("layouts", "message"),
        [
            ((), "layouts=() must hold one at least"),
            ((B, A), "layouts have seq_len=[128, 64], which must ascend"),
            ((A, B.replace(seq_len=64)), "layouts have seq_len=[64, 64], which must ascend"),
            (
                (A, B.replace(mesh=MeshConfig(8))),
                "layouts have mesh.num_devices=[16, 8], which must be the same for all",
            ),
            (
                (A, B.replace(mesh=MeshConfig(16, hardware="h100"))),
                "layouts have mesh.hardware=['cpu', 'h100'], which must be the same for all",
            ),
            (
                (A, B.replace(mesh=MeshConfig(16, hosts=2))),
                "layouts have mesh.hosts=[1, 2], which must be the same for all",
            ),
        ],
    )
    def test_what_cannot_go_together_is_named(self, layouts, message):
        with pytest.raises(ConfigError) as error:
            check_layouts(layouts)
        assert str(error.value) == message
