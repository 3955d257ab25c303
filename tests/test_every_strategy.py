# SPDX-License-Identifier: Apache-2.0
"""What every strategy owes, over all that are installed and the worked example."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.core.query import Contribution, Query, Strategy
from fedsynth.simulation.check import check_strategy, small_images, small_table
from fedsynth.strategies.independent import Columns, Independent
from fedsynth.strategies.registry import build_strategy, strategy_names

# settings that make a long method short; every installed strategy runs even when not named here
QUICK = {
    "aim": {"num_steps": 4},
    "mwem": {"num_steps": 3},
    "absyn": {"num_steps": 2, "batch": 3},
    "flaim": {"num_steps": 2, "augmented": True},
    "private_evolution": {"num_rounds": 3, "num_candidates": 40},
    "tab_pe": {"num_rounds": 3, "num_candidates": 40},
    "dp_fedavg": {"num_rounds": 3, "num_users": 40, "sampling_prob": 0.5},
    "dp_merf": {"num_steps": 20},
    "dp_wgan": {"num_rounds": 3, "steps_per_round": 2, "batch_size": 64},
    "rdp_gan": {"num_rounds": 3, "steps_per_round": 2, "batch_size": 64},
}
TABLES_ONLY = {
    "absyn",
    "aim",
    "dpdsyn",
    "flaim",
    "independent",
    "marginals",
    "mst",
    "mwem",
    "privmrf",
    "privsyn",
    "tab_pe",
    "relational",
}
CASES = [(name, schema) for name in strategy_names() for schema in ("table", "images")]


@pytest.mark.parametrize(("name", "schema"), CASES)
def test_a_strategy_keeps_all_it_owes(name, schema):
    strategy = build_strategy(name, QUICK.get(name, {}))
    on = small_table() if schema == "table" else small_images()
    if schema == "images" and name in TABLES_ONLY:
        pytest.skip("refuses images, as its own tests show")

    findings = check_strategy(strategy, on)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_the_worked_example_keeps_all_it_owes(monkeypatch):
    folder = Path(__file__).parents[1] / "examples" / "own_strategy"
    monkeypatch.syspath_prepend(str(folder))
    module = next(p.stem for p in folder.glob("*.py") if not p.stem.startswith("test_"))
    kind = next(
        value
        for value in vars(__import__(module)).values()
        if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
    )
    strategy = build_strategy(f"{module}:{kind.__name__}", {})
    sys.modules.pop(module)

    assert [f"{f.name}: {f.detail}" for f in check_strategy(strategy) if not f.ok] == []


@dataclass(frozen=True)
class Twin(Strategy):
    """`independent`, broken in one way at a time, to show that the checks can fail."""

    name: ClassVar[str] = "twin"
    fault: str = ""

    def event(self, schema, noise_multiplier):
        claimed = 2 * noise_multiplier if self.fault == "event" else noise_multiplier
        return GaussianDpEvent(claimed)

    def rounds(self, schema, noise_multiplier, rng):
        counts = yield Query(
            "histograms",
            dim=schema.num_cells,
            clip=len(schema.columns) ** 0.5,
            noise_multiplier=noise_multiplier,
            inputs={"offsets": schema.offsets[:-1]},
        )
        if self.fault == "void" and counts.is_void:
            raise ZeroDivisionError
        noise = random.gauss() if self.fault == "global" else rng.normal()
        probs = [np.full(c, 1 / c) for c in schema.shape]
        probs[0] = np.abs(counts.vector[: schema.shape[0]]) + abs(noise) + 1e-3
        probs[0] = probs[0] / probs[0].sum()
        return Columns(schema, tuple(probs))

    def answer(self, query, shard, rng):
        cells = shard.records.codes + query.inputs["offsets"]
        users, num_users = shard.user_index, shard.num_users
        if self.fault == "split":  # each record passes for a user of its own
            rows = np.zeros((len(cells), query.dim))
            np.put_along_axis(rows, np.clip(cells, 0, query.dim - 1), 1, axis=1)
            return Contribution.rows(rows)
        rows = np.zeros((num_users, query.dim))
        np.add.at(rows, (users[:, None], np.clip(cells, 0, query.dim - 1)), 1)
        if self.fault == "mean":  # a user's row leans on the whole block
            rows -= rows.mean(axis=0) if len(rows) else 0
        if self.fault == "empty" and num_users == 0:
            raise IndexError
        return Contribution.rows(rows)


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        ("event", "its queries add up to its event"),
        ("void", "a void round does not stop it"),
        ("global", "it leaves global random state alone"),
        ("mean", "no user's answer depends on another user's records"),
        ("mean", "one user moves each sum by at most the clip"),
        ("empty", "an empty shard and a single user are answered"),
    ],
)
def test_a_broken_twin_is_found_out(fault, claim):
    findings = {f.name: f.ok for f in check_strategy(Twin(fault), small_table())}

    assert not findings[claim]


def test_a_whole_twin_passes():
    assert all(f.ok for f in check_strategy(Twin(), small_table()))


def test_records_that_pass_for_users_count_as_zeros():
    twin, schema = Twin("split"), small_table()
    findings = {f.name: f for f in check_strategy(twin, schema)}

    assert findings["one user moves each sum by at most the clip"].ok


def test_independent_refuses_images():
    with pytest.raises(Exception, match="image"):
        Independent().event(small_images(), 1.0)
