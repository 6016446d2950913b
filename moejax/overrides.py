"""Typed dotted overrides of nested frozen dataclasses, configuration files in Python, and records of them in JSON.

`--config.model.num_layers=4` is read by the type hint of `model.num_layers`. All overrides of one dataclass are
applied in one `dataclasses.replace`, so fields that must change together are validated together. A field such as
`layouts`, a tuple of dataclasses, is called `layout` in paths, and can be changed while it holds one.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import io
import math
import os
import textwrap
import tokenize
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moejax.checks import ConfigError, check, one_line
from moejax.config import MOVED_FIELDS, ModelConfig
from moejax.strict_json import NOT_FINITE

T = TypeVar("T")


def apply_overrides(config: T, overrides: Mapping[str, str]) -> T:
    """`config` with the fields at the dotted paths of `overrides` set to the values that their texts stand for.

    Raises:
      ConfigError: a path that does not exist, a text that is not of the field's type, or a value that the dataclass
        refuses.
    """
    replaced: T = _replace(config, dict(overrides), "")
    return replaced


def _replace(config: Any, overrides: Mapping[str, str], parent: str) -> Any:
    """Applies `overrides`, relative to `config`, which itself stands at `parent` ("" or "model.")."""
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, str]] = {}
    plurals = {name: field for field, name in _path_names(config).items() if name != field}
    for path, text in overrides.items():
        name, _, rest = path.partition(".")
        if name not in _path_names(config).values():
            raise ConfigError(_unknown_message(config, parent, name))
        if name in plurals:
            number = len(getattr(config, plurals[name]))
            check(number == 1, f"{parent}{path}={text!r} cannot be set: there are {number} {plurals[name]}")
        is_nested = dataclasses.is_dataclass(_value(config, name))
        if is_nested and not rest:
            fields = ", ".join(f"{parent}{name}.{field}" for field in _path_names(_value(config, name)).values())
            raise ConfigError(f"{parent}{name}={text!r} cannot be set as a whole; set one of {fields}")
        if is_nested:
            nested.setdefault(name, {})[rest] = text
        elif rest:
            raise ConfigError(f"{parent}{path}={text!r} does not exist: {parent}{name} has no fields")
        else:
            values[name] = _parse(text, hints[name], f"{parent}{name}")
    for name, inner in nested.items():
        inner_value = _replace(_value(config, name), inner, f"{parent}{name}.")
        values |= {plurals[name]: (inner_value,)} if name in plurals else {name: inner_value}
    try:
        return dataclasses.replace(config, **values)
    except ConfigError as error:
        raise ConfigError(f"{parent}{error}") from None


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """A field of a nested configuration: its dotted path, its value as an override writes it, and what it means."""

    path: str
    text: str
    meaning: str
    choices: tuple[str, ...]  # of a Literal


def describe(config: Any, parent: str = "") -> list[FieldInfo]:
    """Returns all fields of a dataclass, those of nested ones in place of these; `parent` ("model.") begins paths."""
    hints, meanings, found = get_type_hints(type(config)), _meanings(type(config)), []
    for field, name in _path_names(config).items():
        if name != field and len(getattr(config, field)) > 1:
            continue  # no path leads to one of several
        value, path = _value(config, name), f"{parent}{name}"
        if dataclasses.is_dataclass(value):
            found += describe(value, f"{path}.")
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        found.append(FieldInfo(path, text, meanings[name], tuple(map(str, choices))))
    return found


def _meanings(kind: type) -> dict[str, str]:
    """Returns the comment beside each field of a dataclass, "" without one, by the field's name."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.end[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    fields = (node for node in body.body if isinstance(node, ast.AnnAssign))
    return {ast.unparse(field.target): comments.get(field.end_lineno or 0, "") for field in fields}


def _path_names(config: Any) -> dict[str, str]:
    """Returns the names that paths have for the fields of a dataclass, by field."""
    fields = [field.name for field in dataclasses.fields(config)]
    return {field: field.removesuffix("s") if _holds_dataclasses(getattr(config, field)) else field for field in fields}


def _holds_dataclasses(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(dataclasses.is_dataclass, value))


def _value(config: Any, name: str) -> Any:
    """Returns what the field that paths call `name` holds: of several the first."""
    field = next(field for field, path_name in _path_names(config).items() if path_name == name)
    value = getattr(config, field)
    return value if field == name else value[0]


