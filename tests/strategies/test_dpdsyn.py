# SPDX-License-Identifier: Apache-2.0
"""DPDSyn: the classifier's gradient and bound, what it learns, its modes, and the warning."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from fedsynth.core.accounting import epsilon_of, single_event
from fedsynth.core.constraints import constraint_from_json
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum, real_sum
from fedsynth.core.query import NoisySum, caution_of
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.simulation.check import check_strategy, made_up, small_images, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.dpdsyn import DpdSyn, Guided, features_of
from fedsynth.strategies.parts.histograms import Grid
from fedsynth.strategies.parts.softmax import Lookup, Newton, Softmax, contrasts, roughness
from fedsynth.strategies.registry import build_strategy, settings_of

import fedsynth as fs

PUBLIC = "public: made up"


def category(name, size):
    return Column(name, "category", PUBLIC, categories=tuple(map(str, range(size))))


def number(name, bins):
    return Column(name, "integer", PUBLIC, bounds=(0.0, float(bins)), num_bins=bins)


# the target in the middle, so that a position that is off by one shows
SCHEMA = Schema((number("x", 10), category("y", 3), category("u", 4)), target="y")


def shard_of(codes, users=None):
    codes = np.asarray(codes, dtype=np.int32)
    users = np.arange(len(codes)) if users is None else np.asarray(users)
    return BoundedShard(Records(codes), users, int(users[-1]) + 1 if len(users) else 0, 100)


def task(num_records, seed=0):
    """Records whose target is told by `x`, and by `u`: classes 0, 1 and 2; and Bayes' accuracy."""
    rng = np.random.default_rng(seed)
    x, u = rng.integers(0, 10, num_records), rng.integers(0, 4, num_records)
    logits = np.column_stack([0.6 * (4.5 - x), 1.5 * (u == 2), 0.6 * (x - 4.5)])
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    y = (rng.random((num_records, 1)) >= np.cumsum(probs, axis=1)).sum(axis=1)
    return shard_of(np.column_stack([x, y, u])), float(probs.max(axis=1).mean())


def accuracy(learned, records):
    return float((learned.soft_labels(records).argmax(axis=1) == records.codes[:, 1]).mean())


def classifier_query(strategy, *, which=0, schema=SCHEMA, shard=None):
    """The classifier's query of a given number in a run with exact sums."""
    rounds = strategy.rounds(schema, 1e-9, np.random.default_rng(0))
    query, seen = next(rounds), 0
    while True:
        if query.name == "classifier":
            if seen == which:
                return query
            seen += 1
        shard = task(2000)[0] if shard is None else shard
        total = clipped_sum(strategy.answer(query, shard, np.random.default_rng(1)), query)
        sent = real_sum(total, stddev=1e-9, lattice=Lattice.of(query), num_clients=1)
        query = rounds.send(sent)


# ---- the classifier ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_contrasts_are_an_orthonormal_basis_of_what_adds_up_to_zero(size):
    basis = contrasts(size)

    assert basis.T @ basis == pytest.approx(np.eye(size - 1))
    assert basis.sum(axis=0) == pytest.approx(np.zeros(size - 1))


