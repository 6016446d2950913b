"""What every script shares: names in files and presets, flags, and errors of one line.

A script that takes neither --config nor --mesh reads:

    def main(argv: list[str]) -> None:
        loading.parse_flags(argv)
        ...

    if __name__ == "__main__":
        loading.run(main)
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from moejax.config import BalanceConfig, ConfigError, ModelConfig, TrainConfig, check
from moejax.mesh import MeshConfig
from moejax.overrides import call_in_file, load_config_file
from moejax.planner.hardware import Cluster
from moejax.presets import PRESETS
from moejax.train.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "experiments" / "configs"
MESH_CONFIGS = ROOT / "mesh_configs"


def parse_flags(argv: Sequence[str], *, positional: bool = False) -> list[str]:
    """Parses the flags of a script that takes nothing else, but for `positional` arguments, which are returned.

    Raises:
      ConfigError: a flag that does not exist, a value that is wrong, or a positional argument that is not taken.
    """
    try:
        rest = flags.FLAGS([a for a in argv if a != "--help"])
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"did you mean --{close[0]}? " if close else ""
        raise ConfigError(f"--{error.flagname} does not exist; {hint}--help lists all") from None
    except flags.Error as error:
        raise ConfigError(f"{' '.join(str(error).split())}; --help lists all") from None
    if "--help" in argv:
        script = sys.modules["__main__"]
        print(f"{(script.__doc__ or '').strip()}\n\nFlags:\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    if len(rest) > 1 and not positional:
        raise ConfigError(f"{' '.join(rest[1:])} is no flag; flags start with --")
    return rest[1:]


def load_model(name: str) -> ModelConfig:
    """The model of a preset, or of what `load_config` finds."""
    return PRESETS[name]() if name in PRESETS else load_config(name).model


def load_cluster(name: str) -> Cluster:
    """The cluster of a name in mesh_configs or of a file: its `get_cluster()`, else the devices that its mesh takes."""
    path = find(name, MESH_CONFIGS)
    if path is None:
        raise ConfigError(_unknown("cluster", name, _names(MESH_CONFIGS)))
    found = call_in_file(path, "get_cluster", "Cluster")
    check(
        found is None or isinstance(found, Cluster),
        f"{path}: get_cluster() returned {found!r:.80}; it must return a moejax.planner.hardware.Cluster",
    )
    return found or Cluster.of_mesh(path.stem, load_config_file(path, MeshConfig))


def load_config(name: str) -> TrainConfig:
    """The configuration of a file, of a name in experiments/configs, or the defaults around a preset's model."""
    path = find(name, CONFIGS)
    if path is not None:
        return load_config_file(path, TrainConfig)
    if name in PRESETS:
        model = PRESETS[name]()
        return TrainConfig(model=model, balance=BalanceConfig.suited_to(model))
    raise ConfigError(_unknown("config", name, {*_names(CONFIGS), *PRESETS}))


def load_mesh_config(name: str) -> MeshConfig:
    """The mesh of a file, or of a name in mesh_configs."""
    path = find(name, MESH_CONFIGS)
    if path is None:
        raise ConfigError(_unknown("mesh", name, _names(MESH_CONFIGS)))
    return load_config_file(path, MeshConfig)


def find(name: str, folder: Path) -> Path | None:
    """The file that `name` stands for: itself if it ends in .py (from here or the repository), else in `folder`."""
    if name.endswith(".py"):
        path = Path(name).expanduser()
        return path if path.exists() or not (ROOT / path).exists() else ROOT / path
    path = folder / f"{name}.py"
    return path if path.exists() else None


def _names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def _unknown(flag: str, name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"--{flag}={name} does not exist; {hint}use one of {', '.join(sorted(names))}, or a path that ends in .py"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(sys.argv)` and exits. What the user can mend is one line on stderr, without a traceback.

    The status is 2 for a `ConfigError`, 1 for checkpoints that cannot be used and for a loss that is not finite.
    """
    try:
        sys.exit(main(sys.argv))
    except (ConfigError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
