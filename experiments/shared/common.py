"""What scripts share that take a model and a mesh: their flags, their configurations and how JAX is started.

A script reads:

    FLAGS = common.ConfigFlags(__doc__)


    def main(argv: list[str]) -> None:
        config, mesh_config = FLAGS.parse_configs(argv)
        FLAGS.setup_jax(mesh_config)
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
from typing import TypeVar

from absl import flags

from experiments.shared.loading import (
    FULL_HELP,
    MESH_CONFIGS,
    Flags,
    config_names,
    find,
    load_config,
    load_mesh_config,
    load_model,
    mesh_names,
)
from moejax import runtime
from moejax.compiler import in_force
from moejax.config import ConfigError, TrainConfig, check
from moejax.data import tokenizer_vocab_size
from moejax.mesh import MeshConfig
from moejax.overrides import FieldInfo, apply_overrides, describe, split_overrides
from moejax.topology import find_target
from moejax.train.schedule import DECIDES, Bucket, load_buckets, load_plan_model

T = TypeVar("T")


class ConfigFlags(Flags):
    """The flags of a script that takes --config, --mesh and overrides of their fields, beside its own flags."""

    def __init__(
        self, usage: str | None, *, config: str = "quickstart", first: Mapping[str, str] | None = None
    ) -> None:
        """`config` is the default of --config. `first` has the flags and fields that help begins with, and examples."""
        super().__init__(usage)
        self.__dict__["_first"] = first or {}
        for name, default, meaning in (
            ("config", config, "What to train: one of the configs below, or a Python file with get_config()."),
            ("mesh", "cpu_16", "What to run on: one of the meshes below, or a Python file such as plan.py writes."),
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

    def parse_configs(self, argv: Sequence[str]) -> tuple[TrainConfig, MeshConfig]:
        """Reads the flags from `argv` and returns the two configurations.

        `--config.a.b=value` and `--mesh.a=value` change fields of what `--config` and `--mesh` name. If `--mesh` is a
        plan, `--config` is by default what it was made for, the configuration has what its first bucket decides, and no
        flag may change that: a plan holds as a whole. A tokenizer that a flag chooses also sets the model's vocabulary,
        unless a flag sets that.

        Raises:
          ConfigError: a flag, a name, a file or an override that is wrong.
        """
        config_overrides, remaining = split_overrides(argv, "config")
        mesh_overrides, remaining = split_overrides(remaining, "mesh")
        _, wants_help = self._read(remaining)
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
        mesh_config = _apply("mesh", self._base_mesh(), mesh_overrides)
        plan_model = self._plan_model()
        name = self.config if self["config"].present or plan_model is None else plan_model
        config = _apply("config", self._base_config(name), config_overrides)
        data = config.data
        self._check_files({"config.data.paths": ",".join(data.paths), "config.data.tokenizer": data.tokenizer})
        buckets = self.plan_buckets()
        if buckets:
            self._check_undecided(config_overrides, mesh_overrides)
            config = buckets[0].applied(config)
        if plan_model is not None:
            self._check_model(config, plan_model)
        if self._vocabulary_follows(config_overrides):
            config = _with_tokenizers_vocabulary(config, [bucket.mesh for bucket in buckets] or [mesh_config])
        if wants_help:
            print(self._config_help(name, config, mesh_config, wants_help in FULL_HELP))
            sys.exit(0)
        return config, mesh_config

    def plan_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets of the plan that `--mesh` names, after the flags are read; none if it names a mesh."""
        path = find(self.mesh, MESH_CONFIGS)
        return load_buckets(path) if path is not None else ()

    def mesh_of_target(self, target: str, mesh_config: MeshConfig) -> MeshConfig:
        """Returns the mesh to compile for `target` with: that of --mesh if it was given, else the target's own.

        Either has the fields that flags change.

        Raises:
          ConfigError: there is no such target, or flags and its mesh do not go together.
        """
        find_target(target)
        return mesh_config if self["mesh"].present else _apply("mesh", load_mesh_config(target), self._mesh_overrides)

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

    def _base_mesh(self) -> MeshConfig:
        """Returns what overrides of the mesh change."""
        return load_mesh_config(self.mesh)

    def _vocabulary_follows(self, overrides: Mapping[str, str]) -> bool:
        """Returns whether the model's vocabulary follows a tokenizer that `overrides` of the configuration choose."""
        return "model.vocab_size" not in overrides and bool(overrides.keys() & _OF_THE_TOKENIZER)

    def _plan_name(self) -> str:
        return f"--mesh={self.mesh}"

    def _check_undecided(self, config_overrides: dict[str, str], mesh_overrides: dict[str, str]) -> None:
        decided = [f"--mesh.{path}" for path in mesh_overrides]
        decided += [f"--config.{path}" for path in config_overrides if path.startswith(DECIDES)]
        if decided:
            raise ConfigError(
                f"{', '.join(decided)} cannot be changed: {self._plan_name()} is a plan, which decides it; "
                "change the plan's file, or use a mesh without get_buckets()"
            )

    def _plan_model(self) -> str | None:
        """Returns what the plan that `--mesh` names was made for, as `--config` takes it; None if it does not say."""
        path = find(self.mesh, MESH_CONFIGS)
        return None if path is None else load_plan_model(path)

    def _check_model(self, config: TrainConfig, name: str) -> None:
        """Refuses a model that the plan was not made for, but for its vocabulary, which the tokenizer decides."""
        planned = load_model(name, "config")
        for field in dataclasses.fields(planned):
            ours, theirs = getattr(config.model, field.name), getattr(planned, field.name)
            check(
                ours == theirs or field.name == "vocab_size",
                f"--mesh={self.mesh} is a plan for --config={name}, with model.{field.name}={theirs}, not {ours}; "
                "leave out the flag that changes it, or plan the other model with experiments/plan.py",
            )

    def _names(self) -> list[str]:
        return [*super()._names(), *(path.removeprefix("--") for path in field_paths())]

    def _hint_for_word(self, word: str) -> str:
        for flag, names in (("config", config_names()), ("mesh", mesh_names())):
            if word in names:
                return f"did you mean --{flag}={word}? "
        return f"did you mean --data={word}? " if os.path.exists(word) else super()._hint_for_word(word)

    def _config_help(self, name: str, config: TrainConfig, mesh_config: MeshConfig, with_options: bool) -> str:
        """Returns the flags that a run needs first, with an example each; then names, the other flags and fields."""
        fields = describe(config, "config.") + describe(mesh_config, "mesh.")
        summary, _, details = self._usage.partition("\n")
        meanings = {name: self[name].help for name in self} | {
            field.path: f"{field.meaning.capitalize()}." for field in fields
        }
        first = [_columns(f"--{name}={example}", meanings[name], 20) for name, example in self._first.items()]
        rest = [name for name in self if name not in self._first]
        parts = [
            summary,
            *(["The flags that a run needs most, with an example each:\n" + "\n".join(first)] if first else []),
            f"Configs: {', '.join(config_names())}.\nMeshes: {', '.join(mesh_names())}.",
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
    return [f"--{field.path}" for field in describe(TrainConfig(), "config.") + describe(MeshConfig(), "mesh.")]


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


def _with_tokenizers_vocabulary(config: TrainConfig, meshes: Sequence[MeshConfig]) -> TrainConfig:
    """Returns `config` with room for every id of its tokenizer, in a vocabulary that divides over the meshes."""
    divisor = math.lcm(*(mesh.pipeline * mesh.tensor for mesh in meshes))
    size = math.ceil(tokenizer_vocab_size(config.data) / divisor) * divisor
    if size == config.model.vocab_size:
        return config
    print(f"--config.model.vocab_size={size} follows --tokenizer={config.data.tokenizer}", file=sys.stderr)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
