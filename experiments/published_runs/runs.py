"""Reads a published run: its hardware, layout and measurements, as people write them in tables.

    run = parse_run({"model": "Qwen3-30B-A3B", "hardware": "H100 2x8", "layout": "TP1 PP1 EP16 DP16", ...})

Layouts are words in any order: "TP1 PP4 VP2 EP8", "FSDP16 full remat", "vLLM TP4 isl1024 osl8192 conc4". What is not
understood is kept in `Run.unknown` and changes nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from experiments.published_runs.architecture import Architecture
from experiments.published_runs.models import find_architecture
from moejax.checks import ConfigError, check
from moejax.planner.hardware import Cluster, Constant, Device, get_device

Recompute = Literal["none", "selective", "half", "minimal", "custom", "full"]
System = Literal["megatron", "torch", "jax"]
Engine = Literal["vllm", "trtllm", "sglang"]
_DEGREES = {  # what a number is called -> what it is
    "tp": "tp", "pp": "pp", "cp": "cp", "dp": "dp", "ep": "ep", "etp": "etp", "vpp": "vp", "vp": "vp", "fsdp": "fsdp",
    "hsdp": "fsdp", "ga": "ga", "isl": "isl", "input": "isl", "osl": "osl", "output": "osl", "concurrency": "conc",
    "conc": "conc", "c": "conc", "batch": "conc", "bs": "conc", "cap": "cap", "capacity": "cap", "mbs": "mbs",
}  # fmt: skip
_DEGREE = re.compile(rf"(?<![a-z0-9])({'|'.join(_DEGREES)})[ =:_-]?(\d+(?:\.\d+)?)(?![a-z])")
_DEVICES = (  # pattern -> device; the first that matches
    (r"gb300", "gb300"), (r"gb200", "gb200"), (r"b300", "b300"), (r"b200", "b200"), (r"h200", "h200"),
    (r"h100.{0,12}96\s*gb", "h100_96gb"), (r"h[18]00", "h100"), (r"a100.{0,12}40\s*gb", "a100_40gb"),
    (r"a100.{0,12}64\s*gb", "a100_64gb"), (r"a100", "a100_80gb"), (r"mi300", "mi300x"), (r"mi250", "mi250x_gcd"),
    (r"v6e|trillium", "tpu_v6e"), (r"v5p", "tpu_v5p"), (r"v5e|v5\s?lite", "tpu_v5e"), (r"v4", "tpu_v4"),
    (r"tpu\s?v?7|ironwood", "tpu7x"),
)  # fmt: skip
_WATTS = {"h100": 700, "h100_96gb": 700, "h200": 700, "a100_80gb": 400, "b200": 1000}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, its degrees of parallelism resolved; 0 and "" stand for what its table does not say.

    `sharded` says that parameters are stored in shards (FSDP), not only the optimizer's state. `deduplicated` tokens
    travel once to a device however many of its experts they visit. `dense_dispatch` moves tokens by one-hot products.
    `captured` is the part of the operations that CUDA graphs start, so that the host need not.
    """

    identifier: str
    model: Architecture
    cluster: Cluster
    dtype: str
    system: System
    inference: bool
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vp: int = 1
    fsdp: int = 0
    gbs: int = 1
    mbs: int = 1
    seq: int = 0
    sharded: bool = False
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    offload: bool = False
    capacity: float = 0.0
    dense_dispatch: bool = False
    deduplicated: bool = False
    balanced: bool = False
    overlapped: bool = False
    tensor_overlap: bool = False
    compiled: bool = True
    captured: float = 0.0
    small_gradients: bool = False
    predicts_more: bool = True
    isl: int = 0
    osl: int = 0
    concurrency: int = 1
    engine: Engine = "vllm"
    unknown: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        return self.cluster.num_devices

    @property
    def dp(self) -> int:
        return max(1, self.devices // (self.tp * self.pp * self.cp))

    @property
    def shards(self) -> int:
        """Devices that share one copy of stored parameters and optimizer state."""
        return min(self.fsdp or self.dp * self.cp, self.dp * self.cp)

    @property
    def microbatches(self) -> int:
        return max(1, round(self.gbs / (self.mbs * self.dp)))


def number(text: object) -> float | None:
    """The first number in a cell: "4096?" is 4096, "<65" is 65, an empty cell nothing."""
    found = re.search(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?", str(text or ""))
    return float(found[0].replace(",", "")) if found else None


def parse_device(text: str) -> Device:
    """The device that a text names, its memory, bandwidth and power as the text says.

    A lower power limit slows matrix products by the square root of its share: between the cube root that a clock's
    power law gives and proportion, which is what remains when voltage cannot fall.

    Raises:
      ConfigError: no device of that name has figures.
    """
    lower = text.lower()
    names = [name for pattern, name in _DEVICES if re.search(pattern, lower)]
    if not names:
        raise ConfigError(f"hardware={text!r} names no device with figures, such as H100, B200 or TPU v5p")
    device = get_device(names[0])
    changes: dict[str, Any] = {}
    bandwidth = re.search(r"([\d.]+)\s*tb/s", lower)
    if bandwidth:
        stated = Constant(float(bandwidth[1]) * 1e12, "published", text)
        copy = Constant(0.9 * stated, "assumed", "0.9 of what the run's table states")
        changes |= {"memory_bytes_per_s": stated, "copy_bytes_per_s": copy}
    watts = re.search(r"(\d{3,4})\s*w\b", lower)
    if watts and names[0] in _WATTS:
        share = min(1.0, float(watts[1]) / _WATTS[names[0]])
        changes["matmul_flops"] = Constant(device.matmul_flops * share**0.5, "assumed", f"{text}: power limit")
        changes["float8_flops"] = Constant(device.float8_flops * share**0.5, "assumed", f"{text}: power limit")
    return dataclasses.replace(device, **changes)


def parse_cluster(hardware: str, devices: int | None) -> Cluster:
    """The cluster of that many devices; without `devices`, a count in the text ("2x8", "v6e-256", "4x4") serves."""
    device = parse_device(hardware)
    if devices is None:
        grid = re.search(r"(\d+)\s*x\s*(\d+)(?:\s*x\s*(\d+))?", hardware)
        slice_of = re.search(r"v\d[a-z]*-(\d+)", hardware)
        if grid:
            devices = int(grid[1]) * int(grid[2]) * int(grid[3] or 1)
        elif slice_of:  # v4 and v5p count cores, two a chip
            devices = int(slice_of[1]) // (2 if device.name in ("tpu_v4", "tpu_v5p") else 1)
        else:
            raise ConfigError(f"hardware={hardware!r} and no column n: how many devices there were is not said")
    per_host = min(device.devices_per_host, devices)
    hosts = -(-devices // per_host)
    if devices % per_host:
        hosts = next(n for n in range(hosts, devices + 1) if devices % n == 0)
    return Cluster(hardware, device, hosts, devices // hosts)


def _dtype(text: str) -> str:
    lower = text.lower()
    if "fp4" in lower:
        return "float4"
    return "float8" if "fp8" in lower or "float8" in lower else "bfloat16"


def _recompute(words: str, system: System) -> tuple[Recompute, bool]:
    """(what is computed again, whether what is kept is kept in the host's memory)."""
    offload = "offload" in words
    if re.search(r"no[- ]?(remat|recompute|ac)\b", words):
        return "none", offload
    if "minimal" in words:
        return "minimal", offload
    if re.search(r"custom", words):
        return "custom", offload
    if re.search(r"\bsac\b|selective[- ]?(ac|op|activation)", words) and system == "torch":
        return "half", offload
    if re.search(r"sel(ective)?[- ]?(recompute|remat|ac|op|activation)?|\bsac\b", words):
        return "selective", offload
    if re.search(r"full[- _]?(recompute|remat|ac|activation)?|recompute|remat|\bac\b", words):
        return "full", offload
    return ("full" if system == "jax" else "none"), offload


_WORDS = (
    r"hybridep|deepep|forced?[- ]?balanc\w*|natural\w*|dropless|token[- ]?drop\w*|drop\w*|dense[- ]?dispatch|"
    r"no[- ]sp\b|sp\b|sequence[- ]parallel|balanced|"
    r"sel\w*|recompute\w*|remat|full|minimal\w*|custom|offload\w*|host|sac|ac|compile[d]?|flash\w*|cuda|graphs?|"
    r"overlap\w*|a2a|vllm|sglang|trt\w*|tensorrt\w*|megatron|maxtext|torchtitan|zero\S*|interleaved|1f1b|float8|fp8\w*|"
    r"bf16|performance|mtp|w/o|without|routing|async\s?tp|scan"
)


def _system(row: Mapping[str, str], cluster: Cluster, degrees: Mapping[str, float]) -> System:
    said = " ".join(str(row.get(key) or "") for key in ("kind", "layout", "source")).lower()
    if cluster.device.name.startswith("tpu") or "jax" in said or "maxtext" in said:
        return "jax"
    if "titan" in said or ("fsdp" in degrees and "megatron" not in said and "bridge" not in said):
        return "torch"
    return "megatron"


def _captured(words: str, device: str, nemo: bool) -> float:
    """NeMo's recipes with HybridEP capture their layers; those for NVL72 all but the experts."""
    if "graph" in words or (nemo and "hybridep" in words):
        return 1.0
    return 0.5 if nemo and device.startswith("gb") else 0.0


def _is_nemo(row: Mapping[str, str]) -> bool:
    source = f"{row.get('source') or ''} {row.get('layout') or ''}".lower()
    return any(name in source for name in ("bridge", "nemo", "model_verification"))


def parse_run(row: Mapping[str, str]) -> Run:
    """The run that a row of a table describes; its columns are those of measured_runs.csv.

    Raises:
      ConfigError: its model or hardware is not known, or its degrees do not fit its devices.
    """
    model = find_architecture(row.get("model") or "")
    count = number(row.get("n"))
    cluster = parse_cluster(row.get("hardware") or "", int(count) if count else None)
    layout = (row.get("layout") or "").lower()
    degrees = {_DEGREES[name]: float(value) for name, value in _DEGREE.findall(layout)}
    words = _DEGREE.sub(" ", layout)
    unknown = tuple(word for word in re.split(r"[\s+,;/|()-]+", re.sub(_WORDS, " ", words)) if word)
    inference = "infer" in (row.get("kind") or "").lower() or "isl" in degrees
    lengths = re.search(r"\b(\d{2,})\s?[x/]\s?(\d{2,})\b", words) if inference else None
    if lengths:  # "1024x8192": prompt and answer
        degrees = {"isl": float(lengths[1]), "osl": float(lengths[2])} | degrees
    whole = {key: max(1, int(value)) for key, value in degrees.items() if key != "cap"}
    tp, pp, cp, ep = (whole.get(key, 1) for key in ("tp", "pp", "cp", "ep"))
    system = _system(row, cluster, degrees)
    # Megatron-LM splits experts as it splits all else unless told not to; NeMo's recipes do not.
    split = ep > 1 and not inference and system == "megatron" and not _is_nemo(row)
    etp = whole.get("etp", tp if split and cluster.num_devices % (ep * tp * pp) == 0 else 1)
    for product, text in ((tp * pp * cp, f"tp {tp} × pp {pp} × cp {cp}"), (ep * etp * pp, f"ep {ep} × pp {pp}")):
        check(
            cluster.num_devices % product == 0,
            f"layout={row.get('layout')!r}: {text} must divide n={cluster.num_devices}",
        )
    dp = cluster.num_devices // (tp * pp * cp)
    mbs = number(row.get("mbs")) or whole.get("mbs", 0)
    gbs = number(row.get("gbs")) or dp * max(1, mbs) * whole.get("ga", 1)
    mbs = mbs or (max(1, gbs / dp / whole.get("ga", 1)) if system != "megatron" else 1)
    length = int(number(row.get("seq")) or 0)
    said = _said(row, words, system, cluster.device.name, tp)
    if model.expert_parameters and not inference:
        said["sequence_parallel"] = True  # Megatron refuses experts with a tensor axis otherwise
    return Run(
        identifier=row.get("id") or row.get("model") or "",
        model=model, cluster=cluster, system=system, inference=inference,
        dtype=_dtype(f"{row.get('dtype') or ''} {words if 'float8' in words or 'fp8' in words else ''}"),
        tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, vp=whole.get("vp", 1), fsdp=whole.get("fsdp", 0),
        gbs=int(gbs), mbs=int(mbs), seq=length or whole.get("isl", 0),
        isl=whole.get("isl", 0) or (length if inference else 0),
        osl=whole.get("osl", 0), concurrency=whole.get("conc", 1),
        capacity=degrees.get("cap", 0.0),
        unknown=unknown,
        **said,
    )  # fmt: skip


def _said(row: Mapping[str, str], words: str, system: System, device: str, tp: int) -> dict[str, Any]:
    """The fields of `Run` that words decide: the layout's, and the source's, which tells the framework."""
    source, nemo = f"{row.get('source') or ''} {words}".lower(), _is_nemo(row)
    check(
        not re.search(r"optim\w*[- ]offload", words),
        "layout keeps the optimizer in the host's memory: no figures for it",
    )
    recompute, offload = _recompute(words, system)
    asked = bool(re.search(r"\bsp\b|sequence", words)) and not re.search(r"no[- ]sp\b", words)
    return {
        "engine": "sglang" if "sglang" in words else "trtllm" if "trt" in words or "tensorrt" in words else "vllm",
        "sharded": "fsdp" in (row.get("layout") or "").lower() or "zero-3" in words or (system == "jax" and tp == 1),
        "recompute": recompute,
        "offload": offload,
        # Off in Megatron-LM unless asked for, on in what NeMo makes of it.
        "sequence_parallel": asked or ((nemo or system != "megatron") and not re.search(r"no[- ]sp\b", words)),
        "tensor_overlap": nemo or system == "jax" or "async" in words,
        "dense_dispatch": "dense" in words and "dispatch" in words,
        # NeMo's recipes send tokens with DeepEP or HybridEP; those that force balance are tuned, and overlap it too.
        "deduplicated": nemo or bool(re.search("hybridep|deepep", words)),
        "balanced": "balanc" in words or "drop" in words or "performance" in source,
        "overlapped": bool(re.search(r"overlap|hybridep.*forced", words)),
        "compiled": system != "torch" or "compile" in words,
        "captured": _captured(words, device, nemo),
        "small_gradients": nemo,
        "predicts_more": not re.search(r"(w/o|no|without) ?mtp", f"{words} {row.get('model')}".lower()),
    }
