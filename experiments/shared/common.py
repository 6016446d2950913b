"""What scripts share that take a model and a mesh: their flags, their configuration and how JAX is started.

A script reads:

    FLAGS = common.ConfigFlags(__doc__)


    def main(argv: list[str]) -> None:
        config = FLAGS.parse_config(argv)
        FLAGS.setup_jax(config.layout.mesh)
        ...


    if __name__ == "__main__":
        loading.run(main, FLAGS)
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from absl import flags

from experiments.shared.loading import (
    FULL_HELP,
    PLANS,
    Flags,
    config_names,
    find,
    load_config,
    load_mesh_config,
    load_model,
    mesh_names,
    plan_names,
    unknown,
)
from moejax import runtime
from moejax.checks import ConfigError, check
from moejax.compiler import in_force
from moejax.config import MOVED_FIELDS
from moejax.data import tokenizer_vocab_size
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.overrides import FieldInfo, apply_overrides, describe, split_overrides
from moejax.topology import find_target
from moejax.train.config import TrainConfig
from moejax.train.plan_file import load_layouts, load_plan_model

T = TypeVar("T")


class ConfigFlags(Flags):
    """The flags of a script that takes --config, --mesh or --plan, and overrides of fields, beside its own flags."""

    def __init__(
        self, usage: str | None, *, config: str = "quickstart", first: Mapping[str, str] | None = None
    ) -> None:
        """`config` is the default of --config. `first` has the flags and fields that help begins with, and examples."""
        super().__init__(usage)
        self.__dict__["_first"] = first or {}
        for name, default, meaning in (
            (
                "config", config,
                "What to train: a config below, a Python file with get_config(), or a Hugging Face folder.",
            ),
            ("mesh", "cpu_16", "What to run on: one of the meshes below, or a Python file with get_config()."),
            (
                "plan", None,
                "The layouts of the run, instead of --mesh: a file that plan.py wrote, or one of the plans below.",
            ),
            ("data", None, "Files, globs or folders to train on, with commas between. Default: Python's own library."),
            (
                "tokenizer", None,
                "bytes, bpe (trained on the data), or a tokenizer.json or its folder. Default: as --config has it.",
            ),
            (
                "compilation_cache_dir", None, "Where compiled programs are kept for the next run; empty for nowhere. "
                "Default: $JAX_COMPILATION_CACHE_DIR, else moejax/xla in $XDG_CACHE_HOME or ~/.cache.",
            ),
        ):  # fmt: skip
            flags.DEFINE_string(name, default, meaning, flag_values=self)

    def parse_config(self, argv: Sequence[str]) -> TrainConfig:
        """Reads the flags from `argv` and returns the configuration, with its layouts on the mesh or by the plan.

        `--config.a.b=value` and `--mesh.a=value` change fields of what `--config` and `--mesh` name. With `--plan`,
        `--config` is by default what the plan was made for, and no flag may change what it decides: a plan holds as a
        whole. A tokenizer that a flag chooses also sets the model's vocabulary, unless a flag sets that.

        Raises:
          ConfigError: a flag, a name, a file or an override that is wrong.
        """
        config_overrides, remaining = split_overrides(argv, "config")
        mesh_overrides, remaining = split_overrides(remaining, "mesh")
        _, wants_help = self._read(remaining)
        for path in config_overrides:
            _check_name(path)
        for flag, path in (("data", "data.paths"), ("tokenizer", "data.tokenizer")):
            value = self[flag].value
            if value is None:
                continue
            if path in config_overrides:
                raise ConfigError(f"--{flag} and --config.{path} are the same field; give one of them")
            config_overrides[path] = value
        check(
            bool(config_overrides.get("data.paths", "x").strip(" ,")),
            "--data= names no file, glob or folder; leave out --data for Python's own library",
        )

        self.__dict__["_mesh_overrides"] = mesh_overrides
        plan_model = None if self.plan is None else load_plan_model(self._plan_file())
        name = self.config if self["config"].present or plan_model is None else plan_model
        config = self._base_config(name)
        layouts, source = self._layouts(config)
        if source:
            self._check_undecided(config_overrides, mesh_overrides, source)
        else:
            layouts = (layouts[0].replace(mesh=_apply("mesh", layouts[0].mesh, mesh_overrides)),)
        config = _apply("config", dataclasses.replace(config, layouts=layouts), config_overrides)
        data = config.data
        self._check_files({"config.data.paths": ",".join(data.paths), "config.data.tokenizer": data.tokenizer})
        if plan_model is not None:
            self._check_model(config, plan_model)
        if self._vocabulary_follows(config_overrides):
            config = _with_tokenizers_vocabulary(config)
        if wants_help:
            print(self._config_help(name, config, wants_help in FULL_HELP))
            sys.exit(0)
        return config

    def for_target(self, target: str, config: TrainConfig) -> TrainConfig:
        """Returns `config` on the mesh to compile for `target` with: as it is if --mesh or --plan was given, else on
        the target's own mesh, with the fields that flags change.

        Raises:
          ConfigError: there is no such target, or flags and its mesh do not go together.
        """
        find_target(target)
        if self["mesh"].present or self.plan is not None:
            return config
        return config.with_layout(mesh=_apply("mesh", load_mesh_config(target), self._mesh_overrides))

    def setup_jax(self, mesh_config: MeshConfig) -> None:
        """Sets up JAX for the mesh as `moejax.setup_jax` does, with the cache that --compilation_cache_dir names."""
        runtime.setup_jax(mesh_config, compilation_cache_dir=self.compilation_cache_dir)

    def with_flag(self, message: str) -> str:
        """Returns `message` with --config.path for the field's name that it begins with, if only one field has it."""
        name, equals, _ = message.partition("=")
        paths = [path for path in field_paths() if path.endswith(f".{name}")]
        return f"{paths[0].removesuffix(name)}{message}" if equals and len(paths) == 1 else super().with_flag(message)

    def _base_config(self, name: str) -> TrainConfig:
        """Returns what overrides change, which --config or a plan calls `name`."""
        return load_config(name)

    def _layouts(self, config: TrainConfig) -> tuple[tuple[Layout, ...], str]:
        """Returns the layouts before overrides, and what decides them as a whole, such as "--plan=a.py is a plan"."""
        if self.plan is None:
            return (config.layout.replace(mesh=load_mesh_config(self.mesh)),), ""
        check(not self["mesh"].present, f"--mesh={self.mesh} and --plan={self.plan} both say where to run; give one")
        return load_layouts(self._plan_file()), f"--plan={self.plan} is a plan"

    def _plan_file(self) -> Path:
        path = find(self.plan, PLANS)
        if path is None:
            raise ConfigError(unknown("plan", self.plan, plan_names()))
        check(os.path.isfile(path), f"--plan={self.plan} is no file; experiments/plan.py writes plans")
        return path

    def _vocabulary_follows(self, overrides: Mapping[str, str]) -> bool:
        """Returns whether the model's vocabulary follows a tokenizer that `overrides` of the configuration choose."""
        return "model.vocab_size" not in overrides and bool(overrides.keys() & _OF_THE_TOKENIZER)

    def _check_undecided(self, config_overrides: dict[str, str], mesh_overrides: dict[str, str], source: str) -> None:
        decided = [f"--mesh.{path}" for path in mesh_overrides]
        decided += [f"--config.{path}" for path in config_overrides if path.startswith("layout.")]
        if decided:
            raise ConfigError(
                f"{', '.join(decided)} cannot be changed: {source}, which decides it; change the plan's file, or use "
                "--mesh instead of --plan"
            )

    def _check_model(self, config: TrainConfig, name: str) -> None:
        """Refuses a model that the plan was not made for, but for its vocabulary, which the tokenizer decides."""
        planned = load_model(name, "config")
        for field in dataclasses.fields(planned):
            ours, theirs = getattr(config.model, field.name), getattr(planned, field.name)
            check(
                ours == theirs or field.name == "vocab_size",
                f"--plan={self.plan} is for --config={name}, with model.{field.name}={theirs}, not {ours}; "
                "leave out the flag that changes it, or plan the other model with experiments/plan.py",
            )

    def _names(self) -> list[str]:
        return [*super()._names(), *(path.removeprefix("--") for path in field_paths())]

    def _hint_for_word(self, word: str) -> str:
        for flag, names in (("config", config_names()), ("mesh", mesh_names()), ("plan", plan_names())):
            if word in names:
                return f"did you mean --{flag}={word}? "
        return f"did you mean --data={word}? " if os.path.exists(word) else super()._hint_for_word(word)

    def _config_help(self, name: str, config: TrainConfig, with_options: bool) -> str:
        """Returns the flags that a run needs first, with an example each; then names, the other flags and fields."""
        fields, mesh_config = _fields(config), config.layout.mesh
        summary, _, details = self._usage.partition("\n")
        meanings = {name: self[name].help for name in self} | {
            field.path: f"{field.meaning.capitalize()}." for field in fields
        }
        first = [_columns(f"--{name}={example}", meanings[name], 20) for name, example in self._first.items()]
        rest = [name for name in self if name not in self._first]
        parts = [
            summary,
            *(["The flags that a run needs most, with an example each:\n" + "\n".join(first)] if first else []),
            f"Configs: {', '.join(config_names())}.\nMeshes: {', '.join(mesh_names())}.\n"
            f"Plans: {', '.join(plan_names())}.",
            details.strip("\n"),
            f"{'Other flags' if first else 'Flags'}:\n{self._flag_help(rest)}",
            f"Fields, as --config={name} and --mesh={self.mesh} have them:\n" + "\n".join(map(_field_help, fields)),
        ]
        if with_options:
            options = in_force(mesh_config.platform, config.compiler_options)
            lines = [f"  {o.name}={o.value}\n      {o.reason} ({o.source})" for o in options]
            parts += [
                f"Options that XLA compiles a {mesh_config.platform} program with, --config.compiler_options included:"
            ]
            parts[-1] += "\n" + ("\n".join(lines) or "  none")
        else:
            parts.append("--help=full also lists the options that XLA compiles with.")
        return "\n\n".join(parts)


