# SPDX-License-Identifier: Apache-2.0
"""Draft `run.toml` and `schema.toml` from a file's header and types; no value is kept.

Bounds, categories and the number of users must come from public knowledge, so a draft leaves
holes for them, and `plan` and `run` refuse it until they are filled.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..client.files import SeenColumn, columns_of
from ..core.errors import ConfigError, DataError, SchemaError
from ..core.privacy import Budget
from ..core.schema import OPEN

HOLE = "FILL IN"
_DATES = 'bounds = ["2015-01-01", "2024-12-31"]'
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TABLES, _IMAGES = 'name = "marginals"\n', 'name = "private_evolution"\n'
_TEXTS = f"""\
name = "private_evolution"
num_candidates = 100     # `fedsynth plan` says how many can be heard
num_rounds = 4
num_votes = 1

[strategy.model_settings]
about = "{HOLE}: what the texts are, in public words, as in short messages in a technical chat room"
examples = []            # public texts of the kind; six or more make a small model useful
max_words = 40
"""
_IDENTIFYING = frozenset(
    [
        *("account", "address", "comment", "comments", "contact", "email", "fax", "firstname"),
        *("fullname", "guid", "iban", "id", "imei", "ip", "lastname", "latitude", "licence"),
        *("license", "login", "longitude", "mac", "mail", "mobile", "mrn", "name", "note", "notes"),
        *("passport", "phone", "remark", "remarks", "signature", "ssn", "street", "surname"),
        *("telephone", "text", "uid", "url", "username", "uuid"),
    ]
)


@dataclass(frozen=True)
class Found:
    """A column as a file's header tells of it.

    Attributes:
      name: Its name.
      type: `integer`, `real`, `category`, `boolean`, `date`, `image`, or what the file says.
      role: What the draft does with it.
      needs: What a person has to fill in.
      note: Why it is left out, or how its hole is filled.
      shape: Height, width and channels of an image.
      categories: Given by the caller, or by the type itself.
      bounds: Given by the caller.
      is_open: The run is to find them, under its budget.
    """

    name: str
    type: str
    role: Literal["user id", "feature", "left out"] = "feature"
    needs: Literal["", "bounds", "categories"] = ""
    note: str = ""
    shape: tuple[int, int, int] | None = None
    categories: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Draft:
    """The two files that describe a run, not yet written.

    Attributes:
      columns: The file's columns and what became of each.
      run_toml: Content of `run.toml`.
      schema_toml: Content of `schema.toml`.
    """

    columns: tuple[Found, ...]
    run_toml: str
    schema_toml: str

    @property
    def holes(self) -> list[str]:
        """What is left for a person to fill in."""
        return [
            *holes_in(tomllib.loads(self.run_toml), "run.toml"),
            *holes_in(tomllib.loads(self.schema_toml), "schema.toml"),
        ]


def draft(
    path: Path,
    *,
    user: str | None = None,
    keep: Sequence[str] = (),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    categories: Mapping[str, tuple[str, ...]] | None = None,
    private: Sequence[str] = (),
    text: str | None = None,
    num_users: int | None = None,
    target: str | None = None,
    epsilon: float = 1.0,
    folder: Path = Path("."),
) -> Draft:
    """A draft from a file's header and types.

    Args:
      path: A file that `client.shard.read_shard` reads.
      user: Column of user ids; `None`: every record is a user.
      keep: Columns to keep although their names look as if they identify people.
      bounds: Public bounds of numbers, by column.
      categories: Public categories, by column; a number given categories becomes one.
      private: Columns whose bounds or categories the run is to find, under its budget.
      text: Column of free text, of which new texts are to be written.
      num_users: Public lower bound on the number of users.
      target: The column a reader of the synthetic data wants to predict.
      epsilon: Budget of the run; the population's is four times as much, up to 10.
      folder: Where the draft will lie, which paths in it start from.

    Raises:
      ConfigError: An option names a column that is not there, or that it does not fit; or no
        budget has that epsilon.
      DataError: The file cannot be read or has no usable column.

    Privacy:
      Only names and types of columns are kept; a text file's types are guessed from its first
      records. Whoever passes the draft on declares those names and types public.
    """
    Budget(epsilon, _delta(None), accept_weak=True)  # whether a weak one is meant, `plan` asks
    bounds, categories = bounds or {}, categories or {}
    columns = [_found(column) for column in columns_of(path)]
    names = [column.name for column in columns]
    for name in (*bounds, *categories, *private, *keep, text, user, target):
        if name is not None and name not in names:
            raise ConfigError(f"no column {name!r} in {path.name}; there are {', '.join(names)}")
    if text is not None and text in {*bounds, *categories, *private, user, target}:
        raise ConfigError(f"column {text!r} is free text, and nothing else beside it")
    kept = {*keep, *bounds, *categories, *private, target}
    judged = tuple(
        replace(column, role="user id", note="keys the promise; never synthesized")
        if column.name == user
        else _free_text(column)
        if column.name == text
        else _judged(column, column.name in kept, bounds, categories)
        for column in columns
    )
    judged = tuple(_opened(column, private) for column in judged)
    if not any(column.role == "feature" for column in judged):
        raise DataError(f"{path.name} has no column to synthesize; keep one with --keep NAME")
    image = any(column.type == "image" and column.role == "feature" for column in judged)
    if image and text is not None:
        raise ConfigError("a run makes images or texts, not both: leave --text out")
    return Draft(
        judged,
        _run_toml(
            population=re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-")[:64] or "population",
            data=os.path.relpath(path, folder),
            strategy=_TEXTS if text is not None else _IMAGES if image else _TABLES,
            user=user,
            num_users=num_users,
            epsilon=epsilon,
        ),
        _schema_toml(path.name, judged, target),
    )


def check_filled(run_toml: Path) -> None:
    """Refuse a draft that still has holes, naming all of them at once.

    Raises:
      ConfigError: `run.toml` has holes.
      SchemaError: Its schema has.
    """
    data = _toml(run_toml)
    section = data.get("data")
    named = section.get("schema") if isinstance(section, dict) else None
    schema = run_toml.parent / named if isinstance(named, str) else None
    in_run = holes_in(data, run_toml.name)
    in_schema = holes_in(_toml(schema), schema.name) if schema else []
    if in_run or in_schema:
        kind = ConfigError if in_run else SchemaError
        raise kind(
            "this is a draft; fill in, from public knowledge and never from the records\n"
            + "\n".join([*in_run, *in_schema])
        )


def holes_in(data: Mapping[str, Any], where: str) -> list[str]:
    """Keys whose value is still to be filled in, with what belongs there."""
    return [
        f"{where}: {key} ({value.removeprefix(HOLE).strip(': ')})"
        for key, value in _leaves(data)
        if isinstance(value, str) and value.startswith(HOLE)
    ]


def _leaves(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value in nested tables, by its dotted key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _leaves(value))
        else:
            yield key, value


def _toml(path: Path) -> dict[str, Any]:
    """A file's content; nothing if it cannot be read, which its reader says better."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _found(column: SeenColumn) -> Found:
    """A column of a file, in the schema's words."""
    if column.type == "image":
        height, width, channels = (*column.shape, 1)[:3]
        return Found(column.name, "image", shape=(height, width, channels))
    return Found(column.name, "category" if column.type == "text" else column.type)


