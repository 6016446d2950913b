"""What it takes to run a run again, in its `run.json`: {"starts": [...]}, an entry each time it was started or resumed.

Each entry is whole, for anything may have changed between two starts: another mesh, other packages, other sources. If
the sources were changed since their commit, a patch lies beside it: `git checkout COMMIT && git apply PATCH` has them.
"""

from __future__ import annotations

import dataclasses
import os
import platform as host
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moejax import strict_json
from moejax.checks import ConfigError, check
from moejax.compiler import program_options
from moejax.mesh import platform
from moejax.train.config import TrainConfig
from moejax.train.files import read_json, replace_text

RECORD_FILE = "run.json"
PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
ENVIRONMENT = ("XLA_", "JAX_", "LIBTPU_", "NCCL_", "TF_GPU_")  # beginnings of the variables that change a program


def describe_start(config: TrainConfig, mesh: Mesh, *, resumed_from: int, data_fingerprint: str) -> dict[str, Any]:
    """An entry of `run.json`, ready for JSON: all that decides what a run computes, but for the text itself.

    With `config` the run can be started again (see `moejax.train.resume`).

    - `config`: every field; seeds are `config.seed` (of the parameters) and `config.data.seed` (of the order of the
      batches);
    - `compiler_options`: what the step is compiled with beyond XLA's defaults (see `moejax.compiler`);
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
        "compiler_options": program_options(platform(mesh), config.compiler_options),
        "devices": {
            "kind": devices[0].device_kind,
            "ids": [device.id for device in devices],  # in the order of the mesh
            "processes": len({device.process_index for device in devices}),
        },
        "versions": {"python": host.python_version()} | {name: _version(name) for name in PACKAGES},
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
    """The state of the repository that the sources in `folder` are tracked by; None if none does, or without git.

    `commit`; `patch`, text: what has changed since, with Python files that are new, for `git apply` ("" for nothing);
    `untracked`: paths of other files that are neither tracked nor ignored, of which the patch has nothing.
    """
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*command: str, at: str | Path = folder) -> str:
        done = subprocess.run([git, "-C", str(at), *command], capture_output=True, check=False)
        # A diff of two files ends with 1 where they differ; names and contents may be in any encoding.
        return done.stdout.decode(errors="surrogateescape") if done.returncode in (0, 1) else ""

    # A package that is installed in some repository's virtual environment is no part of that repository.
    if not ask("ls-files", "."):
        return None
    root, commit = ask("rev-parse", "--show-toplevel").strip(), ask("rev-parse", "HEAD").strip()
    new = ask("ls-files", "-z", "--others", "--exclude-standard", at=root).split("\0")[:-1]
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
    patches = [ask(*diff, "HEAD", at=root)]
    patches += [ask(*diff, "--no-index", "--", "/dev/null", path, at=root) for path in new if path.endswith(".py")]
    others = [path for path in new if not path.endswith(".py")]
    return (commit and {"commit": commit, "patch": "".join(patches), "untracked": others}) or None


def append_start(workdir: Path, start: dict[str, Any]) -> None:
    """Adds an entry to the run's `run.json`: all at once or not at all, whatever kills the process.

    A patch of its sources goes to a file, `changes_0.patch` for the first start, and the entry has the file's name.

    Raises:
      OSError: naming the file, if it cannot be written; then `run.json` is as it was.
    """
    path = workdir / RECORD_FILE
    before = read_starts(workdir) if path.exists() else []
    if start.get("git") and (patch := start["git"]["patch"]):
        name = f"changes_{len(before)}.patch"
        replace_text(workdir / name, patch)
        start = start | {"git": start["git"] | {"patch": name}}
    replace_text(path, strict_json.dumps({"starts": [*before, start]}, indent=1))


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run's `run.json`, the oldest first.

    Raises:
      ConfigError: the folder holds none, or the file is not such a record.
    """
    path = workdir / RECORD_FILE
    try:
        starts = read_json(path)["starts"]
        check(isinstance(starts, list) and len(starts) > 0, "starts must be a list of one or more")
        check(all(isinstance(start, dict) for start in starts), "each of starts must be a JSON object")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the record of a run ({error!r}); restore it, move it away, or use another workdir"
        ) from None
    return starts


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration in a record, of `run.json` or a checkpoint, in the fields that it has today.

    Records of version 0.1 have no `layouts`: what makes one is in `config`, in `mesh`, and in a plan's `buckets`.

    Raises:
      LookupError: a field of that version is missing.
    """
    config = {"init": "", "upcycle": "", **record["config"]}  # every run began with random weights once
    if "layouts" in config:
        return config
    data = dict(config["data"])
    one = {name: config.pop(name) for name in ("parallel", "dispatch", "accumulate")} | {"mesh": record["mesh"]}
    one |= {name: data.pop(name) for name in ("seq_len", "batch_size")}
    return config | {"data": data, "layouts": [_upgrade_layout(bucket) for bucket in record["buckets"] or [one]]}


def _upgrade_layout(bucket: Mapping[str, Any]) -> dict[str, Any]:
    parallel, dispatch, mesh = (dict(bucket[name]) for name in ("parallel", "dispatch", "mesh"))
    hosts, payload = dispatch.pop("hosts"), dispatch.pop("payload")
    if hosts > 1:  # virtual devices had them in `dispatch` alone
        mesh["hosts"] = max(hosts * mesh.get("replica", 1), mesh.get("hosts", 1))
    return {
        "mesh": mesh,
        "seq_len": bucket["seq_len"],
        "batch_size": bucket["batch_size"],
        "grad_accumulation_steps": bucket["accumulate"],
        "pipeline_repeats": parallel.pop("repeats"),
        "dispatch": dispatch | {"hierarchical": hosts > 1, "wire_dtype": "compute" if payload == "full" else payload},
        **parallel,
    }
