"""What each way of balancing experts comes to: load, drops and held-out loss, by method and capacity, on real text.

    python experiments/load_balance.py --mesh=cpu_16_expert --out=experiments/results/load_balance

Trains one model for every method (none, aux, aux+z, loss-free) at every capacity (fixed buffers that drop, and
dropless), all from the same seed, on the same batches, for as many steps. Writes OUT.csv, OUT.md and OUT.png; in a
pipe, ends with one line of JSON. A run that has ended is not repeated when the script is started again with the same
--workdir.

Figures are over the window of the last steps (`balance.window`), so that sampling noise is small; its floor stands
beside the CV. MaxVio is the busiest expert's load over the mean, less 1 (arXiv 2408.15664), averaged over layers.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments.shared import common, loading
from moejax import strict_json
from moejax.checks import ConfigError, check
from moejax.config import BalanceConfig
from moejax.mesh import build_mesh
from moejax.plots import check_installed, pyplot
from moejax.train.config import TrainConfig
from moejax.train.files import replace_text
from moejax.train.loop import Trainer
from moejax.train.metrics import read_metrics
from moejax.train.workdir import check_folder

METHODS = ("none", "aux", "aux+z", "loss-free")
CAPACITIES = ("1.0", "1.25", "1.5", "2.0", "dropless")

FLAGS = common.ConfigFlags(__doc__)
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Ways of balancing.", flag_values=FLAGS)
_CAPACITIES = flags.DEFINE_list("capacities", list(CAPACITIES), "Capacity factors, and dropless.", flag_values=FLAGS)
_AUX = flags.DEFINE_float(
    "aux_weight", 0.01, "balance.aux_loss_weight of aux and aux+z.", lower_bound=0, flag_values=FLAGS
)
_Z = flags.DEFINE_float("z_weight", 0.001, "balance.z_loss_weight of aux+z.", lower_bound=0, flag_values=FLAGS)
_RATE = flags.DEFINE_float(
    "bias_rate", 0.01, "balance.bias_update_rate of loss-free.", lower_bound=0, flag_values=FLAGS
)
_WORKDIR = FLAGS.define_output("workdir", "A folder for the runs. Default: runs/load_balance.", folder=True)
_OUT = FLAGS.define_output("out", "Where the table goes, without suffix. Default: `table` in the workdir.")

COLUMNS = {
    "method": "method",
    "capacity": "capacity",
    "load_cv": "CV",
    "load_cv_floor": "CV floor",
    "max_vio": "MaxVio",
    "dropped_percent": "dropped %",
    "eval_bits_per_byte": "bits per byte",
    "rounds": "rounds",
    "window_tokens": "window, tokens",
}


def main(argv: list[str]) -> None:
    base = FLAGS.parse_config(argv)
    for name, values, allowed in (
        ("methods", _METHODS.value, METHODS),
        ("capacities", _CAPACITIES.value, CAPACITIES),
    ):
        unknown = [value for value in values if value not in allowed]
        check(not unknown, f"--{name} has {', '.join(unknown)}; it takes {', '.join(allowed)}")
    check_installed()
    runs = [(method, capacity) for method in _METHODS.value for capacity in _CAPACITIES.value]
    configs = {run: variant(base, *run) for run in runs}
    FLAGS.setup_jax(base.layout.mesh)
    build_mesh(base.layout.mesh)  # other devices are refused before the first run's headline
    console = Console(stderr=True)
    folder, rows = _WORKDIR.value or check_folder(Path("runs/load_balance")), []
    for number, (method, capacity) in enumerate(runs, start=1):
        console.rule(f"{number} of {len(runs)}: {method}, {capacity}")
        workdir = folder / f"{method}-{capacity}"
        rows.append({"method": method, "capacity": capacity} | train(configs[method, capacity], workdir))
    out = _OUT.value or folder / "table"
    write(rows, base, out)
    plot(rows, out.with_suffix(".png"))
    console.print(f"written: {out}.csv, {out}.md, {out}.png", highlight=False)
    loading.print_json({"steps": base.steps, "seed": base.seed, "mesh": base.layout.mesh.shape, "rows": rows})


def variant(base: TrainConfig, method: str, capacity: str) -> TrainConfig:
    """The configuration of one run: only the router's balance, and what is dropped, differ."""
    off = dataclasses.replace(base.balance, aux_loss_weight=0, sequence_loss_weight=0, z_loss_weight=0)
    off = dataclasses.replace(off, bias_update_rate=0.0)
    balance: BalanceConfig = {
        "none": off,
        "aux": dataclasses.replace(off, aux_loss_weight=_AUX.value),
        "aux+z": dataclasses.replace(off, aux_loss_weight=_AUX.value, z_loss_weight=_Z.value),
        "loss-free": dataclasses.replace(off, bias_update_rate=_RATE.value),
    }[method]
    if capacity == "dropless":
        base = base.with_layout(strategy="dropless")
    else:
        base = base.with_layout(strategy="capacity", capacity_factor=float(capacity))
    model = dataclasses.replace(base.model, router=dataclasses.replace(base.model.router, bias=method == "loss-free"))
    return dataclasses.replace(base, model=model, balance=balance, sample_tokens=0)


