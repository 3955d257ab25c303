# SPDX-License-Identifier: Apache-2.0
"""Tab-PE: parities that no small marginal shows, classes under privacy, and mutation by rule."""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from fedsynth.core.accounting import calibrate, leaves, mu_of, single_event
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.check import check_strategy, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.independent import Independent
from fedsynth.strategies.mst import Mst
from fedsynth.strategies.tab_pe import Evolved, TabPe, mutated

PUBLIC = "public: made up"
NOISE = calibrate(single_event, Budget(epsilon=1, delta=1e-6))


def category(name, size):
    return Column(name, "category", PUBLIC, categories=tuple(map(str, range(size))))


def shard_of(codes, users=None):
    codes = np.asarray(codes, dtype=np.int32)
    users = np.arange(len(codes)) if users is None else np.asarray(users)
    num_users = int(users.max(initial=-1)) + 1
    return BoundedShard(Records(codes), users.astype(np.int64), num_users, max(1, len(codes)))


def parity_schema(order, num_noise):
    noise = [category(f"z{i}", 4) for i in range(num_noise)]
    return Schema(
        (*(category(f"x{i}", 2) for i in range(order - 1)), *noise, category("y", 2)), target="y"
    )


def parity_records(order, num_noise, num_records, seed):
    """Fair coins, columns of noise, and the coins' parity as the label."""
    rng = np.random.default_rng(seed)
    coins = rng.integers(0, 2, (num_records, order - 1))
    noise = rng.integers(0, 4, (num_records, num_noise))
    return np.column_stack([coins, noise, coins.sum(axis=1) % 2])


def parity_error(codes, order):
    """Total variation distance of the joint table of coins and label from the true one."""
    held = np.column_stack([codes[:, : order - 1], codes[:, -1]])
    cells = held @ (1 << np.arange(order))
    found = np.bincount(cells, minlength=1 << order) / len(codes)
    even = np.array([cell.bit_count() % 2 == 0 for cell in range(1 << order)])
    return np.abs(found - even / even.sum()).sum() / 2


def parity_errors(strategy, order, num_noise, seeds):
    schema, errors = parity_schema(order, num_noise), []
    for seed in seeds:
        shard = shard_of(parity_records(order, num_noise, 20_000, seed))
        learned = direct_run(strategy, schema, shard, NOISE, rng=np.random.default_rng(seed))
        sampled = learned.sample(20_000, np.random.default_rng(seed)).codes
        errors.append(parity_error(sampled, order))
    return errors


# --- it learns what no pair shows


@pytest.mark.parametrize(("order", "num_noise", "most"), [(3, 4, 0.15), (4, 6, 0.25)])
def test_a_parity_is_learned_that_a_tree_of_pairs_cannot_hold(order, num_noise, most):
    ours = parity_errors(TabPe(), order, num_noise, range(3))
    others = parity_errors(Mst(), order, num_noise, range(3))
    nothing = parity_errors(Independent(), order, num_noise, range(1))

    assert max(ours) < most
    assert min(others) > 0.45  # half of all records break the rule, as in independent columns
    assert min(nothing) > 0.45


def test_without_users_no_parity_is_seen():
    schema = parity_schema(3, 4)

    learned = prior(TabPe(), schema, NOISE, np.random.default_rng(0))

    sampled = learned.sample(5000, np.random.default_rng(0)).codes
    assert parity_error(sampled, 3) > 0.4


def test_votes_are_what_selects():
    """The same run with its votes put in another order learns nothing."""
    schema, shard = parity_schema(3, 4), shard_of(parity_records(3, 4, 5000, 0))
    errors = []
    for shuffle in (False, True):
        rounds, rng = (
            TabPe().rounds(schema, 1.0, np.random.default_rng(1)),
            np.random.default_rng(2),
        )
        query = next(rounds)
        try:
            while True:
                exact = clipped_sum(TabPe().answer(query, shard, rng), query)
                exact = exact * Lattice.of(query).unit
                if shuffle and query.name == "votes":
                    exact = rng.permutation(exact)
                query = rounds.send(NoisySum(exact, 1e-9, 1))
        except StopIteration as end:
            sampled = end.value.sample(5000, rng).codes
            errors.append(parity_error(sampled, 3))

    assert errors[0] < 0.15
    assert errors[1] > 0.3


def test_a_sample_of_any_size_has_the_measured_columns():
    codes = np.column_stack([np.repeat([0, 1, 2], [600, 300, 100]), np.arange(1000) % 32])
    schema = Schema(
        (category("a", 3), Column("b", "integer", PUBLIC, bounds=(0.0, 31.0), num_bins=32))
    )

    learned = non_private(TabPe(), schema, shard_of(codes), np.random.default_rng(3))

    for num_records in (0, 1, 10, 4000):
        sampled = learned.sample(num_records, np.random.default_rng(4)).codes
        assert sampled.shape == (num_records, 2)
    assert np.abs(np.bincount(sampled[:, 0], minlength=3) / 4000 - [0.6, 0.3, 0.1]).max() < 0.01
    assert np.abs(np.bincount(sampled[:, 1], minlength=32) / 4000 - 1 / 32).max() < 0.005


