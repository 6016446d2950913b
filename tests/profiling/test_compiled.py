"""What a compiled step does is what its program says."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax.config import ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.profiling.compiled import CompiledCounts, compiled_counts

MODEL, LAYOUT = ModelConfig(num_experts=16), Layout(MeshConfig(hardware="h100"), 64, 2)
LOOP = 'backend_config={"known_trip_count":{"n":"5"}}'
GATHER = 'metadata={op_name="jit(step)/jvp(pipeline)/while/body/gather/all_gather"}'
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints='
TEXT = f"""HloModule step, is_scheduled=true

%body (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16] parameter(0)
  %half = bf16[8,16] convert(%x)
  %w = bf16[32,16] all-gather(%half), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, {GATHER}
  %half.y = bf16[32,16] all-gather(%half), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %sum = f32[8,16] all-reduce(%x), replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  %alone = f32[8,16] all-reduce(%x), replica_groups={{{{0}},{{1}},{{2}},{{3}}}}, to_apply=%add
  %q = bf16[2,64,4,32] custom-call(%x), {KERNEL}{{bf16[2,64,4,32]{{3,2,1,0}}}}, metadata={{op_name="mha_forward"}}
  %r = f32[8,2] custom-call(%x), {KERNEL}{{f32[8,16]{{1,0}}, f32[16,16]{{1,0}}}}, metadata={{op_name="top_k_routing"}}
  %g = f32[8,4] custom-call(%x), {KERNEL}{{s32[9]{{0}}, f32[8,16]{{1,0}}, f32[16,16,4]{{2,1,0}}}}, metadata={{op_name="grouped_matmul_forward"}}
  %d = f32[8,16,4] custom-call(%x), {KERNEL}{{s32[9]{{0}}, f32[8,16]{{1,0}}, f32[8,4]{{1,0}}}}, metadata={{op_name="grouped_matmul_drhs"}}
}}

ENTRY %main () -> f32[8,16] {{
  %z = f32[8,16] parameter(0)
  %loop = f32[8,16] while(%z), condition=%body, body=%body, {LOOP}
}}
"""  # noqa: E501


def test_a_text_by_hand():
    compiled = SimpleNamespace(as_text=lambda: TEXT, memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=7))
    attention = 2 * (2 * 64 * 4 * 32) * 64
    router, grouped = 2 * 8 * 16 * 16, 2 * (2 * 8 * 16 * 4)
    gathered = 3 * 2 * 8 * 16
    assert compiled_counts(compiled, MODEL, LAYOUT) == CompiledCounts(
        flops=5 * (attention + router + grouped),
        sent_bytes={"all_gather": 5 * 2 * gathered, "all_reduce": 5 * 4 * 8 * 16},
        written_bytes={"all_gather": 5 * (2 + 1) * gathered, "all_reduce": 5 * 4 * 8 * 16},
        asynchronous={"all_gather": 0, "all_reduce": 0},
        peak_bytes=7,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pipeline", "kept", "all axes", "split experts", "replicas"])
def test_the_reference_model_compiled_for_h100s(case):
    found = None
    with contextlib.suppress(ModuleNotFoundError):  # of the package that the plugin would be in
        found = importlib.util.find_spec("jax_plugins.xla_cuda13")
    assert found, "jax_plugins.xla_cuda13 is missing, which compiles for H100 anywhere; pip install 'moejax[aot]'"
    here = Path(__file__).parent
    script = [sys.executable, here / "compiled_ahead_of_time.py", case]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    pairs = report["pairs"]
    everything = sum(counted for name, (counted, _) in pairs.items() if name != "flops")
    for name, (counted, compiled) in pairs.items():
        allowed = 0.01 * counted
        if name == "all_reduce":  # sums of the parts of a microbatch are added up before they are sent
            assert compiled < counted + allowed
            allowed = 0.01 * everything
        assert abs(compiled - counted) < allowed, name
