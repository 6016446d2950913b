"""Reads a profiler trace: where the time of its steps went, by phase and device, beside the planner's prediction.

    python experiments/train.py --profile_steps=10:13 --workdir=runs/a
    python experiments/read_trace.py runs/a/profiles/step_000010
    python experiments/read_trace.py runs/a/profiles/step_000010 --out=figures --nopicture
    tensorboard --logdir=runs/a/profiles      # the same traces as pictures; needs tensorboard and xprof

TRACE is a directory that train.py --profile_steps or moejax.profiling.capture wrote, or a run's, whose last trace is
taken. Prints tables, writes them there with report.json and a picture of one step, timeline.png (extra `plots`). In a
pipe, ends with one line of JSON.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments.shared import loading
from moejax import strict_json
from moejax.checks import check, expand, make_folder
from moejax.plots import check_installed
from moejax.profiling import report, tables, timeline
from moejax.profiling.capture import TRACES
from moejax.profiling.trace import read_trace

FLAGS = loading.Flags(__doc__)
_OUT = FLAGS.define_output(
    "out", "The folder for report.md, report.json and timeline.png. Default: that of the trace.", folder=True
)
_PICTURE = flags.DEFINE_boolean(
    "picture", True, "Draw timeline.png, which needs matplotlib (extra plots).", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    rest = FLAGS.parse(argv, positional=True)
    check(
        len(rest) == 1,
        f"{' '.join(rest) or 'nothing'} is given as TRACE; give one directory of a trace, or of a run",
    )
    if _PICTURE.value:
        check_installed("timeline.png", instead=", or add --nopicture")
    folder = newest_trace(expand(rest[0], "TRACE"))
    trace = read_trace(folder)
    out = make_folder("--out", _OUT.value or folder)
    found = report.make_report(trace)
    text, data = tables.as_markdown(found), tables.as_data(found)
    (out / "report.md").write_text(text + "\n")
    (out / "report.json").write_text(strict_json.dumps(data, indent=1) + "\n")
    print(text)
    if _PICTURE.value:
        timeline.figure(trace, found).savefig(out / "timeline.png", dpi=120)
    print(f"\nWritten: report.md, report.json{', timeline.png' * _PICTURE.value} in {out}")
    loading.print_json(data)


def newest_trace(folder: Path) -> Path:
    """The last trace of a run, by the time that names its files' folder, if `folder` is a run's; else itself."""
    last = max(folder.glob(f"{TRACES}/*/plugins/profile/*"), key=lambda files: files.name, default=None)
    return last.parents[2] if last else folder


if __name__ == "__main__":
    loading.run(main, FLAGS)
