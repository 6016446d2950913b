"""What it takes to run a run again, in its `run.json`: {"starts": [...]}, an entry each time it was started or resumed.

Each entry is whole, for anything may have changed between two starts: another mesh, other packages, other sources.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moejax.config import TrainConfig
from moejax.train.schedule import Bucket

RECORD_FILE = "run.json"
PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
ENVIRONMENT = ("XLA_", "JAX_", "LIBTPU_", "NCCL_", "TF_GPU_")  # beginnings of the variables that change a program


def describe_start(
    config: TrainConfig, mesh: Mesh, buckets: Sequence[Bucket], *, resumed_from: int, data_fingerprint: str
) -> dict[str, Any]:
    """An entry of `run.json`, ready for JSON: all that decides what a run computes, but for the text itself.

    - `config`: every field, with those that a plan decided as its last bucket has them; seeds are `config.seed` (of the
      parameters) and `config.data.seed` (of the order of the batches);
    - `mesh`: its shape, and `buckets`: a plan's, else empty;
    - `argv` as the process was started, and the variables of its `environment` that XLA, JAX and NCCL read;
    - `versions`, `devices`, and `git`: see `git_state`;
    - `data_fingerprint`: of the training text and tokenizer.
    """
    devices = mesh.devices.ravel()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed_from": resumed_from,
        "argv": sys.argv,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
        "config": dataclasses.asdict(config),
        "mesh": dict(mesh.shape),
        "buckets": [dataclasses.asdict(bucket) for bucket in buckets],
        "devices": {
            "kind": devices[0].device_kind,
            "ids": [device.id for device in devices],  # in the order of the mesh
            "processes": len({device.process_index for device in devices}),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parent),
        "data_fingerprint": data_fingerprint,
    }


def _version(package: str) -> str | None:
    """As installed; None for what is only on the path, as moejax may be: its commit says more."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The `commit` that the tracked sources in `folder` are of, and whether the repository is `dirty`: has changes, or
    files that are neither tracked nor ignored. None where they are tracked by no repository, or git is not installed.
    """
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*command: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that is installed in some repository's virtual environment is no part of that repository.
    if not ask("ls-files", "."):
        return None
    commit = ask("rev-parse", "HEAD")
    return commit and {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}


def append_start(workdir: Path, start: dict[str, Any]) -> None:
    """Adds an entry to the run's `run.json`: all at once or not at all, whatever kills the process."""
    path = workdir / RECORD_FILE
    starts = [*read_starts(workdir), start] if path.exists() else [start]
    written = path.with_suffix(".tmp")
    with written.open("w", encoding="utf-8") as file:
        json.dump({"starts": starts}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a run's `run.json`, the oldest first.

    Raises:
      FileNotFoundError: the folder holds none.
    """
    return json.loads((workdir / RECORD_FILE).read_text(encoding="utf-8"))["starts"]
