"""The flags of a script that trains in a --workdir. If it holds a run, flags change what that run's record says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from absl import flags

from experiments.shared.common import ConfigFlags
from moejax.checks import check, expand
from moejax.config import BalanceConfig, DataConfig
from moejax.interop import Upcycling, read_model_config
from moejax.layout import Layout
from moejax.train.config import TrainConfig
from moejax.train.resume import read_record


class RunFlags(ConfigFlags):
    """The flags of a script that trains, with --workdir, --override, --init and --upcycle.

    If --workdir holds a run, its record replaces the defaults of --config and of --mesh or --plan. Flags that are given
    still count; `Trainer` then compares what was asked for with the record.
    """

    def __init__(self, usage: str | None, *, first: Mapping[str, str]) -> None:
        super().__init__(usage, first=first)
        self.define_output(
            "workdir",
            "Where checkpoints and metrics go; a run that is there goes on. Default: a new folder in runs/.",
            folder=True,
        )
        flags.DEFINE_string(
            "init", None,
            "A Hugging Face checkpoint's folder to begin with: its model, weights and tokenizer, instead of --config.",
            flag_values=self,
        )  # fmt: skip
        flags.DEFINE_string(
            "upcycle", None,
            "Make experts of the feed-forwards of a dense --init: num_experts=8,experts_per_token=2, and with "
            "granularity=2 experts of half the width, or with reinit_ratio=0.5 half of their units drawn anew.",
            flag_values=self,
        )  # fmt: skip
        flags.DEFINE_boolean(
            "override", False, "Resume the run in --workdir even if flags make it another one.", flag_values=self
        )

    def _base_config(self, name: str) -> TrainConfig:
        check(
            self.upcycle is None or self.init is not None,
            f"--upcycle={self.upcycle} has no weights to begin with; give a dense checkpoint with --init",
        )
        if self.init is not None:
            return self._initialized()
        run = self._run("config")
        return super()._base_config(name) if run is None else run

    def _layouts(self, config: TrainConfig) -> tuple[tuple[Layout, ...], str]:
        run = self._run("mesh") if self.plan is None else None
        if run is None:
            return super()._layouts(config)
        if len(run.layouts) > 1:
            return run.layouts, f"the run in --workdir={self.workdir} follows a plan"
        return (config.layout.replace(mesh=run.layout.mesh),), ""

    def _vocabulary_follows(self, overrides: Mapping[str, str]) -> bool:
        return self.init is None and self._run("config") is None and super()._vocabulary_follows(overrides)

    def _initialized(self) -> TrainConfig:
        """Returns the configuration of a run that begins with --init, before overrides."""
        check(not self["config"].present, f"--config={self.config} and --init={self.init} both say the model; give one")
        model = read_model_config(self.init)
        if self.upcycle is not None:
            model = Upcycling.parse(self.upcycle).model(model)
        folder = expand(self.init, "init")
        check(
            self.tokenizer is not None or Path(folder, "tokenizer.json").is_file(),
            f"--init={self.init} has no tokenizer.json; give its model's tokenizer with --tokenizer",
        )
        return TrainConfig(
            model=model,
            layouts=(Layout(seq_len=min(Layout().seq_len, model.max_seq_len)),),
            balance=BalanceConfig.suited_to(model),
            data=DataConfig(tokenizer=str(folder)),
            init=str(folder),
            upcycle=self.upcycle or "",
        )

    def _run(self, flag: str) -> TrainConfig | None:
        """Returns the run in --workdir; None if there is none, or if `flag`, whose default it replaces, was given."""
        record = None if self[flag].present or self.workdir is None else read_record(self.workdir)
        return None if record is None else record.config
