# SPDX-License-Identifier: Apache-2.0
"""A score is what a judge's accuracy is, costs one sum, and leaves the method as it was."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum, names_files
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import OPEN, Column, ImageColumn, Schema
from fedsynth.simulation.check import check_strategy, made_up, small_images, small_table
from fedsynth.strategies.discovered import Discovered
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.parts.judge import STARTS, TARGET, WEIGHTS, correct_shares, fitted
from fedsynth.strategies.registry import build_strategy, settings_of
from fedsynth.strategies.scored import SCORE, Scored

PUBLIC = "public: made up"
LETTERS = ("a", "b", "c")


def linked(num_records, seed, noise=0.1):
    """Records whose target is told by another column, but for a share of them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (num_records, 3)).astype(np.int32)
    told = rng.random(num_records) >= noise
    codes[told, 2] = (codes[told, 0] + 1) % 3
    return Records(codes)


LINKED = Schema(
    tuple(Column(name, "category", PUBLIC, categories=LETTERS) for name in ("x", "y", "z")),
    target="z",
)


def shard_of(records, per_user):
    user = np.repeat(np.arange(len(per_user)), per_user)
    return BoundedShard(records, user, len(per_user), max(per_user))


@pytest.mark.parametrize(
    "schema", [small_table(), pytest.param(small_images(), marks=pytest.mark.slow)]
)
def test_a_scored_strategy_keeps_all_it_owes(schema):
    strategy = build_strategy("independent", {"score_share": 0.2})
    if schema.image is not None:
        settings = {"score_share": 0.2, "num_features": 50, "num_steps": 5}
        strategy = build_strategy("dp_merf", settings)

    findings = check_strategy(strategy, schema)

    assert [finding for finding in findings if not finding.ok] == []


def test_a_judge_predicts_what_can_be_predicted():
    judge = fitted(linked(4000, seed=0), LINKED)

    shares = correct_shares(judge, shard_of(linked(3000, seed=1), [1, 2] * 1000))

    assert shares.shape == (2000,)
    assert set(np.unique(shares)) <= {0.0, 0.5, 1.0}
    assert shares.mean() == pytest.approx(0.9 + 0.1 / 3, abs=0.02)  # the best that anybody could


def test_a_judge_of_images_tells_bright_from_dark():
    rng = np.random.default_rng(0)
    schema = Schema(
        (Column("label", "category", PUBLIC, categories=("dark", "bright")),),
        image=ImageColumn("image", (4, 4, 1), PUBLIC),
        target="label",
    )
    codes = rng.integers(0, 2, (600, 1)).astype(np.int32)
    images = (rng.integers(0, 120, (600, 4, 4, 1)) + 130 * codes[:, :, None, None]).astype(np.uint8)

    shares = correct_shares(
        fitted(Records(codes, images), schema), shard_of(Records(codes, images), [1] * 600)
    )

    assert shares.mean() > 0.99


def test_a_users_share_is_the_same_to_the_bit_whoever_stands_beside():
    judge, records = fitted(linked(500, seed=0), LINKED), linked(10_000, seed=1)

    together = correct_shares(judge, shard_of(records, [2] * 5000))
    alone = [
        correct_shares(judge, shard_of(records.take(slice(2 * u, 2 * u + 2)), [2]))[0]
        for u in range(0, 5000, 97)
    ]

    assert together[::97].tolist() == alone


@pytest.mark.parametrize(
    "change",
    [
        {WEIGHTS: np.zeros((3, 3), dtype=np.int32)},
        {WEIGHTS: np.zeros((7, 3))},
        {WEIGHTS: np.zeros((7, 0), dtype=np.int32)},
        {STARTS: np.array([0, 3, 2, 6])},
        {STARTS: np.array([1, 3, 6, 6])},
        {STARTS: np.array([0, 6])},
        {TARGET: np.array([3])},
        {TARGET: np.array([-1])},
    ],
)
def test_a_judge_that_does_not_fit_is_refused_for_everybody(change):
    judge = fitted(linked(50, seed=0), LINKED)

    with pytest.raises(ConfigError, match="does not fit"):
        correct_shares(judge | change, shard_of(linked(4, seed=1), [2, 2]))


