"""Traces written out by hand, of CPUs and of GPUs, are read into the events that they hold."""

import json

import jax
import pytest
from scripts import run_script

from moejax import hlo
from moejax.checks import ConfigError
from moejax.profiling.phases import Op, ops, phase_of
from moejax.profiling.trace import FACTS, Marker, read_trace

PROGRAM = """HloModule jit_step, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%p), metadata={op_name="jit(step)/shard_map/expert/neg"}
  %b = f32[8]{0} negate(%a), metadata={op_name="jit(step)/shard_map/expert/neg"}
  ROOT %c = f32[8]{0} negate(%b), metadata={op_name="jit(step)/shard_map/combine/neg"}
}

%body (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %copy.3 = f32[8]{0} copy(%q)
  %dot = f32[8]{0} negate(%copy.3), metadata={op_name="jit(step)/transpose(jvp(attention))/while/body/dot_general"}
  %bitcast = f32[8]{0} bitcast(%dot)
  ROOT %copy.4 = f32[8]{0} copy(%bitcast)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
  %all-to-all.1 = f32[8]{0} all-to-all(%fusion), replica_groups={{0,1}}, metadata={op_name="jit(step)/dispatch/a2a"}
  %copy.2 = f32[8]{0} copy(%all-to-all.1)
  ROOT %while = f32[8]{0} while(%copy.2), condition=%inner, body=%body
}
"""
STEP = Op("attention", backward=True, communication=False, container=False)


def line(name, events):
    """A line of an XPlane; events are (metadata id, start in ns, duration in ns, stats)."""
    text = "".join(
        f"events {{ metadata_id: {kind} offset_ps: {start * 1000} duration_ps: {duration * 1000} {stats} }} "
        for kind, start, duration, stats in events
    )
    return f'lines {{ name: "{name}" {text} }} '


def plane(name, event_names, stat_names, *lines):
    entries = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }} ' for i, n in event_names.items())
    entries += "".join(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }} ' for i, n in stat_names.items())
    return f'planes {{ name: "{name}" {"".join(lines)} {entries} }} '


STATS = {1: "hlo_op", 2: "device_ordinal", 3: "step_num", 4: "name", 5: "device_id"}


def op(name, device=None):
    ordinal = "" if device is None else f"stats {{ metadata_id: 2 int64_value: {device} }}"
    return f'stats {{ metadata_id: 1 str_value: "{name}" }} {ordinal}'


def scoped(name, path):
    return f'{op(name)} stats {{ metadata_id: 4 str_value: "{path}" }}'


def number(step):
    return f"stats {{ metadata_id: 3 int64_value: {step} }}"