# --- classes are under privacy


LABELLED = Schema((category("x", 8), category("y", 4)), target="y")


def first_ballot(strategy, sums, schema=LABELLED):
    """The first query for votes, after made-up sums by the query's name."""
    rounds = strategy.rounds(schema, 1.0, np.random.default_rng(5))
    query = next(rounds)
    while query.name != "votes":
        noisy = sums(query)
        query = rounds.send(noisy)
    return query


def histogram(query, shares, total=100_000.0):
    """An answer in which the label's histogram has given shares, and all others are flat."""
    if query.name != "classes":
        return NoisySum(np.full(query.dim, total / query.dim), 1.0, 1)
    return NoisySum(total * np.asarray(shares, dtype=np.float64), 1.0, 1)


def classes_of(query):
    return np.bincount(query.inputs["codes"][:, 1], minlength=4) / query.dim


def test_classes_have_candidates_by_the_noisy_histogram_and_nothing_else():
    shares = [0.5, 0.25, 0.25, 0.0]

    query = first_ballot(TabPe(), lambda q: histogram(q, shares))

    assert np.abs(classes_of(query) - shares).max() < 0.01
    assert classes_of(query)[3] * query.dim == TabPe().num_votes  # enough to be voted for


def test_the_label_histogram_costs_a_share_of_its_own():
    event = TabPe(class_share=0.1, column_share=0.2, num_rounds=7).event(LABELLED, 2.0)

    noises = sorted(noise for noise, *_ in leaves(event))
    assert mu_of(event) == pytest.approx(0.5)
    assert sum(leaves(event).values()) == 9
    assert noises == pytest.approx([2 / 0.2**0.5, 2 / 0.1**0.5, 2 / 0.1**0.5], rel=1e-6) or (
        noises == pytest.approx([2 / 0.2**0.5, 2 / 0.1**0.5], rel=1e-6)
    )


@dataclass(frozen=True)
class CountedTwin(TabPe):
    """Tab-PE that takes class counts for known, as published: the failing twin."""

    known: tuple[int, ...] = ()
    name: ClassVar[str] = "counted_twin"

    def learn(self, schema, noise_multiplier, rng, max_norm):
        rounds = super().learn(schema, noise_multiplier, rng, max_norm)
        query = next(rounds)
        try:
            while True:
                noisy = yield query
                if query.name == "classes":
                    noisy = NoisySum(np.asarray(self.known, dtype=np.float64), 1e-6, 1)
                query = rounds.send(noisy)
        except StopIteration as end:
            return end.value


def shown_to_clients(make, shard):
    """What clients are shown in the first ballot, where every sum before it told nothing."""
    strategy = make(shard)
    return classes_of(first_ballot(strategy, lambda q: histogram(q, [0.25] * 4)))


def test_what_clients_are_shown_tells_neighbors_apart_only_through_sums():
    one = shard_of(np.column_stack([np.arange(6), np.repeat([0, 1], [5, 1])]))
    other = shard_of(one.records.codes[:5])  # without the one user of class 1

    def counted(shard):
        return CountedTwin(known=tuple(np.bincount(shard.records.codes[:, 1], minlength=4)))

    honest = [shown_to_clients(lambda _: TabPe(), shard) for shard in (one, other)]
    twins = [shown_to_clients(counted, shard) for shard in (one, other)]

    assert np.array_equal(*honest)
    assert not np.array_equal(*twins)


@dataclass(frozen=True)
class NoiselessTwin(TabPe):
    """Tab-PE that asks for exact class counts while its event claims noise."""

    name: ClassVar[str] = "noiseless_twin"

    def learn(self, schema, noise_multiplier, rng, max_norm):
        rounds = super().learn(schema, noise_multiplier, rng, max_norm)
        query = next(rounds)
        try:
            while True:
                if query.name == "classes":
                    query = dataclasses.replace(query, noise_multiplier=1e-6)
                query = rounds.send((yield query))
        except StopIteration as end:
            return end.value


def test_a_twin_that_asks_for_exact_class_counts_is_found_out():
    quick = {"num_rounds": 2, "num_candidates": 40}

    honest = {f.name: f.ok for f in check_strategy(TabPe(**quick), small_table())}
    twin = {f.name: f.ok for f in check_strategy(NoiselessTwin(**quick), small_table())}

    assert all(honest.values())
    assert not twin["its queries add up to its event"]


# --- what one user can do


def length(total, query):
    return float(np.linalg.norm(total.astype(float))) * Lattice.of(query).unit


def test_a_user_with_a_record_of_every_class_moves_the_votes_by_at_most_the_clip():
    strategy = TabPe()
    query = first_ballot(strategy, lambda q: histogram(q, [0.25] * 4))
    codes = np.column_stack([np.arange(4), np.arange(4)])
    user = shard_of(codes, users=np.zeros(4, dtype=np.int64))

    moved = length(clipped_sum(strategy.answer(query, user, None), query), query)
    as_four = length(clipped_sum(strategy.answer(query, shard_of(codes), None), query), query)

    assert 0.99 * query.clip < moved <= query.clip
    assert as_four == pytest.approx(2 * query.clip, rel=1e-3)  # what clipping by class would let by