def _judged(
    column: Found,
    kept: bool,
    bounds: Mapping[str, tuple[float, float]],
    categories: Mapping[str, tuple[str, ...]],
) -> Found:
    """A column with its role, and what it still needs."""
    name = column.name
    if not kept and (word := _identifying(name)):
        note = f"{word!r} looks identifying; keep it with --keep {name}"
        return replace(column, role="left out", note=note)
    if name in categories:
        return replace(column, type="category", categories=categories[name])
    if name in bounds:
        if column.type == "date":
            raise ConfigError(f"column {name!r} holds dates; write in schema.toml: {_DATES}")
        if column.type not in ("integer", "real", "category"):
            raise ConfigError(f"column {name!r} is {column.type}, so bounds mean nothing for it")
        kind = "real" if column.type == "category" else column.type  # text that spells numbers
        return replace(column, type=kind, bounds=bounds[name])
    match column.type:
        case "integer" | "real":
            note = f"--bounds {name}=LOW,HIGH or --private {name}"
            return replace(column, needs="bounds", note=note)
        case "category":
            note = f"--categories {name}=FILE, --private {name} or --text {name}"
            return replace(column, needs="categories", note=note)
        case "date":
            return replace(column, needs="bounds", note=f"in schema.toml: {_DATES}")
        case "boolean" | "image":
            return column
        case _:
            note = "neither text nor number: code it first"
            return replace(column, role="left out", note=note)


def _free_text(column: Found) -> Found:
    """The column of free text.

    Raises:
      ConfigError: It holds no text.
    """
    if column.type != "category":
        raise ConfigError(f"column {column.name!r} is {column.type}, and no text")
    return replace(column, type="text", note="new texts are written; none is copied")


def _opened(column: Found, private: Sequence[str]) -> Found:
    """A column whose domain the run is to find, if it is one of those named."""
    if column.name not in private:
        return column
    if not column.needs or column.type not in ("integer", "real", "category"):
        raise ConfigError(
            f"column {column.name!r} needs no bounds or categories that a run could find"
        )
    note = "found by the run, under its budget"
    return replace(column, needs="", note=note, is_open=True)