def test_the_answer_is_the_derivative_of_the_log_likelihood():
    strategy = DpdSyn(features="independent", clip_share=10.0)
    shard, _ = task(60)
    query = classifier_query(strategy, which=2)
    model = Softmax(
        Lookup(*(query.inputs[k] for k in ("columns", "starts", "rows")), query.dim // 2),
        query.inputs["weights"],
    )

    def likelihood(weights):
        probs = Softmax(model.lookup, weights).probabilities(shard.records.codes)
        return np.log(probs[np.arange(60), shard.records.codes[:, 1]]).sum()

    total = clipped_sum(strategy.answer(query, shard, np.random.default_rng(0)), query)
    found = (total * Lattice.of(query).unit).reshape(model.weights.shape)

    for row, column in [(0, 0), (3, 1), (11, 0), (len(found) - 1, 1)]:
        step = np.zeros_like(model.weights)
        step[row, column] = 1e-5
        slope = likelihood(model.weights + step) - likelihood(model.weights - step)
        assert found[row, column] == pytest.approx(slope / 2e-5, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("num_classes", [3, 10, 32])
def test_a_residual_is_the_same_to_the_bit_in_any_batch(num_classes):
    rng = np.random.default_rng(num_classes)
    lookup = Lookup.of(Grid.each([6, 7, 8]))
    model = Softmax(lookup, rng.standard_normal((lookup.num_rows, num_classes - 1)))
    codes = np.stack([rng.integers(0, cells, 200) for cells in (6, 7, 8)], 1).astype(np.int32)
    classes = rng.integers(0, num_classes, 200)

    every = model.residuals(codes, classes)

    for size in range(1, 40):
        assert np.array_equal(model.residuals(codes[:size], classes[:size]), every[:size])


def test_a_user_of_many_records_adds_their_mean():
    strategy = DpdSyn(features="independent", clip_share=10.0)
    query = classifier_query(strategy, which=1)
    codes = task(4)[0].records.codes
    rng = np.random.default_rng(0)

    apart = clipped_sum(strategy.answer(query, shard_of(codes), rng), query)
    together = clipped_sum(strategy.answer(query, shard_of(codes, [0] * 4), rng), query)

    assert together == pytest.approx(apart / 4, abs=4)


def test_the_first_query_counts_users_and_clips_nobody():
    strategy = DpdSyn(features="independent", clip_share=0.1)
    shard, _ = task(500)
    query = classifier_query(strategy)
    exact = strategy.answer(query, shard, np.random.default_rng(0))
    wide = replace(query, clip=100.0)

    clipped = clipped_sum(exact, query) * Lattice.of(query).unit
    free = clipped_sum(exact, wide) * Lattice.of(wide).unit

    assert free[-1] == pytest.approx(500, abs=1e-3)
    assert clipped == pytest.approx(free, abs=1e-2)


def test_newtons_bound_is_one_for_any_weights():
    rng = np.random.default_rng(0)
    shard, _ = task(300)
    lookup = Lookup.of([Grid.whole(0, 10), Grid.whole(2, 4)])
    gram = lookup.gram(shard.records.codes)
    design = np.zeros((300, lookup.num_rows))
    np.put_along_axis(design, lookup.of_codes(shard.records.codes), 1.0, axis=1)
    basis = contrasts(3)

    for scale in (0.0, 0.5, 3.0):
        model = Softmax(lookup, scale * rng.normal(size=(lookup.num_rows, 2)))
        probs = model.probabilities(shard.records.codes)
        for v in rng.normal(size=(20, lookup.num_rows, 2)):
            z = (design @ v) @ basis.T  # curvature along v: mean variance of the logits' change
            curvature = ((probs * z**2).sum(axis=1) - (probs * z).sum(axis=1) ** 2).mean()
            assert curvature <= np.einsum("ik,ij,jk->", v, gram / 2, v) * (1 + 1e-9)


def test_a_step_solves_the_penalized_quadratic():
    gram, penalty = np.diag([2.0, 4.0]), np.eye(2)
    weights = np.array([[1.0], [-1.0]])

    step = Newton.of(gram, penalty).step(weights, np.array([[3.0], [2.0]]))

    assert step == pytest.approx(np.array([[1.0], [1.0]]))  # (3 - 1) / (1 + 1), (2 + 1) / (2 + 1)


def test_a_balanced_classifier_has_the_shares_it_was_given():
    rng = np.random.default_rng(0)
    codes = task(500)[0].records.codes
    lookup = Lookup.of([Grid.whole(0, 10), Grid.whole(2, 4)])
    model = Softmax(lookup, 3 * rng.normal(size=(lookup.num_rows, 2)))
    shares = np.array([0.7, 0.29, 0.01])

    found = model.balanced(codes, shares)

    assert found.probabilities(codes).mean(axis=0) == pytest.approx(shares, abs=1e-5)
    assert (found.weights[:-1] == model.weights[:-1]).all()


def test_roughness_ties_neighbors_of_a_number_and_leaves_categories_apart():
    grids = [Grid.whole(0, 6), Grid.whole(1, 3)]
    penalty = roughness(grids, [5, 0])  # the number's last cell is for missing values

    def held_back(cells):
        weights = np.zeros(10)
        weights[cells] = 1.0
        return float(weights @ penalty @ weights)

    assert held_back([1, 2]) < 0.8 * held_back([1, 4]) < held_back([1]) + held_back([4])
    assert held_back([4, 5]) == pytest.approx(held_back([4]) + held_back([5]))
    assert held_back([6, 7]) == pytest.approx(held_back([6]) + held_back([7])) == pytest.approx(2)
    assert held_back([9]) == 0


# ---- what is learnt ----------------------------------------------------------------------------


def test_a_run_costs_one_gaussian():
    for strategy in (DpdSyn(), DpdSyn(features="uniform"), DpdSyn(num_steps=3)):
        event = strategy.event(SCHEMA, 1.3)
        assert epsilon_of(event, 1e-6) == pytest.approx(epsilon_of(single_event(1.3), 1e-6))


def test_the_classifier_is_learnt_and_what_knows_less_is_not():
    strategy = DpdSyn(features="independent")
    train, best = task(8000)
    test, _ = task(4000, seed=1)

    learned = direct_run(strategy, SCHEMA, train, 8.0, rng=np.random.default_rng(0))
    nothing = prior(strategy, SCHEMA, 8.0, np.random.default_rng(0))
    half = task(8000)[0].records.codes.copy()
    half[:, 0] = np.random.default_rng(2).permutation(half[:, 0])  # a third of what tells is gone
    wrong = direct_run(strategy, SCHEMA, shard_of(half), 8.0, rng=np.random.default_rng(0))

    assert accuracy(learned, test.records) > best - 0.02
    assert accuracy(nothing, test.records) < best - 0.15
    assert accuracy(wrong, test.records) < best - 0.1


def test_probabilities_are_right_and_not_only_their_order():
    train, _ = task(20_000)
    test, _ = task(4000, seed=1)
    learned = non_private(DpdSyn(features="mst"), SCHEMA, train, np.random.default_rng(0))

    probs = learned.soft_labels(test.records)
    truth = np.eye(3)[test.records.codes[:, 1]]

    assert probs.mean(axis=0) == pytest.approx(truth.mean(axis=0), abs=0.015)
    for group in range(4):
        inside = test.records.codes[:, 2] == group
        assert probs[inside].mean(axis=0) == pytest.approx(truth[inside].mean(axis=0), abs=0.03)


def test_steps_come_close_to_the_maximum_of_the_likelihood():
    from sklearn.linear_model import LogisticRegression

    train, _ = task(10_000)
    codes = train.records.codes
    design = np.column_stack([np.eye(10)[codes[:, 0]], np.eye(4)[codes[:, 2]]])
    best = LogisticRegression(C=1e4, max_iter=500).fit(design, codes[:, 1]).predict_proba(design)

    def gap(num_steps):
        strategy = DpdSyn(features="mst", clip_share=2.0, num_steps=num_steps)
        learned = non_private(strategy, SCHEMA, train, np.random.default_rng(0))
        return np.abs(learned.soft_labels(train.records) - best).mean()

    gaps = [gap(1), gap(8), gap(40)]
    assert gaps[0] > 3 * gaps[1] > 4 * gaps[2]


def test_void_rounds_are_gone_on_without():
    strategy = DpdSyn(features="independent")
    train, best = task(8000)
    rounds = strategy.rounds(SCHEMA, 1e-9, np.random.default_rng(0))
    query, number, dims = next(rounds), 0, []
    learned = None
    while learned is None:
        sent = NoisySum.void(query)
        if number not in (1, 4):  # the first of the classifier and a later one
            total = clipped_sum(strategy.answer(query, train, np.random.default_rng(0)), query)
            sent = real_sum(total, stddev=1e-9, lattice=Lattice.of(query), num_clients=1)
        dims.append(query.dim)
        number += 1
        try:
            query = rounds.send(sent)
        except StopIteration as end:
            learned = end.value

    assert dims[1] == dims[2] == dims[3] + 1  # users are counted by the first sum that arrives
    assert accuracy(learned, task(2000, seed=1)[0].records) > best - 0.03


def test_users_lost_in_noise_leave_the_classes_equal():
    learned = prior(DpdSyn(features="independent"), SCHEMA, 50.0, np.random.default_rng(0))

    assert learned.soft_labels(task(5)[0].records) == pytest.approx(np.full((5, 3), 1 / 3))


# ---- what is sampled ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    train, _ = task(8000)
    return non_private(DpdSyn(features="mst"), SCHEMA, train, np.random.default_rng(0))


def test_labels_are_drawn_and_not_the_likeliest(learned):
    records = learned.sample(20_000, np.random.default_rng(0))
    probs = learned.soft_labels(records)

    shares = np.bincount(records.codes[:, 1], minlength=3) / 20_000
    likeliest = np.bincount(probs.argmax(axis=1), minlength=3) / 20_000

    assert shares == pytest.approx(probs.mean(axis=0), abs=0.015)
    assert np.abs(likeliest - probs.mean(axis=0)).max() > 0.03


def test_accepted_and_inverted_records_are_surer_of_their_class(learned):
    def own(mode):
        made = replace(learned, mode=mode).sample(4000, np.random.default_rng(0))
        assert made.codes.shape == (4000, 3)
        assert (made.codes >= 0).all()
        assert (made.codes < SCHEMA.shape).all()
        return learned.soft_labels(made)[np.arange(4000), made.codes[:, 1]].mean()

    assert own("label") + 0.02 < own("accept") < own("invert")


def test_accept_without_sharpness_draws_class_and_features_apart(learned):
    made = replace(learned, mode="accept", sharpness=0.0).sample(20_000, np.random.default_rng(0))
    joint = np.histogram2d(made.codes[:, 0], made.codes[:, 1], bins=(10, 3))[0] / 20_000

    apart = np.outer(joint.sum(axis=1), joint.sum(axis=0))

    assert 0.5 * np.abs(joint - apart).sum() < 0.02


def test_accept_ends_when_hardly_anything_is_accepted(learned):
    sharp = replace(learned, mode="accept", sharpness=999.0)

    assert len(sharp.sample(50, np.random.default_rng(0))) == 50


@pytest.mark.parametrize("mode", ["label", "accept", "invert"])
def test_no_records_can_be_asked_for(learned, mode):
    assert replace(learned, mode=mode).sample(0, np.random.default_rng(0)).codes.shape == (0, 3)


def test_a_saved_synthesizer_comes_back(learned):
    settings = json.loads(json.dumps(learned.settings()))

    again = Guided.restore(SCHEMA, settings, learned.tensors())

    drawn = [s.sample(100, np.random.default_rng(3)).codes for s in (learned, again)]
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.zeros((3, 2))},
        {"weights": np.full((15, 2), math.nan)},
        {"rows": np.full(14, 99)},
        {"columns": np.array([0, 1])},
        {"more": np.zeros(1)},
    ],
)
def test_saved_arrays_that_cannot_be_are_refused(learned, change):
    with pytest.raises(ConfigError):
        Guided.restore(SCHEMA, learned.settings(), learned.tensors() | change)