def test_a_judge_of_very_many_classes_takes_no_memory_for_all_records_at_once():
    judge = fitted(linked(50, seed=0), LINKED)
    judge[WEIGHTS] = np.zeros((len(judge[WEIGHTS]), 20_000), dtype=np.int32)

    tracemalloc.start()
    shares = correct_shares(judge, shard_of(linked(3000, seed=1), [1] * 3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2e8  # all 3000 together: 480 MB
    assert 0.2 < shares.mean() < 0.5  # the first class


def test_no_weights_overflow_and_no_cell_reaches_beyond_its_column():
    most = np.iinfo(np.int32).max
    judge = fitted(linked(50, seed=0), LINKED)
    judge[WEIGHTS] = np.where(judge[WEIGHTS] > 0, most, -most).astype(np.int32)
    records = linked(4, seed=1)
    strange = Records(records.codes + np.int32(1000))

    assert correct_shares(judge, shard_of(records, [2, 2])).max() <= 1
    assert correct_shares(judge, shard_of(strange, [2, 2])).tolist() == [0.0, 0.0]


def test_the_score_asks_last_and_the_synthesizer_is_the_methods():
    inner, shares = Independent(), []
    strategy = Scored(inner, score_share=0.2)
    shard = made_up(small_table(), [2] * 50, seed=0)

    def drive(method, noise):
        rounds, rng = method.rounds(small_table(), noise, np.random.default_rng(3)), None
        query, names = next(rounds), []
        while True:
            names.append(query.name)
            answer = method.answer(query, shard, rng)
            if answer.dense is not None:
                shares.append(float(answer.dense.mean()))
            try:
                query = rounds.send(NoisySum(np.full(query.dim, 20.0), 1.0, 1))
            except StopIteration as end:
                return names, end.value

    names, learned = drive(strategy, 1.0)
    plain, alone = drive(inner, 1.0 / 0.8**0.5)

    assert names == [*plain, SCORE]
    assert json.dumps(learned.settings()) == json.dumps(alone.settings())
    assert all(np.array_equal(v, alone.tensors()[k]) for k, v in learned.tensors().items())
    assert -0.5 <= shares[-1] <= 0.5


def test_the_whole_costs_what_the_budget_says_and_the_score_its_share():
    strategy = Scored(Independent(), score_share=0.25)
    budget = Budget(1.0, 1e-5)

    noise = accounting.calibrate(lambda z: strategy.event(LINKED, z), budget)

    assert accounting.epsilon_of(strategy.event(LINKED, noise), 1e-5) == pytest.approx(1, rel=1e-4)
    assert accounting.leaves(strategy.event(LINKED, 1.0))[(2.0, 1.0, 1, 1)] == 1


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (replace(LINKED, target=None), "declare one"),
        (Schema((LINKED.columns[2],), target="z"), "only column"),
    ],
)
def test_where_nothing_can_be_predicted_nothing_is_asked(schema, said):
    with pytest.raises(ConfigError, match=said):
        Scored(Independent()).event(schema, 1.0)


def test_settings_name_the_score_and_are_read_back():
    plain = build_strategy("mst", {"score_share": 0.3, "max_norm": 2.0})
    opened = build_strategy("mst", {"score_share": 0.3, "domain_share": 0.2}, is_open=True)

    assert isinstance(plain, Scored)
    assert isinstance(opened, Discovered)
    assert isinstance(opened.inner, Scored)
    assert build_strategy("mst", json.loads(settings_of(plain))) == plain
    assert build_strategy("mst", json.loads(settings_of(opened)), is_open=True) == opened
    with pytest.raises(ConfigError, match="unknown key 'score_records'"):
        build_strategy("mst", {"score_records": 5})


def test_a_score_comes_after_the_domains_are_found():
    columns = {
        "city": {"type": "category", "categories": OPEN},
        "ill": {"type": "boolean"},
    }
    schema = Schema.from_json({"columns": columns, "target": "ill"})
    strategy = build_strategy("independent", {"score_share": 0.2}, is_open=True)

    findings = check_strategy(strategy, schema)

    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_that_a_setting_names_is_seen_through_what_wraps_the_method(is_open):
    named = {"path": "/somewhere", "score_share": 0.1}

    assert names_files(build_strategy("dp_lora", named, is_open=is_open))
    assert not names_files(build_strategy("dp_lora", {"score_share": 0.1}, is_open=is_open))
