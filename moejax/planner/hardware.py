"""Devices and clusters: what they can do at most, what was measured on them, and who says so.

Every figure is a `Constant`, a float that knows its kind: "datasheet" (what the maker says), "published" (somebody's
measurement), "calibrated" (measured on the device at hand by experiments/calibrate.py) or "assumed" (a guess, from a
similar device). Bandwidths are one way, in bytes a second and device; FLOP/s are dense.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from moejax.checks import ConfigError, check, check_types, expand
from moejax.mesh import MeshConfig, hardware_of_kind

Kind = Literal["datasheet", "published", "calibrated", "assumed"]


class Constant(float):
    """A float with where it comes from."""

    kind: Kind
    source: str

    def __new__(cls, value: float, kind: Kind, source: str) -> Constant:
        self = super().__new__(cls, value)
        check(kind in get_args(Kind), f"kind={kind!r} must be one of {', '.join(get_args(Kind))}")
        self.kind, self.source = kind, source
        return self

    def __repr__(self) -> str:
        return f"{float(self):g} ({self.kind}: {self.source})"


def _sheet(value: float, source: str) -> Constant:
    return Constant(value, "datasheet", source)


def _published(value: float, source: str) -> Constant:
    return Constant(value, "published", source)


def _assumed(value: float, source: str) -> Constant:
    return Constant(value, "assumed", source)


@dataclasses.dataclass(frozen=True)
class Link:
    """How fast a device sends to others: a message of n bytes takes `latency_s + n / bytes_per_s` seconds.

    `bytes_per_s` is what collectives achieve, `peak_bytes_per_s` what the wire can.
    """

    peak_bytes_per_s: Constant
    bytes_per_s: Constant
    latency_s: Constant


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    `peak_flops` is bfloat16's, `matmul_flops` what a large bfloat16 product reaches; `copy_bytes_per_s` what a large
    copy reaches, reads and writes both counted. `float8_flops` is 0 where the device has no such units.
    `reserved_bytes` of the memory are the runtime's. `launch_s` is what an operation costs however small it is.
    """

    name: str
    peak_flops: Constant
    matmul_flops: Constant
    float8_flops: Constant
    memory_bytes: Constant
    reserved_bytes: Constant
    memory_bytes_per_s: Constant
    copy_bytes_per_s: Constant
    inside: Link
    across: Link
    devices_per_host: int
    launch_s: Constant

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes - self.reserved_bytes


_GB = 1e9
_RESERVED_GPU = _assumed(1.5 * _GB, "CUDA context, NCCL buffers and libraries of one process")
_RESERVED_TPU = _assumed(0.3 * _GB, "runtime and program")
_LAUNCH_GPU = _assumed(4e-6, "a kernel's start, as profilers show")
_LAUNCH_TPU = _assumed(1e-6, "a fusion's start")
_NCCL = "fit of NCCL tests on 8 GPUs of one host, the total buffer of a rank"
_MAMF = "largest matmul rate found over shapes, bf16: S. Bekman, Machine Learning Engineering, compute/accelerator"
_FRACTION_MATMUL = 0.81  # of the datasheet, as on H100: 798 of 989


def _matmul(peak: float) -> Constant:
    return _assumed(_FRACTION_MATMUL * peak, "the fraction of its peak that an H100 reaches, 0.81")


def _copy(peak: float) -> Constant:
    return _assumed(0.9 * peak, "the fraction of its peak that an H100 reaches, 0.9")


def _across_gpu(peak: float, source: str) -> Link:
    return Link(_sheet(peak, source), _assumed(0.8 * peak, "0.8 of the wire"), _assumed(20e-6, "network and NCCL"))


