"""Runs the scripts of experiments/ in this process: each has flags of its own, and JAX has started once already."""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import sys
from unittest import mock

import jax

from experiments.shared import common, loading
from moejax import ModelConfig, runtime
from moejax.data import ByteTokenizer
from moejax.interop.families import family_to_write
from moejax.interop.save import config_json
from moejax.topology import find_target

EXPERIMENTS = loading.EXPERIMENTS
SCRIPTS = sorted(  # such as "train" and "benchmarks/moe"
    str(path.relative_to(EXPERIMENTS).with_suffix(""))
    for path in EXPERIMENTS.rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)


@dataclasses.dataclass(frozen=True)
class Done:
    """A script that has ended: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def figures(self):
        """The line of JSON that ends standard output."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def error(self):
        """The one line on standard error, without "error: "."""
        (line,) = self.stderr.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def load_script(name):
    """Returns the module of a script of experiments/."""
    return importlib.import_module(f"experiments.{name.replace('/', '.')}")


def parse_command(name, arguments):
    """Has a script of experiments/ read `arguments`, finds what they name, and checks sizes; nothing is run."""
    script_flags = load_script(name).FLAGS
    with contextlib.suppress(SystemExit):  # after --help
        if isinstance(script_flags, common.ConfigFlags):
            config = script_flags.parse_config([name, *arguments])
            if name == "train":
                load_script(name).refuse_what_cannot_fit(config)
        else:
            script_flags.parse([name, *arguments], positional=name == "read_trace")
    for flag, find in (("model", loading.load_model), ("cluster", loading.load_cluster), ("target", find_target)):
        value = script_flags[flag].value if flag in script_flags else None
        for found in value if isinstance(value, list) else [value] if value else []:
            find(found)


DENSE = ModelConfig(num_experts=1, experts_per_token=1)


def write_model_folder(folder, model=ModelConfig()):  # noqa: B008
    """Writes what `train.py --init` reads of a Hugging Face checkpoint before it loads weights."""
    folder.mkdir(parents=True, exist_ok=True)
    family, written = family_to_write(model)
    (folder / "config.json").write_text(json.dumps(config_json(written, family, "float32")))
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())


def run_script(name, *arguments, status=0):
    """Runs a script of experiments/ as `python experiments/name.py *arguments`; it must end with `status`.

    Where programs are cached stays as it is, and so do the allocator and logging: settings of the whole process.
    """
    module = load_script(name)
    cached = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch.object(sys, "argv", [f"experiments/{name}.py", *map(str, arguments)]),
            mock.patch.object(runtime, "keep_freed_memory"),
            mock.patch.object(logging.getLogger(), "handlers", logging.getLogger().handlers[:]),
        ):
            loading.run(module.main, module.FLAGS)
    except SystemExit as stop:
        done = Done(stop.code or 0, stdout.getvalue(), stderr.getvalue())
    finally:
        logging.getLogger("moejax").setLevel(logging.NOTSET)
        jax.config.update("jax_compilation_cache_dir", cached[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", cached[1])
    assert done.status == status, done.stderr[-2000:]
    return done