def field_paths() -> list[str]:
    """Returns every field as the flag that sets it, such as --config.model.num_layers."""
    return [f"--{field.path}" for field in _fields(TrainConfig())]


def _fields(config: TrainConfig) -> list[FieldInfo]:
    """Returns every field with the flag that sets it; those of a layout's mesh have flags of their own."""
    fields = [f for f in describe(config, "config.") if not f.path.startswith("config.layout.mesh.")]
    return fields + describe(config.layout.mesh, "mesh.")


# Where the fields of version 0.1 are today, by the beginning of their path.
_RENAMED = {
    "accumulate": "layout.grad_accumulation_steps", "data.seq_len": "layout.seq_len",
    "data.batch_size": "layout.batch_size", "parallel.repeats": "layout.pipeline_repeats", "parallel.": "layout.",
    "dispatch.hosts": "layout.dispatch.hierarchical", "dispatch.payload": "layout.dispatch.wire_dtype",
    "dispatch.": "layout.dispatch.",
    **{f"model.{name}": f"model.{path}" for name, path in MOVED_FIELDS.items()},
}  # fmt: skip


def _check_name(path: str) -> None:
    """Refuses a field that --config does not set, and names the flag that does."""
    check(not path.startswith("layout.mesh."), f"--config.{path} is --{path.removeprefix('layout.')}")
    for before, now in _RENAMED.items():
        if path == before or (before.endswith(".") and path.startswith(before)):
            raise ConfigError(f"--config.{path} is called --config.{now}{path[len(before) :]} now")