def _gpu(
    name: str,
    *,
    teraflops: float,
    float8_teraflops: float,
    gigabytes: float,
    memory_gbps: float,
    inside: Link,
    across_gbps: float,
    source: str,
    matmul: Constant | None = None,
    copy: Constant | None = None,
    per_host: int = 8,
) -> Device:
    return Device(
        name=name,
        peak_flops=_sheet(teraflops * 1e12, source),
        matmul_flops=matmul or _matmul(teraflops * 1e12),
        float8_flops=_sheet(float8_teraflops * 1e12, source),
        memory_bytes=_sheet(gigabytes * _GB, source),
        reserved_bytes=_RESERVED_GPU,
        memory_bytes_per_s=_sheet(memory_gbps * _GB, source),
        copy_bytes_per_s=copy or _copy(memory_gbps * _GB),
        inside=inside,
        across=_across_gpu(across_gbps * _GB, f"{source}, one network card a GPU"),
        devices_per_host=per_host,
        launch_s=_LAUNCH_GPU,
    )


def _nvlink(peak: float, achieved: Constant, latency: Constant, source: str) -> Link:
    return Link(_sheet(peak * _GB, source), achieved, latency)


def _tpu(
    name: str,
    *,
    teraflops: float,
    gigabytes: float,
    memory_gbps: float,
    inside_gbps: float,
    across_gbps: float,
    devices_per_host: int,
    source: str,
) -> Device:
    """A slice's links are as fast between its hosts as inside one; `across` is between slices."""
    return Device(
        name=name,
        peak_flops=_sheet(teraflops * 1e12, source),
        matmul_flops=_assumed(0.9 * teraflops * 1e12, "a systolic array keeps near its peak on large products"),
        float8_flops=_sheet(0.0, "not counted"),
        memory_bytes=_sheet(gigabytes * _GB, source),
        reserved_bytes=_RESERVED_TPU,
        memory_bytes_per_s=_sheet(memory_gbps * _GB, source),
        copy_bytes_per_s=_copy(memory_gbps * _GB),
        inside=Link(
            _sheet(inside_gbps * _GB, source),
            _assumed(0.7 * inside_gbps * _GB, "0.7 of the links"),
            _assumed(5e-6, "a hop and a semaphore"),
        ),
        across=Link(
            _sheet(across_gbps * _GB, source),
            _assumed(0.8 * across_gbps * _GB, "0.8 of the wire"),
            _assumed(30e-6, "data-center network"),
        ),
        devices_per_host=devices_per_host,
        launch_s=_LAUNCH_TPU,
    )


