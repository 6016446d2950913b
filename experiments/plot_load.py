"""Draws how evenly the experts of a run were loaded: by layer and expert, and over its steps.

    python experiments/plot_load.py --workdir=runs/deep --out=load.png

The run may be going on. Left: the load of each expert over its layer's mean, over the last window. Right: the same by
step. Below: the coefficient of variation with the floor that sampling sets, and the rounds of a dispatch, each with
the bound beyond which the run warns. Needs matplotlib (extra `plots`). Prints a table of the last window by layer; in a
pipe, ends with one line of JSON.
"""

from __future__ import annotations

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.shared import loading, outputs
from moejax.checks import check, expand
from moejax.plots import SUFFIXES
from moejax.profiling.loads import LoadHistory, figure

FLAGS = loading.Flags(__doc__)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", flag_values=FLAGS)
_OUT = FLAGS.define_output(
    "out", "Where the picture goes: .png, .svg or .pdf. Default: load.png in the workdir.", *SUFFIXES
)


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    check(bool(_WORKDIR.value), "--workdir is missing; give the directory of a run")
    workdir = expand(_WORKDIR.value, "workdir")
    history = LoadHistory.read(workdir)
    out = _OUT.value or outputs.check_output(workdir / "load.png", *SUFFIXES)
    figure(history).savefig(out, dpi=120)
    console = Console()
    console.print(table(history))
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    loading.print_json(
        {
            "last_step": int(history.steps_N[-1]),
            "window_steps": history.window_steps,
            "window_tokens": history.window_tokens,
            "load_cv_floor": history.window_cv_floor,
            "layers": history.by_layer(),
        }
    )


def table(history: LoadHistory) -> Table:
    """The last window by layer."""
    title = (
        f"steps {history.steps_N[-history.window_steps]:,} to {history.steps_N[-1]:,}: "
        f"{history.window_tokens:,.0f} tokens, sampling floor of the CV {history.window_cv_floor:.3f}"
    )
    columns = ("layer", "load CV", "busiest expert", "its load × mean", "least load × mean", "idle experts")
    rows = Table(*columns, title=title)
    for row in history.by_layer():
        rows.add_row(
            str(row["layer"]), f"{row['load_cv']:.3f}", str(row["busiest_expert"]), f"{row['max_over_mean']:.2f}",
            f"{row['min_over_mean']:.2f}", str(row["idle_experts"]),
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    loading.run(main, FLAGS)