def write(folder, text, steps=(7,)):
    """The directory of a trace."""
    run = folder / "plugins" / "profile" / "now"
    run.mkdir(parents=True)
    (run / "host.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    (folder / "program_0.txt").write_text(PROGRAM)
    facts = {"steps": [{"step": n, "program": "program_0.txt"} for n in steps]}
    (folder / FACTS).write_text(json.dumps(facts))
    return folder


def cpu_trace(folder):
    names = {1: "train", 2: "fusion", 3: "all-to-all.1", 4: "while", 5: "dot", 6: "Rendezvous", 7: "end: fusion"}
    ops = [
        (2, 110, 50, op("fusion", 0)),
        (3, 160, 40, op("all-to-all.1", 0)),
        (6, 160, 35, ""),
        (7, 159, 1, ""),
        (4, 200, 80, op("while", 1)),
        (5, 200, 30, op("dot", 1)),
    ]
    markers = [(1, 100, 200, number(7)), (1, 90, 5, "")]  # the second is somebody's own annotation
    return write(folder, plane("/host:CPU", names, STATS, line("python", markers), line("tf_XLAEigen/1", ops)))


def gpu_trace(folder):
    """Two streams: 100 ns of products, and of 80 ns of NCCL 30 behind them; a kernel that nothing names."""
    names = {1: "sm90_gemm", 2: "ncclDevKernel_AllGather_RING_LL", 3: "memcpy32"}
    compute = [(1, 1000, 100, op("dot")), (3, 1200, 10, "")]
    nccl = [(2, 1070, 80, op("all-to-all.1"))]
    repeated = [(1, 1000, 100, op("dot"))]
    lines = line("Stream #13(Compute)", compute), line("Stream #14(Memcpy)", nccl), line("XLA Ops", repeated)
    host = plane("/host:CPU", {1: "train"}, STATS, line("python", [(1, 950, 300, number(7))]))
    return write(folder, plane("/device:GPU:0", names, STATS, *lines) + host)


def foreign_gpu_trace(folder):
    """As JAX wrote it on an MI300X of eight, of a program that is not at hand; and copies as XLA writes NVIDIA's."""
    names = {1: "Cijk_Ailk_Bljk_BBS", 2: "__amd_rocclr_copyBuffer.kd", 3: "ncclDevKernel_Generic_1", 4: "MemcpyP2P"}
    names |= {5: "MemcpyD2H", 6: "loop_convert_fusion.kd", 7: "train", 8: "hipExtModuleLaunchKernel"}
    kernels = [
        (1, 1000, 100, scoped("custom-call.1", "jit(step)/transpose(jvp(attention))/dot_general")),
        (6, 1100, 50, scoped("loop_convert_fusion", "jit(f)/convert_element_type")),
        (5, 1150, 5, scoped("while.3", "jit(step)/pipeline/while")),
    ]
    copies = [
        (2, 1000, 20, ""),
        (3, 1020, 30, op("psum.2")),
        (2, 1085, 10, op("all_gather.2")),
        (4, 1050, 30, scoped("fusion.7", "jit(step)/dispatch/mul")),
    ]
    device = line("Stream #16(Kernel)", kernels), line("Stream #17(MemcpyP2P,Kernel)", copies)
    launched = f"{op('custom-call.1')} stats {{ metadata_id: 5 int64_value: 768 }}"
    host = line("python", [(7, 900, 300, number(7))]), line("Host Threads/2356", [(8, 950, 10, launched)])
    cpu = line("tf_XLAEigen/1", [(6, 950, 10, op("loop_convert_fusion", 0))])  # a program of the host's own
    planes = (
        plane("/device:GPU:0", names, STATS, *device),
        plane("/device:GPU:1", names, STATS),
        plane("/host:CPU", names, STATS, *host, cpu),
    )
    run = write(folder, "".join(planes))
    (run / FACTS).unlink()
    return run


def tpu_trace(folder):
    """As JAX wrote it on a v6e, but for the loop: a core does one thing at a time, others go on beside it."""
    names = {
        1: "%while = f32[8]{0:T(128)} while(f32[8]{0} %copy.2), condition=%inner, body=%body",
        2: "%dot = f32[8]{0:T(8,128)S(5)} negate(f32[8]{0} %q)",
        3: "%all-reduce = (f32[8]{0:T(128)}, f32[4]{0}) all-reduce(f32[8]{0} %a, f32[4]{0} %b), channel_id=1",
        4: "%all-gather-start.2 = (f32[4]{0}, f32[8]{0}) all-gather-start(f32[4]{0} %a), channel_id=1",
        5: "%all-gather-done.2 = f32[8]{0} all-gather-done((f32[4]{0}, f32[8]{0}) %all-gather-start.2)",
        6: "%copy-start.1 = (f32[8]{0:T(8,128)S(5)}, f32[8]{0}, u32[]{:S(2)}) copy-start(f32[8]{0} %a)",
        7: "jit_step(9646411105960254074)",
        8: "barrier-cores",
        9: "train",
    }
    core = [(1, 1000, 200, ""), (2, 1000, 90, ""), (3, 1100, 40, ""), (4, 1140, 1, ""), (5, 1180, 20, "")]
    beside = [(4, 1140, 60, ""), (6, 1000, 300, "")]
    lines = line("XLA Modules", [(7, 1000, 250, "")]), line("XLA Ops", core), line("Async XLA Ops", beside)
    device = plane("/device:TPU:2", names, STATS, *lines, line("XLA TraceMe", [(8, 1000, 100, "")]))
    return write(folder, device + plane("/host:CPU", names, STATS, line("python", [(9, 900, 400, number(7))])))


def test_the_innermost_scope_is_the_phase():
    assert phase_of("jit(step)/shard_map/pipeline/while/body/attention/dot_general") == "attention"
    assert phase_of("jit(step)/transpose(jvp(gather))/expert/checkpoint/mul") == "expert"
    assert phase_of("jit(step)/dispatch/jit(_take)/gather") == "dispatch"  # the operation, not the phase
    assert phase_of("jit(step)/transpose(jvp(gather))/reduce_scatter") == "gather"
    assert phase_of("jit(step)/gathering/mul") is None
    assert phase_of("") is None
    assert phase_of("jit(step)/(loss/psum:shard_map/route/psum:reduce_sum:transpose(jvp(route))/psum)") == "route"


def test_operations_of_a_program():
    found = ops(hlo.parse(PROGRAM))
    assert found["fusion"] == Op("expert", False, False, False)  # two of three parts
    assert found["all-to-all.1"] == Op("dispatch", False, True, False)
    assert found["copy.2"] == Op("dispatch", False, False, False)  # as what feeds it
    assert found["copy.3"].phase is None  # fed from outside
    assert found["copy.4"] == STEP
    assert found["while"].container
    assert found["dot"] == STEP


def test_a_cpu_trace(tmp_path):
    trace = read_trace(cpu_trace(tmp_path))
    assert trace.platform == "cpu"
    assert trace.steps == [Marker(7, 0, 200)]
    found = [(e.device, e.name, e.start_ns, e.end_ns, e.phase, e.backward, e.communication) for e in trace.events]
    assert found == [
        ("CPU 0", "fusion", 10, 60, "expert", False, False),
        ("CPU 0", "all-to-all.1", 60, 100, "dispatch", False, True),
        ("CPU 1", "dot", 100, 130, "attention", True, False),  # the loop is its body
    ]


def test_a_gpu_trace(tmp_path):
    trace = read_trace(gpu_trace(tmp_path))
    assert trace.platform == "gpu"
    found = [(e.device, e.line, e.start_ns, e.duration_ns, e.phase, e.communication) for e in trace.events]
    assert found == [
        ("GPU 0", "Stream #13(Compute)", 50, 100, "attention", False),
        ("GPU 0", "Stream #13(Compute)", 250, 10, None, False),
        ("GPU 0", "Stream #14(Memcpy)", 120, 80, "dispatch", True),
    ]


def test_a_gpu_trace_without_its_program(tmp_path):
    """Phases come from the events' own scopes, communication from names; a launch is the host's own affair."""
    trace = read_trace(foreign_gpu_trace(tmp_path))
    assert trace.platform == "gpu"
    found = [(e.device, e.name, e.start_ns, e.phase, e.backward, e.communication) for e in trace.events]
    assert found == [
        ("GPU 0", "Cijk_Ailk_Bljk_BBS", 100, "attention", True, False),
        ("GPU 0", "loop_convert_fusion.kd", 200, None, False, False),
        ("GPU 0", "MemcpyD2H", 250, "pipeline", False, False),
        ("GPU 0", "__amd_rocclr_copyBuffer.kd", 100, None, False, False),
        ("GPU 0", "ncclDevKernel_Generic_1", 120, None, False, True),
        ("GPU 0", "__amd_rocclr_copyBuffer.kd", 185, None, False, True),
        ("GPU 0", "MemcpyP2P", 150, "dispatch", False, True),
    ]


def test_a_tpu_trace(tmp_path):
    trace = read_trace(tpu_trace(tmp_path))
    assert trace.platform == "tpu"
    found = [(e.device, e.line, e.name, e.start_ns, e.duration_ns, e.phase, e.communication) for e in trace.events]
    assert found == [
        ("TPU 2", "XLA Ops", "dot", 100, 90, "attention", False),  # the loop is its body
        ("TPU 2", "XLA Ops", "all-reduce", 200, 40, None, True),
        ("TPU 2", "XLA Ops", "all-gather-start.2", 240, 1, None, True),
        ("TPU 2", "XLA Ops", "all-gather-done.2", 280, 20, None, True),
        ("TPU 2", "Async XLA Ops", "all-gather-start.2", 240, 60, None, True),
    ]


def test_another_steps_program_says_nothing(tmp_path):
    folder = gpu_trace(tmp_path)
    (folder / FACTS).write_text('{"steps": [{"step": 6, "program": "program_0.txt"}]}')
    events = read_trace(folder).events
    assert {event.phase for event in events} == {None}
    assert [event.communication for event in events] == [False, False, True]  # by the kernel's name


def test_what_is_no_trace_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"has no plugins/profile/\*/\*.xplane.pb; give a directory"):
        read_trace(tmp_path)
    with pytest.raises(ConfigError, match="has no operations of a CPU, GPU or TPU"):
        read_trace(write(tmp_path, plane("/host:CPU", {}, {}, line("python", []))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not what moejax"),
        ('{"steps": 5}', "is not what moejax"),
        ('{"steps": [{"step": 6}]}', "is not what moejax"),
    ],
)
def test_facts_that_are_none_are_one_line(text, message, tmp_path):
    folder = cpu_trace(tmp_path)
    (folder / FACTS).write_text(text)
    with pytest.raises(ConfigError, match=rf"capture\.json {message}.*; copy the trace's whole directory$"):
        read_trace(folder)


