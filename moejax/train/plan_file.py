"""Plans as Python files: the layouts that a run follows, and the model that they were made for.

`experiments/plan.py --out=FILE` writes one and `experiments/train.py --plan=FILE` takes it. It has `get_layouts() ->
tuple[Layout, ...]`: one for a run of one length, several for mixed lengths; and `get_model() -> str`, the model's name
as `--config` takes it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from moejax.checks import check
from moejax.layout import Layout, check_layouts
from moejax.overrides import call_in_file

LINE_LENGTH = 120  # of the files that are written


def load_layouts(path: str | Path) -> tuple[Layout, ...]:
    """Returns the layouts of a plan file.

    Raises:
      ConfigError: the file fails, is no plan, or its layouts cannot go together.
    """
    layouts = call_in_file(path, "get_layouts", "tuple[Layout, ...]")
    check(layouts is not None, f"{path} has no get_layouts(); a mesh file goes with --mesh, and plan.py writes plans")
    whole = isinstance(layouts, tuple) and layouts and all(isinstance(layout, Layout) for layout in layouts)
    check(bool(whole), f"{path}: get_layouts() returned {layouts!r:.80}; it must return a tuple of Layouts")
    check_layouts(layouts)
    return tuple(layouts)


def load_plan_model(path: str | Path) -> str | None:
    """Returns the model that a plan file was made for, its `get_model()`; None if it does not say.

    Raises:
      ConfigError: the file fails, or returns something else than a name.
    """
    model = call_in_file(path, "get_model", "str")
    check(model is None or isinstance(model, str), f"{path}: get_model() returned {model!r:.80}; it must return a name")
    return model


def write_plan_file(path: str | Path, layouts: tuple[Layout, ...], model: str, title: str) -> None:
    """Writes a plan file, which `load_layouts` and `load_plan_model` read.

    The same arguments give the same text. Every field is written out, so that a later default does not change an old
    plan.

    Args:
        path: of the file, which is replaced.
        layouts: in ascending order of `seq_len`, on the same devices.
        model: what the plan was made for, as `--config` takes it: a name, or the path of a Python file.
        title: the file's docstring, of one or more lines.

    Raises:
      ConfigError: the layouts are none or cannot go together, or the title is no docstring.
    """
    check_layouts(layouts)
    lines = title.splitlines() or [""]
    fits = bool(lines[0]) and all(len(line) <= LINE_LENGTH - 6 and line == line.rstrip() for line in lines)
    check(fits and not set(title) & {'"', "\\"}, f"title={title!r} must be lines of at most 114 characters, no quotes")
    last_line = "\n" if len(lines) > 1 else ""
    items = "".join(f"        {_source(layout, 8)},\n" for layout in layouts)
    Path(path).write_text(
        f'"""{title}{last_line}"""\n\n'
        "from moejax.config import DispatchConfig\n"
        "from moejax.layout import Layout\n"
        "from moejax.mesh import MeshConfig\n\n\n"
        f"def get_layouts() -> tuple[Layout, ...]:\n    return (\n{items}    )\n\n\n"
        f"def get_model() -> str:\n    return {_source(model, 0)}\n",
        encoding="utf-8",
    )


def _source(value: Any, indent: int, before: int = 0) -> str:
    """Python that makes `value`, as ruff formats it `indent` columns in, after `before` characters of its line."""
    if not dataclasses.is_dataclass(value):
        if isinstance(value, tuple):
            items = ", ".join(_source(item, indent) for item in value)
            return f"({items},)" if len(value) == 1 else f"({items})"
        return _quoted(value) if isinstance(value, str) else repr(value)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    name = type(value).__name__
    line = f"{name}({', '.join(f'{key}={_source(item, 0)}' for key, item in fields.items())})"
    if not isinstance(value, Layout) and indent + before + len(line) + 1 <= LINE_LENGTH:
        return line
    inner = indent + 4
    lines = "".join(f"{' ' * inner}{key}={_source(item, inner, len(key) + 1)},\n" for key, item in fields.items())
    return f"{name}(\n{lines}{' ' * indent})"


def _quoted(text: str) -> str:
    """Returns `text` in double quotes, with what UTF-8 cannot encode spelled out: the bytes of some files' names."""
    return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()
