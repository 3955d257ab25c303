# SPDX-License-Identifier: Apache-2.0
"""Every strategy learns columns of every kind, and its samples keep the schema's constraints."""

from typing import Any

import numpy as np
import pytest
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard, encode
from fedsynth.core.decode import decode
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.simulation.direct import direct_run, prior
from fedsynth.strategies.parts.descent import fit
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.registry import build_strategy, strategy_names

QUICK: dict[str, dict[str, Any]] = {
    "aim": {"num_steps": 3},
    "mwem": {"num_steps": 3},
    "absyn": {"num_steps": 2, "batch": 3},
    "flaim": {"num_steps": 2},
    "private_evolution": {"num_rounds": 2, "num_candidates": 60},
    "dp_fedavg": {"num_rounds": 1, "num_users": 40, "sampling_prob": 0.5},
    "dp_merf": {"num_steps": 20},
    "dp_wgan": {"num_rounds": 2, "steps_per_round": 2, "batch_size": 64},
    "rdp_gan": {"num_rounds": 2, "steps_per_round": 2, "batch_size": 64},
}
SCHEMA = Schema.from_json(
    {
        "columns": {
            "patient": {"type": "id", "synthesize": "serial"},
            "sex": {"type": "category", "categories": ["F", "M"], "origin": "policy"},
            "pregnant": {"type": "boolean", "missing": True},
            "grade": {"type": "ordinal", "categories": ["low", "mid", "high"], "origin": "policy"},
            "ward": {"type": "category", "categories": ["A", "B", "C", "D"], "origin": "policy"},
            "house": {"type": "category", "categories": ["north", "south"], "origin": "policy"},
            "came": {
                "type": "date",
                "bounds": ["2024-01-01", "2024-02-09"],
                "num_bins": 8,
                "origin": "policy",
            },
            "left": {
                "type": "date",
                "bounds": ["2024-01-01", "2024-02-09"],
                "num_bins": 5,
                "missing": True,
                "origin": "policy",
            },
            "ill": {"type": "boolean"},
        },
        "target": "ill",
        "constraints": [
            {"forbid": {"sex": "M", "pregnant": True}},
            {"if": {"grade": "low"}, "then": {"ill": False}},
            {
                "from": "ward",
                "to": "house",
                "table": {"A": "north", "B": "north", "C": "south", "D": "south"},
            },
            {"order": ["came", "<=", "left"]},
        ],
    }
)


def wards(num_draws: int, seed: int) -> Records:
    """Records of a made-up hospital, one in fifty of which breaks a constraint."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, c, num_draws) for c in SCHEMA.shape], axis=1)
    valid = SCHEMA.rules.valid(codes.astype(np.int32))
    keep = valid | (rng.random(num_draws) < 0.02 * valid.mean())
    return Records(codes[keep].astype(np.int32))


@pytest.mark.parametrize("name", strategy_names())
def test_every_sample_of_every_strategy_keeps_the_constraints(name: str):
    strategy = build_strategy(name, QUICK.get(name, {}))
    records = wards(10_000, 1)
    ids = np.arange(len(records)).astype(str)
    shard = bound(Shard(records, ids), PrivacyUnit(), seed=0)
    try:
        strategy.event(SCHEMA, 1.0)
    except ConfigError as refusal:
        pytest.skip(f"refuses this table: {refusal}")

    learnt = direct_run(strategy, SCHEMA, shard, 0.5, rng=np.random.default_rng(0))
    ignorant = prior(strategy, SCHEMA, 0.5, np.random.default_rng(0))

    for synthesizer in (learnt, ignorant):
        sample = synthesizer.sample(500, np.random.default_rng(2))
        assert SCHEMA.rules.valid(sample.codes).all()
        table = decode(SCHEMA, sample, np.random.default_rng(3))
        assert table.column_names == ["patient", *SCHEMA.names]
        again = encode(table, SCHEMA, PrivacyUnit()).records
        assert (again.codes == sample.codes).all()
        came, left = (table[name].to_numpy() for name in ("came", "left"))
        assert ((came <= left) | np.isnat(left)).all()


def test_the_records_that_are_learnt_from_break_constraints():
    """The test above would say little if every record kept them."""
    valid = SCHEMA.rules.valid(wards(10_000, 1).codes)

    assert 0.9 < valid.mean() < 1


def test_an_estimator_that_is_told_what_cannot_be_leaves_nothing_to_mend():
    records = wards(20_000, 3)
    rng = np.random.default_rng(0)
    pairs = [(0, 1), (2, 7), (3, 4), (5, 6), (4, 5)]
    measured = []
    for pair in pairs:
        sides = [SCHEMA.shape[c] for c in pair]
        cells = np.ravel_multi_index(tuple(records.codes[:, pair].T), sides)
        counts = np.bincount(cells, minlength=int(np.prod(sides))).reshape(sides)
        grids = tuple(Grid.whole(c, SCHEMA.shape[c]) for c in pair)
        measured.append(Measured(grids, counts + rng.normal(0, 20, sides), 20.0))

    told = fit(SCHEMA.shape, measured, zeros=SCHEMA.rules.zeros())
    untold = fit(SCHEMA.shape, measured)

    assert SCHEMA.rules.valid(told.sample(5_000, rng)).all()
    assert not SCHEMA.rules.valid(untold.sample(5_000, rng)).all()


def test_users_with_records_keep_the_constraints_and_their_own_columns():
    strategy = build_strategy("relational", {"parent": ["sex", "ward", "house"]})
    records = wards(10_000, 1)
    users = np.arange(len(records)) // 3
    codes = records.codes.copy()
    codes[:, [0, 3, 4]] = codes[users * 3][:, [0, 3, 4]]
    ids = users.astype(str)
    unit = PrivacyUnit("patient", max_records=3)
    shard = bound(Shard(Records(codes), ids), unit, seed=0)

    learnt = direct_run(strategy, SCHEMA, shard, 0.5, rng=np.random.default_rng(0))

    sample = learnt.sample(600, np.random.default_rng(2))
    assert SCHEMA.rules.valid(sample.codes).all()
    assert sample.owners is not None
    first = np.searchsorted(sample.owners, sample.owners)
    assert (sample.codes[:, [0, 3, 4]] == sample.codes[first][:, [0, 3, 4]]).all()
    assert np.bincount(sample.owners).max() > 1


def test_an_ordering_of_a_user_and_a_record_is_refused():
    strategy = build_strategy("relational", {"parent": ["came"]})

    with pytest.raises(ConfigError, match="cannot keep 'came <= left'"):
        strategy.event(SCHEMA, 1.0)
