"""Every text of JSON that people or programs get is one that strict parsers read."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import strict_json

ROOT = Path(__file__).resolve().parents[1]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
# Not data for anyone: a string that is quoted for Python, and a search in a tokenizer's settings.
OTHERS = {"moejax/train/plan_file.py", "moejax/data/tokenizer.py"}


def strict(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def numbers(data):
    if isinstance(data, dict):
        return {key: numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [numbers(value) for value in data]
    return float(data) if isinstance(data, str) and data in strict_json.NOT_FINITE else data


@given(JSON)
def test_strict_parsers_read_it_and_nothing_is_lost(data):
    assert repr(numbers(strict(strict_json.dumps(data)))) == repr(numbers(data))


def test_what_json_has_nothing_for_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        strict_json.dumps({"a": object()})


SOURCES = [path for folder in ("moejax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_json_is_written(path):
    if str(path.relative_to(ROOT)) in {*OTHERS, "moejax/strict_json.py"}:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    written = [ast.unparse(node) for node in calls if ast.unparse(node) in ("json.dump", "json.dumps")]
    assert written == [], "use moejax.strict_json.dumps"