def _field_help(field: FieldInfo) -> str:
    choices = f" ({' | '.join(field.choices)})" if field.choices else ""
    return _columns(f"--{field.path}={field.text}", f"{field.meaning}{choices}", 46)


def _columns(flag: str, meaning: str, width: int) -> str:
    """Returns `flag` with its meaning beside it, in a column that starts after `width`."""
    return textwrap.fill(meaning, 120, initial_indent=f"  {flag:{width}}  ", subsequent_indent=" " * (width + 4))


def _apply(prefix: str, config: T, overrides: dict[str, str]) -> T:
    try:
        return apply_overrides(config, overrides)
    except ConfigError as error:
        raise ConfigError(f"--{prefix}.{error}") from None


_OF_THE_TOKENIZER = {"data.tokenizer", "data.tokenizer_vocab_size"}


def _with_tokenizers_vocabulary(config: TrainConfig) -> TrainConfig:
    """Returns `config` with room for every id of its tokenizer, in a vocabulary that divides over its meshes."""
    divisor = math.lcm(*(layout.mesh.pipeline * layout.mesh.tensor for layout in config.layouts))
    size = math.ceil(tokenizer_vocab_size(config.data) / divisor) * divisor
    if size == config.model.vocab_size:
        return config
    print(f"--config.model.vocab_size={size} follows --tokenizer={config.data.tokenizer}", file=sys.stderr)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
