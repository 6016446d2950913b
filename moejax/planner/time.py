"""How long a step takes: every entry of its `Work` in seconds, what overlaps taken off, as an interval.

    placement = Placement.of(mesh_config)
    time = predict_time(work, cluster, placement, step=Step(tokens=tokens, model_flops=flops, bubble=1 / 9))
    print(time.expected, time.by_category, time.mfu, time.dominant)

A matrix product runs at the rate that the device reaches on large ones, times an efficiency in (0, 1] that falls
smoothly where a dimension is small (`product_efficiency`), and never faster than memory delivers its operands. A sweep
runs at the bandwidth of a copy. A collective takes α + β·bytes on the links that it uses (`transfer_seconds`). What can
run behind computation is hidden up to the fractions of `Assumptions`, and costs a part of itself in return, for it
takes cores and bandwidth from what it hides behind.

The interval adds in squares what the step gains or loses when each uncertain assumption alone moves by its stated
spread; `StepTime.dominant` names the largest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moejax.config import check
from moejax.mesh import MeshConfig
from moejax.planner.hardware import Cluster, Device
from moejax.planner.work import Product, Sweep, Transfer

CATEGORIES = ("compute", "memory", "communication", "bubble", "optimizer", "host")
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "float4": 0.5625}
_WIDE_TPUS = ("tpu_v6e", "tpu7x")  # units of 256 × 256
_FLOAT4 = ("b200", "b300", "gb200", "gb300")  # devices with float4 units, twice as fast as float8
_PIPELINED = frozenset(("attention", "route", "dispatch", "expert", "combine", "pipeline"))
_ROUTED = frozenset(("dispatch", "expert", "combine"))


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is not known of a run, each with its source. Spreads are relative, one way.

    Attributes:
      tile: rows and columns that a GPU's kernel works on at once; half a tile is lost at an edge on average (NVIDIA,
        "Matrix multiplication background", tile quantisation). A TPU's is its unit, 128 or, from v6e, 256 wide.
      depth: terms of a sum before a tile's start and end are paid off on a GPU; 64 gives attention with heads of 128
        0.65 of the rate of a large product, as FlashAttention-3 (arXiv 2407.08608, fig. 5) has in its forward pass on
        H100. On a TPU the unit's width: shorter sums leave a part of it empty.
      cores: cores of a GPU that take a tile each; half a wave is lost at the end on average (108 on A100, 132 on H100).
      grouped: rate of a grouped product against one plain product of the same shapes: tokamax's records on H100 for
        Mixtral's shape are 649 TFLOP/s forward and 390 to 595 for the weights' gradients, 590 over the three passes of
        798.
      attention: rate of a fused attention's products against plain ones of the same efficiency.
      sustained: rate over a whole step against that of a product by itself, for power and clocks, and for kernels that
        are not the best one for each shape. Chosen on published dense runs (experiments/results/planner_accuracy.md).
      float8: rate of float8 products, as a fraction of the datasheet's, before `sustained`: 0.75 gives H100 1.86 times
        bfloat16's measured rate, casts counted apart.
      float32: rate of float32 products against bfloat16 (TF32).
      large_link: fraction of the wire that transfers of 64 MB and more reach inside a host: 371 of 450 GB/s, all-to-all
        of 470 MB between 8 H100 (arXiv 2603.07685, table 7).
      peer_s: seconds an all-to-all needs for each further peer that it sends to, as NCCL's tests show on small buffers.
      gather_hidden: part of the gathers of parameters and the sums of their gradients that runs behind computation.
      exchange_hidden: part of dispatch and combine that does so when work is cut in many parts; with n parts (n-1)/n
        of it. experiments/results/overlap.md: 12 of 16 exchanges hold matrix work in two parts.
      tensor_hidden: the same for the tensor axis, whose collectives wait for the products before them.
      stage_hidden: the same for what pipeline stages hand each other.
      contention: seconds that computation loses for each hidden second of communication on a GPU, whose collectives
        take cores: 20 of 132 (DeepSeek-V3, arXiv 2412.19437, section 3.2.2). None on a TPU.
    """

    tile: float = 128.0
    depth: float = 64.0
    cores: float = 132.0
    grouped: float = 590 / 798
    attention: float = 1.0
    sustained: float = 0.8
    float8: float = 0.75
    float32: float = 0.5
    large_link: float = 371 / 450
    peer_s: float = 1.0e-6
    gather_hidden: float = 0.9
    exchange_hidden: float = 0.9
    tensor_hidden: float = 0.0
    stage_hidden: float = 0.5
    contention: float = 0.15
    matmul_spread: float = 0.12
    memory_spread: float = 0.15
    link_spread: float = 0.25
    overlap_spread: float = 0.3
    load_spread: float = 0.1


