"""Checks of what users give: one line that names the argument, its value, and what would be right."""

from __future__ import annotations

import functools
import math
import os
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

_EXPECTED = {int: "a whole number (int)", float: "a finite number (float)", str: "a text (str)", bool: "True or False"}


class ConfigError(ValueError):
    """A configuration that cannot work; the message is one line that says what would."""


def check(ok: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def one_line(message: object) -> str:
    """Returns the text of an error or another message with each run of white space as one space."""
    return " ".join(str(message).split())


def expand(path: str | os.PathLike[str], name: str = "") -> Path:
    """Returns `path`, of the argument `name`, with the home folder that a leading ~ or ~user stands for.

    Raises:
      ConfigError: there is no such user, or the user has no home folder.
    """
    expanded = os.path.expanduser(os.fspath(path))
    argument = f"{name}={path}" if name else path
    check(not expanded.startswith("~"), f"{argument} needs a home folder that is not known; write the whole path")
    return Path(expanded)


def make_folder(name: str, path: str | Path) -> Path:
    """The folder that the argument `name` says, made where it is not there; `ConfigError` if it cannot be."""
    path = expand(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise ConfigError(f"{name}={path} cannot be a folder ({why}); give another") from None
    return path


def check_positive(config: object, *names: str) -> None:
    """Raises `ConfigError` unless the fields of these names are above 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{name}={value} must be positive")


def check_not_negative(config: object, *names: str) -> None:
    """Raises `ConfigError` unless the fields of these names are 0 or more."""
    for name in names:
        value = getattr(config, name)
        check(value >= 0, f"{name}={value} must be 0 or more")


def check_types(config: object, *, infinite: tuple[str, ...] = ()) -> None:
    """Checks that each field of a dataclass holds a value of its type; NumPy's numbers become Python's.

    The fields named by `infinite` may be infinity.

    Raises:
      ConfigError: naming the field, if a value has another type, is not finite, or does not fit into 64 bits.
    """
    kind: Any = type(config)
    for name, hint in _type_hints(kind).items():
        value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, name, value)
        if not (name in infinite and value == math.inf):
            _check_type(name, hint, value)


_type_hints = functools.cache(get_type_hints)


def _check_type(name: str, hint: Any, value: Any) -> None:
    if type(value) is int:
        check(-(2**63) <= value < 2**63, f"{name} has {value.bit_length()} bits; it must be within ±2**63")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # of one type with None
        if value is not None:
            _check_type(name, arguments[0], value)
        return
    if origin is Literal:
        ok, expected = isinstance(value, str) and value in arguments, f"one of {', '.join(map(repr, arguments))}"
    elif origin is tuple:
        ok, expected = isinstance(value, tuple), "a tuple" + f"; write ({value!r},)" * isinstance(value, str)
    else:
        article = "an" if hint.__name__[0] in "AEIOU" else "a"
        ok, expected = _is(hint, value), _EXPECTED.get(hint) or f"{article} {hint.__name__}"
    check(ok, f"{name}={value!r} must be {expected}")
    if origin is tuple:
        for position, item in enumerate(value):
            _check_type(f"{name}[{position}]", arguments[0], item)


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)
