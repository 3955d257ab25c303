# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md from the methods' own fields and docstrings: python docs/methods.py."""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fedsynth.core.plugins import find
from fedsynth.core.query import Strategy
from fedsynth.strategies.parts.measuring import MarginalStrategy
from fedsynth.strategies.registry import STRATEGIES

PAGE = Path(__file__).with_name("methods.md")
HEAD = """# Methods and their settings

Every method with all it can be told, made by `python docs/methods.py` from the code. A setting stands beside `name` in
`[strategy]` of the run's file, or follows the method's name in `fs.simulate`; what is left out has its default:

```toml
[strategy]
name = "relational"
parent = ["ward", "sex"]
```

Settings that begin with `domain_` belong to open columns: [schema.md](schema.md). A share of the budget is one of mu²,
which adds up over rounds. A dash as default: left out, the setting is not in force, or means what its line says.
"""
COMMON = """## Settings of all methods of marginals

Whom a table counts, and how much one user may add to it. {names} have them.

- `weight = "record"`: a user adds the sum over their records, shortened to `max_norm` times the length of one record's
  part. A greater `max_norm` takes less from users with many records and brings more noise. Declare it, or have it measured
  within the same budget: `max_norm = "auto"`, or `norm_quantile` for the bound that this share of users stays below.
- `weight = "user"`: a user adds the mean over their records. Every user weighs the same, nothing is shortened, and
  `max_norm` and `norm_quantile` are left out.
"""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def page() -> str:
    """The whole page."""
    kinds = {n: find("strategy", n, STRATEGIES, "", Strategy) for n in sorted(STRATEGIES)}  # type: ignore[type-abstract]
    names = [f"`{n}`" for n, kind in kinds.items() if issubclass(kind, MarginalStrategy)]
    shared = {field.name for field in dataclasses.fields(MarginalStrategy)}
    common = COMMON.format(names=", ".join(names[:-1]) + f" and {names[-1]}")
    parts = [HEAD, common, *_table(MarginalStrategy, shared)]
    for name, kind in kinds.items():
        fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
        own = {field.name for field in fields if field.init}
        marginal = issubclass(kind, MarginalStrategy)
        parts += [f"\n## `{name}`\n", inspect.getdoc(kind).splitlines()[0].replace("``", "`")]  # type: ignore[union-attr]
        table = list(_table(kind, own - shared if marginal else own))
        if marginal:
            own_too = "It has, beside its own," if table else "It has"
            parts.append(f"\n{own_too} the settings of all methods of marginals, above.")
        parts += ["", *table] if table else []
    return "\n".join(parts) + "\n"


def _table(kind: type, names: set[str]) -> Iterator[str]:
    """Rows of the settings named, in the order of the class's fields."""
    meanings = _meanings(kind)
    fields: Any = dataclasses.fields(kind)
    rows = [field for field in fields if field.name in names]
    if rows:
        yield "| setting | takes | default | meaning |"
        yield "|---|---|---|---|"
    for field in rows:
        if field.name not in meanings:
            raise LookupError(
                f"{kind.__name__}.{field.name} is a setting without a line under Attributes: in"
                " its class's docstring; write one"
            )
        cells = (f"`{field.name}`", _takes(field.type), _default(field), meanings[field.name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _meanings(kind: type) -> dict[str, str]:
    """What each attribute means, from the docstrings of a class and of those it derives from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(owner.__dict__.get("__doc__") or "").partition(
            "\nAttributes:\n"
        )
        section = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n(?=  \S)", "\n" + section.rstrip()):
            name, colon, text = entry.strip().partition(": ")
            if colon:
                found[name] = " ".join(
                    text.replace("``", "`")
                    .replace("`None`:", "Left out:")
                    .replace("; Left", "; left")
                    .split()
                )
    return found


def _takes(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(_takes(part) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of texts" if get_args(kind)[0] is str else "a list of numbers"
    return "a table of settings" if get_origin(kind) is dict else _WORDS[kind]


def _default(field: Any) -> str:
    """A default as a run's file spells it; a dash where a setting that is left out has no value."""
    if field.default is dataclasses.MISSING:
        return "`{}`" if field.default_factory is dict else "must be given"
    return "-" if field.default is None else f"`{json.dumps(field.default)}`"


def main() -> int:
    """Write the page beside this file."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