def _unknown_message(config: Any, parent: str, name: str) -> str:
    names = list(_path_names(config).values())
    deeper = [field.path for field in describe(config) if field.path.endswith(f".{name}")]
    close = deeper or difflib.get_close_matches(name, names, n=2)
    hint = f"did you mean {' or '.join(parent + match for match in close)}? " if close else ""
    owner = f"{parent.removesuffix('.')} ({type(config).__name__})" if parent else type(config).__name__
    return f"{parent}{name} does not exist; {hint}the fields of {owner} are {', '.join(names)}"


def _parse(text: str, hint: Any, path: str) -> Any:
    """The value of type `hint` that `text` stands for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _parse_optional(text, arguments, path)
    if origin is tuple:
        item = arguments[0]
        if item is str and os.path.exists(os.path.expanduser(text)):  # commas and spaces may belong to its name
            return (text,)
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return tuple(_parse(part, item, path) for part in parts)
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        close = difflib.get_close_matches(text.lower(), map(str, arguments), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise _wrong_type(text, path, f"one of {', '.join(map(str, arguments))}{hint}")
    if hint is str:
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise _wrong_type(text, path, "true or false")
        return text.lower() == "true"
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise _wrong_type(text, path, "a whole number (int)") from None
    if hint is float:
        return _parse_float(text, path)
    raise ConfigError(f"{path}={text!r} cannot be set by an override: its type is {hint}; set it in a file")


def _parse_float(text: str, path: str) -> float:
    expected = "a finite number (float)"
    try:
        value = float(text)
    except ValueError:
        raise _wrong_type(text, path, expected) from None
    if not math.isfinite(value):
        raise _wrong_type(text, path, expected)
    return value


def _parse_optional(text: str, arguments: tuple[Any, ...], path: str) -> Any:
    if type(None) in arguments and text.lower() == "none":
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    if len(kinds) != 1:
        raise ConfigError(
            f"{path}={text!r} cannot be set by an override: it has several types; set it in a config file"
        )
    return _parse(text, kinds[0], path)


def _wrong_type(text: Any, path: str, expected: str) -> ConfigError:
    return ConfigError(f"{path}={text!r} must be {expected}")


def from_record(kind: type[T], record: Mapping[str, Any], path: str) -> tuple[T, list[str]]:
    """Returns the `kind` that `record` holds as JSON has it, and a line per way in which another version wrote it.

    Undoes `dataclasses.asdict` and JSON. A field that the record lacks gets the default that it has today; one that
    `kind` lacks is left out; fields that a model of version 0.1 had elsewhere are moved. `path` says in messages where
    the record is: "config".

    Raises:
      ConfigError: a value that is not of the field's type, a field that has no default, or a value that the dataclass
        refuses.
    """
    reader = _RecordReader()
    value = reader.read(kind, record, path)
    lines = [f"{', '.join(reader.unknown)} left out: this version has no such field"] if reader.unknown else []
    if reader.missing:
        lines.append(f"{', '.join(reader.missing)} taken from the defaults: the record has no such field")
    return value, lines


class _RecordReader:
    def __init__(self) -> None:
        self.missing: list[str] = []  # "config.steps=300", or a group: "config.model.rope.scaling"
        self.unknown: list[str] = []

    def read(self, hint: Any, value: Any, path: str) -> Any:
        """Returns `value`, as JSON has it, as the type `hint`."""
        origin, arguments = get_origin(hint), get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self._read_fields(hint, value, path)
        if origin is tuple:
            _check_type(isinstance(value, list | tuple), value, path, "a list")
            return tuple(self.read(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if origin is Literal:
            _check_type(value in arguments, value, path, f"one of {', '.join(map(str, arguments))}")
            return value
        kinds = arguments if origin in (Union, types.UnionType) else (hint,)
        if float in kinds and (type(value) is int or value in NOT_FINITE):
            return float(value)
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        _check_type(type(value) in kinds, value, path, f"of type {names}")
        return value

    def _read_fields(self, kind: Any, record: Any, path: str) -> Any:
        _check_type(isinstance(record, Mapping), record, path, f"the fields of a {kind.__name__}")
        record = _regroup(record) if kind is ModelConfig else record
        hints, values = get_type_hints(kind), {}
        self.unknown += [f"{path}.{name}={value!r}" for name, value in record.items() if name not in hints]
        for field in dataclasses.fields(kind):
            name = f"{path}.{field.name}"
            if field.name in record:
                values[field.name] = self.read(hints[field.name], record[field.name], name)
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            check(default is not dataclasses.MISSING, f"{name} is missing, and has no default")
            is_group = dataclasses.is_dataclass(default)
            self.missing.append(name if is_group else f"{name}={default}")
        try:
            return kind(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from None


def _regroup(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a model with fields of version 0.1 moved to where they are now."""
    moved: dict[str, Any] = {name: value for name, value in record.items() if name not in MOVED_FIELDS}
    for name in MOVED_FIELDS.keys() & record.keys():
        group, _, field = MOVED_FIELDS[name].partition(".")
        moved[group] = moved.get(group, {}) | {field: record[name]}
    return moved


