"""The plans that the planner is audited with, what the compilers said about them, and the table of both.

`configs/memory_grid.csv` lists the plans, one a line, and says which of them the formulas were made with: with those
where `used_for_fitting` is false nothing was fitted. `results/memory_compiled.jsonl` has the compilers' figures.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax import strict_json
from moejax.config import DispatchConfig, ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner.memory import predict_memory
from moejax.presets import get_preset

FOLDER = Path(__file__).resolve().parents[1]
GRID = FOLDER / "configs" / "memory_grid.csv"
RECORD = FOLDER / "results" / "memory_compiled.jsonl"
HARDWARE = {"h100_2x8": "h100", "tpu_v5p_16": "tpu_v5p", "tpu_v5e_16": "tpu_v5e"}
HELD_OUT, FITTED = "held out", "fitted"

_GRID_COLUMNS = (
    "model", "target", "expert", "pipeline", "tensor", "seq_len", "batch_size", "microbatches", "repeats", "remat",
    "gather", "strategy", "capacity_factor", "expert_axes", "batch_split", "chunks", "hosts", "accumulate",
    "used_for_fitting",
)  # fmt: skip
_COLUMNS = ("model", "target", "e × p × t", "batch", "plan", "predicted, GB", "compiled, GB", "error", "")
HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the grid: a model by name, the target to compile it for, and the layout."""

    name: str
    target: str
    model: ModelConfig
    layout: Layout
    used_for_fitting: bool

    @classmethod
    def parse(cls, row: dict[str, str]) -> Case:
        model = get_preset(row["model"])
        seq_len = int(row["seq_len"])
        if seq_len > model.max_seq_len:
            model = dataclasses.replace(model, max_seq_len=seq_len)
        hosts = int(row["hosts"])
        sizes = {axis: int(row[axis]) for axis in ("expert", "pipeline", "tensor")}
        layout = Layout(
            MeshConfig(**sizes, hardware=HARDWARE[row["target"]], hosts=hosts),  # type: ignore[arg-type]
            seq_len=seq_len,
            batch_size=int(row["batch_size"]),
            grad_accumulation_steps=int(row["accumulate"]),
            num_microbatches=int(row["microbatches"]),
            pipeline_repeats=int(row["repeats"]),
            gather=row["gather"],  # type: ignore[arg-type]
            remat=row["remat"],  # type: ignore[arg-type]
            batch_split=int(row["batch_split"]),
            dispatch=DispatchConfig(
                strategy=row["strategy"],  # type: ignore[arg-type]
                capacity_factor=float(row["capacity_factor"]),
                expert_axes=tuple(row["expert_axes"].split("+")),  # type: ignore[arg-type]
                hierarchical=hosts > 1,
                chunks=int(row["chunks"]),
            ),
        )
        return cls(row["model"], row["target"], model, layout, row["used_for_fitting"] == "true")

    @property
    def choices(self) -> str:
        """What the layout chooses beside the mesh, defaults left out."""
        layout, dispatch = self.layout, self.layout.dispatch
        words = [layout.remat, f"{layout.num_microbatches} microbatches", f"{layout.gather} gather"]
        words += [f"{layout.pipeline_repeats} repeats"] * (layout.pipeline_repeats > 1)
        words += [f"{layout.grad_accumulation_steps} slices"] * (layout.grad_accumulation_steps > 1)
        words += [dispatch.strategy] * (dispatch.strategy != "dropless")
        words += [f"buffers of {dispatch.capacity_factor:g}"] * (dispatch.capacity_factor != 1.5)
        words += ["experts split"] * (layout.mesh.tensor > 1 and dispatch.expert_axes == ("expert",))
        words += [f"{dispatch.chunks} chunks"] * (dispatch.chunks > 1) + ["two hops"] * dispatch.hierarchical
        words += [f"{layout.batch_split} part"] * (layout.batch_split > 0)
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one device, in bytes; `peak_bytes` has arguments and everything else at the peak."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    compile_s: float
    jax: str


@dataclasses.dataclass(frozen=True)
class Audited:
    """A case beside its prediction."""

    case: Case
    compiled: Compiled
    predicted_bytes: float

    @classmethod
    def of(cls, case: Case, compiled: Compiled) -> Audited:
        return cls(case, compiled, predict_memory(case.model, case.layout).peak_bytes)

    @property
    def error(self) -> float:
        """Relative to what was compiled, positive where too much was predicted."""
        return self.predicted_bytes / self.compiled.peak_bytes - 1

    @property
    def group(self) -> str:
        return FITTED if self.case.used_for_fitting else HELD_OUT

    @property
    def line(self) -> str:
        layout, mesh = self.case.layout, self.case.layout.mesh
        cells = [self.case.name, self.case.target, f"{mesh.expert} × {mesh.pipeline} × {mesh.tensor}"]
        cells += [f"{layout.batch_size} × {layout.seq_len}", self.case.choices]
        cells += [f"{self.predicted_bytes / 1e9:.2f}", f"{self.compiled.peak_bytes / 1e9:.2f}"]
        return f"| {' | '.join([*cells, f'{self.error:+.1%}', self.group])} |"


def read_grid(path: Path = GRID) -> list[dict[str, str]]:
    """The grid's lines, as `Case.parse` takes them."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_record(path: Path = RECORD) -> dict[tuple[str, ...], Compiled]:
    """What was compiled, by the `key` of the grid's line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [field.name for field in dataclasses.fields(Compiled)]
    return {key(line): Compiled(**{name: line[name] for name in names}) for line in lines}


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells lines of the grid apart."""
    return tuple(row[name] for name in _GRID_COLUMNS)


def append_record(row: dict[str, str], compiled: Compiled, path: Path = RECORD) -> None:
    with path.open("a") as file:
        file.write(strict_json.dumps(row | dataclasses.asdict(compiled)) + "\n")


def recorded() -> list[Audited]:
    """Every line of the grid that was compiled, in its order."""
    record = read_record()
    return [Audited.of(Case.parse(row), record[key(row)]) for row in read_grid() if key(row) in record]


def summary(audited: Iterable[Audited]) -> dict[str, dict[str, float]]:
    """Number of cases, mean and worst absolute error: of all, by fitted or held out, and of those by target."""
    groups: dict[str, list[float]] = {}
    for a in audited:
        for name in ("all", a.group, f"{a.group}, {a.case.target}"):
            groups.setdefault(name, []).append(abs(a.error))
    return {
        name: {"cases": len(errors), "mean_error": sum(errors) / len(errors), "worst_error": max(errors)}
        for name, errors in sorted(groups.items())
    }


def summary_table(audited: Iterable[Audited]) -> str:
    """`summary` in Markdown."""
    lines = ["| | cases | mean error | worst error |", "|---|---|---|---|"]
    for name, s in summary(audited).items():
        lines.append(f"| {name} | {s['cases']} | {s['mean_error']:.1%} | {s['worst_error']:.1%} |")
    return "\n".join(lines)
