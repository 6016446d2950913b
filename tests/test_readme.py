"""README.md's Python runs as it is, and so does the Python that its links show for the same model; the model learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.full
def test_the_library_examples_run():
    section = (ROOT / "README.md").read_text().split("\n## As a library\n")[1].split("\n## ")[0]
    train, layer = PYTHON.findall(section)
    (report,) = PYTHON.findall((ROOT / "moejax" / "balance" / "README.md").read_text())
    assert len(train.strip().splitlines()) <= 20
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-c", train + layer + report],
        cwd=ROOT,
        env=os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+) load_cv \S+$", done.stdout, re.MULTILINE)]
    assert len(losses) == 20, done.stdout
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5
    assert "(8, 64, 64)" in done.stdout
