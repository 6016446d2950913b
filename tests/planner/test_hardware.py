import json

import pytest

from moejax.config import ConfigError
from moejax.mesh import MeshConfig
from moejax.planner.hardware import DEVICES, Cluster, Constant, get_device, load_calibration


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_says_where_it_is_from(name):
    device = get_device(name)
    constants = [v for part in (device, device.inside, device.across) for v in vars(part).values()]
    constants = [v for v in constants if isinstance(v, float)]
    assert len(constants) == 8 + 2 * 3
    assert all(isinstance(v, Constant) and v.source for v in constants)
    assert device.matmul_flops <= device.peak_flops
    assert device.copy_bytes_per_s <= device.memory_bytes_per_s
    assert device.inside.bytes_per_s <= device.inside.peak_bytes_per_s


def test_unknown_hardware_is_named():
    with pytest.raises(ConfigError, match="hardware='custom' has no figures; use one of cpu, "):
        Cluster.of_mesh("mine", MeshConfig(hardware="custom"))


def test_a_mesh_gives_its_cluster():
    cluster = Cluster.of_mesh("x", MeshConfig(8, 2, 1, hardware="h100", hosts=2, host_axis="pipeline"))
    assert (cluster.num_devices, cluster.hosts, cluster.devices_per_host) == (16, 2, 8)
    assert not cluster.one_network
    assert Cluster.of_mesh("y", MeshConfig(8, 2, 1, hardware="tpu_v5p", hosts=2)).one_network


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("# not JSON", "cannot be read"), ("[1]", "has no figures"), ("{}", "has no figures")],
)
def test_what_is_no_calibration_is_one_line(text, message, tmp_path):
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"calibration={path} {message}") as error:
        load_calibration(path, get_device("h100"))
    assert "\n" not in str(error.value)


def test_calibrated_figures_replace_the_devices_own(tmp_path):
    path = tmp_path / "calibration.json"
    figures = {"matmul_flops": 5e12, "inside": {"latency_s": 1e-3}}
    path.write_text(json.dumps({"device": "H100", "date": "2026-11-22", "figures": figures}))
    device = load_calibration(path, get_device("h100"))
    assert (device.matmul_flops, device.matmul_flops.kind) == (5e12, "calibrated")
    assert device.inside.latency_s == 1e-3
    assert device.inside.bytes_per_s == get_device("h100").inside.bytes_per_s
    path.write_text(json.dumps({"device": "H100", "date": "2026-11-22", "figures": {"speed": 1}}))
    with pytest.raises(ConfigError, match="figure 'speed' does not exist; use one of "):
        load_calibration(path, get_device("h100"))