@pytest.mark.parametrize(
    "change",
    [{"mode": "other"}, {"features": {"kind": "guided", "settings": {}}}, {"sharpness": None}],
)
def test_saved_settings_that_cannot_be_are_refused(learned, change):
    with pytest.raises(ConfigError):
        Guided.restore(SCHEMA, learned.settings() | change, learned.tensors())


# ---- settings, schemas, constraints ------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"features": "my_module:Mine"},
        {"features": "dpdsyn"},
        {"features": "nothing_of_the_kind"},
        {"features": "uniform", "feature_settings": {"max_norm": 2.0}},
        {"feature_settings": {"no_such": 1}},
        {"feature_share": 1.0},
        {"num_steps": 0},
        {"clip_share": 0.0},
        {"sharpness": -1.0},
        {"num_moves": -1},
        {"max_groups": 1},
        {"max_classes": 1},
        {"mode": "other"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError):
        build_strategy("dpdsyn", settings)


def test_the_features_own_settings_are_theirs():
    strategy = build_strategy("dpdsyn", {"feature_settings": {"max_norm": 2.0}})

    assert build_strategy("dpdsyn", json.loads(settings_of(strategy))) == strategy
    with pytest.raises(ConfigError, match="max_norm"):
        build_strategy("dpdsyn", {"feature_settings": {"max_norm": -2.0}})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (replace(SCHEMA, target=None), "names none"),
        (Schema((category("y", 3),), target="y"), "only column"),
        (Schema((number("y", 33), category("u", 4)), target="y"), "at most 32"),
        (small_images(), "image"),
    ],
)
def test_a_schema_without_a_task_is_refused_before_anything_is_asked(schema, says):
    with pytest.raises(ConfigError, match=says):
        DpdSyn().event(schema, 1.0)
    with pytest.raises(ConfigError, match=says):
        next(DpdSyn().rounds(schema, 1.0, np.random.default_rng(0)))