def test_a_trace_that_lacks_a_part_is_one_line(tmp_path):
    folder = cpu_trace(tmp_path)
    (folder / "program_0.txt").unlink()
    with pytest.raises(ConfigError, match=r"program_0\.txt is not there, which .*capture\.json names; copy"):
        read_trace(folder)
    (folder / FACTS).unlink()
    file = folder / "plugins" / "profile" / "now" / "host.xplane.pb"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ConfigError, match=r"host\.xplane\.pb is no whole trace \(.*\); copy it again"):
        read_trace(folder)


def test_the_script_ends_with_the_figures(tmp_path):
    """80 ns of NCCL, of which 30 run behind 100 ns of products; 10 ns of a kernel without a name; a step of 300 ns."""
    out = tmp_path / "out"
    done = run_script("read_trace", gpu_trace(tmp_path / "trace"), f"--out={out}")
    figures = done.figures
    assert json.loads((out / "report.json").read_text()) == figures
    assert (out / "report.md").read_text() in done.stdout
    assert (out / "timeline.png").stat().st_size > 10_000
    usage = figures["devices"]["GPU 0"]
    assert usage == figures["mean"]
    names = ("window", "compute", "communication", "exposed", "idle")
    assert [round(1e6 * usage[f"{name}_ms"]) for name in names] == [300, 110, 80, 50, 140]
    assert {name: round(1e6 * ms) for name, ms in usage["phases"].items() if ms} == {
        "attention": 100, "dispatch": 50, "no phase": 10,
    }  # fmt: skip
    assert figures["longest"][0] == {
        "name": "sm90_gemm", "phase": "attention", "communication": False, "times": 1, "total_ms": 1e-4,
    }  # fmt: skip


