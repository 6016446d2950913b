"""How near the planner comes to published measurements: step time, tokens/s and peak memory of each run of a table.

    python experiments/published_runs/planner_accuracy.py
    python experiments/published_runs/planner_accuracy.py --runs=experiments/published_runs/more_runs.csv --out=table.md

The table's columns are those of measured_runs.csv. A training run's step time is step_s, or follows
from tok_s_per_dev, or from tflops_per_dev; an inference run has "TTFT ..ms" and "TPOT ..ms" in any column, and its
error is the mean of both. "<65" is a bound, and wrong only when it is exceeded. Runs that cannot be predicted are
listed with the reason and lower the coverage. Nothing is calibrated on the table: see experiments/results for which
runs were looked at while the planner's constants were chosen. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from collections.abc import Mapping

from absl import flags

from experiments.published_runs.memory import training_memory
from experiments.published_runs.runs import Run, number, parse_run
from experiments.published_runs.serving import predict_serving
from experiments.published_runs.training import predict_training
from experiments.shared import loading
from moejax.checks import ConfigError, check, expand

FLAGS = loading.Flags(__doc__)
_RUNS = flags.DEFINE_string(
    "runs",
    str(loading.EXPERIMENTS / "published_runs" / "measured_runs.csv"),
    "A table of measured runs, CSV.",
    flag_values=FLAGS,
)
_OUT = FLAGS.define_output("out", "A Markdown file for the table.")

_NEEDED = ("model", "hardware", "layout")
_COLUMNS = (
    "id", "model", "hardware", "layout", "step, s", "measured", "error", "tokens/s/device", "measured", "error",
    "peak, GiB", "measured", "error", "MFU", "what decides",
)  # fmt: skip
HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


@dataclasses.dataclass
class Outcome:
    """One run, predicted and measured; None where there is nothing. Errors are relative, with their sign."""

    run: Mapping[str, str]
    step: tuple[float | None, float | None] = (None, None)
    step_error: float | None = None
    tokens: tuple[float | None, float | None] = (None, None)
    tokens_error: float | None = None
    peak: tuple[float | None, float | None] = (None, None)
    peak_error: float | None = None
    mfu: float | None = None
    note: str = ""
    reason: str = ""


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    outcomes = [predict(row) for row in read(_RUNS.value)]
    lines = [HEADER, *map(line, outcomes), *summary(outcomes)]
    print("\n".join(lines))
    if _OUT.value:
        _OUT.value.write_text("\n".join(lines) + "\n")
    loading.print_json(figures(outcomes))


def read(path: str) -> list[dict[str, str]]:
    """The rows of a table.

    Raises:
      ConfigError: there is no such file, or it lacks columns or rows.
    """
    try:
        with expand(path, "runs").open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
            names = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--runs={path} cannot be read: {error}") from None
    missing = [name for name in _NEEDED if name not in names]
    check(not missing, f"--runs={path} lacks the columns {', '.join(missing)}; it has {', '.join(names) or 'none'}")
    check(bool(rows), f"--runs={path} has no rows")
    rows = [{key.strip(): value for key, value in row.items()} for row in rows]
    for above, row in itertools.pairwise(rows):  # "same" is what the row above says
        if row.get("source", "").strip().lower() in ("same", "ditto", '"'):
            row["source"] = above["source"]
    return rows


def predict(row: Mapping[str, str]) -> Outcome:
    """The run's prediction beside its measurements; with `reason` where it cannot be."""
    try:
        run = parse_run(row)
        outcome = _serving(row, run) if run.inference else _training(row, run)
    except ConfigError as error:
        return Outcome(row, reason=str(error))
    if run.unknown:
        outcome.note += f"; not understood: {' '.join(run.unknown)}"
    return outcome


def _relative(predicted: float | None, measured: float | None, cell: object = "") -> float | None:
    if predicted is None or not measured:
        return None
    error = predicted / measured - 1
    bound = str(cell).strip()[:1]
    return max(error, 0.0) if bound in "<≤" and bound else min(error, 0.0) if bound in ">≥" and bound else error


