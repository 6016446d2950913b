"""Seconds of a single matrix product and a single collective on a device, under stated assumptions.

`moejax.planner.time` adds them up to a step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

from moejax.planner.hardware import Device
from moejax.planner.work import Collective, Matmul

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "float4": 0.5625}
_WIDE_TPUS = ("tpu_v6e", "tpu7x")  # units of 256 × 256
_FLOAT4 = ("b200", "b300", "gb200", "gb300")  # devices with float4 units, twice as fast as float8


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is not known of a run, each with its source. Spreads are relative, one way.

    Attributes:
      tile: rows and columns that a GPU's kernel works on at once; half a tile is lost at an edge on average (NVIDIA,
        "Matrix multiplication background", tile quantization). A TPU's is its unit, 128 or, from v6e, 256 wide.
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
      float8: rate of float8 products, as a fraction of the datasheet's, before `sustained`: 0.71 on H100, 0.76 on B200,
        0.72 on GB200 (S. Bekman, Machine Learning Engineering, compute/accelerator). Casts are counted apart.
      float32: rate of float32 products against bfloat16 (TF32).
      large_link: fraction of the wire that collectives of 64 MB and more reach inside a host: 371 of 450 GB/s, an
        all-to-all of 470 MB between 8 H100 (arXiv 2603.07685, table 7).
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
    float8: float = 0.73
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
    near: tuple[float, float, float]  # bytes/s of small and of large collectives, seconds
    far: tuple[float, float]
    peer: float
    torus: int  # dims, 0 for a switch


@functools.lru_cache(maxsize=256)
def rates(device: Device, assumptions: Assumptions) -> Rates:
    """What products, memory operations and collectives run at on the device."""
    tpu, cpu = device.name.startswith("tpu"), device.name == "cpu"
    plain = float(device.matmul_flops)
    float8 = max(plain, device.float8_flops * assumptions.float8)
    flops = {
        "bfloat16": plain,
        "float16": plain,
        "float32": plain if cpu else plain * assumptions.float32,
        "float8": float8,
        "float4": max(plain, 2 * device.float8_flops * assumptions.float8) if device.name in _FLOAT4 else float8,
    }
    unit = 256.0 if device.name in _WIDE_TPUS else 16.0 if cpu else 128.0
    waves = not (tpu or cpu)
    fitted, large = float(device.inside.bytes_per_s), assumptions.large_link * float(device.inside.peak_bytes_per_s)
    return Rates(
        tpu=tpu,
        tile=assumptions.tile if waves else unit,
        depth=assumptions.depth if waves else unit / 2,
        half_wave=assumptions.cores / 2 if waves else 0.0,
        grouped={"expert": assumptions.grouped if waves else 1.0, "attention": assumptions.attention},
        flops={name: value * assumptions.sustained for name, value in flops.items()},
        copy=float(device.copy_bytes_per_s),
        launch=float(device.launch_s),
        near=(fitted, max(large - fitted, 0.0), float(device.inside.latency_s)),
        far=(float(device.across.bytes_per_s), float(device.across.latency_s)),
        peer=assumptions.peer_s,
        torus=0 if not tpu else 3 if device.name in ("tpu_v4", "tpu_v5p", "tpu7x") else 2,
    )


def matmul_efficiency(m: float, n: float, k: float, groups: float, rate: Rates) -> float:
    """Part of a large product's rate that `groups` products [m, k] × [k, n] reach, in (0, 1), rising in each of them.

    Half a tile is lost at each edge of m and n, `depth` terms at the start of each tile, and on a GPU half a wave of
    tiles at the end.
    """
    tile = rate.tile
    edge_m, edge_n = m + tile / 2, n + tile / 2
    tiles = groups * edge_m * edge_n / (tile * tile)
    return m / edge_m * n / edge_n * k / (k + rate.depth) * tiles / (tiles + rate.half_wave)


def matmul_bytes(item: Matmul) -> float:
    """Bytes that one of the entry's `times` reads and writes at least.

    Grouped products of the phase "attention" are those of a fused kernel, whose scores never reach memory.
    """
    m, n, k, groups = item.m, item.n, item.k, item.groups
    elements = k * n + m * min(k, n) if groups > 1 and item.phase == "attention" else m * k + k * n + m * n
    return elements * groups * _BYTES[item.dtype]


def matmul_seconds(item: Matmul, rate: Rates) -> tuple[float, float]:
    """Seconds that one of the entry's `times` computes, and that it moves bytes: it takes the longer of the two, and a
    launch. See the module's docstring.
    """
    m, n, k, groups = item.m, item.n, item.k, item.groups
    if m <= 0 or n <= 0 or k <= 0 or groups <= 0:
        return 0.0, 0.0
    flops_per_s = rate.flops[item.dtype] * matmul_efficiency(m, n, k, groups, rate)
    if groups > 1:
        flops_per_s *= rate.grouped.get(item.phase, 1.0)
    return 2.0 * m * n * k * groups / flops_per_s, matmul_bytes(item) / rate.copy


def _bandwidth(rate: Rates, size: float) -> float:
    """Inside a host, of a collective of `size` bytes: the fitted line's, rising to that of large ones."""
    return rate.near[0] + rate.near[1] * size / (size + 64e6)


def collective_seconds(item: Collective, span: tuple[int, int], rate: Rates) -> float:
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
