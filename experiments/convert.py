"""Writes a trained model as a Hugging Face checkpoint, which transformers, vLLM and others load.

    python experiments/convert.py --workdir=runs/a --out=exported
    python experiments/convert.py --workdir=runs/a --out=exported --dtype=float32

Takes the newest undamaged checkpoint of the run in --workdir, and writes config.json, the weights and the tokenizer
into a new folder. It needs no accelerator, but memory for the parameters in float32.

The other way needs no conversion: `python experiments/train.py --init=DIR` begins with a Hugging Face checkpoint.
"""

from __future__ import annotations

from typing import get_args

import jax
from absl import flags

from experiments.shared import loading
from moejax.checks import ConfigError, check, expand
from moejax.config import Dtype
from moejax.data import load_data
from moejax.interop import save_hf, special_token_ids, tokenizer_files
from moejax.interop.tensors import check_new
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.program import Program
from moejax.sharding import param_shapes
from moejax.train.checkpoint import Checkpointer
from moejax.train.progress import Progress
from moejax.train.resume import CHECKPOINTS, read_record
from moejax.train.workdir import WorkdirLock

FLAGS = loading.Flags(__doc__)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run whose model to write.", flag_values=FLAGS)
_OUT = FLAGS.define_output("out", "The folder to write; it must be new or empty.", folder=True)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(get_args(Dtype)), "What weights are stored in.", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    check(_WORKDIR.value is not None, "--workdir is missing; name the folder of a run")
    check(_OUT.value is not None, "--out is missing; name the folder to write")
    check_new(expand(_OUT.value, "--out"))
    workdir = expand(_WORKDIR.value, "--workdir")
    record = read_record(workdir)
    if record is None or not record.has_checkpoint:
        raise ConfigError(f"--workdir={workdir} has no run with a checkpoint; train one with experiments/train.py")
    model, data = record.config.model, record.config.data
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, or too small
    layout = Layout(MeshConfig(), seq_len=1, batch_size=1, num_microbatches=1)
    program = Program(model, layout, build_mesh(layout.mesh, jax.devices()[:1]))
    tokenizer = load_data(data, workdir=workdir).tokenizer
    source = None if data.tokenizer in ("bytes", "bpe") else data.tokenizer
    # The rest of the state is left where it is: moments are twice the parameters.
    rest = ("step", "opt_state", "balance")
    with WorkdirLock(workdir), Checkpointer(workdir / CHECKPOINTS, keep=10**9, every=1) as checkpointer:
        restored = checkpointer.restore({"params": param_shapes(program.table, program.mesh)}, fresh=rest)
    assert restored is not None, "there is a checkpoint: the record says so"
    state, step, _ = restored
    files, token_ids = tokenizer_files(tokenizer, source), special_token_ids(tokenizer, source)
    with Progress(steps=0) as progress, progress.waiting("writing weights"):
        architecture = save_hf(
            _OUT.value, program, state["params"], dtype=_DTYPE.value, files=files, token_ids=token_ids,
            report=progress.update,
        )  # fmt: skip
    print(f"step {step} of {workdir} is in {_OUT.value}, a {architecture} model in {_DTYPE.value}")
    loading.print_json({"step": step, "model_type": architecture, "out": str(_OUT.value)})


if __name__ == "__main__":
    loading.run(main, FLAGS)
