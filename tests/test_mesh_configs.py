from pathlib import Path

import pytest

from moejax.mesh import MeshConfig, build_mesh
from moejax.overrides import load_config_file
from moejax.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
MESHES = sorted((ROOT / "mesh_configs").glob("*.py"))
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.py"))


def named(path):
    return path.stem


def test_there_are_files():
    assert MESHES
    assert CONFIGS


@pytest.mark.parametrize("path", MESHES, ids=named)
def test_mesh_config_builds_and_says_when_to_use_it(path, fake_devices):
    config = load_config_file(path, MeshConfig)
    mesh = build_mesh(config, fake_devices(config.hosts, config.num_devices // config.hosts, config.platform))
    assert mesh.shape == config.shape
    docstring = path.read_text().split('"""')[1]
    assert len(docstring.strip().splitlines()) >= 3
    hardware = path.stem.rsplit("_", 1)[0].removesuffix("_16")  # a100_64gb_2x8 -> a100_64gb
    assert config.hardware == {"single": "cpu", "local": "cpu"}.get(path.stem, hardware)


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_train_config_loads(path):
    config = load_config_file(path, TrainConfig)
    assert config.layout.batch_size % config.layout.num_microbatches == 0
    assert path.read_text().startswith('"""')