def _devices() -> dict[str, Device]:
    a100_link = _nvlink(300, _published(172 * _GB, _NCCL), _published(14.8e-6, _NCCL), "NVLink 3")
    h100_link = _nvlink(450, _published(274 * _GB, _NCCL), _published(9.4e-6, _NCCL), "NVLink 4")
    h200_link = _nvlink(450, _published(273 * _GB, _NCCL), _published(9.3e-6, _NCCL), "NVLink 4")
    b200_link = _nvlink(900, _published(483 * _GB, _NCCL), _published(13.0e-6, _NCCL), "NVLink 5")
    mi250x_link = _nvlink(
        50, _assumed(35 * _GB, "0.7 of a link"), _assumed(15e-6, "RCCL as NCCL"), "Infinity Fabric, the slowest pair"
    )
    mi300x_link = _nvlink(448, _assumed(0.6 * 448 * _GB, "as NCCL on H100"), _assumed(15e-6, "RCCL as NCCL"), "xGMI")
    a100: dict[str, Any] = {"teraflops": 312, "float8_teraflops": 0, "inside": a100_link, "across_gbps": 25}
    found = (
        _gpu(
            "a100_40gb", **a100, gigabytes=40, memory_gbps=1555, source="NVIDIA A100 40GB SXM",
            matmul=_published(271.2e12, _MAMF),
        ),
        _gpu(
            "a100_64gb", **a100, gigabytes=64, memory_gbps=1640, source="NVIDIA A100 64GB, custom for CINECA Leonardo",
            matmul=_published(240e12, "design of the reference cluster: achievable bf16"),
        ),
        _gpu(
            "a100_80gb", **a100, gigabytes=80, memory_gbps=2039, source="NVIDIA A100 80GB SXM",
            matmul=_published(271.2e12, _MAMF),
        ),
        _gpu(
            "h100", teraflops=989, float8_teraflops=1979, gigabytes=80, memory_gbps=3350, inside=h100_link,
            across_gbps=50, source="NVIDIA H100 SXM",
            matmul=_published(798e12, "measured on one H100, a large product of random data"),
            copy=_published(3.0e12, "measured on one H100, device to device"),
        ),
        _gpu(
            "h100_96gb", teraflops=989, float8_teraflops=1979, gigabytes=96, memory_gbps=2400, inside=h100_link,
            across_gbps=50, source="NVIDIA H100 96GB, 500 W, as torchtitan's benchmarks describe theirs",
        ),
        _gpu(
            "h200", teraflops=989, float8_teraflops=1979, gigabytes=141, memory_gbps=4800, inside=h200_link,
            across_gbps=50, source="NVIDIA H200 SXM",
            matmul=_published(794.5e12, _MAMF),
        ),
        _gpu(
            "b200", teraflops=2250, float8_teraflops=4500, gigabytes=180, memory_gbps=7700, inside=b200_link,
            across_gbps=100, source="NVIDIA B200",
            matmul=_published(1745.0e12, _MAMF),
        ),
        _gpu(
            "b300", teraflops=2250, float8_teraflops=4500, gigabytes=288, memory_gbps=8000, inside=b200_link,
            across_gbps=100, source="NVIDIA B300",
            matmul=_published(1769.0e12, _MAMF),
        ),
        _gpu(
            "gb200", teraflops=2500, float8_teraflops=5000, gigabytes=186, memory_gbps=8000, inside=b200_link,
            across_gbps=50, source="NVIDIA GB200 NVL72: one NVLink domain is a host here", per_host=72,
            matmul=_published(1822.0e12, _MAMF),
        ),
        _gpu(
            "gb300", teraflops=2500, float8_teraflops=5000, gigabytes=279, memory_gbps=8000, inside=b200_link,
            across_gbps=100, source="NVIDIA GB300 NVL72: one NVLink domain is a host here", per_host=72,
            matmul=_assumed(1822e12, "as GB200"),
        ),
        _gpu(
            "mi250x_gcd", teraflops=191.5, float8_teraflops=0, gigabytes=64, memory_gbps=1600, inside=mi250x_link,
            across_gbps=12.5, source="AMD MI250X, one of two dies",
        ),
        _gpu(
            "mi300x", teraflops=1307, float8_teraflops=2615, gigabytes=192, memory_gbps=5300, inside=mi300x_link,
            across_gbps=50, source="AMD MI300X",
            matmul=_published(668.4e12, _MAMF),
        ),
        _tpu(
            "tpu_v4", teraflops=275, gigabytes=32, memory_gbps=1200, inside_gbps=6 * 45, across_gbps=6.25,
            devices_per_host=4, source="Google TPU v4",
        ),
        _tpu(
            "tpu_v5e", teraflops=197, gigabytes=16, memory_gbps=810, inside_gbps=4 * 45, across_gbps=6.25,
            devices_per_host=8, source="Google TPU v5e",
        ),
        _tpu(
            "tpu_v5p", teraflops=459, gigabytes=95, memory_gbps=2765, inside_gbps=600, across_gbps=6.25,
            devices_per_host=4, source="Google TPU v5p",
        ),
        _tpu(
            "tpu_v6e", teraflops=918, gigabytes=32, memory_gbps=1638, inside_gbps=400, across_gbps=12.5,
            devices_per_host=4, source="Google TPU v6e",
        ),
        _tpu(
            "tpu7x", teraflops=2307, gigabytes=192, memory_gbps=7380, inside_gbps=600, across_gbps=12.5,
            devices_per_host=4, source="Google TPU7x",
        ),
    )  # fmt: skip
    return {device.name: device for device in (_virtual_cpu(), *found)}


