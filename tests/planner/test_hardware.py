import json
import os

import pytest

from moejax.checks import ConfigError
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


def written(path, figures, device="NVIDIA H100 80GB HBM3"):
    path.write_text(json.dumps({"device": device, "date": "2026-11-22", "figures": figures}))
    return path


@pytest.mark.parametrize(
    "value", ["fast", "NaN", None, [1], {"a": 1}, True, 0, -1, float("inf"), float("nan"), 10**400]
)
def test_a_figure_is_a_finite_number_above_0(value, tmp_path):
    path = written(tmp_path / "calibration.json", {"inside": {"latency_s": value}})
    with pytest.raises(ConfigError, match=r": figures\.inside\.latency_s=.* must be a finite number above 0$"):
        load_calibration(path, get_device("h100"))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ([1], r"figures=\[1\] must be an object of figures"),
        (None, "figures=None must be an object of figures"),
        ({"inside": 5}, "figures.inside=5 must be an object of figures"),
        ({"name": "x"}, "figures.name does not exist; use one of across, "),
        ({"devices_per_host": 4}, "figures.devices_per_host does not exist"),
    ],
)
def test_figures_are_those_of_a_device(figures, message, tmp_path):
    path = written(tmp_path / "calibration.json", figures)
    with pytest.raises(ConfigError, match=f"^calibration={path}: {message}"):
        load_calibration(path, get_device("h100"))


def test_figures_of_another_device_are_refused(tmp_path):
    path = written(tmp_path / "calibration.json", {"launch_s": 0}, device="cpu")
    assert load_calibration(path, get_device("cpu")).launch_s == 0
    with pytest.raises(ConfigError, match=r"was measured on 'cpu', which is cpu, not h100$"):
        load_calibration(path, get_device("h100"))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_calibration_is_a_regular_file(kind, tmp_path):
    path = tmp_path / "calibration.json"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ConfigError, match=f"calibration={path} is not a regular file"):
        load_calibration(path, get_device("h100"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hosts": 2.0}, r"hosts=2\.0 must be a whole number \(int\)"),
        ({"device": "h100"}, "device='h100' must be a Device"),
    ],
)
def test_a_clusters_fields_are_of_their_types(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Cluster(**{"name": "x", "device": get_device("h100"), "hosts": 2, "devices_per_host": 8} | fields)


def test_calibrated_figures_replace_the_devices_own(tmp_path):
    path = tmp_path / "calibration.json"
    figures = {"matmul_flops": 5e12, "inside": {"latency_s": 1e-3}}
    path.write_text(json.dumps({"device": "H100", "date": "2026-11-22", "figures": figures}))
    device = load_calibration(path, get_device("h100"))
    assert (device.matmul_flops, device.matmul_flops.kind) == (5e12, "calibrated")
    assert device.inside.latency_s == 1e-3
    assert device.inside.bytes_per_s == get_device("h100").inside.bytes_per_s
    path.write_text(json.dumps({"device": "H100", "date": "2026-11-22", "figures": {"speed": 1}}))
    with pytest.raises(ConfigError, match=r"figures\.speed does not exist; use one of "):
        load_calibration(path, get_device("h100"))
