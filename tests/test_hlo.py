"""Reading compiled programs: hand-written ones with known figures, and a real one of this machine's compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import hlo
from moejax.mesh import MeshConfig, build_mesh


def module(*instructions, computations=""):
    body = "\n".join(f"  {line}" for line in instructions)
    return hlo.parse(
        f"HloModule test, is_scheduled=true\n\n{computations}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"
    )


def total_flops(*instructions, **kwargs):
    found = module(*instructions, **kwargs)
    return found.computation_flops(found.entry)


A, B = "%a = bf16[3,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)", "%b = bf16[3,32,16]{2,1,0} parameter(1)"
DOT = (
    "ROOT %dot.1 = f32[3,64,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    'rhs_contracting_dims={1}, metadata={op_name="jit(f)/dot_general"}'
)
DOT_FLOPS = 2 * 3 * 64 * 16 * 32
FUSED = f"%fused (x: bf16[3,64,32], y: bf16[3,32,16]) -> f32[3,64,16] {{\n  {A}\n  {B}\n  {DOT}\n}}\n"
FUSION = "%fusion.1 = f32[3,64,16]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%fused"


def test_instructions_are_taken_apart():
    found = module(
        "%p.0 = (s32[]{:T(128)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[4]{0}, token[]) parameter(0)",
        '%kernel = f32[2]{0} custom-call(%p.0), custom_call_target="tpu_custom_call", frontend_attributes={text={',
        '"block": 512}}, metadata={op_name="jit(f)/while/body"}',
        "ROOT %get = bf16[2,3]{1,0} get-tuple-element(%p.0), index=1",
    ).computations["main"]
    assert list(found) == ["p.0", "kernel", "get"]
    assert [x.opcode for x in found.values()] == ["parameter", "custom-call", "get-tuple-element"]
    assert found["p.0"].arrays == [(), (2, 3), (4,), ()]
    assert found["p.0"].num_bytes == 4 + 2 * 3 * 2 + 4
    assert found["kernel"].operands == found["get"].operands == ("p.0",)
    assert '"block": 512' in found["kernel"].attributes


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [("f8e4m3fn[8]", 8), ("s4[6]", 3), ("c64[2]", 16), ("pred[]", 1), ("u32[]{:S(2)}", 4), ("(f64[], ())", 8)],
)
def test_bytes_of_every_kind_of_number(shape, num_bytes):
    (found,) = module(f"%x = {shape} parameter(0)").computations["main"].values()
    assert found.num_bytes == num_bytes


@pytest.mark.parametrize(
    ("instruction", "times"),
    [
        (DOT, 1),
        (FUSION, 1),
        ("%call.1 = f32[3,64,16]{2,1,0} call(%a, %b), to_apply=%fused", 1),
        (
            "%start = ((bf16[3,64,32], bf16[3,32,16]), f32[3,64,16], s32[]) async-start(%a, %b), calls=%fused, "
            'async_execution_thread="parallel"',
            1,
        ),
        ("%done = f32[3,64,16]{2,1,0} async-done(%a)", 0),
        ("%choice = f32[] conditional(%p, %a, %b), branch_computations={%other, %fused}", 1),
        ("%sum = f32[3,64]{1,0} reduce(%a, %b), dimensions={2}, to_apply=%fused", 0),
        (
            '%loop = (s32[]) while(%a), condition=%other, body=%fused, backend_config={"known_trip_count":{"n":"7"}}',
            7,
        ),
        ("%loop = (s32[]) while(%a), condition=%below_five, body=%fused", 5),
        ("%loop = (s32[]) while(%a), condition=%below_what_is_carried, body=%fused", 0),
        (
            '%cublas = (f32[3,64,16]{2,1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
            '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}',
            1,
        ),
        ('%kernel = f32[3,64,16]{2,1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton"', 0),
    ],
)
def test_flops_of_matrix_products_wherever_they_stand(instruction, times):
    others = (
        '%other (q: f32[]) -> f32[] {\n  ROOT %q = f32[] parameter(0)\n}, execution_thread="sparsecore"\n\n'
        "%below_five (q: (s32[])) -> pred[] {\n  %five = s32[]{:T(128)} constant(5)\n  %q = (s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%q), index=0\n"
        "  ROOT %lt = pred[] compare(%i, %five), direction=LT\n}\n\n"
        "%below_what_is_carried (q: (s32[], s32[])) -> pred[] {\n  %q = (s32[], s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%q), index=0\n  %n = s32[] get-tuple-element(%q), index=1\n"
        "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n\n"
    )
    assert total_flops(A, B, instruction, computations=FUSED + others) == times * DOT_FLOPS


def test_flops_of_kernels_are_told():
    kernel = '%kernel = f32[] custom-call(%a), custom_call_target="tpu_custom_call"'
    text = f"HloModule test, is_scheduled=true\n\nENTRY %main (p: f32[]) -> f32[] {{\n  {A}\n  {kernel}\n}}\n"
    found = hlo.parse(text, kernel_flops=lambda call: 5.0 * call.attributes.count("tpu_custom_call"))
    assert found.computation_flops("main") == 5


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "flops"),
    [
        ("64,32", "32,16", "64,16", "dim_labels=bf_io->bf", 2 * 64 * 32 * 16),
        ("5,7", "3,7", "5,3", "dim_labels=bf_oi->bf", 2 * 5 * 3 * 7),
        # A batch of two products as a TPU has it: of the window's two places one is always a hole of the dilation.
        ("2,9,8", "2,8,16", "2,9,16", "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf", 2 * 2 * 9 * 8 * 16),
        # bsd,dnh->bsnh: each head is met once, the window's other places are padding.
        (
            "2,10,32,1", "32,6,8,1", "2,10,6,8",
            "window={size=1x6 pad=0_0x5_5 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f", 2 * 2 * 10 * 32 * 6 * 8,
        ),
        # bsnh,nhd->bsd: the window is what is summed over.
        (
            "2,10,8,6", "6,8,32,1", "2,10,32,1",
            "window={size=1x6}, dim_labels=0bf1_1io0->0bf1", 2 * 2 * 10 * 32 * 6 * 8,
        ),
        ("1,9,4", "3,4,2", "1,4,2", "window={size=3 stride=2}, dim_labels=b0f_0io->b0f", 2 * 4 * 3 * 4 * 2),
    ],
)  # fmt: skip
def test_flops_of_convolutions_are_those_that_meet_something(lhs, rhs, out, attributes, flops):
    convolution = f"%c = bf16[{out}] convolution(%l, %r), {attributes}, metadata={{}}"
    assert total_flops(f"%l = bf16[{lhs}] parameter(0)", f"%r = bf16[{rhs}] parameter(1)", convolution) == flops


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
X, KIB = "%x = f32[256] parameter(0)", 1024
WRAPPED = "%wrapped (x: f32[256]) -> f32[256] {\n  %x = f32[256] parameter(0)\n  ROOT %y = f32[256] all-to-all(%x), "
WRAPPED += f"{GROUPS}, dimensions={{0}}\n}}\n"


@pytest.mark.parametrize(
    ("instruction", "kind", "sent_bytes", "asynchronous"),
    [
        (f"%y = f32[256] all-to-all(%x), {GROUPS}, dimensions={{0}}", "all-to-all", KIB * 3 / 4, False),
        (f"%y = ((f32[256]), f32[256]) all-to-all-start(%x), {GROUPS}", "all-to-all", KIB * 3 / 4, True),
        (
            f'%y = ((f32[256]), f32[256]) all-to-all-start(%x), {GROUPS}, backend_config={{"is_sync":true}}',
            "all-to-all", KIB * 3 / 4, False,
        ),
        ("%y = ((f32[256]), f32[256], s32[]) async-start(%x), calls=%wrapped", "all-to-all", KIB * 3 / 4, True),
        (f"%y = f32[1024] all-gather(%x), {GROUPS}, dimensions={{0}}", "all-gather", KIB * 3, False),
        ("%y = f32[64] reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%wrapped",
            "reduce-scatter", KIB * 3 / 4, False),
        ("%y = f32[256] all-reduce-start(%x), replica_groups=[4,2]<=[2,4]T(1,0)", "all-reduce", KIB, True),
        (
            "%y = f32[256] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}",
            "all-reduce", KIB * 2 * 3 / 4, False,
        ),
        (
            "%y = (f32[256], f32[256], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            "collective-permute", KIB, True,
        ),
        (
            "%y = (f32[256], f32[256], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,0},{1,1}}",
            "collective-permute", 0, True,
        ),
    ],
)  # fmt: skip
def test_collectives_send_what_a_ring_would(instruction, kind, sent_bytes, asynchronous):
    found = module(X, instruction, computations=WRAPPED)
    *_, last = found.computations["main"].values()
    assert hlo.collective(found, "main", last) == hlo.Collective(kind, sent_bytes, asynchronous)


def test_what_is_no_collective_is_none():
    found = module(X, "%y = f32[256] negate(%x)", "%s = (f32[256], f32[256], u32[]) copy-start(%x)")
    assert [hlo.collective(found, "main", x) for x in found.computations["main"].values()] == [None] * 3


def test_groups_that_are_not_understood_are_told():
    found = module(X, "%y = f32[256] all-reduce(%x), replica_groups=what")
    with pytest.raises(ValueError, match="y has replica groups of an unknown form"):
        hlo.collective(found, "main", found.computations["main"]["y"])


def test_text_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        hlo.parse("HloModule test\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n")


@pytest.mark.parametrize("layers", [1, 3])
def test_a_real_program_has_the_flops_and_bytes_that_were_written(layers):
    mesh = build_mesh(MeshConfig(expert=4, tensor=2), jax.devices()[:8])

    def per_device(x_bD, w_LDD):
        def layer(x_bD, w_DD):
            return jax.lax.all_to_all(x_bD @ w_DD, "expert", 0, 0, tiled=True), None

        x_bD, _ = jax.lax.scan(layer, x_bD, w_LDD)
        return jax.lax.psum(x_bD.sum(), ("expert", "tensor"))

    def array(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    f = jax.shard_map(per_device, mesh=mesh, in_specs=(P(("expert", "tensor")), P()), out_specs=P())
    compiled = jax.jit(f).lower(array(128, 64, spec=P(("expert", "tensor"))), array(layers, 64, 64, spec=P())).compile()
    found = hlo.parse(compiled.as_text())
    assert found.computation_flops(found.entry) == layers * 2 * 16 * 64 * 64
    sent = {}

    def visit(computation, times):
        for x in found.computations[computation].values():
            if collective := hlo.collective(found, computation, x):
                sent[collective.kind] = sent.get(collective.kind, 0) + times * collective.sent_bytes
            if x.opcode == "while":
                visit(*x.called, times * found.trip_count(x))

    visit(found.entry, 1)
    assert sent == {"all-to-all": layers * 16 * 64 * 4 * 3 / 4, "all-reduce": 4 * 2 * 7 / 8}
