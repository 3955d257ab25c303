# SPDX-License-Identifier: Apache-2.0
"""Find what can be plugged in by its name, and build it from settings."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .errors import ConfigError

T = TypeVar("T")

_MOST = 2**63  # in absolute value, of whole numbers
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def entry_names(group: str) -> Collection[str]:
    """Names of all entry points of a group."""
    return _plugins(group).keys()


def find(what: str, name: str, builtin: Mapping[str, str], group: str, base: type[T]) -> type[T]:
    """A class by its built-in name, its entry point's name, or `module:Name`."""
    if name in builtin:
        module, attribute = builtin[name].split(":")
        found = getattr(import_module(f"...{module}", __name__), attribute)
    elif name in (plugins := _plugins(group)):
        found = plugins[name].load()
    elif ":" in name:
        found = _imported(what, name)
    else:
        known = sorted({*builtin, *plugins})
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"no {what} {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}"
            f" Installed: {', '.join(known)}; your own: 'module:Name'"
        )
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{what} {name!r} is not a subclass of fedsynth's {base.__name__}")
    return found


def installed(
    what: str, name: str, builtin: Mapping[str, str], group: str, base: type[T]
) -> type[T]:
    """A class by its built-in name or its entry point's: never by `module:Name`.

    For names that stand in settings, which a client takes from a server and a replay from a card:
    neither may have a module imported.
    """
    if ":" in name:
        raise ConfigError(f"{what} {name!r} must be installed as an entry point of {group}")
    return find(what, name, builtin, group, base)


def build(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from settings; unknown keys are refused with the known ones."""
    if not dataclasses.is_dataclass(kind):
        raise ConfigError(f"{where} must be a frozen dataclass, so that its fields are settings")
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else '.'}"
                f" Known keys: {', '.join(known) or 'none'}"
            )
    hints = _hints(kind)
    for key, value in settings.items():
        if key in hints and not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key} = {value!r}: expected {_wanted(hints[key])}")
    try:
        made: T = _adapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key} = {problem['input']!r}: {message}") from error
    except ConfigError as error:  # a class's own check, which need not know its name
        if where in str(error):
            raise
        raise ConfigError(f"{where}: {error}") from error
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a field's type; no text or truth value is a number.

    Nor is a whole number that 64 bits cannot hold: arithmetic on one ends in an OverflowError.

    Of types that TOML does not have, nothing is said here.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple and parts[1:] == (...,):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        if isinstance(value, Integral):
            return abs(int(value)) < _MOST
        return hint is float or float(value).is_integer()
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _wanted(hint: Any) -> str:
    """What belongs in a field, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_wanted(part) for part in parts if part is not NoneType)
    if origin is Annotated:
        return _wanted(parts[0])
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return 'a list, as ["sex"]' if str in parts else "a list, as [1, 2]"
    return _WANTED.get(hint) or f"a {getattr(hint, '__name__', hint)}"


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    """Types of a class's fields."""
    return get_type_hints(kind, include_extras=True)


@lru_cache(maxsize=64)
def _adapter(kind: type) -> "TypeAdapter[Any]":
    """What validates a class's settings; costly to make."""
    return TypeAdapter(kind)


@lru_cache(maxsize=8)
def _plugins(group: str) -> dict[str, Any]:
    """Entry points of a group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def _imported(what: str, name: str) -> Any:
    """What `module:Name` names; only ever called with a name that a person wrote or allowed."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} {name!r} cannot be imported: {error}") from error
