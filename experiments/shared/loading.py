"""What every script shares: its flags, names in files and presets, outputs, and errors of one line.

A script that takes neither --config nor --mesh reads:

    FLAGS = loading.Flags(__doc__)
    _TOP = flags.DEFINE_integer("top", 20, "How many to list.", flag_values=FLAGS)
    _OUT = FLAGS.define_output("out", "A Markdown file for the table.")


    def main(argv: list[str]) -> None:
        FLAGS.parse(argv)
        ...


    if __name__ == "__main__":
        loading.run(main, FLAGS)
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.published_runs.models import find_architecture, what_is_missing
from experiments.shared.outputs import OutputParser, identity
from moejax import strict_json
from moejax.checks import ConfigError, check, expand, one_line
from moejax.config import BalanceConfig, ModelConfig
from moejax.interop import read_model_config
from moejax.mesh import MeshConfig
from moejax.overrides import call_in_file, is_flag, load_config_file
from moejax.planner.hardware import Cluster
from moejax.presets import PRESETS
from moejax.train.checkpoint import CheckpointError
from moejax.train.config import TrainConfig
from moejax.train.progress import show_logs

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
CONFIGS = EXPERIMENTS / "configs"
MESH_CONFIGS = ROOT / "mesh_configs"
PLANS = MESH_CONFIGS / "plans"
FULL_HELP = ("--help=full", "-help=full", "--helpfull", "-helpfull")
ALIASES = {  # other programs' names for flags and fields: what they may be here
    "config": ("model",), "model": ("config",), "preset": ("config", "model"), "mesh": ("cluster",),
    "cluster": ("mesh",), "devices": ("mesh", "cluster"), "gpus": ("mesh", "cluster"), "hardware": ("cluster",),
    "dataset": ("data",), "output": ("out", "workdir"), "output_dir": ("workdir", "out"), "save_dir": ("workdir",),
    "resume": ("workdir",), "checkpoint_dir": ("workdir",), "lr": ("config.optimizer.learning_rate",),
    "wd": ("config.optimizer.weight_decay",), "epochs": ("config.steps",), "max_steps": ("config.steps",),
    "iters": ("config.steps",), "train_steps": ("config.steps",), "top_k": ("config.model.experts_per_token",),
    "hidden_size": ("config.model.d_model",), "dim": ("config.model.d_model",), "n_layer": ("config.model.num_layers",),
    "n_head": ("config.model.attention.num_heads",), "block_size": ("config.layout.seq_len",),
    "precision": ("config.model.dtype",),
    "context_length": ("config.layout.seq_len",), "grad_accum": ("config.layout.grad_accumulation_steps",),
    "bs": ("config.layout.batch_size",),
    "fsdp": ("config.layout.gather",), "tp": ("mesh.tensor",), "ep": ("mesh.expert",), "pp": ("mesh.pipeline",),
}  # fmt: skip
HELP = ("-h", "--h", "-help", "--help", "-helpshort", "--helpshort", *FULL_HELP)


MAX_NUMBER = 2**31 - 1  # of a list of numbers


class NumbersParser(flags.ArgumentParser[list[int]]):
    """Reads whole numbers from `lower` to `MAX_NUMBER`, with commas between."""

    def __init__(self, lower: int) -> None:
        self._lower = lower

    def parse(self, argument: str | list[int]) -> list[int]:
        if isinstance(argument, list):  # the default
            return argument
        for text in argument.split(","):
            digits = text.strip()
            many = digits.isdecimal() and len(digits) > 10  # of which Python reads 4,300 at most
            check(
                digits.isdecimal() and (many or int(text) >= self._lower),
                f"{argument}: {text!r} must be a whole number of at least {self._lower}",
            )
            check(not many and int(text) <= MAX_NUMBER, f"{argument:.40}: {text!r:.40} must be at most {MAX_NUMBER:,}")
        return [int(text) for text in argument.split(",")]


class Flags(flags.FlagValues):
    """The flags of one script, apart from those of other scripts, so that one process can run any number of scripts.

    Each `parse` starts from the defaults again. `usage` is the script's docstring, which --help shows first.
    """

    def __init__(self, usage: str | None) -> None:
        super().__init__()
        self.__dict__["_usage"] = (usage or "").strip()  # absl takes other attributes for flags

    def define_output(
        self, name: str, meaning: str, *suffixes: str, folder: bool = False
    ) -> flags.FlagHolder[Path | None]:
        """Defines a flag for a file that the script writes, or for a folder; `parse` refuses what cannot be written.

        The file must have one of `suffixes`, if there are any. With those of `moejax.plots`, it is a picture.
        """
        return flags.DEFINE(OutputParser(suffixes, folder), name, None, meaning, flag_values=self)

    def define_numbers(
        self, name: str, default: list[int], meaning: str, lower: int = 1
    ) -> flags.FlagHolder[list[int]]:
        """Defines a flag for whole numbers of at least `lower`, with commas between."""
        serializer = flags.CsvListSerializer(",")
        return flags.DEFINE(NumbersParser(lower), name, default, meaning, flag_values=self, serializer=serializer)

    def parse(self, argv: Sequence[str], *, positional: bool = False) -> list[str]:
        """Reads the flags from `argv`, and returns the other arguments, which only `positional` allows.

        Raises:
          ConfigError: a flag that does not exist, a value that is wrong, an output that cannot be written, or an
            argument that is not a flag.
        """
        rest, wants_help = self._read(argv, positional)
        if wants_help:
            print(self._help())
            sys.exit(0)
        return rest

    def _read(self, argv: Sequence[str], positional: bool = False) -> tuple[list[str], str]:
        """Returns the arguments that are not flags, and the one that asks for help, "" without one."""
        arguments = ["--help" if i == 0 and text == "help" else text for i, text in enumerate(argv[1:])]
        wants_help = next((argument for argument in arguments if argument in HELP), "")
        self._check_arguments(arguments)
        self.unparse_flags()
        try:
            rest = self([argv[0], *(argument for argument in arguments if argument not in HELP)])[1:]
        except flags.UnrecognizedFlagError as error:
            name = error.flagname
            raise ConfigError(f"--{name} does not exist; {self._hint(name)}--help lists all") from None
        except flags.IllegalFlagValueError as error:
            raise ConfigError(self._wrong_value(error)) from None
        except (flags.Error, ValueError) as error:
            raise ConfigError(f"{one_line(error)}; --help lists all") from None
        if rest and not positional:
            raise ConfigError(
                f"argument {' '.join(rest)} is no flag; {self._hint_for_word(rest[0])}flags start with --"
            )
        self._check_files({})
        return rest, wants_help

    def _check_arguments(self, arguments: Sequence[str]) -> None:
        """Refuses what absl would take for something else, such as `--workdir --config=tiny` for a folder's name."""
        for argument, following in itertools.zip_longest(arguments, arguments[1:]):
            if argument == "--":
                return
            name, equals, _ = argument.lstrip("-").partition("=")
            if not is_flag(argument):
                continue
            check(name not in ("flagfile", "undefok"), f"--{name} is not supported; give the flags themselves")
            check(argument in HELP or name != "help", "--help takes no value but full")
            if name in self and not self[name].boolean and not equals:
                check(following is not None and not is_flag(following), f"--{name} needs a value; write --{name}=VALUE")

    def _check_files(self, inputs: Mapping[str, str]) -> None:
        """Refuses empty lists, and an output that is also an input or another output, however the two are spelled.

        `inputs` are values by name that may name files beside those of the flags.
        """
        read = {identity(path): name for name, value in inputs.items() for path in _named(value)}
        for name in self:
            flag, value = self[name], self[name].value
            if isinstance(flag.parser, flags.BaseListParser):
                check(value != [], f"--{name}= needs one value at least; leave out --{name} for the default")
            if isinstance(value, str) and not isinstance(flag.parser, flags.EnumParser):
                read |= {identity(path): name for path in _named(value)}
        written: dict[Any, str] = {}
        for name in self:
            value = self[name].value
            if not isinstance(self[name].parser, OutputParser) or value is None:
                continue
            file = identity(value)
            check(file not in read, f"--{name}={value} is the file that --{read.get(file)} reads; give another file")
            check(file not in written, f"--{written.get(file)} and --{name} are both {value}; give two files")
            written[file] = name

    def with_flag(self, message: str) -> str:
        """Returns `message` with --name for the name that it begins with, if this is a flag's."""
        name, equals, _ = message.partition("=")
        return f"--{message}" if equals and name in self else message

    def _names(self) -> list[str]:
        """Returns what can stand before the = of a flag."""
        return list(self)

    def _hint(self, name: str) -> str:
        """Returns "did you mean ...? " for a name that is another program's, a part of a name here, or misspelled."""
        last, names = name.replace("-", "_").lower().rpartition(".")[2], self._names()
        by_end = {other.rpartition(".")[2]: other for other in reversed(names)}  # flags come before fields
        matches = [other for other in names if other.rpartition(".")[2] == last]
        matches = matches or [other for other in ALIASES.get(last, ()) if other in names]
        matches = matches or [other for other in names if last in other.rpartition(".")[2].split("_")]
        matches = matches or [by_end[end] for end in difflib.get_close_matches(last, by_end, n=1, cutoff=0.7)]
        return f"did you mean {' or '.join(f'--{match}' for match in matches[:2])}? " if matches else ""

    def _hint_for_word(self, word: str) -> str:
        """Returns "did you mean ...? " for an argument without the -- of a flag."""
        name, equals, value = word.removeprefix("config.").partition("=")
        return self._hint(name).replace("? ", f"={value}? ") if equals else ""

    def _wrong_value(self, error: flags.IllegalFlagValueError) -> str:
        """Returns what would be right, where absl says `flag --top=x: invalid literal for int() with base 10`."""
        why = str(error.__context__)
        given = str(error).removeprefix("flag ").removesuffix(f": {why}")
        name = given[2:].partition("=")[0]
        parser = self[name].parser
        if isinstance(parser, OutputParser | NumbersParser):
            return f"--{name}={why}"
        if isinstance(parser, flags.EnumParser):
            return f"{given} must be one of {', '.join(parser.enum_values)}"
        right = parser.syntactic_help or "true or false"
        return f"{given} must be {'a ' * right.startswith('number')}{right}"

    def _help(self) -> str:
        return f"{self._usage}\n\nFlags:\n{self._flag_help(self)}"

    def _flag_help(self, names: Iterable[str]) -> str:
        """Returns a line `--name=default` per flag, with its meaning below."""
        lines = []
        for name in names:
            flag = self[name]
            default = (flag.default_as_str or "").strip("'")
            meaning = textwrap.wrap(flag.help, 114, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [f"  --{name}{'=' * bool(default)}{default}", *meaning]
        return "\n".join(lines)


def _named(value: str) -> list[Path]:
    """Returns the files that the value of a flag may name, by itself or with commas between."""
    texts = [value, *value.split(",")]
    folders = (CONFIGS, MESH_CONFIGS, PLANS)
    places = [(Path(os.path.expanduser(t)), ROOT / t, *(folder / f"{t}.py" for folder in folders)) for t in texts]
    return [path for path in itertools.chain(*places) if os.path.isfile(path)]


def print_json(data: Any) -> None:
    """Prints the line of JSON that ends a script's output for other programs; people at a terminal see the tables."""
    if not sys.stdout.isatty():
        print(strict_json.dumps(data))


def load_model(name: str, flag: str = "model") -> ModelConfig:
    """Returns the model of what `load_config` finds; `flag` is what `name` was given with."""
    return load_config(name, flag).model


def load_cluster(name: str) -> Cluster:
    """The cluster of a name in mesh_configs or of a file: its `get_cluster()`, else the devices that its mesh takes."""
    path = find(name, MESH_CONFIGS)
    if path is None:
        raise ConfigError(unknown("cluster", name, mesh_names()))
    found = call_in_file(path, "get_cluster", "Cluster")
    check(
        found is None or isinstance(found, Cluster),
        f"{path}: get_cluster() returned {found!r:.80}; it must return a moejax.planner.hardware.Cluster",
    )
    return found or Cluster.of_mesh(path.stem, load_config_file(path, MeshConfig))


def load_config(name: str, flag: str = "config") -> TrainConfig:
    """Returns the configuration of a file or of a name in experiments/configs, or a model with defaults for the rest.

    The model is a preset, or that of config.json in the folder of a Hugging Face checkpoint. No weights are read.
    """
    path = find(name, CONFIGS)
    if path is not None:
        return load_config_file(path, TrainConfig)
    if name in PRESETS:
        model = PRESETS[name]()
    elif os.path.isdir(expand(name, f"--{flag}")):
        try:
            model = read_model_config(name)
        except ConfigError as error:
            raise ConfigError(str(error).replace("folder=", f"--{flag}=", 1)) from None
    else:
        raise ConfigError(unknown(flag, name, config_names(), _why_not(name)))
    return TrainConfig(model=model, balance=BalanceConfig.suited_to(model))


def _why_not(name: str) -> str:
    """Says why `name` is not a model that can be trained or planned, though it may be a published one."""
    try:
        model = find_architecture(name)
    except ConfigError:
        return "does not exist"
    missing = what_is_missing(model)
    but = (
        f"cannot be trained or planned yet, because moejax does not support {', '.join(missing)}"
        if missing
        else "has no preset; give the folder of its checkpoint, or describe it in a Python file with get_config()"
    )
    return f"is known from published runs ({model.name}), but {but}"


def load_mesh_config(name: str) -> MeshConfig:
    """The mesh of a file, or of a name in mesh_configs."""
    path = find(name, MESH_CONFIGS) or find(name, PLANS)
    if path is None:
        raise ConfigError(unknown("mesh", name, mesh_names()))
    if call_in_file(path, "get_config", "MeshConfig") is None:
        is_plan = call_in_file(path, "get_layouts", "tuple[Layout, ...]") is not None
        check(not is_plan, f"--mesh={name} is a plan; write --plan={name}")
    return load_config_file(path, MeshConfig)


def find(name: str, folder: Path) -> Path | None:
    """The file that `name` stands for: itself if it ends in .py (from here or the repository), else in `folder`."""
    if name.endswith(".py"):
        path = expand(name)
        return path if os.path.lexists(path) or not os.path.exists(ROOT / path) else ROOT / path
    path = folder / f"{name}.py"
    return path if os.path.exists(path) else None  # unlike `Path.exists`, False for a name that is too long


def config_names() -> list[str]:
    """Returns what --config takes beside files."""
    return sorted({*_names(CONFIGS), *PRESETS})


def mesh_names() -> list[str]:
    """Returns what --mesh and --cluster take beside files."""
    return sorted(_names(MESH_CONFIGS))


def plan_names() -> list[str]:
    """Returns what --plan takes beside files."""
    return sorted(_names(PLANS))


def _names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def unknown(flag: str, name: str, names: list[str], problem: str = "does not exist") -> str:
    """Says that --flag takes no `name`, and which it does."""
    close = difflib.get_close_matches(name, names, n=1)
    if "=" in name:  # --config steps=20
        close = [f"--{flag}.{name}"]
    hint = f"did you mean {close[0]}? " if close else ""
    return f"--{flag}={name} {problem}; {hint}use one of {', '.join(names)}, or a path that ends in .py"


def command(script: str, *arguments: str) -> str:
    """Returns the command that runs a script of experiments/, as it can be typed where this process was started."""
    path = EXPERIMENTS / f"{script}.py"
    here = Path.cwd()
    return shlex.join(["python", str(path.relative_to(here) if path.is_relative_to(here) else path), *arguments])


def run(main: Callable[[list[str]], int | None], script_flags: Flags) -> None:
    """Runs `main(sys.argv)` and exits. What the user can mend is one line on stderr, without a traceback.

    An error that begins with the name of a field of the configuration gets that of the flag which sets it, of
    `script_flags`.

    The status is 2 for a `ConfigError`, 1 for checkpoints that cannot be used, a loss that is not finite and a full
    disk, 130 for Ctrl-C, and 141 without a line where nobody reads on, as for other programs before `head`.
    """
    sys.stdout = sys.stdout or io.StringIO()  # `>&-` has closed it
    sys.stderr = sys.stderr or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # × where only ASCII can be written
    show_logs()
    try:
        try:
            status = main(sys.argv)
        finally:
            sys.stdout.flush()  # what fails, fails here and not when Python exits
        sys.exit(status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (ConfigError, CheckpointError, FloatingPointError) as error:
        print(f"error: {_printable(script_flags.with_flag(str(error)))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:
        _drop_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'an output'} cannot be written ({error.strerror})", file=sys.stderr)
        _drop_output()
        sys.exit(1)


def _drop_output() -> None:
    """Sends what standard output still holds nowhere, or Python would fail to write it again when it exits."""
    with open(os.devnull, "w") as nowhere, contextlib.suppress(io.UnsupportedOperation):  # not a real file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _printable(message: str) -> str:
    """Returns `message` with control characters spelled out and words of 200 characters cut."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return re.sub(r"\S{200,}", lambda word: f"{word[0][:80]}…", printable)
