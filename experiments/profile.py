"""Reads a profiler trace: where the time of its steps went, by phase and device, beside the planner's prediction.

    python experiments/train.py --profile_steps=10:13 --workdir=runs/a
    python experiments/profile.py runs/a/profiles/step_000010
    python experiments/profile.py runs/a/profiles/step_000010 --json=a.json --markdown=a.md
    tensorboard --logdir=runs/a/profiles      # the same traces as pictures; needs tensorboard and xprof

TRACE is a directory that train.py --profile_steps or moejax.profiling.capture wrote. Prints tables and ends with one
line of JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import loading
from absl import flags

from moejax.config import ConfigError
from moejax.planner.report import finite
from moejax.profiling import report
from moejax.profiling.trace import read_trace

_JSON = flags.DEFINE_string("json", None, "Where to write the figures as JSON.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Where to write the tables.")


def main(argv: list[str]) -> None:
    rest = loading.parse_flags(argv, positional=True)
    if len(rest) != 1:
        raise ConfigError(f"{' '.join(rest) or 'nothing'} is given as TRACE; give one directory of a trace")
    found = report.make_report(read_trace(rest[0]))
    text, data = report.as_markdown(found), finite(report.as_data(found))
    print(text)
    if _MARKDOWN.value:
        Path(_MARKDOWN.value).expanduser().write_text(text + "\n")
    if _JSON.value:
        Path(_JSON.value).expanduser().write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data))


if __name__ == "__main__":
    loading.run(main)
