# SPDX-License-Identifier: Apache-2.0
"""Settings are of the types of a strategy's fields, and what is wrong with them names it."""

from typing import Any

import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.strategies.registry import build_strategy


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("marginals", {"pair_cells": True}, "pair_cells = True: expected a whole number"),
        ("marginals", {"pair_cells": "20"}, "pair_cells = '20': expected a whole number"),
        ("marginals", {"pair_cells": 2.5}, "pair_cells = 2.5: expected a whole number"),
        ("marginals", {"pair_cells": 10**40}, "pair_cells = 1"),
        ("marginals", {"pair_cells": 10**400}, "pair_cells = 1"),
        ("marginals", {"pair_share": 10**400}, "pair_share = 1"),
        ("marginals", {"pair_share": True}, "pair_share = True: expected a number"),
        ("marginals", {"pair_share": "0.1"}, "pair_share = '0.1': expected a number"),
        ("marginals", {"max_norm": "aut"}, "max_norm = 'aut': expected a number or 'auto'"),
        ("marginals", {"max_norm": "2"}, "max_norm = '2': expected a number or 'auto'"),
        ("marginals", {"norm_quantile": "x"}, "norm_quantile = 'x': expected a number"),
        ("marginals", {"weight": "users"}, "weight = 'users': expected 'record' or 'user'"),
        ("relational", {"parent": "sex"}, "parent = 'sex': expected a list, as [\"sex\"]"),
        ("dp_merf", {"bandwidths": [0.1, "x"]}, "bandwidths = [0.1, 'x']: expected a list, as"),
        ("dp_merf", {"label": 5}, "label = 5: expected a text"),
        ("flaim", {"augmented": 1}, "augmented = 1: expected true or false"),
        ("marginals", {"pair_cells": 0}, "pair_cells must be 2 to"),
        ("dpdsyn", {"feature_settings": 1}, "feature_settings = 1"),
    ],
)
def test_a_setting_of_another_type_or_range_is_named_with_its_strategy(
    name: str, setting: dict[str, Any], says: str
):
    with pytest.raises(ConfigError) as refusal:
        build_strategy(name, setting)

    assert str(refusal.value).startswith(f"strategy {name!r}: {says}")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("marginals", {"max_model_mb": 4, "pair_cells": 20.0, "norm_quantile": None}),
        ("marginals", {"max_norm": "auto"}),
        ("relational", {"parent": ["sex"]}),
        ("dp_merf", {"bandwidths": [1, 0.5], "num_features": None}),
    ],
)
def test_a_whole_number_is_a_number_and_a_list_is_a_tuple(name: str, setting: dict[str, Any]):
    made = build_strategy(name, setting)

    assert {key: getattr(made, key) for key in setting} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in setting.items()
    }


def test_a_strategy_inside_another_is_named_once_each():
    with pytest.raises(ConfigError) as refusal:
        build_strategy("dpdsyn", {"feature_settings": {"pair_cells": 0}})

    assert str(refusal.value).startswith("strategy 'dpdsyn': strategy 'marginals': pair_cells must")