def test_a_record_votes_within_its_class_only():
    query = first_ballot(TabPe(), lambda q: histogram(q, [0.25] * 4))

    votes = TabPe().answer(query, shard_of([[0, 2], [7, 3]]), None).indices

    assert (query.inputs["codes"][votes, 1] == [[2], [3]]).all()


def test_users_may_count_alike():
    strategy = TabPe(weight="user")
    query = first_ballot(strategy, lambda q: histogram(q, [0.25] * 4))
    shard = shard_of([[0, 1]] * 9 + [[0, 2]], users=[0] * 9 + [1])

    total = clipped_sum(strategy.answer(query, shard, None), query)

    classes = query.inputs["codes"][:, 1]
    assert total[classes == 1].sum() == pytest.approx(total[classes == 2].sum(), rel=1e-4)


# --- mutation


BINS = {1: 100}
PROBS = (np.full(5, 0.2), np.full(101, 1 / 101), np.array([0.5, 0.5]), np.full(4, 0.25))


def test_every_offspring_is_offered_a_change_and_labels_never():
    rng = np.random.default_rng(6)
    codes = np.column_stack([rng.integers(0, len(p), 4000) for p in PROBS]).astype(np.int32)

    few = mutated(codes, PROBS, BINS, 3, 1e-9, rng)
    many = mutated(codes, PROBS, BINS, 3, 0.5, rng)

    assert np.array_equal(few[:, 3], codes[:, 3])
    assert np.array_equal(many[:, 3], codes[:, 3])
    changed = (few != codes).sum(axis=1)
    assert changed.max() == 1
    # one of three columns each: a fifth, half a walk, half of the coins are drawn as they were
    assert 0.6 < changed.mean() < 0.85
    assert (many != codes).sum(axis=1).mean() > 1.15


def test_an_ordered_cell_moves_nearby_or_is_drawn_and_missing_never_walks():
    rng = np.random.default_rng(7)
    codes = np.zeros((6000, 4), dtype=np.int32)
    codes[:, 1] = np.repeat([50, 100], 3000)  # 100 is the cell for missing values
    peak = (PROBS[0], np.eye(1, 101, 3)[0], PROBS[2], PROBS[3])

    after = mutated(codes, peak, BINS, 3, 1e-9, rng)[:, 1]

    moved = after[:3000][after[:3000] != 50]
    near = np.abs(moved - 50) <= 5
    assert set(moved[~near]) == {3}
    assert 0.25 < near.mean() < 0.6
    assert set(after[3000:]) == {3, 100}


# --- what is refused


@pytest.mark.parametrize(
    "settings",
    [
        {"num_rounds": 0},
        {"num_votes": 0},
        {"mutation_first": 0.0},
        {"mutation_last": 1.5},
        {"class_share": 0.0},
        {"class_share": 0.5, "column_share": 0.5},
        {"least_votes": -1.0},
        {"category_weight": 0.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError):
        TabPe(**settings)


@pytest.mark.parametrize(
    ("schema", "settings", "message"),
    [
        (Schema((category("y", 4),), target="y"), {}, "nothing but the label"),
        (LABELLED, {"num_candidates": 7}, "at least 8"),
        (LABELLED, {"label": "nope"}, "no column"),
        (Schema((), image=ImageColumn("i", (8, 8, 1), PUBLIC)), {}, "image"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(schema, settings, message):
    with pytest.raises(ConfigError, match=message):
        TabPe(**settings).event(schema, 1.0)


def learned_small():
    shard = shard_of(np.column_stack([np.arange(80) % 8, np.arange(80) % 4]))
    return non_private(TabPe(num_rounds=2), LABELLED, shard, np.random.default_rng(8))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("codes", lambda t: t + 9),
        ("codes", lambda t: t[:-1]),
        ("codes", lambda t: t.astype(np.int64)),
        ("weights", lambda t: t * 2),
        ("weights", lambda t: -t),
        ("probs", lambda t: t[:-1]),
    ],
)
def test_a_saved_pool_that_was_spoiled_is_refused(key, value):
    tensors = learned_small().tensors()
    tensors[key] = value(tensors[key])

    with pytest.raises(ConfigError):
        Evolved.restore(LABELLED, {}, tensors)


def test_votes_that_drown_are_said_once_a_run_with_the_setting_that_helps(caplog):
    strategy = TabPe(num_rounds=3, num_candidates=40)
    rounds = strategy.rounds(parity_schema(2, 1), 1.0, np.random.default_rng(0))
    query = next(rounds)

    with suppress(StopIteration):
        for number in range(9):
            drowned = NoisySum(np.full(query.answer_dim, -1.0), 1e6, 1)
            query = rounds.send(NoisySum.void(query) if number == 3 else drowned)

    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "of 3 rounds votes could not be told from noise" in told[0]
    assert "set num_candidates below" in told[0]