def _check_type(ok: bool, value: Any, path: str, expected: str) -> None:
    if not ok:
        raise _wrong_type(value, path, expected)


def split_overrides(argv: Sequence[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Takes `--<prefix>.path=value` and `--<prefix>.path value` (or with one dash) out of `argv`.

    Returns the overrides, path -> text, of which the last one of a path wins, and the remaining arguments in order.
    What follows `--` is left alone.

    Raises:
      ConfigError: an override without a value.
    """
    overrides: dict[str, str] = {}
    remaining: list[str] = []
    arguments = list(argv)
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            remaining += [argument, *arguments[position:]]
            break
        flag = argument[2:] if argument.startswith("--") else argument[1:]
        if not argument.startswith("-") or not flag.startswith(f"{prefix}."):
            remaining.append(argument)
            continue
        path, equals, text = flag.removeprefix(f"{prefix}.").partition("=")
        if not equals:
            if position == len(arguments) or is_flag(arguments[position]):
                raise ConfigError(f"--{prefix}.{path} needs a value; write --{prefix}.{path}=VALUE")
            text = arguments[position]
            position += 1
        overrides.pop(path, None)
        overrides[path] = text
    return overrides, remaining


def is_flag(argument: str) -> bool:
    """Returns whether `argument` is a flag, and not a value such as -1 or -.5."""
    return argument.startswith("-") and not argument.lstrip("-")[:1].isdigit() and not argument.startswith("-.")


def load_config_file(path: str | Path, expected_type: type[T]) -> T:
    """Runs the Python file at `path` and returns what its `get_config()` returns, an `expected_type`.

    Raises:
      ConfigError: there is no such file, it has no `get_config`, it fails, or it returns something else.
    """
    name = expected_type.__name__
    config = call_in_file(path, "get_config", name)
    check(config is not None, f"{path} has no get_config(); define get_config() -> {name}")
    if not isinstance(config, expected_type):
        raise ConfigError(f"{path}: get_config() returned {config!r:.80}; it must return a {name}")
    return config


def call_in_file(path: str | Path, function: str, returns: str) -> Any:
    """Runs the Python file at `path` and then its `function()`, which `returns` something; None if it has none.

    Raises:
      ConfigError: there is no such file, it fails or exits, or the function returns None.
    """
    path = Path(path)
    wanted = f"use a Python file with {function}() -> {returns}"
    try:
        problem = "is no file" if os.path.lexists(path) else "does not exist"
        check(path.is_file(), f"{path} {problem}; {wanted}")
    except OSError as error:  # its folder may not be entered, or its name is too long
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {wanted}") from None
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        called = getattr(module, function, None)
        if not callable(called):
            return None
        returned = called()
        check(returned is not None, f"{function}() returned None; it must return a {returns}")
        return returned
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
        raise ConfigError(f"{path} failed{_line(error, path)}: {what}") from error


def _line(error: BaseException, path: Path) -> str:
    """ " at line N" of `path`, where its own code last was when it failed."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" at line {error.lineno}"
    numbers = []
    traceback = error.__traceback__
    while traceback is not None:
        if Path(traceback.tb_frame.f_code.co_filename).resolve() == path.resolve():
            numbers.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f" at line {numbers[-1]}" if numbers else ""
