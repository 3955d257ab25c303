# SPDX-License-Identifier: Apache-2.0
"""The page of settings says what the code says."""

import dataclasses
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from fedsynth.strategies.registry import STRATEGIES, build_strategy

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """`docs/methods.py`."""
    spec = util.spec_from_file_location("methods_page", DOCS / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_what_its_script_makes(maker: ModuleType):
    committed = (DOCS / "methods.md").read_text(encoding="utf-8")

    assert committed == maker.page(), "run: python docs/methods.py"


def test_every_setting_of_every_method_stands_on_the_page(maker: ModuleType):
    shared, *sections = maker.page().split("\n## ")[1:]
    of = {section.partition("`\n")[0].strip("`"): section for section in sections}

    for name in STRATEGIES:
        for field in dataclasses.fields(build_strategy(name, {})):
            row = f"| `{field.name}` |"
            assert row in of[name] or row in shared, (name, field.name)


def test_a_setting_without_a_line_in_its_docstring_is_refused(maker: ModuleType):
    @dataclasses.dataclass(frozen=True)
    class Silent:
        """A class that says nothing of its field."""

        depth: int = 3

    with pytest.raises(LookupError, match=r"Silent\.depth is a setting without a line"):
        list(maker._table(Silent, {"depth"}))
