"""The flags of a script that trains in a --workdir. If it holds a run, flags change what that run's record says."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from absl import flags

from experiments.shared.common import ConfigFlags
from moejax.config import TrainConfig
from moejax.mesh import MeshConfig
from moejax.overrides import from_record
from moejax.train.resume import Run, read_record
from moejax.train.schedule import Bucket


class RunFlags(ConfigFlags):
    """The flags of a script that trains, with --workdir and --override.

    If --workdir holds a run, its record replaces the defaults of --config and --mesh. Flags that are given still count;
    `Trainer` then compares what was asked for with the record.
    """

    def __init__(self, usage: str | None, *, first: Mapping[str, str]) -> None:
        super().__init__(usage, first=first)
        self.define_output(
            "workdir",
            "Where checkpoints and metrics go; a run that is there goes on. Default: a new folder in runs/.",
            folder=True,
        )
        flags.DEFINE_boolean(
            "override", False, "Resume the run in --workdir even if flags make it another one.", flag_values=self
        )

    def plan_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets of the plan that `--mesh` names, or without it those of the run in --workdir."""
        run = self._run("mesh")
        return super().plan_buckets() if run is None else run.buckets

    def _base_config(self, name: str) -> TrainConfig:
        run = self._run("config")
        return super()._base_config(name) if run is None else run.config

    def _base_mesh(self) -> MeshConfig:
        run = self._run("mesh")
        if run is None:
            return super()._base_mesh()
        mesh_config, lines = from_record(MeshConfig, run.mesh, "mesh")
        for line in lines:
            print(f"the record in {self.workdir}: {line}", file=sys.stderr)
        return mesh_config

    def _vocabulary_follows(self, overrides: Mapping[str, str]) -> bool:
        return self._run("config") is None and super()._vocabulary_follows(overrides)

    def _plan_name(self) -> str:
        return super()._plan_name() if self._run("mesh") is None else f"the run in --workdir={self.workdir}"

    def _run(self, flag: str) -> Run | None:
        """Returns the run in --workdir; None if there is none, or if `flag`, whose default it replaces, was given."""
        record = None if self[flag].present or self.workdir is None else read_record(self.workdir)
        return None if record is None else record.run
