import dataclasses
from typing import get_args

import jax
import numpy as np
import pytest

from moejax.checks import ConfigError
from moejax.config import DispatchConfig, ModelConfig
from moejax.layout import check_experts
from moejax.mesh import (
    EXPERT,
    PIPELINE,
    REPLICA,
    TENSOR,
    Hardware,
    MeshConfig,
    abstract_mesh,
    build_mesh,
    local_mesh_config,
    platform,
)


def hosts_of(mesh):
    return np.vectorize(lambda device: device.process_index)(mesh.devices)


def test_shape_leaves_out_a_single_replica():
    config = MeshConfig(expert=4, pipeline=2, tensor=2)
    assert config.shape == {EXPERT: 4, PIPELINE: 2, TENSOR: 2}
    assert config.axis_names == (EXPERT, PIPELINE, TENSOR)
    assert config.batch_axes == (EXPERT,)
    assert config.num_devices == 16


def test_replica_is_outermost_and_splits_the_batch():
    config = MeshConfig(expert=4, pipeline=1, tensor=2, replica=2)
    assert config.axis_names == (REPLICA, EXPERT, PIPELINE, TENSOR)
    assert config.batch_axes == (REPLICA, EXPERT)
    assert build_mesh(config).shape == {REPLICA: 2, EXPERT: 4, PIPELINE: 1, TENSOR: 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert": 0}, "expert=0 must be positive"),
        ({"pipeline": -1}, "pipeline=-1 must be positive"),
        ({"tensor": 0}, "tensor=0 must be positive"),
        ({"replica": 0}, "replica=0 must be positive"),
        ({"hosts": 0}, "hosts=0 must be positive"),
        ({"hardware": "abacus"}, "hardware='abacus' must be one of 'cpu', "),
        ({"host_axis": "layers"}, "host_axis='layers' must be one of 'replica', 'expert', "),
        ({"expert": 4, "hosts": 3}, "hosts=3 must divide expert=4, the host_axis; hosts can be 1, 2, 4"),
        ({"expert": 4, "hosts": 2, "host_axis": "tensor"}, "hosts=2 must divide tensor=1"),
        ({"expert": 4, "replica": 2, "hosts": 3}, "hosts=3 must be replica=2 × a divisor of expert=4, the host_axis"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ConfigError) as error:
        MeshConfig(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_host_is_row_major_and_automatic():
    mesh = build_mesh(MeshConfig(expert=4, pipeline=2, tensor=2))
    assert mesh.axis_names == (EXPERT, PIPELINE, TENSOR)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.devices.flatten().tolist() == jax.devices()


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(expert=8, pipeline=2, hosts=2, host_axis="pipeline"),
        MeshConfig(expert=4, pipeline=2, tensor=2, hosts=2, host_axis="pipeline"),
        MeshConfig(expert=8, pipeline=1, tensor=2, hosts=2, host_axis="expert"),
        MeshConfig(expert=8, pipeline=1, tensor=2, hosts=4, host_axis="expert"),
        MeshConfig(expert=2, pipeline=2, tensor=4, hosts=2, host_axis="tensor"),
        MeshConfig(expert=4, pipeline=1, tensor=2, replica=2, hosts=2, host_axis="replica"),
    ],
)
def test_only_the_host_axis_crosses_hosts(config, fake_devices):
    config = dataclasses.replace(config, hardware="h100")
    mesh = build_mesh(config, fake_devices(config.hosts, 16 // config.hosts))
    hosts = np.moveaxis(hosts_of(mesh), config.axis_names.index(config.host_axis), 0)
    per_host = hosts.shape[0] // config.hosts
    for position in range(hosts.shape[0]):  # the host is the outermost part of the axis, and nothing else matters
        assert (hosts[position] == position // per_host).all()
    assert len({device.id for device in mesh.devices.flatten()}) == 16


def test_replicas_have_hosts_of_their_own(fake_devices):
    config = MeshConfig(expert=2, pipeline=2, tensor=2, replica=2, hardware="h100", hosts=4, host_axis="pipeline")
    hosts = hosts_of(build_mesh(config, fake_devices(4, 4)))
    for replica in range(2):
        for stage in range(2):
            assert (hosts[replica, :, stage] == 2 * replica + stage).all()
    assert (config.hosts_along("replica"), config.hosts_along("pipeline"), config.hosts_along("expert")) == (2, 2, 1)
    assert config.hosts_along("replica", "expert", "pipeline") == 4


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(expert=2, pipeline=2, tensor=2), 16, ["expert=2 × pipeline=2 × tensor=2 needs 8", "use expert=4"]),
        (MeshConfig(expert=4, pipeline=3, tensor=2), 16, ["needs 24", "product is 16", "use_virtual_devices(24)"]),
        (MeshConfig(expert=2), 1, ["needs 2 devices", "is 1", "--mesh=single"]),
    ],
)  # fmt: skip
def test_device_count_is_explained(config, devices, expected):
    with pytest.raises(ConfigError) as error:
        build_mesh(config, jax.devices()[:devices])
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_accelerators_get_no_hint_of_virtual_devices(fake_devices):
    with pytest.raises(ConfigError) as error:
        build_mesh(MeshConfig(expert=4, hardware="h100"), fake_devices(1, 8))
    assert "virtual" not in str(error.value)


KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-SXM-64GB": "a100_64gb",
    "NVIDIA A100 80GB PCIe": "a100_80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100",
    "NVIDIA H100 NVL": "h100_96gb",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "AMD Instinct MI250X": "mi250x_gcd",
    "AMD Instinct MI300X": "mi300x",
    "TPU v4": "tpu_v4",
    "TPU v5 lite": "tpu_v5e",
    "TPU v5": "tpu_v5p",
    "TPU v5p": "tpu_v5p",
    "TPU v6 lite": "tpu_v6e",
    "TPU7x": "tpu7x",
    "NVIDIA GeForce RTX 4090": "custom",
    "NVIDIA GH200 480GB": "custom",
    "NVIDIA GB200": "custom",
    "TPU v4 lite": "custom",
}


@pytest.mark.parametrize(("kind", "hardware"), KINDS.items())
def test_devices_are_recognized_by_the_name_that_they_give_themselves(kind, hardware, fake_devices):
    devices = fake_devices(1, 8, "tpu" if kind.startswith("TPU") else "gpu", kind)
    config = local_mesh_config(devices)
    assert config == MeshConfig(expert=8, hardware=hardware)
    assert build_mesh(config, devices).size == 8
    assert build_mesh(dataclasses.replace(config, hardware="custom"), devices).size == 8


def test_every_name_of_hardware_can_be_recognized():
    assert {*KINDS.values(), "cpu"} == set(get_args(Hardware))


@pytest.mark.parametrize(("number", "expert", "replica"), [(1, 1, 1), (2, 2, 1), (3, 1, 3), (6, 2, 3), (16, 16, 1)])
def test_the_local_mesh_takes_every_device_of_any_machine(number, expert, replica, fake_devices):
    devices = fake_devices(1, number, "gpu", "NVIDIA A100-SXM4-40GB")
    config = local_mesh_config(devices)
    assert config == MeshConfig(expert=expert, replica=replica, hardware="a100_40gb")
    assert build_mesh(config, devices).size == number
    mixed = [*devices, *fake_devices(1, 1, "gpu", "NVIDIA H200")]
    assert build_mesh(local_mesh_config(mixed), mixed).size == number + 1


def test_the_local_mesh_of_a_cpu_is_what_jax_has_of_it():
    assert local_mesh_config() == MeshConfig(expert=16)
    assert local_mesh_config(jax.devices()[:1]) == MeshConfig()
    assert build_mesh(local_mesh_config()).size == 16