def train(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Trains and returns the run's figures; those of a run that has ended are read."""
    ended = workdir / "row.json"
    settings = json.loads(strict_json.dumps(dataclasses.asdict(config)))
    if ended.exists():
        kept = _read_row(ended)
        check(kept["config"] == settings, f"{workdir} holds a run of another configuration; use another --workdir")
        return kept["row"]
    summary = Trainer(config, workdir).run()
    check(not summary.interrupted, f"stopped at step {summary.step}; start again to go on")
    last = read_metrics(workdir)[-1]
    row = {
        "load_cv": last["window_load_cv"],
        "load_cv_floor": last["window_load_cv_floor"],
        "max_vio": last["window_load_max_over_mean"] - 1,
        "dropped_percent": 100 * last["window_dropped_fraction"],
        "eval_bits_per_byte": last["eval_bits_per_byte"],
        "rounds": last["window_rounds"],
        "window_tokens": int(last["window_tokens"]),
    }
    replace_text(ended, strict_json.dumps({"config": settings, "row": row}))
    return row


def _read_row(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove it to read the run's figures again") from None
    row = kept.get("row") if isinstance(kept, dict) else None
    whole = isinstance(row, dict) and "config" in kept and COLUMNS.keys() - {"method", "capacity"} <= row.keys()
    check(whole, f"{path} has no config and row; remove it to read the run's figures again")
    return kept


def write(rows: list[dict[str, Any]], base: TrainConfig, out: Path) -> None:
    """OUT.csv for programs, OUT.md for people."""
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(COLUMNS))
        writer.writeheader()
        writer.writerows({name: row[name] for name in COLUMNS} for row in rows)
    m = base.model
    tokens, mesh = base.layout.tokens, base.layout.mesh.shape
    lines = [
        "# Load balance by method and capacity",
        "",
        f"{m.num_layers} layers of d_model {m.d_model}, {m.num_experts} experts of d_ff {m.d_ff}, top-"
        f"{m.experts_per_token}, {m.router.score} router; {base.steps} steps of {tokens:,} tokens, seed {base.seed}, "
        f"tokenizer {base.data.tokenizer}; mesh {mesh}. Weights: aux {_AUX.value}, z {_Z.value}; bias rate "
        f"{_RATE.value}. CV, MaxVio, drops and rounds are over the last {base.balance.window} steps, "
        "means over layers; bits per byte are of held-out text, evaluated without drops.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(_cell(row[name]) for name in COLUMNS) + " |" for row in rows]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.3f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """CV, drops and bits per byte over capacity, a line a method."""
    plt = pyplot()
    capacities = [c for c in CAPACITIES if any(row["capacity"] == c for row in rows)]
    figures = {
        "load_cv": "load CV over the window",
        "dropped_percent": "assignments dropped, %",
        "eval_bits_per_byte": "held-out bits per byte",
    }
    fig, axes = plt.subplots(1, len(figures), figsize=(13, 4.4), layout="constrained")
    for ax, (name, label) in zip(axes, figures.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            by_capacity = {row["capacity"]: row[name] for row in rows if row["method"] == method}
            values = [by_capacity.get(capacity, math.nan) for capacity in capacities]
            ax.plot(range(len(capacities)), values, marker="o", label=method)
        ax.set_xticks(range(len(capacities)), capacities)
        ax.set(xlabel="capacity factor", title=label)
        ax.grid(alpha=0.3)
    if min(row["load_cv"] for row in rows) > 0:
        axes[0].set_yscale("log")
    axes[0].axhline(rows[0]["load_cv_floor"], color="gray", linestyle=":", label="sampling floor")
    axes[0].axhline(0.06, color="gray", linestyle="--", label="aim, 0.06")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    loading.run(main, FLAGS)
