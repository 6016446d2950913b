"""Devices that are not there: what is said of them without their compilers, and with them the whole train step."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.checks import ConfigError
from moejax.topology import TARGETS, compile_only_devices

ROOT = Path(__file__).parents[1]


def run(program, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def test_an_unknown_target_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="target=h100 does not exist; use one of a100_64gb_2x8, h100_2x8, tpu"):
        compile_only_devices("h100")


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_compiler_is_named_with_its_remedy(target, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=r"needs \S+, which is missing; pip install 'moejax\[aot\]'"):
        compile_only_devices(target)
    assert dict(os.environ) == before


def test_too_late_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match=r"compile_only_devices\('h100_2x8'\) comes too late: JAX .* started on gpu"):
        compile_only_devices("h100_2x8")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_devices_are_sixteen_in_their_hosts(target):
    done = run(
        "from moejax.topology import compile_only_devices\nimport collections, json, jax\n"
        f"found = compile_only_devices({target!r})\n"
        "hosts = collections.Counter(device.process_index for device in found)\n"
        "print(json.dumps([found[0].platform, len(found), sorted(hosts.values()), jax.default_backend()]))"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    platform = {"cuda": "gpu", "tpu": "tpu"}[TARGETS[target].platform]
    per_host = [8, 8] if platform == "gpu" else [4, 4, 4, 4]
    assert json.loads(done.stdout.splitlines()[-1]) == [platform, 16, per_host, "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "chunks", "overlapped"), [("a100_64gb_2x8", 1, 0.3), ("h100_2x8", 1, 0.7), ("tpu_v5p_16", 4, 0.5)]
)
def test_the_reference_models_step_compiles_and_its_exchanges_overlap(target, chunks, overlapped):
    script = [
        sys.executable, ROOT / "experiments" / "overlap.py", f"--target={target}", "--batch_split=2",
        f"--chunks={chunks}",
        "--config.model.num_layers=2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])
    assert row["collectives"]["all-to-all"]["overlapped"] > overlapped
    assert row["peak_gb"] < 80