def test_the_script_takes_the_last_trace_of_a_run(tmp_path):
    for step, made in ((7, "2026_11_02_10_00_00"), (6, "2026_11_01_10_00_00")):
        files = gpu_trace(tmp_path / "profiles" / f"step_{step}") / "plugins" / "profile"
        (files / "now").rename(files / made)
    (tmp_path / "profiles" / "step_9").mkdir()  # a trace that was never written
    run_script("read_trace", tmp_path, "--nopicture")
    assert {path.parent.name for path in tmp_path.rglob("report.json")} == {"step_7"}
    assert not list(tmp_path.rglob("timeline.png"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("read_trace", ["a", "b"], "a b is given as TRACE; give one directory of a trace, or of a run"),
        ("read_trace", ["/nowhere"], "/nowhere has no plugins/profile"),
        ("memory", ["--json=/"], "--json=/ is a folder; give a file"),
        ("train", ["--profile_steps=5:5"], "--profile_steps=5:5 must be FIRST:END with 1 <= FIRST < END"),
        ("train", ["--profile_steps="], "--profile_steps= must be FIRST:END with 1 <= FIRST < END"),
    ],
)
def test_wrong_requests_are_one_line(name, arguments, message):
    assert run_script(name, *arguments, status=2).error.startswith(message)
