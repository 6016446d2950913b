"""Compares a run that is started again with the record in its work directory, and decides what may differ.

The record is the last start in `run.json`. If that file is missing, it is the configuration in the newest checkpoint.
`KINDS` gives each field of `TrainConfig` a kind, which decides what happens if the field differs from the record.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moejax.checks import ConfigError, check
from moejax.overrides import from_record
from moejax.train.checkpoint import METADATA, list_steps
from moejax.train.config import TrainConfig
from moejax.train.files import read_json
from moejax.train.record import RECORD_FILE, read_starts, upgrade

CHECKPOINTS = "checkpoints"  # the folder of them in a work directory

# "free" fields may differ. "meaning" fields make it another run and need `override`; "drops" fields are of that kind
# under the strategy "capacity", and free under the others, which drop nothing. "fixed" fields cannot differ: the arrays
# or the batches would not fit. "data" fields may differ as long as they bring the same batches.
Kind = Literal["free", "meaning", "drops", "fixed", "data"]
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "steps", "eval_every", "eval_batches", "sample_tokens", "memory_limit_bytes", "compiler_options",
            "checkpoint.every", "checkpoint.keep",
            "layout.num_microbatches", "layout.pipeline_repeats", "layout.gather", "layout.remat", "layout.bubble",
            "layout.batch_split",
            "layout.dispatch.expert_axes", "layout.dispatch.hierarchical", "layout.dispatch.chunks",
            "balance.window", "balance.headroom", "balance.capacity_factors", "balance.max_load_cv",
            "balance.max_dropped_fraction", "balance.max_rounds", "balance.max_idle_experts",
        ),
        "free",
    ),
    **dict.fromkeys(("layout.dispatch.strategy", "layout.dispatch.capacity_factor"), "drops"),
    **dict.fromkeys(
        (
            "seed", "init", "upcycle", "layout.grad_accumulation_steps", "layout.dispatch.wire_dtype",
            "model.experts_per_token", "model.router.score", "model.router.renormalize", "model.max_seq_len",
            "model.rope.theta", "model.norm_eps", "model.dtype",
            "model.attention.multiplier", "model.rope.rotary_dim", "model.router.scaling",
            "model.router.num_groups", "model.router.groups_per_token",
            "model.rope.scaling.kind", "model.rope.scaling.factor", "model.rope.scaling.original_max_seq_len",
            "model.rope.scaling.low_freq_factor", "model.rope.scaling.high_freq_factor",
            "model.rope.scaling.beta_fast", "model.rope.scaling.beta_slow", "model.rope.scaling.truncate",
            "model.rope.scaling.attention_factor",
            "model.rope.scaling.short_factors", "model.rope.scaling.long_factors",
            "model.embedding_multiplier", "model.residual_multiplier", "model.logits_divisor",
            "balance.aux_loss_weight", "balance.sequence_loss_weight", "balance.z_loss_weight",
            "balance.bias_update_rate",
            "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.final_learning_rate_fraction",
            "optimizer.b1", "optimizer.b2", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm",
        ),
        "meaning",
    ),
    **dict.fromkeys(
        (
            "model.num_layers", "model.d_model", "model.d_ff", "model.num_experts", "model.shared_d_ff",
            "model.num_dense_layers", "model.dense_d_ff", "model.vocab_size", "model.tie_embeddings",
            "model.attention.num_heads", "model.attention.num_kv_heads", "model.attention.head_dim",
            "model.attention.qk_norm", "model.attention.bias", "model.attention.output_bias",
            "model.attention.latent.kv_rank", "model.attention.latent.q_rank",
            "model.attention.latent.rope_head_dim", "model.attention.latent.value_head_dim",
            "model.router.bias", "model.shared_gate",
            "layout.seq_len", "layout.batch_size", "data.seed",
        ),
        "fixed",
    ),
    **dict.fromkeys(
        (
            "data.paths", "data.tokenizer", "data.tokenizer_vocab_size", "data.separator", "data.eval_fraction",
            "data.block_steps",
        ),
        "data",
    ),
}  # fmt: skip
_LONGEST_VALUE, _MOST_NAMED = 60, 8


@dataclasses.dataclass(frozen=True)
class Record:
    """What a work directory holds: the run's configuration, its data's fingerprint, and whether there is a checkpoint.

    `lines` say in which way another version wrote it.
    """

    config: TrainConfig
    data_fingerprint: str
    has_checkpoint: bool
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field that is not as it is in the run."""

    path: str
    recorded: Any
    asked: Any
    kind: Kind

    def __str__(self) -> str:
        flag = "" if self.path.startswith("layouts") else "--"
        return f"{flag}{self.path}: {_text(self.recorded)} in the run, {_text(self.asked)} asked for"