def _virtual_cpu() -> Device:
    """One of 16 virtual devices of two cores: of use for comparisons of layouts, and once it is calibrated."""
    source = "a sixteenth of two cores of a shared machine; run experiments/calibrate.py"
    memory = Link(_assumed(1e9, source), _assumed(0.3e9, source), _assumed(1e-3, "virtual devices wait for each other"))
    return Device(
        name="cpu",
        peak_flops=_assumed(10e9, source),
        matmul_flops=_assumed(7e9, source),
        float8_flops=_assumed(0.0, "none"),
        memory_bytes=_assumed(1.5 * _GB, source),
        reserved_bytes=_assumed(0.05 * _GB, "the interpreter's part"),
        memory_bytes_per_s=_assumed(1.2e9, source),
        copy_bytes_per_s=_assumed(1e9, source),
        inside=memory,
        across=memory,
        devices_per_host=16,
        launch_s=_assumed(30e-6, "a thunk of XLA:CPU and its share of waiting"),
    )


DEVICES = _devices()
_MAY_BE_0 = ("launch_s", "float8_flops")


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in DEVICES:
        raise ConfigError(f"hardware={name!r} has no figures; use one of {', '.join(DEVICES)}")
    return DEVICES[name]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`hosts` of `devices_per_host` equal devices; in a TPU slice the links between hosts are those inside."""

    name: str
    device: Device
    hosts: int
    devices_per_host: int

    def __post_init__(self) -> None:
        check_types(self)
        check(self.hosts > 0, f"hosts={self.hosts} must be positive")
        check(self.devices_per_host > 0, f"devices_per_host={self.devices_per_host} must be positive")

    @classmethod
    def of_mesh(cls, name: str, mesh: MeshConfig) -> Cluster:
        """The devices that a mesh of named hardware takes.

        Raises:
          ConfigError: the hardware has no figures, or is "custom".
        """
        return cls(name, get_device(mesh.hardware), mesh.hosts, mesh.num_devices // mesh.hosts)

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices_per_host

    @property
    def one_network(self) -> bool:
        """Whether devices of different hosts are as near as those of one."""
        return self.hosts == 1 or self.device.name.startswith("tpu")


def load_calibration(path: str | Path, device: Device) -> Device:
    """Returns the device with the figures that experiments/calibrate.py wrote to `path` in place of its own.

    Raises:
      ConfigError: the file cannot be read or is something else, was measured on another device, or has a figure that
        devices do not have or that is not a number above 0.
    """
    file = expand(path, "calibration")
    check(file.is_file() or not file.exists(), f"calibration={path} is not a regular file")  # a pipe may never end
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no text, or no JSON
        raise ConfigError(f"calibration={path} cannot be read ({error}); give what calibrate.py --out wrote") from None
    written = isinstance(saved, dict) and {"figures", "device", "date"} <= saved.keys()
    check(written, f"calibration={path} has no figures, device and date; give what calibrate.py --out wrote")
    measured = hardware_of_kind(str(saved["device"]))
    check(
        measured in (None, device.name) or device.name not in DEVICES,
        f"calibration={path} was measured on {saved['device']!r}, which is {measured}, not {device.name}",
    )
    return _replaced(device, saved["figures"], f"{saved['device']}, {saved['date']}", f"calibration={path}: figures")


def _replaced(target: Any, figures: Any, source: str, path: str) -> Any:
    """Returns a `Device` or `Link` with these figures; `path` says in messages where they are."""
    check(isinstance(figures, dict), f"{path}={figures!r:.80} must be an object of figures")
    own = {name: value for name, value in vars(target).items() if isinstance(value, Constant | Link)}
    changes = {}
    for name, value in figures.items():
        check(name in own, f"{path}.{name} does not exist; use one of {', '.join(sorted(own))}")
        if isinstance(own[name], Link):
            changes[name] = _replaced(own[name], value, source, f"{path}.{name}")
            continue
        least = 0 if name in _MAY_BE_0 else sys.float_info.min
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(
            number and least <= value <= sys.float_info.max,
            f"{path}.{name}={value!r:.80} must be a finite number {'of 0 or more' if least == 0 else 'above 0'}",
        )
        changes[name] = Constant(value, "calibrated", source)
    return dataclasses.replace(target, **changes)
