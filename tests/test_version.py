"""The changelog has a section for the version in moejax/__init__.py, the one place that states it."""

from pathlib import Path

import moejax

ROOT = Path(__file__).resolve().parents[1]


def test_the_changelog_knows_the_version():
    assert f"\n## {moejax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