@pytest.mark.parametrize(
    ("hardware", "described", "expected"),
    [
        ("h100", ("cpu", "cpu"), 'JAX found, 8 cpu devices; install JAX for it (pip install -e ".[cuda]"), or use '),
        ("mi300x", ("cpu", "cpu"), "install JAX for it (the ROCm plugin of JAX), or use --mesh.hardware=cpu"),
        ("custom", ("cpu", "cpu"), "or use --mesh.hardware=cpu"),
        ("tpu_v5e", ("cpu", "cpu"), 'pip install -e ".[tpu]"), or use --mesh.hardware=cpu'),
        ("tpu_v5e", ("gpu", "NVIDIA H200"), "8 gpu devices (NVIDIA H200); use --mesh.hardware=h200, or --mesh=local"),
        ("cpu", ("gpu", "NVIDIA H200"), "8 gpu devices (NVIDIA H200); use --mesh.hardware=h200, or --mesh=local"),
        ("cpu", ("tpu", "TPU v9"), "8 tpu devices (TPU v9); use --mesh.hardware=custom, or --mesh=local"),
        ("h100", ("gpu", "NVIDIA A100-SXM4-80GB"), "(NVIDIA A100-SXM4-80GB); use --mesh.hardware=a100_80gb, or"),
        ("tpu_v4", ("tpu", "TPU v5 lite"), "use --mesh.hardware=tpu_v5e, or"),
    ],
)
def test_hardware_that_is_not_there_is_refused(hardware, described, expected, fake_devices, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ConfigError) as error:
        build_mesh(MeshConfig(expert=8, hardware=hardware), fake_devices(1, 8, *described))
    message = str(error.value)
    assert message.startswith(f"hardware={hardware} is not what JAX found, 8 ")
    assert expected in message
    assert "\n" not in message


def test_the_real_devices_are_compared_too(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ConfigError, match=r"is not what JAX found, 16 cpu devices; unset JAX_PLATFORMS=cpu, or"):
        build_mesh(MeshConfig(expert=16, hardware="h100"))


@pytest.mark.parametrize(("processes", "hosts", "works"), [(1, 2, False), (2, 2, True), (16, 2, True), (2, 4, False)])
def test_as_many_hosts_as_the_mesh_says_have_processes(processes, hosts, works, fake_devices):
    config, devices = MeshConfig(expert=16, hardware="h100", hosts=hosts), fake_devices(processes, 16 // processes)
    if works:
        assert build_mesh(config, devices).size == 16
        return
    with pytest.raises(ConfigError, match=rf"mesh.hosts={hosts}, but the 16 devices are all of {processes} process"):
        build_mesh(config, devices)


@pytest.mark.parametrize(("hardware", "kind"), [("cpu", "cpu"), ("a100_64gb", "gpu"), ("tpu_v5e", "tpu")])
def test_an_abstract_mesh_has_everything_but_devices(hardware, kind):
    config = MeshConfig(expert=512, tensor=4, replica=2, hardware=hardware)
    mesh = abstract_mesh(config)
    assert dict(mesh.shape) == {REPLICA: 2, EXPERT: 512, PIPELINE: 1, TENSOR: 4}
    assert platform(mesh) == config.platform == kind


def test_the_platform_of_devices_that_are_there():
    assert platform(build_mesh(MeshConfig(), jax.devices()[:1])) == "cpu"


@pytest.mark.parametrize(("forced", "fix"), [("cuda", "unset JAX_PLATFORMS"), (None, "set JAX_PLATFORMS=cpu")])
@pytest.mark.parametrize(
    ("find", "asked"), [(lambda: build_mesh(MeshConfig()), "devices"), (local_mesh_config, "local_devices")]
)
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend")])
def test_a_jax_without_its_platform_is_one_line(forced, fix, find, asked, error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, asked, fail)
    if forced:
        monkeypatch.setenv("JAX_PLATFORMS", forced)
    else:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ConfigError, match=r"^JAX finds no devices .*; install JAX for them .*\[cuda\]") as raised:
        find()
    assert str(raised.value).endswith(fix)


def test_an_axis_of_any_size_is_checked_at_once():
    assert MeshConfig(expert=10**12, hosts=10**6).num_devices == 10**12
    with pytest.raises(ConfigError, match="hosts=3 must divide expert=1000000000000"):
        MeshConfig(expert=10**12, hosts=3)
    with pytest.raises(ConfigError, match="num_experts=16 must be a multiple of expert"):
        check_experts(ModelConfig(), DispatchConfig(), MeshConfig(expert=10**12))
