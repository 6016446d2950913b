"""What experiments/profile.py does; a file of its own, for that one's name is a module of the standard library's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import loading
from absl import flags

from moejax.config import ConfigError
from moejax.planner.report import finite
from moejax.profiling import report
from moejax.profiling.trace import read_trace

_JSON = flags.DEFINE_string("json", None, "Where to write the figures as JSON.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Where to write the tables.")
for _flag in (_JSON, _MARKDOWN):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[_flag.name])  # for --help


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
