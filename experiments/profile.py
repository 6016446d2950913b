"""Reads a profiler trace: `python experiments/profile.py TRACE`. What it does is in trace_report.py.

This file's name is also that of a module of the standard library.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from experiments import trace_report
    from experiments.shared import loading

    loading.run(trace_report.main, trace_report.FLAGS)
else:  # somebody imports the standard library's `profile`, as `cProfile` does, which this folder hides from scripts
    import importlib.util
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib"), "profile.py"))
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules[__name__] = _module