def test_a_number_of_few_bins_is_a_target():
    schema = Schema((number("x", 10), number("y", 3), category("u", 4)), target="y")
    train, best = task(8000)

    learned = non_private(DpdSyn(), schema, train, np.random.default_rng(0))

    assert accuracy(learned, train.records) > best - 0.03


def test_a_target_of_one_cell_is_always_that_cell():
    schema = Schema((number("x", 10), category("y", 1), category("u", 4)), target="y")
    codes = task(200)[0].records.codes.copy()
    codes[:, 1] = 0

    learned = direct_run(DpdSyn(), schema, shard_of(codes), 1.0, rng=np.random.default_rng(0))

    assert not learned.sample(50, np.random.default_rng(0)).codes[:, 1].any()


CONSTRAINED = replace(
    SCHEMA,
    constraints=(
        constraint_from_json({"forbid": {"y": "0", "u": "2"}}, 1),
        constraint_from_json({"forbid": {"x": {"from": 8}, "u": "3"}}, 2),
    ),
)


def test_the_features_keep_the_constraints_that_do_not_name_the_target():
    assert features_of(CONSTRAINED).constraints == CONSTRAINED.constraints[1:]
    assert features_of(CONSTRAINED).names == ("x", "u")


@pytest.mark.parametrize("mode", ["label", "accept", "invert"])
def test_every_sample_keeps_the_constraints(mode):
    train, _ = task(4000)
    learned = non_private(DpdSyn(mode=mode), CONSTRAINED, train, np.random.default_rng(0))

    x, y, u = learned.sample(3000, np.random.default_rng(0)).codes.T

    assert not ((y == 0) & (u == 2)).any()
    assert not ((x >= 8) & (u == 3)).any()