@dataclasses.dataclass(frozen=True)
class Step:
    """What the list of work does not say of its step.

    Attributes:
      tokens: of the step, over all devices.
      model_flops: matrix FLOPs of the step over all devices, without rematerialisation, causal attention halved.
      bubble: part of the pipeline's ticks in which a stage has nothing to do.
      bubble_counted: whether the entries' `times` include those ticks (computed, as on accelerators) or not.
      parts: independent parts whose exchanges can run behind each other's products: batch_split × chunks.
      load: tokens of the busiest device's experts over the mean, for expert work whose size follows the load.
      rounds: mean rounds of a dropless dispatch.
      host_s: seconds that the host takes to start the operations of the step; 0 where one program holds them all.
      host_waits: part of the shorter of host's and device's time that is not hidden behind the longer, because the host
        waits for results (sizes of buffers) before it can go on.
    """

    tokens: float = 0.0
    model_flops: float = 0.0
    bubble: float = 0.0
    bubble_counted: bool = True
    parts: int = 1
    load: float = 1.0
    rounds: float = 1.0
    host_s: float = 0.0
    host_waits: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.bubble < 1, f"bubble={self.bubble} must be at least 0 and below 1")
        check(self.load >= 1, f"load={self.load} must be 1 or more: the busiest over the mean")
        check(self.rounds >= 1, f"rounds={self.rounds} must be 1 or more")
        check(self.parts >= 1, f"parts={self.parts} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the devices of an axis stand: axis -> (size, hosts that it crosses)."""

    axes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, mesh: MeshConfig) -> Placement:
        """As `moejax.mesh.build_mesh` places devices: `host_axis` and replicas leave a host."""
        return cls({axis: (n, mesh.hosts_along(axis)) for axis, n in mesh.shape.items()})

    def span(self, axes: Iterable[str], num_devices: int) -> tuple[int, int]:
        """(devices inside one host, hosts) of a group along `axes`; an axis that is not there stays inside."""
        hosts = 1
        for axis in axes:
            if axis in self.axes:
                hosts *= self.axes[axis][1]
        hosts = min(hosts, num_devices)
        return max(num_devices // hosts, 1), hosts


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step: `expected` within `low` and `high`, and what they are spent on.

    `by_phase` (the phases of the work, "bubble" and "host") and `by_category` each add up to `expected`.
    `communication` is every transfer's time by phase, hidden or not. `mfu` counts model FLOPs, `hfu` executed ones,
    both against the device's datasheet peak. `spreads` are the seconds that each assumption moves the step by.
    """

    low: float
    expected: float
    high: float
    by_phase: dict[str, float]
    by_category: dict[str, float]
    communication: dict[str, float]
    spreads: dict[str, float]
    mfu: float
    hfu: float
    tokens_per_s_per_device: float
    tokens_per_ms: float

    @property
    def dominant(self) -> str:
        """The assumption that moves the step most."""
        return max(self.spreads, key=self.spreads.__getitem__)

    @property
    def busy(self) -> float:
        """Part of the step in which the device computes what is wanted: not waiting, not in a bubble."""
        idle = sum(self.by_category[name] for name in ("communication", "bubble", "host"))
        return 1 - idle / self.expected if self.expected else 0.0


class Rates(NamedTuple):
    """A device's figures under assumptions, as plain floats."""

    tpu: bool
    tile: float
    depth: float
    half_wave: float
    grouped: dict[str, float]  # by phase
    flops: dict[str, float]
    copy: float
    launch: float
    near: tuple[float, float, float]  # bytes/s of small and of large transfers, seconds
    far: tuple[float, float]
    peer: float
    torus: int  # dims, 0 for a switch


@functools.lru_cache(maxsize=256)
def rates(device: Device, assumptions: Assumptions) -> Rates:
    """What products, sweeps and transfers run at on the device."""
    tpu = device.name.startswith("tpu")
    plain = float(device.matmul_flops)
    float8 = max(plain, device.float8_flops * assumptions.float8)
    flops = {
        "bfloat16": plain,
        "float16": plain,
        "float32": plain * assumptions.float32,
        "float8": float8,
        "float4": max(plain, 2 * device.float8_flops * assumptions.float8) if device.name in _FLOAT4 else float8,
    }
    unit = 256.0 if device.name in _WIDE_TPUS else 128.0
    fitted, large = float(device.inside.bytes_per_s), assumptions.large_link * float(device.inside.peak_bytes_per_s)
    return Rates(
        tpu=tpu,
        tile=unit if tpu else assumptions.tile,
        depth=unit / 2 if tpu else assumptions.depth,
        half_wave=0.0 if tpu else assumptions.cores / 2,
        grouped={"expert": 1.0 if tpu else assumptions.grouped, "attention": assumptions.attention},
        flops={name: value * assumptions.sustained for name, value in flops.items()},
        copy=float(device.copy_bytes_per_s),
        launch=float(device.launch_s),
        near=(fitted, max(large - fitted, 0.0), float(device.inside.latency_s)),
        far=(float(device.across.bytes_per_s), float(device.across.latency_s)),
        peer=assumptions.peer_s,
        torus=0 if not tpu else 3 if device.name in ("tpu_v4", "tpu_v5p", "tpu7x") else 2,
    )


def product_efficiency(m: float, n: float, k: float, groups: float, rate: Rates) -> float:
    """Part of a large product's rate that `groups` products [m, k] × [k, n] reach, in (0, 1), rising in each of them.

    Half a tile is lost at each edge of m and n, `depth` terms at the start of each tile, and on a GPU half a wave of
    tiles at the end.
    """
    tile = rate.tile
    edge_m, edge_n = m + tile / 2, n + tile / 2
    tiles = groups * edge_m * edge_n / (tile * tile)
    return m / edge_m * n / edge_n * k / (k + rate.depth) * tiles / (tiles + rate.half_wave)


def product_bytes(item: Product) -> float:
    """Bytes that one of the entry's `times` reads and writes at least.

    Grouped products of the phase "attention" are those of a fused kernel, whose scores never reach memory.
    """
    m, n, k, groups = item.m, item.n, item.k, item.groups
    elements = k * n + m * min(k, n) if groups > 1 and item.phase == "attention" else m * k + k * n + m * n
    return elements * groups * _BYTES[item.dtype]


def product_seconds(item: Product, rate: Rates) -> float:
    """Seconds of one of the entry's `times`, its launch included; see the module's docstring."""
    m, n, k, groups = item.m, item.n, item.k, item.groups
    if m <= 0 or n <= 0 or k <= 0 or groups <= 0:
        return 0.0
    flops_per_s = rate.flops[item.dtype] * product_efficiency(m, n, k, groups, rate)
    if groups > 1:
        flops_per_s *= rate.grouped.get(item.phase, 1.0)
    return max(2.0 * m * n * k * groups / flops_per_s, product_bytes(item) / rate.copy) + rate.launch


def _bandwidth(rate: Rates, size: float) -> float:
    """Inside a host, of a transfer of `size` bytes: the fitted line's, rising to that of large ones."""
    return rate.near[0] + rate.near[1] * size / (size + 64e6)


def transfer_seconds(item: Transfer, span: tuple[int, int], rate: Rates) -> float:
    """Seconds of one of the entry's `times`, alone on its links, between `span`: (devices inside a host, hosts).

    all_to_all: each device sends 1/n of its operand to each other, over both links at once; what leaves a host goes
    over the device's own network card. With `item.hosts` > 1 two hops, one after the other: inside the host, then
    across, with the same bytes there in fewer and larger messages. On a torus the bytes take several hops, a quarter of
    a ring's length in each of its dims.
    all_gather, reduce_scatter: rings that use every link of the group; a host takes in what it lacks once, over the
    cards of all of the group's devices that are in it. all_reduce moves twice as much. ppermute: one message.
    """
    n, size, kind = item.num_devices, item.operand_bytes, item.kind
    if n <= 1 or size <= 0:
        return 0.0
    inside, hosts = span
    far, far_latency = rate.far
    latency = rate.near[2] if inside > 1 else 0.0
    if kind == "all_to_all":
        latency += far_latency if hosts > 1 else 0.0
        near = _bandwidth(rate, size)
        if rate.torus:
            near /= max(1.0, rate.torus * inside ** (1 / rate.torus) / 4)
        far_s = size * (hosts - 1) / hosts / far
        if item.hosts > 1 and hosts > 1:
            return latency + size * (inside - 1) / inside / near + far_s + rate.peer * (inside + hosts - 2)
        return latency + max(size * (inside - 1) / n / near, far_s) + rate.peer * (n - 1)
    if kind == "ppermute":
        if hosts > 1:
            return latency + far_latency + size / far
        return latency + size / _bandwidth(rate, size)
    total = size * n if kind == "all_gather" else size
    seconds = total * (n - 1) / n / _bandwidth(rate, total) if inside > 1 else 0.0
    if hosts > 1:
        latency += far_latency * math.log2(2 * hosts)
        seconds = max(seconds, total * (hosts - 1) / hosts / (inside * far))
    return (2 if kind == "all_reduce" else 1) * seconds + latency


# Which fraction of `Assumptions` says how much of a phase's transfers is hidden; all others' is the tensor axis's.
_CLASSES = {
    "gather": "gather",
    "optimizer": "gather",
    "dispatch": "exchange",
    "combine": "exchange",
    "pipeline": "stage",
}


def _hidden(seconds: Mapping[str, float], cover: float, parts: int, assumptions: Assumptions) -> dict[str, float]:
    """Seconds of each class of transfers that run behind `cover` seconds of computation, which they share in turn."""
    fractions = (
        ("gather", assumptions.gather_hidden),
        ("exchange", assumptions.exchange_hidden * (1 - 1 / parts)),
        ("stage", assumptions.stage_hidden),
        ("tensor", assumptions.tensor_hidden),
    )
    hidden = {}
    for name, fraction in fractions:
        hidden[name] = min(fraction * seconds[name], cover)
        cover -= hidden[name]
    return hidden


def predict_time(
    work: Iterable[Product | Transfer | Sweep],
    cluster: Cluster,
    placement: Placement,
    assumptions: Assumptions = Assumptions(),
    *,
    step: Step = Step(),
) -> StepTime:
    """The time of one step in which a device of `cluster` does `work`.

    `placement` says which axes of the transfers leave a host. `step` says what the list does not; without it there is
    no bubble, nothing to hide exchanges behind, balanced load, and throughput and MFU are 0.
    """
    rate = rates(cluster.device, assumptions)
    routed = step.load * step.rounds
    compute: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    raw: dict[str, float] = defaultdict(float)
    executed = wasted = optimizer = 0.0
    for item in work:
        phase, kind = item.phase, type(item)
        factor = item.times * routed if phase in _ROUTED else item.times
        if kind is Product:
            compute[phase] += factor * product_seconds(item, rate)
            flops = 2.0 * item.m * item.n * item.k * item.groups * item.times
            executed += flops
            if phase in _PIPELINED:
                wasted += flops
        elif kind is Sweep:
            seconds = factor * (item.moved_bytes / rate.copy + rate.launch)
            if phase == "optimizer":
                optimizer += seconds
            else:
                memory[phase] += seconds
        else:
            n = item.num_devices
            span = (n, 1) if cluster.one_network else placement.span(item.axes, n)
            raw[phase] += factor * transfer_seconds(item, span, rate)
    executed -= wasted * step.bubble if step.bubble_counted else 0.0
    return _assemble(compute, memory, raw, optimizer, executed, cluster, assumptions, step)


def _assemble(
    compute: dict[str, float],
    memory: dict[str, float],
    raw: dict[str, float],
    optimizer: float,
    executed: float,
    cluster: Cluster,
    assumptions: Assumptions,
    step: Step,
) -> StepTime:
    """Takes off what overlaps, adds the bubble, and moves each assumption by its spread."""
    totals = dict.fromkeys(("gather", "exchange", "stage", "tensor"), 0.0)
    for phase, seconds in raw.items():
        totals[_CLASSES.get(phase, "tensor")] += seconds
    compute_s, memory_s = sum(compute.values()), sum(memory.values())
    hidden = _hidden(totals, compute_s + memory_s, step.parts, assumptions)
    hidden_s, total_s = sum(hidden.values()), sum(totals.values())
    cost = 0.0 if cluster.device.name.startswith("tpu") else assumptions.contention * hidden_s
    exposed = {name: 1 - hidden[name] / totals[name] if totals[name] else 1.0 for name in totals}

    by_phase: dict[str, float] = {}
    for amounts in (compute, memory):
        for phase, seconds in amounts.items():
            by_phase[phase] = by_phase.get(phase, 0.0) + seconds
    share = cost / hidden_s if hidden_s else 0.0
    for phase, seconds in raw.items():
        part = exposed[_CLASSES.get(phase, "tensor")]
        by_phase[phase] = by_phase.get(phase, 0.0) + seconds * (part + share * (1 - part))
    if optimizer:
        by_phase["optimizer"] = by_phase.get("optimizer", 0.0) + optimizer

    # A bubble that is counted is a part of every pipelined entry; one that is not is as many ticks more.
    pipelined = sum(seconds for phase, seconds in by_phase.items() if phase in _PIPELINED)
    bubble = pipelined * (step.bubble if step.bubble_counted else step.bubble / (1 - step.bubble))
    kept = 1.0
    if bubble and step.bubble_counted:
        for phase in _PIPELINED & by_phase.keys():
            by_phase[phase] *= 1 - step.bubble
        exposed_all = total_s - hidden_s + cost
        kept = 1 - bubble / (compute_s + memory_s + exposed_all)
    by_phase["bubble"] = bubble
    running = compute_s + memory_s + total_s - hidden_s + cost
    host = max(step.host_s - running, 0.0) + step.host_waits * min(step.host_s, running)
    if host:
        by_phase["host"] = host
    by_category = {
        "host": host,
        "compute": compute_s * kept,
        "memory": memory_s * kept,
        "communication": (total_s - hidden_s + cost) * kept,
        "bubble": bubble,
        "optimizer": optimizer,
    }
    expected = sum(by_category.values())
    stretch = 1 + (0.0 if step.bubble_counted else bubble / pipelined if pipelined else 0.0)
    spreads = _spreads(
        compute, compute_s, memory_s + optimizer, total_s - hidden_s, hidden_s, stretch, assumptions, step
    )
    half = math.sqrt(sum(seconds * seconds for seconds in spreads.values()))
    devices, peak = cluster.num_devices, float(cluster.device.peak_flops)
    per_s = 1 / expected if expected else 0.0
    return StepTime(
        low=expected * expected / (expected + half) if expected else 0.0,
        expected=expected,
        high=expected + half,
        by_phase=by_phase,
        by_category=by_category,
        communication=dict(raw),
        spreads=spreads,
        mfu=step.model_flops / devices * per_s / peak,
        hfu=executed * per_s / peak,
        tokens_per_s_per_device=step.tokens / devices * per_s,
        tokens_per_ms=step.tokens * per_s / 1e3,
    )


def _spreads(
    compute: dict[str, float],
    compute_s: float,
    memory_s: float,
    exposed_s: float,
    hidden_s: float,
    stretch: float,
    assumptions: Assumptions,
    step: Step,
) -> dict[str, float]:
    """Seconds that the step moves by when one assumption alone moves by its spread."""
    expert_s = compute.get("expert", 0.0) if step.load > 1 or step.rounds > 1 else 0.0
    return {
        "rate of matrix products": assumptions.matmul_spread * compute_s * stretch,
        "memory bandwidth": assumptions.memory_spread * memory_s * stretch,
        "bandwidth of links": assumptions.link_spread * exposed_s * stretch,
        "overlap": assumptions.overlap_spread * hidden_s * stretch,
        "load of experts": assumptions.load_spread * expert_s * stretch,
    }
