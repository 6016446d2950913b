"""What experiments/profile.py does; a file of its own, for that one's name is a module of the standard library's."""

from __future__ import annotations

import sys
from pathlib import Path

import loading
from absl import flags

from moejax import strict_json
from moejax.config import ConfigError, make_folder
from moejax.profiling import report, tables, timeline
from moejax.profiling.capture import TRACES
from moejax.profiling.trace import read_trace

_OUT = flags.DEFINE_string(
    "out", None, "The folder for report.md, report.json and timeline.png. Default: that of the trace."
)
_PICTURE = flags.DEFINE_boolean("picture", True, "Draw timeline.png, which needs matplotlib (extra plots).")
for _flag in (_OUT, _PICTURE):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[_flag.name])  # for --help


def main(argv: list[str]) -> None:
    rest = loading.parse_flags(argv, positional=True)
    if len(rest) != 1:
        raise ConfigError(
            f"{' '.join(rest) or 'nothing'} is given as TRACE; give one directory of a trace, or of a run"
        )
    folder = newest_trace(Path(rest[0]).expanduser())
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
    print(strict_json.dumps(data))


def newest_trace(folder: Path) -> Path:
    """The last trace of a run, by the time that names its files' folder, if `folder` is a run's; else itself."""
    last = max(folder.glob(f"{TRACES}/*/plugins/profile/*"), key=lambda files: files.name, default=None)
    return last.parents[2] if last else folder