# ---- what every strategy owes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"features": "independent", "mode": "accept"},
        {"features": "uniform", "mode": "invert"},
        {"feature_settings": {"max_norm": "auto"}, "num_steps": 2},
    ],
)
def test_every_mode_keeps_all_a_strategy_owes(settings):
    findings = check_strategy(build_strategy("dpdsyn", settings), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_a_query_that_lies_about_its_arrays_is_refused():
    strategy = DpdSyn(features="independent")
    shard = made_up(SCHEMA, [1, 2], seed=0)
    query = classifier_query(strategy, which=1)

    for key, value in [
        ("target", np.array([7])),
        ("rows", np.full_like(query.inputs["rows"], 10_000)),
        ("weights", np.full_like(query.inputs["weights"], math.inf)),
        ("columns", np.array([0, 9])),
    ]:
        with pytest.raises(ConfigError):
            strategy.answer(
                replace(query, inputs={**query.inputs, key: value}), shard, np.random.default_rng(0)
            )


# ---- the warning -------------------------------------------------------------------------------


def test_the_method_warns_of_other_tasks():
    assert "one task" in caution_of(DpdSyn())
    assert caution_of(build_strategy("mst", {})) == ""


@pytest.mark.parametrize("method", ["dpdsyn", "independent"])
def test_the_warning_stands_on_the_card(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    codes = task(300)[0].records.codes
    names = {name: pa.array(codes[:, i].astype(str)) for i, name in enumerate("xyu")}
    people = pa.table({"who": pa.array([f"u{i}" for i in range(300)]), **names})
    schema = Schema((category("x", 10), category("y", 3), category("u", 4)), target="y")
    warned = []

    release = fs.simulate(
        method,
        people,
        schema=schema,
        budget=fs.Budget(3.0, 1e-4),
        unit=fs.User("who"),
        num_users=200,
        clients=2,
        num_records=50,
    )

    warned.append("Do not use the records for another task" in release.card.caution)
    warned.append("**Caution.** These records" in (release.folder / "card.md").read_text())
    assert warned == [method == "dpdsyn"] * 2
