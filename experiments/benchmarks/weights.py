"""Times loading and writing Hugging Face weights, and measures the memory that both take.

    python experiments/benchmarks/weights.py                                   # 2 GB, on 16 virtual devices
    python experiments/benchmarks/weights.py --gigabytes=12 --scratch=/data

Makes a Mixtral of that many gigabytes with random float32 weights, loads it onto a mesh of virtual devices, and writes
it again in bfloat16. It takes as much memory as the weights, and 1.5 times as much disk, in a folder that is removed
afterward. "Beyond the arrays" is the peak of the process's own memory (RssAnon, without pages of mapped files, which
the system drops when it needs room), less the memory before and the loaded parameters. "Read" is one thread reading
every byte once. Files that are smaller than memory come from the system's cache both times. In a pipe, ends with one
line of JSON. Linux only.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.shared import loading
from moejax import runtime, strict_json
from moejax.checks import check, expand
from moejax.config import AttentionConfig, ModelConfig
from moejax.interop import load_hf, save_hf
from moejax.interop.families import family_to_write
from moejax.interop.params import stored_params
from moejax.interop.save import config_json
from moejax.interop.tensors import NewTensor, write_tensors
from moejax.layout import Layout
from moejax.mesh import build_mesh
from moejax.program import Program
from moejax.train.progress import Progress

FLAGS = loading.Flags(__doc__)
_GIGABYTES = flags.DEFINE_float(
    "gigabytes", 2.0, "Size of the checkpoint, to the next whole layer.", lower_bound=0.1, flag_values=FLAGS
)
_MESH = flags.DEFINE_string("mesh", "cpu_16", "The mesh to load onto.", flag_values=FLAGS)
_SCRATCH = flags.DEFINE_string(
    "scratch", None, "Folder to write into; by default the system's for temporary files.", flag_values=FLAGS
)

STATUS = Path("/proc/self/status")


class PeakMemory:
    """The highest RssAnon of this process while it is open, sampled every 10 ms."""

    def __init__(self) -> None:
        self.before = self.peak = rss_anon()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, rss_anon())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


def rss_anon() -> int:
    """Returns the bytes of memory that are this process's own, without pages of files."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def model_of(gigabytes: float) -> ModelConfig:
    """Returns a Mixtral whose float32 weights have at least this size."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128)
    sizes: dict[str, Any] = {"d_model": 2048, "d_ff": 1024, "num_experts": 16, "vocab_size": 32_000}
    layer = 16 * 3 * 2048 * 1024 + 4 * 2048 * 2048
    rest = 2 * 32_000 * 2048
    num_layers = max(2, math.ceil((gigabytes * 1e9 / 4 - rest) / layer))
    return ModelConfig(num_layers=num_layers, attention=attention, **sizes)


def write_random(folder: Path, program: Program) -> None:
    """Writes a checkpoint with random weights, one tensor in memory at a time."""
    family, model = family_to_write(program.model)
    block = np.random.default_rng(0).standard_normal(2**20, np.float32) * np.float32(0.02)
    tensors = [
        NewTensor(name, shape, np.dtype(np.float32), lambda shape=shape: np.resize(block, shape))
        for stored in stored_params(family, model, program.table)
        for name, shape in stored.stored_shapes()
    ]
    folder.mkdir()
    (folder / "config.json").write_text(strict_json.dumps(config_json(model, family, "float32")))
    write_tensors(folder, tensors)


def read_alone(folder: Path) -> int:
    """Reads every byte of the weights once, in pieces of 16 MiB; returns their number."""
    total, buffer = 0, bytearray(2**24)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total


@contextlib.contextmanager
def timed(figures: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - began


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    check(STATUS.exists(), f"{STATUS} is missing; memory is measured on Linux only")
    mesh_config = loading.load_mesh_config(_MESH.value)
    check(mesh_config.platform == "cpu", f"--mesh={_MESH.value} must be a mesh of CPUs, whose memory is the process's")
    runtime.setup_jax(mesh_config)
    model = model_of(_GIGABYTES.value)
    layout = Layout(mesh_config, seq_len=256, batch_size=64)
    layout.check(model)
    program = Program(model, layout, build_mesh(mesh_config))
    figures: dict[str, float] = {}
    scratch = expand(_SCRATCH.value, "--scratch") if _SCRATCH.value else None
    with tempfile.TemporaryDirectory(dir=scratch, prefix="moejax_weights_") as temporary, Progress(steps=0) as progress:
        source, out = Path(temporary) / "source", Path(temporary) / "out"
        with progress.waiting("writing random weights"):
            write_random(source, program)
        with progress.waiting("reading them alone"), timed(figures, "read_seconds"):
            figures["file_bytes"] = read_alone(source)
        with progress.waiting("loading"), PeakMemory() as memory, timed(figures, "load_seconds"):
            loaded = load_hf(source, program, progress.update)
            jax.block_until_ready(loaded.params)
        arrays = sum(shard.data.nbytes for w in jax.tree.leaves(loaded.params) for shard in w.addressable_shards)
        figures |= {
            "bytes_read": loaded.bytes_read,
            "array_bytes": arrays,
            "load_beyond_arrays_bytes": memory.peak - memory.before - arrays,
        }
        with progress.waiting("writing bfloat16"), PeakMemory() as memory, timed(figures, "save_seconds"):
            save_hf(out, program, loaded.params, report=progress.update)
        figures["saved_bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        figures["save_beyond_arrays_bytes"] = memory.peak - memory.before
    for line in report(figures):
        print(line)
    loading.print_json({"mesh": mesh_config.shape, "hardware": mesh_config.hardware, **figures})


def report(f: dict[str, float]) -> Iterator[str]:
    """Yields the figures in words."""
    GB = 1e9
    yield f"{f['file_bytes'] / GB:.2f} GB of weights, of which {f['bytes_read'] / GB:.2f} GB were read"
    for name in ("read", "load"):
        yield f"{name:5} {f[f'{name}_seconds']:7.1f} s  {f['file_bytes'] / GB / f[f'{name}_seconds']:5.2f} GB/s"
    yield f"save  {f['save_seconds']:7.1f} s  {f['saved_bytes'] / GB / f['save_seconds']:5.2f} GB/s"
    for name in ("load", "save"):
        yield f"{name:5} {f[f'{name}_beyond_arrays_bytes'] / GB:7.2f} GB of memory beyond the arrays"


if __name__ == "__main__":
    loading.run(main, FLAGS)