def read_record(workdir: Path) -> Record | None:
    """Returns what the work directory says of its run; None if it holds none.

    Raises:
      ConfigError: it holds one that cannot be read.
    """
    steps = _steps_of(workdir / CHECKPOINTS)
    source, missing = workdir / RECORD_FILE, ""
    start = read_starts(workdir)[-1] if source.exists() else None
    if start is None:
        if not steps:
            return None
        missing = f"{source} is missing, and "
        source = workdir / CHECKPOINTS / str(steps[-1]) / METADATA / "metadata"
    try:
        saved = read_json(source) if start is None else start
        fingerprint = saved["data" if start is None else "data_fingerprint"]
        check(isinstance(fingerprint, str), f"the fingerprint of the data, {fingerprint!r}, must be text")
        config, lines = from_record(TrainConfig, upgrade(saved), "config")
    except (OSError, ValueError, LookupError, TypeError) as error:  # no file, no JSON, a wrong value, a missing field
        why = error if isinstance(error, ConfigError) else repr(error)
        raise ConfigError(
            f"{missing}{source} is of another version, or was changed: {why}; restore it, or use another workdir"
        ) from None
    return Record(config, fingerprint, bool(steps), tuple(f"{source}: {line}" for line in lines))


def _steps_of(checkpoints: Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first.

    Raises:
      ConfigError: `checkpoints` exists, but is not a folder that can be read and written.
    """
    if not os.path.lexists(checkpoints):
        return []
    why = f"cannot be used as the folder of checkpoints; move {checkpoints} away, or use another workdir"
    try:
        steps = list_steps(checkpoints)
    except OSError as error:
        raise ConfigError(f"{checkpoints} ({error.strerror}) {why}") from None
    check(os.access(checkpoints, os.W_OK | os.X_OK), f"{checkpoints} (Permission denied) {why}")
    return steps


def compare(recorded: TrainConfig, asked: TrainConfig) -> list[Difference]:
    """Returns the fields that differ, but for those that only one of the two has."""
    before, after = _fields(recorded), _fields(asked)
    return [
        Difference(path, value, after[path], _kind(path, before, after))
        for path, value in before.items()
        if path in after and value != after[path]
    ]


def check_run(record: Record, asked: TrainConfig, workdir: Path, *, override: bool) -> list[str]:
    """Returns a line per field, data aside, in which `asked` differs from the run in `workdir` that it resumes.

    Raises:
      ConfigError: the run cannot be resumed so; or it can, but would be another run, and `override` is False.
    """
    differences = [d for d in compare(record.config, asked) if d.kind != "data"]
    fixed = [d for d in differences if d.kind == "fixed"] if record.has_checkpoint else []
    _refuse(
        fixed, f"the run in {workdir} cannot be resumed with this; leave it out, or use another workdir for a new run"
    )
    meaning = [d for d in differences if d.kind == "meaning"] if record.has_checkpoint and not override else []
    _refuse(
        meaning,
        f"this would make it another run than the one in {workdir}; leave it out, add --override (in Python "
        "override=True) to resume anyway, or use another workdir for a new run",
    )
    return [*record.lines, *map(str, differences)]


def check_data(record: Record, asked: TrainConfig, fingerprint: str, workdir: Path) -> list[str]:
    """Returns a line per field of the data in which `asked` differs from the run in `workdir`.

    Raises:
      ConfigError: there is a checkpoint, and they bring other text or other ids than it was trained on.
    """
    differences = [d for d in compare(record.config, asked) if d.kind == "data"]
    if record.has_checkpoint and record.data_fingerprint != fingerprint:
        _refuse(
            differences,
            f"the run in {workdir} has another training text or tokenizer; leave this out, or use another "
            "workdir for a new run",
        )
        raise ConfigError(
            f"the run in {workdir} has another training text or tokenizer: the files of "
            f"data.paths={_text(asked.data.paths)} or of data.tokenizer={asked.data.tokenizer} have "
            "changed since; restore them, or use another workdir for a new run"
        )
    return [str(difference) for difference in differences]


def _fields(config: TrainConfig) -> dict[str, Any]:
    """Returns every field that can differ, by the flag that sets it or, of several layouts, by its place in them."""
    fields = {f"config.{path}": value for path, value in _leaves(config).items() if path != "layouts"}
    many = len(config.layouts) > 1
    fields["layouts"] = tuple(f"{layout.batch_size}x{layout.seq_len}" for layout in config.layouts) if many else ()
    for i, layout in enumerate(config.layouts):
        for path, value in _leaves(layout).items():
            if many:
                fields[f"layouts[{i}].{path}"] = value
            else:
                fields[path if path.startswith("mesh.") else f"config.layout.{path}"] = value
    return fields


def _kind(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Kind:
    owner, _, field = path.partition(".")
    if not field:
        return "fixed"  # the layouts' shapes
    if owner == "mesh" or field.startswith("mesh."):
        return "free"
    kind = KINDS[field if owner == "config" else f"layout.{field}"]
    if kind == "drops":
        strategy = f"{path.partition('dispatch.')[0]}dispatch.strategy"
        return "meaning" if "capacity" in (before[strategy], after[strategy]) else "free"
    return kind


def _refuse(differences: Sequence[Difference], why: str) -> None:
    if differences:
        named = [str(difference) for difference in differences[:_MOST_NAMED]]
        more = len(differences) - len(named)
        raise ConfigError(f"{'; '.join(named)}{f'; and {more} more' if more else ''}; {why}")


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of nested dataclasses by their dotted path."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        leaves |= _leaves(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return leaves


def _text(value: Any) -> str:
    """Returns a value as flags have it, cut where it is long."""
    text = str(value)
    if isinstance(value, tuple):
        text = ",".join(map(_text, value)) or "none"
    elif isinstance(value, bool):
        text = text.lower()
    elif isinstance(value, float):
        text = text.removesuffix(".0")
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
