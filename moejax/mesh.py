"""The device mesh: axis names, its configuration, and which devices stand where.

A mesh is expert × pipeline × tensor, with an outermost `replica` axis when there are more devices than one such mesh
takes. `moejax.sharding` says what each axis shards.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Final, Literal

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from moejax.checks import ConfigError, check, check_types, one_line
from moejax.compiler import Platform

REPLICA: Final = "replica"
EXPERT: Final = "expert"
PIPELINE: Final = "pipeline"
TENSOR: Final = "tensor"

_MAX_LISTED = 1024  # the largest number of hosts along an axis that a message suggests

HostAxis = Literal["replica", "expert", "pipeline", "tensor"]
Hardware = Literal[
    "cpu", "a100_40gb", "a100_64gb", "a100_80gb", "h100", "h100_96gb", "h200", "b200", "mi250x_gcd", "mi300x",
    "tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu7x", "custom",
]  # fmt: skip

# How devices name themselves (`jax.Device.device_kind`); the first pattern that is found counts.
_KINDS: tuple[tuple[str, Hardware], ...] = (
    (r"A100.*40GB", "a100_40gb"),
    (r"A100.*64GB", "a100_64gb"),
    (r"A100.*80GB", "a100_80gb"),
    (r"H100.*96GB|H100 NVL", "h100_96gb"),
    (r"H100", "h100"),
    (r"\bH200", "h200"),  # a GH200 is another device
    (r"\bB200", "b200"),
    (r"MI250X", "mi250x_gcd"),
    (r"MI300X", "mi300x"),
    (r"TPU v4$", "tpu_v4"),
    (r"TPU v5( lite|e)", "tpu_v5e"),
    (r"TPU v5p?$", "tpu_v5p"),
    (r"TPU v6( lite|e)", "tpu_v6e"),
    (r"TPU ?v?7x", "tpu7x"),
)
_PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh axes, the kind of device, and the axis that crosses hosts.

    `host_axis` is the one axis whose neighbors may stand in different hosts; every other axis stays inside one host.
    But for replicas: unless they are the `host_axis`, each takes hosts of its own, `hosts / replica` of them. `hosts`
    must divide accordingly. `hardware` names the devices; the planner has figures of each name, and "custom" is any
    other accelerator.
    """

    expert: int = 1  # size of the axis for the batch and the experts
    pipeline: int = 1  # size of the axis for consecutive layers
    tensor: int = 1  # size of the axis for heads and the sequence between attention blocks
    replica: int = 1  # whole copies of such a mesh
    hardware: Hardware = "cpu"  # kind of device
    hosts: int = 1  # hosts that the devices are in
    host_axis: HostAxis = "expert"  # the axis whose neighbors may be in different hosts

    def __post_init__(self) -> None:
        check_types(self)
        for name in (EXPERT, PIPELINE, TENSOR, REPLICA, "hosts"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value} must be positive")
        crossing, each = getattr(self, self.host_axis), 1 if self.host_axis == REPLICA else self.replica
        possible = [each * n for n in range(1, min(crossing, _MAX_LISTED) + 1) if crossing % n == 0]
        replicas = f"replica={each} × a divisor of " if each > 1 else ""
        relation = "must be" if each > 1 else "must divide"
        check(
            self.hosts == 1 or (self.hosts % each == 0 and crossing % (self.hosts // each) == 0),
            f"hosts={self.hosts} {relation} {replicas}{self.host_axis}={crossing}, the host_axis; "
            f"hosts can be {', '.join(map(str, [1, *possible] if each > 1 else possible))}",
        )

    @property
    def shape(self) -> dict[str, int]:
        """Axis name -> size, outermost first; `replica` only when there is more than one."""
        replica = {REPLICA: self.replica} if self.replica > 1 else {}
        return {**replica, EXPERT: self.expert, PIPELINE: self.pipeline, TENSOR: self.tensor}

    @property
    def platform(self) -> Platform:
        """What the devices are to XLA."""
        return "cpu" if self.hardware == "cpu" else "tpu" if self.hardware.startswith("tpu") else "gpu"

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.shape)

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape.values())

    def hosts_along(self, *axes: str) -> int:
        """Over how many hosts the devices along these axes stand, the other axes' positions held."""
        along: dict[str, int] = {self.host_axis: self.hosts}
        if self.host_axis != REPLICA and self.hosts > 1:
            along = {REPLICA: self.replica, self.host_axis: self.hosts // self.replica}
        return math.prod(along.get(axis, 1) for axis in axes)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes over which the batch is split."""
        return (REPLICA, EXPERT) if self.replica > 1 else (EXPERT,)


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Places `devices` (default: all that JAX found) on the mesh of `config`.

    Devices are taken by (process, id), so that consecutive ones share a host. Replicas are equal runs of them, and of
    each the runs that are its hosts become the outermost part of `host_axis`: no other axis crosses hosts.

    Raises:
      ConfigError: the devices are not the hardware that `config` names, or are too few or too many for it.
    """
    devices = find_devices(jax.devices) if devices is None else list(devices)
    _check_hardware(config, devices)
    if len(devices) != config.num_devices:
        raise ConfigError(_device_count_message(config, devices))
    processes = len({device.process_index for device in devices})
    check(
        config.hardware == "cpu" or processes % config.hosts == 0,
        f"mesh.hosts={config.hosts}, but the {len(devices)} devices are all of {_processes(processes)}; start one "
        "process per host, or use --mesh.hosts=1 if they share a host",
    )
    ordered = np.empty(len(devices), dtype=object)
    ordered[:] = sorted(devices, key=lambda device: (device.process_index, device.id))

    host_dim = config.axis_names.index(config.host_axis)
    outer = list(config.shape.values())[:1] if host_dim and REPLICA in config.shape else []
    crossed = config.hosts_along(config.host_axis)
    inside_host = list(config.shape.values())[len(outer) :]
    inside_host[host_dim - len(outer)] //= crossed
    grid = ordered.reshape(*outer, crossed, *inside_host)
    grid = np.moveaxis(grid, len(outer), host_dim).reshape(tuple(config.shape.values()))
    return Mesh(grid, config.axis_names, axis_types=(AxisType.Auto,) * grid.ndim)


def count_hosts(mesh: Mesh, axis: str) -> int:
    """Returns how many hosts the devices along an axis are in: how many processes, of which every host has one."""
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    return len({device.process_index for device in along})


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of `config` without devices: programs can be traced on it as they would be for its hardware."""
    device = AbstractDevice(device_kind=config.hardware, num_cores=None, platform=config.platform)
    names, sizes = config.axis_names, tuple(config.shape.values())
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), abstract_device=device)


def platform(mesh: Mesh | AbstractMesh) -> Platform:
    """What the mesh's devices are: "cpu", "gpu" or "tpu"."""
    return mesh.abstract_mesh.abstract_device.platform


def local_mesh_config(devices: Sequence[jax.Device] | None = None) -> MeshConfig:
    """Returns a mesh of all of this machine's devices, whatever they are. Without `devices`, starts JAX to find them.

    The expert axis takes the largest power of two that divides their number, because numbers of experts are multiples
    of powers of two; the other factor becomes replicas.
    """
    devices = find_devices(jax.local_devices) if devices is None else list(devices)
    expert = len(devices) & -len(devices)
    hardware: set[Hardware] = {_hardware(device) or "custom" for device in devices}
    return MeshConfig(
        expert=expert,
        replica=len(devices) // expert,
        hardware=hardware.pop() if len(hardware) == 1 else "custom",
    )


def find_devices(ask: Callable[[], list[jax.Device]]) -> list[jax.Device]:
    """Returns the devices of `jax.devices` or `jax.local_devices`, whichever `ask` is.

    Raises:
      ConfigError: JAX cannot start on the platform that it is to use.
    """
    try:
        return ask()
    except (AssertionError, RuntimeError) as error:  # an assertion: JAX has no plugin at all for JAX_PLATFORMS=cuda
        forced = os.environ.get("JAX_PLATFORMS")
        where = f"with JAX_PLATFORMS={forced}" if forced else "on this machine"
        why = f" ({one_line(error)})" if str(error) else ""
        extra = "tpu" if forced == "tpu" else "cuda"
        raise ConfigError(
            f'JAX finds no devices {where}{why}; install JAX for them (pip install -e ".[{extra}]"), or '
            f"{'unset JAX_PLATFORMS' if forced else 'set JAX_PLATFORMS=cpu'}"
        ) from error


def _hardware(device: jax.Device) -> Hardware | None:
    """Returns the name of what the device is, or None for an accelerator that has no name here."""
    if device.platform == "cpu":
        return "cpu"
    return hardware_of_kind(device.device_kind)


def hardware_of_kind(device_kind: str) -> Hardware | None:
    """Returns the name of the hardware whose devices call themselves `device_kind`, or None if it has none here."""
    if device_kind == "cpu":
        return "cpu"
    return next((name for pattern, name in _KINDS if re.search(pattern, device_kind)), None)


def _check_hardware(config: MeshConfig, devices: Sequence[jax.Device]) -> None:
    """Refuses devices that are known to be something else than `config.hardware`."""
    for device in devices:
        found, name = _PLATFORMS.get(device.platform, device.platform), _hardware(device)
        if config.hardware == "custom" and found != "cpu":
            continue
        if found == config.platform and name in (config.hardware, None):
            continue
        have = f"{len(devices)} {found} device{'s' * (len(devices) > 1)}"
        if found == "cpu":
            extra = "tpu" if config.platform == "tpu" else "cuda"
            plugin = "the ROCm plugin of JAX" if config.hardware.startswith("mi") else f'pip install -e ".[{extra}]"'
            forced = os.environ.get("JAX_PLATFORMS")
            first = f"unset JAX_PLATFORMS={forced}" if forced else f"install JAX for it ({plugin})"
            fix = f"{first}, or use --mesh.hardware=cpu"
        else:
            have += f" ({device.device_kind})"
            fix = f"use --mesh.hardware={name or 'custom'}, or --mesh=local for the devices of this machine"
        raise ConfigError(f"hardware={config.hardware} is not what JAX found, {have}; {fix}")


def _device_count_message(config: MeshConfig, devices: Sequence[jax.Device]) -> str:
    sizes = " × ".join(f"{name}={size}" for name, size in config.shape.items())
    have, needed = len(devices), config.num_devices
    others = needed // config.expert
    on_cpu = all(device.platform == "cpu" for device in devices)
    if have == 1:
        fix = f"for one device use --mesh={'single' if on_cpu else 'local'}"
    elif have % others == 0:
        fix = f"for {have} devices use expert={have // others}"
    else:
        fix = f"for {have} devices use sizes whose product is {have}, such as expert={have} with the others 1"
    if on_cpu:
        fix += f", or for {needed} virtual CPU devices call moejax.use_virtual_devices({needed}) first"
    return f"mesh {sizes} needs {needed} device{'s' * (needed > 1)} but there {_count(have)}; {fix}"


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _count(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"
