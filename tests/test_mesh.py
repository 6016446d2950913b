import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.mesh import (
    EXPERT,
    PIPELINE,
    REPLICA,
    TENSOR,
    MeshConfig,
    abstract_mesh,
    build_mesh,
    platform,
    use_virtual_devices,
)

ROOT = Path(__file__).resolve().parents[1]


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
    mesh = build_mesh(config, fake_devices(config.hosts, 16 // config.hosts))
    hosts = np.moveaxis(hosts_of(mesh), config.axis_names.index(config.host_axis), 0)
    per_host = hosts.shape[0] // config.hosts
    for position in range(hosts.shape[0]):  # the host is the outermost part of the axis, and nothing else matters
        assert (hosts[position] == position // per_host).all()
    assert len({device.id for device in mesh.devices.flatten()}) == 16


def test_replicas_have_hosts_of_their_own(fake_devices):
    config = MeshConfig(expert=2, pipeline=2, tensor=2, replica=2, hosts=4, host_axis="pipeline")
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
        (MeshConfig(expert=8, hardware="h100"), 1, ["--mesh.hardware=cpu"]),
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


def test_virtual_devices_again_with_the_same_number():
    use_virtual_devices(16)
    assert jax.device_count() == 16


@pytest.mark.parametrize("number", [0, -3])
def test_virtual_devices_must_be_positive(number):
    with pytest.raises(ConfigError, match=f"number={number}"):
        use_virtual_devices(number)


def test_virtual_devices_too_late():
    jax.devices()
    with pytest.raises(ConfigError, match=r"use_virtual_devices\(8\) comes too late.*16 cpu devices"):
        use_virtual_devices(8)
    assert jax.config.jax_num_cpu_devices == 16


def test_collective_timeouts_keep_what_the_user_set():
    program = (
        "import os, jax, moejax; moejax.use_virtual_devices(2); print(jax.device_count(), os.environ['XLA_FLAGS'])"
    )
    name = "--xla_cpu_collective_call_terminate_timeout_seconds"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": f"{name}=7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("2 ")
    assert done.stdout.count(name) == 1
    assert f"{name}=7" in done.stdout
    assert "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120" in done.stdout


@pytest.mark.parametrize(("hardware", "kind"), [("cpu", "cpu"), ("a100_64gb", "gpu"), ("tpu_v5e", "tpu")])
def test_an_abstract_mesh_has_everything_but_devices(hardware, kind):
    config = MeshConfig(expert=512, tensor=4, replica=2, hardware=hardware)
    mesh = abstract_mesh(config)
    assert dict(mesh.shape) == {REPLICA: 2, EXPERT: 512, PIPELINE: 1, TENSOR: 4}
    assert platform(mesh) == config.platform == kind


def test_the_platform_of_devices_that_are_there():
    assert platform(build_mesh(MeshConfig(), jax.devices()[:1])) == "cpu"