def _identifying(name: str) -> str:
    """The word in a column's name that makes it look as if it identified people."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    words = [word for word in re.split(r"[^a-z]+", apart.lower()) if word]
    pairs = [first + second for first, second in pairwise(words)]
    return next((word for word in (*words, *pairs) if word in _IDENTIFYING), "")


def _run_toml(
    *,
    population: str,
    data: str,
    strategy: str,
    user: str | None,
    num_users: int | None,
    epsilon: float,
) -> str:
    """Content of `run.toml`."""
    users = _quoted(HOLE + ": a public lower bound on the number of users, as in 1000")
    unit = (
        f"column = {_quoted(user)}\n"
        "max_records = 1          # most records of one user that are used; the rest is left out"
        if user
        else "# no column of user ids: each record is protected by itself, a person with several is"
        " not"
    )
    typical = (
        "# typical_records = [1, 1, 2, 5]  # of typical users, if publicly known: a plan reads it\n"
        if user
        else ""
    )
    cap = min(4 * epsilon, max(10.0, epsilon))
    clip = (
        "# where max_records is above 1: how far a user with many records counts, found by itself\n"
        '# max_norm = "auto"\n'
        if user and strategy == _TABLES
        else ""
    )
    return f"""\
# A run of fedsynth. `fedsynth plan` says what it costs before anything is read or spent.

[population]             # these people own the budget, whatever run asks
name = {_quoted(population)}
num_users = {users if num_users is None else num_users}
{typical}epsilon = {cap:g}              # the most that all runs together may ever spend
delta = {_delta(num_users):g}            # below 1 / (10 x users)

[unit]                   # whom the promise protects
{unit}

[data]
path = {_quoted(data)}
schema = "schema.toml"

[budget]                 # of this run
epsilon = {epsilon:g}

[strategy]
{strategy}{clip}
[noise]
placement = "central"    # or "local": clients then trust nobody, and the noise is larger

[engine]
kind = "local"           # a simulation in one process
clients = 10

[release]
path = "releases"
num_records = 10000
"""


def _delta(num_users: int | None) -> float:
    """A power of ten well below one over the number of users."""
    return min(1e-6, 10.0 ** -(len(str(num_users or 1)) + 1))


def _schema_toml(name: str, columns: Sequence[Found], target: str | None) -> str:
    """Content of `schema.toml`."""
    parts = [
        f"# Public schema of {_quoted(name)}, drafted from its header and types, not its values.\n"
        "# An origin begins with public, policy or measured, and says where the facts came from.\n"
    ]
    if target:
        parts.append(f"target = {_quoted(target)}\n")
    parts += [_entry(column) for column in columns if column.role != "left out"]
    parts.append(
        "# What holds of every record may be declared too, and every synthetic one keeps it:\n"
        '# [[constraints]]\n# order = ["admitted", "<=", "discharged"]  # more in docs/schema.md\n'
    )
    return "\n".join(parts)


def _entry(column: Found) -> str:
    """A column's table in `schema.toml`."""
    key = column.name if _BARE_KEY.fullmatch(column.name) else _quoted(column.name)
    if column.role == "user id":
        return f'[columns.{key}]\ntype = "id"  # keys the promise; never synthesized\n'
    lines = [f"[columns.{key}]", f"type = {_quoted(column.type)}"]
    if column.type == "text":
        lines.append("max_bytes = 1000  # of each text that count")
        return "\n".join(lines) + "\n"
    if column.is_open:
        domain = "categories" if column.type == "category" else "bounds"
        lines += [f"{domain} = {_quoted(OPEN)}", "missing = true"]
        return "\n".join(lines) + "\n"
    if column.shape:
        lines.append(f"shape = {list(column.shape)}")
    elif column.categories:
        lines.append(f"categories = [{', '.join(map(_quoted, column.categories))}]")
    elif column.bounds:
        lines.append(f"bounds = [{column.bounds[0]!r}, {column.bounds[1]!r}]")
    elif column.needs == "categories":
        what = "a list of all values, or only private, and the run finds them"
        lines.append(f"categories = {_quoted(f'{HOLE}: {what}')}")
    elif column.needs == "bounds":
        what = "[lowest, highest], or only private, and the run finds them"
        if column.type == "date":
            what = "[first, last], as ISO dates"
        lines.append(f"bounds = {_quoted(f'{HOLE}: {what}')}")
    origin = "public: declared to fedsynth init"
    if column.needs:
        origin = HOLE + ": where that is known from, as in 'public: code book'"
    lines.append(f"origin = {_quoted(origin)}")
    if not column.shape:
        lines.append("missing = true  # one more cell, for what is missing or not listed")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
