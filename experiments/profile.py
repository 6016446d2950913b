"""Reads a profiler trace: where the time of its steps went, by phase and device, beside the planner's prediction.

    python experiments/train.py --profile_steps=10:13 --workdir=runs/a
    python experiments/profile.py runs/a/profiles/step_000010
    python experiments/profile.py runs/a/profiles/step_000010 --out=figures --nopicture
    tensorboard --logdir=runs/a/profiles      # the same traces as pictures; needs tensorboard and xprof

TRACE is a directory that train.py --profile_steps or moejax.profiling.capture wrote, or a run's, whose last trace is
taken. Prints tables, writes them there with report.json and a picture of one step, timeline.png (extra `plots`), and
ends with one line of JSON.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import loading
    import trace_report

    loading.run(trace_report.main)
else:  # somebody imports the standard library's `profile`, as `cProfile` does, which this folder hides from scripts
    import importlib.util
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib"), "profile.py"))
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules[__name__] = _module