def _training(row: Mapping[str, str], run: Run) -> Outcome:
    check(run.seq > 0, f"seq={row.get('seq')!r} must be the tokens of a sequence")
    time, memory = predict_training(run), sum(training_memory(run).values()) / 2**30
    tokens = run.gbs * run.seq / run.devices
    step, rate, teraflops = (number(row.get(name)) for name in ("step_s", "tok_s_per_dev", "tflops_per_dev"))
    cell = row.get("step_s")
    if step is None and rate:
        step, cell = tokens / rate, ""
    if step is None and teraflops:
        step, cell = 3 * tokens * run.model.flops_per_token(run.seq) / teraflops / 1e12, ""
    rate = rate or (tokens / step if step else None)
    peak = number(row.get("peak_gib"))
    return Outcome(
        row,
        (time.expected, step),
        _relative(time.expected, step, cell),
        (time.tokens_per_s_per_device, rate),
        _relative(time.tokens_per_s_per_device, rate, row.get("tok_s_per_dev")),
        (memory if run.cluster.device.name[:3] != "tpu" or peak else None, peak),
        _relative(memory, peak, row.get("peak_gib")),
        time.mfu,
        f"{time.low:.3g}–{time.high:.3g} s: {time.dominant}",
        "" if step or peak else "the row has neither a step time nor a peak",
    )


def _serving(row: Mapping[str, str], run: Run) -> Outcome:
    said = " ".join(row.values())
    measured = {}
    for name in ("TTFT", "TPOT"):
        column = number(row.get(f"{name.lower()}_ms"))
        if column:
            measured[name] = column / 1e3
            continue
        found = re.search(rf"{name}\s*[:=]?\s*([\d.]+)\s*(ms|s|us|µs)", said, re.IGNORECASE)
        if found:
            measured[name] = float(found[1]) * {"ms": 1e-3, "s": 1.0}.get(found[2].lower(), 1e-6)
    time = predict_serving(run)
    predicted = {"TTFT": time.first_token, "TPOT": time.per_token}
    errors = {name: predicted[name] / seconds - 1 for name, seconds in measured.items() if seconds}
    note = ", ".join(
        f"{name} {predicted[name] * 1e3:.3g} ms, measured {measured[name] * 1e3:.3g}, {errors[name]:+.0%}"
        for name in errors
    )
    size = sum(map(abs, errors.values())) / len(errors) if errors else None
    return Outcome(row, step_error=size, note=note, reason="" if errors else "the row has neither TTFT nor TPOT")


def line(outcome: Outcome) -> str:
    """A row of the table."""
    row = outcome.run
    cells = [row.get("id", ""), row["model"], row["hardware"], row["layout"]]
    if outcome.reason:
        return f"| {' | '.join([*cells, f'not predicted: {outcome.reason}'])} |"
    for pair, error, form in (
        (outcome.step, outcome.step_error, ".3g"),
        (outcome.tokens, outcome.tokens_error, ".0f"),
        (outcome.peak, outcome.peak_error, ".1f"),
    ):
        cells += ["" if value is None else format(value, form) for value in pair]
        cells.append("" if error is None else f"{error:+.1%}")
    cells += ["" if outcome.mfu is None else f"{outcome.mfu:.1%}", outcome.note]
    return f"| {' | '.join(cells)} |"


def figures(outcomes: list[Outcome]) -> dict[str, float | int | None]:
    """Mean and worst errors as fractions, None without any, and the part of all runs that was predicted."""
    found: dict[str, float | int | None] = {}
    for name in ("step", "memory"):
        attribute = "step_error" if name == "step" else "peak_error"
        errors = [abs(e) for o in outcomes if (e := getattr(o, attribute)) is not None and not o.reason]
        key = "step_time" if name == "step" else "memory"
        found[f"mean_{key}_error"] = sum(errors) / len(errors) if errors else None
        found[f"worst_{key}_error"] = max(errors, default=None)
        found[f"{key}_runs"] = len(errors)
    found["coverage"] = sum(not o.reason for o in outcomes) / len(outcomes)
    return found


def summary(outcomes: list[Outcome]) -> list[str]:
    """What the table says, in words."""
    found, lines = figures(outcomes), [""]
    for key, name in (("step_time", "Step time"), ("memory", "Peak memory")):
        if found[f"mean_{key}_error"] is not None:
            mean, worst = (found[f"{part}_{key}_error"] for part in ("mean", "worst"))
            lines.append(f"{name}: mean error {mean:.1%}, worst {worst:.1%}, over {found[f'{key}_runs']} runs.")
    refused = [outcome for outcome in outcomes if outcome.reason]
    lines.append(f"Predicted: {len(outcomes) - len(refused)} of {len(outcomes)} runs.")
    lines += [f"Not predicted: {o.run.get('id') or o.run['model']}: {o.reason}." for o in refused]
    return lines


if __name__ == "__main__":
    loading.run(main, FLAGS)
