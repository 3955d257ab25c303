# SPDX-License-Identifier: Apache-2.0
"""Private Evolution: its pool moves towards the records, and no user moves its votes too far."""

from contextlib import suppress

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.leaf import Leaf
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.parts.nearest import Finder, TableMetric, pooled
from fedsynth.strategies.parts.pool import Pool
from fedsynth.strategies.private_evolution import PrivateEvolution

ORIGIN = "public: made up for this test"
PLANE = Schema(tuple(Column(name, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=64) for name in "xy"))
TEN = Column("digit", "category", ORIGIN, categories=tuple("0123456789"))
DIGITS = Schema((TEN,), ImageColumn("image", (8, 8, 1), ORIGIN), target="digit")
LABELLED = Schema((TEN, *PLANE.columns), target="digit")


def rng(seed=0):
    return np.random.default_rng(seed)


def shard_of(codes, images=None, users=None):
    users = np.arange(len(codes)) if users is None else np.asarray(users)
    num_users = int(users.max()) + 1 if len(users) else 0
    records = Records(np.asarray(codes, dtype=np.int32), images)
    return BoundedShard(records, users.astype(np.int64), num_users, max(1, len(codes)))


def mixture(num_records, seed=0):
    """Two narrow clusters and one elongated one, in codes."""
    draw = rng(seed)
    centres = np.array([[10, 12], [50, 50], [14, 52]])[draw.integers(3, size=num_records)]
    return np.clip(np.rint(centres + 2.5 * draw.normal(size=(num_records, 2))), 0, 63)


def first_ballot(strategy, schema):
    """The first query for votes."""
    rounds = strategy.rounds(schema, 1.0, rng())
    query = next(rounds)
    while query.name != "votes":
        query = rounds.send(NoisySum.void(query))
    return query


def pools_over(strategy, schema, shard, sums=lambda exact, query: NoisySum(exact, 1e-9, 1)):
    """Each round's pool, as the clients see it, and what the run ends in."""
    rounds, pools = strategy.rounds(schema, 1.0, rng()), []
    try:
        query = next(rounds)
        while True:
            if query.name == "votes":
                pools.append(query.inputs)
            answer = strategy.answer(query, shard, rng())
            exact = clipped_sum(answer, query) * Lattice.of(query).unit
            query = rounds.send(sums(exact, query))
    except StopIteration as end:
        return pools, end.value


def length(total, query):
    """L2 norm of an integer sum, in the vectors' own unit."""
    return float(np.linalg.norm(total.astype(float))) * Lattice.of(query).unit


# --- it learns


@pytest.mark.parametrize("selection", ["sample", "rank"])
def test_without_noise_candidates_come_nearer_in_every_round(selection):
    strategy = PrivateEvolution(
        num_rounds=5, num_candidates=100, num_votes=1, grounding=0.0, selection=selection
    )
    codes = mixture(2000).astype(np.int32)
    metric = TableMetric(np.array([64, 64]), np.array([64, 64]), -1, 0.3)
    alike = np.zeros(2000, dtype=np.int64)

    pools, _ = pools_over(strategy, PLANE, shard_of(codes))

    distances = [
        Finder(p["codes"], None, alike[:100], metric=metric).nearest(codes, None, alike)[1].mean()
        for p in pools
    ]
    assert len(distances) == 5
    assert all(np.diff(distances) < 0)
    assert distances[-1] < distances[0] / 4


def far_from(codes, synthesizer):
    """Total variation distance to the records on 8 by 8 cells."""
    sampled = synthesizer.sample(4000, rng(5)).codes
    counts = [
        np.bincount((c[:, 0] // 8 * 8 + c[:, 1] // 8).astype(int), minlength=64) / len(c)
        for c in (codes, sampled)
    ]
    return np.abs(counts[0] - counts[1]).sum() / 2


@pytest.mark.parametrize("vote", ["l2_clip", "l2_normalize", "l1", "one_record"])
def test_under_privacy_it_beats_its_own_pool_without_votes_and_with_random_ones(vote):
    strategy = PrivateEvolution(num_rounds=4, num_candidates=60, vote=vote, grounding=0.0)
    codes = mixture(1500)
    noise = accounting.calibrate(lambda z: strategy.event(PLANE, z), Budget(2.0, 1e-5))

    learned, unvoted, random = [], [], []
    for seed in range(3):
        shuffled = rng(seed + 9)
        _, by_chance = pools_over(
            strategy,
            PLANE,
            shard_of(codes),
            lambda exact, query, s=shuffled: NoisySum(s.permutation(exact), 1e-9, 1),
        )
        random.append(far_from(codes, by_chance))
        unvoted.append(far_from(codes, prior(strategy, PLANE, noise, rng(seed))))
        told = direct_run(strategy, PLANE, shard_of(codes), noise, rng=rng(seed))
        learned.append(far_from(codes, told))

    assert np.mean(learned) < 0.7 * np.mean(unvoted)
    assert np.mean(learned) < 0.7 * np.mean(random)
    assert np.mean(random) > 0.8 * np.mean(unvoted)


def digits():
    """scikit-learn's digits, four fifths to learn from and a fifth to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    order = rng(3).permutation(len(images))
    seen, held = order[:1437], order[1437:]
    shard = shard_of(data.target[seen][:, None], images[seen])
    return shard, images[held].reshape(len(held), -1) / 255, data.target[held]


def test_on_digits_a_classifier_learns_more_from_votes_than_from_the_renderer_alone():
    from sklearn.linear_model import LogisticRegression

    shard, held, truth = digits()
    strategy = PrivateEvolution(model="digits", num_candidates=600, num_rounds=4)
    noise = accounting.calibrate(lambda z: strategy.event(DIGITS, z), Budget(4.0, 1e-5))

    def accuracy(synthesizer):
        made = synthesizer.sample(2000, rng(1))
        judge = LogisticRegression(max_iter=400)
        judge.fit(made.images.reshape(len(made), -1) / 255, made.codes[:, 0])
        return judge.score(held, truth)

    learned = [
        accuracy(direct_run(strategy, DIGITS, shard, noise, rng=rng(seed))) for seed in range(2)
    ]
    unvoted = [accuracy(prior(strategy, DIGITS, noise, rng(seed))) for seed in range(2)]

    assert min(learned) > max(unvoted) + 0.03
    assert np.mean(learned) > 0.84


def test_weights_follow_the_labels_of_the_records():
    codes = np.column_stack([np.repeat([2, 7], [900, 300]), mixture(1200)])
    strategy = PrivateEvolution(num_rounds=2, num_candidates=100, grounding=0.0)

    learned = non_private(strategy, LABELLED, shard_of(codes), rng())

    labels = learned.candidates.codes[:, 0]
    assert learned.weights[labels == 2].sum() == pytest.approx(0.75, abs=1e-6)
    assert learned.weights[labels == 7].sum() == pytest.approx(0.25, abs=1e-6)


def test_grounding_draws_candidates_from_measured_columns():
    codes = np.full((500, 2), 5)
    far, near = (
        prior_pool(PrivateEvolution(num_rounds=1, num_candidates=200, grounding=share), codes)
        for share in (0.0, 0.2)
    )

    assert np.abs(far - 5).mean() > 10
    assert np.abs(near - 5).mean() == 0


def prior_pool(strategy, codes):
    """The first pool that is voted on."""
    pools, _ = pools_over(strategy, PLANE, shard_of(codes))
    return pools[0]["codes"]


# --- what one user can do


@pytest.mark.parametrize("vote", ["l2_clip", "l2_normalize", "l1", "one_record"])
def test_a_user_with_a_record_of_every_label_moves_the_votes_by_at_most_the_clip(vote):
    strategy = PrivateEvolution(num_candidates=100, vote=vote, num_votes=1)
    query = first_ballot(strategy, LABELLED)
    user = shard_of(np.column_stack([np.arange(10), mixture(10)]), users=np.zeros(10))

    moved = length(clipped_sum(strategy.answer(query, user, rng()), query), query)

    assert query.clip == pytest.approx(1)
    assert 0 < moved <= query.clip


def test_a_record_of_one_user_is_not_clipped():
    strategy = PrivateEvolution(num_candidates=100, num_votes=4)
    query = first_ballot(strategy, LABELLED)

    total = clipped_sum(strategy.answer(query, shard_of([[3, 9, 9]]), rng()), query)

    assert sorted(total[total > 0] * Lattice.of(query).unit) == [1, 1, 1, 1]


def test_votes_weigh_users_as_the_rules_say():
    """One user with four equal records beside a user with one."""
    codes, users = [[0, 1, 1]] * 4 + [[5, 60, 60]], [0, 0, 0, 0, 1]
    weights = {}
    for vote, max_norm in (
        ("l2_clip", 8.0),
        ("l2_clip", 1.0),
        ("l2_normalize", 1.0),
        ("l1", 1.0),
        ("one_record", 1.0),
    ):
        strategy = PrivateEvolution(num_candidates=100, vote=vote, max_norm=max_norm, num_votes=2)
        query = first_ballot(strategy, LABELLED)
        total = clipped_sum(strategy.answer(query, shard_of(codes, users=users), rng()), query)
        by_label = total.reshape(10, 10).sum(axis=1)
        weights[vote, max_norm] = by_label[0] / by_label[5]

    assert weights.pop(("l2_clip", 8.0)) == 4
    assert all(weight == pytest.approx(1, rel=1e-4) for weight in weights.values())


def test_a_record_may_only_vote_within_its_label():
    strategy = PrivateEvolution(num_candidates=100, num_votes=10)
    query = first_ballot(strategy, LABELLED)

    votes = strategy.answer(query, shard_of([[4, 0, 0], [9, 63, 63]]), rng()).indices

    assert (query.inputs["codes"][votes, 0] == [[4], [9]]).all()


def test_the_one_record_of_a_user_changes_with_the_salt_and_not_with_others():
    codes, users = np.column_stack([np.arange(8), mixture(8)]), np.repeat([0, 1], 4)
    strategy = PrivateEvolution(num_candidates=100, vote="one_record", num_votes=1)
    query = first_ballot(strategy, LABELLED)

    def votes(rows, owners, seed):
        return strategy.answer(query, shard_of(rows, users=owners), rng(seed)).indices[:, 0]

    together = [votes(codes, users, seed)[1] for seed in range(40)]
    alone = [votes(codes[4:], users[:4], seed)[0] for seed in range(40)]

    assert together == alone
    assert len(set(together)) == 4


# --- rounds that teach nothing


def test_void_rounds_leave_the_pool_as_it_was():
    strategy = PrivateEvolution(num_rounds=3, num_candidates=50, grounding=0.0)
    shard = shard_of(mixture(300))

    pools, learned = pools_over(strategy, PLANE, shard, lambda exact, query: NoisySum.void(query))

    assert all((p["codes"] == pools[0]["codes"]).all() for p in pools)
    assert (learned.candidates.codes == pools[0]["codes"]).all()
    assert (learned.weights == 1 / 50).all()
    assert (learned.lineage == np.arange(50)).all()


def test_a_void_last_round_leaves_each_offspring_its_share_of_its_parent():
    strategy = PrivateEvolution(num_rounds=2, num_candidates=50, grounding=0.0, num_votes=1)
    given = []

    def last_is_void(exact, query):
        given.append(exact)
        return NoisySum(exact, 1e-9, 1) if len(given) == 1 else NoisySum.void(query)

    _, learned = pools_over(strategy, PLANE, shard_of(mixture(300)), last_is_void)

    inherited = np.bincount(learned.lineage[0], weights=learned.weights, minlength=50)
    survived = np.isin(np.arange(50), learned.lineage[0])
    voted = np.where(survived, given[0], 0)
    assert inherited == pytest.approx(voted / voted.sum(), abs=1e-6)


@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("selection", ["sample", "rank"])
def test_when_nothing_stands_out_from_the_noise_the_pool_stays(threshold, selection):
    strategy = PrivateEvolution(
        num_rounds=2, num_candidates=50, grounding=0.0, threshold=threshold, selection=selection
    )

    pools, learned = pools_over(
        strategy,
        PLANE,
        shard_of(mixture(10)),
        lambda exact, query: NoisySum(np.full(50, 1.9), 1.0 if threshold else 100.0, 1),
    )

    assert (pools[1]["codes"] == pools[0]["codes"]).all()
    assert (learned.weights == 1 / 50).all()


def test_a_label_without_votes_keeps_its_candidates():
    strategy = PrivateEvolution(num_rounds=2, num_candidates=100, grounding=0.0)
    codes = np.column_stack([np.full(200, 3), mixture(200)])

    pools, _ = pools_over(strategy, LABELLED, shard_of(codes))

    before, after = (p["codes"][p["codes"][:, 0] != 3] for p in pools)
    assert (np.unique(before, axis=0) == np.unique(after, axis=0)).all()


def test_an_empty_shard_votes_for_nobody():
    for vote in ("l2_clip", "l2_normalize", "l1", "one_record"):
        strategy = PrivateEvolution(num_candidates=100, vote=vote)
        query = first_ballot(strategy, DIGITS)
        nobody = shard_of(np.zeros((0, 1)), np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0))

        assert not clipped_sum(strategy.answer(query, nobody, rng()), query).any()


# --- what it costs and what it leaves


def test_rounds_have_equal_noise_that_adds_up_to_one_gaussian():
    strategy = PrivateEvolution(num_rounds=4, grounding=0.0, num_candidates=100)

    leaves = accounting.leaves(strategy.event(LABELLED, 1.5))

    assert leaves == {Leaf(3.0, 1.0): 4}


def test_grounding_takes_its_share_and_nothing_where_there_is_no_column_to_ground():
    strategy = PrivateEvolution(num_rounds=4, grounding=0.36)

    table = accounting.leaves(strategy.event(LABELLED, 1.5))
    image = accounting.leaves(strategy.event(DIGITS, 1.5))

    assert sorted(table.values()) == [1, 4]
    assert sorted(noise for noise, *_ in table) == pytest.approx([2.5, 3.75])
    assert image == {Leaf(3.0, 1.0): 4}


def test_every_candidate_goes_back_to_one_of_the_first_pool_with_its_label():
    strategy = PrivateEvolution(num_rounds=5, num_candidates=200)
    codes = np.column_stack([np.arange(2000) % 10, mixture(2000)])

    pools, learned = pools_over(strategy, LABELLED, shard_of(codes))

    assert learned.lineage.shape == (4, 200)
    assert learned.lineage.min() >= 0
    assert learned.lineage.max() < 200
    labels = [p["codes"][:, 0] for p in pools]
    for earlier, later, parents in zip(labels, labels[1:], learned.lineage, strict=False):
        assert (later == earlier[parents]).all()
    assert (learned.candidates.codes[:, 0] == labels[0][learned.origins]).all()


@pytest.mark.parametrize("model", ["strokes", "digits", "blobs"])
def test_a_pool_of_images_survives_saving(model):
    strategy = PrivateEvolution(num_rounds=2, num_candidates=60, model=model)
    learned = prior(strategy, DIGITS, 1.0, rng())

    again = Pool.restore(DIGITS, learned.settings(), learned.tensors())

    one, two = (s.sample(100, rng(3)) for s in (learned, again))
    assert (one.images == two.images).all()
    assert (one.codes == two.codes).all()
    assert len(np.unique(one.images.reshape(100, -1), axis=0)) > 90


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("codes", lambda a: a + 64),
        ("weights", lambda a: a * 2),
        ("lineage", lambda a: a - 100),
        ("lineage", lambda a: a.astype(np.int64)),
    ],
)
def test_a_spoilt_pool_is_refused(name, spoil):
    learned = prior(PrivateEvolution(num_rounds=2, num_candidates=50), PLANE, 1.0, rng())
    tensors = learned.tensors()
    tensors[name] = spoil(tensors[name])

    with pytest.raises(ConfigError, match="do not fit"):
        Pool.restore(PLANE, learned.settings(), tensors)


@pytest.mark.parametrize(
    ("settings", "schema", "message"),
    [
        ({"label": "x"}, PLANE, "must be a category"),
        ({"label": "z"}, PLANE, "no column"),
        ({"num_candidates": 29}, LABELLED, "use at least 30"),
        ({"model": "digits", "label": ""}, DIGITS, "needs a label"),
        ({}, Schema((TEN,), target="digit"), "nothing but the label"),
    ],
)
def test_settings_that_do_not_fit_the_schema_are_refused(settings, schema, message):
    with pytest.raises(ConfigError, match=message):
        PrivateEvolution(**settings).event(schema, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_rounds": 0},
        {"degree_first": 0.0},
        {"sample_degree": -0.1},
        {"grounding": 1.0},
        {"max_norm": 2.0, "vote": "l1"},
        {"vote": "most"},
        {"selection": "best"},
        {"threshold": -1.0},
        {"category_weight": float("nan")},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        PrivateEvolution(**settings)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: given | {"codes": given["codes"][:-1]},
        lambda given: given | {"codes": given["codes"] + 64},
        lambda given: given | {"num_cells": given["num_cells"] * 0},
        lambda given: given | {"label": np.array([7])},
        lambda given: given | {"images": np.zeros((100, 8, 8, 1), np.uint8)},
        lambda given: {name: given[name] for name in ("codes", "label")},
    ],
)
def test_a_ballot_that_contradicts_itself_is_refused_whatever_the_records(spoil):
    strategy = PrivateEvolution(num_candidates=100)
    query = first_ballot(strategy, LABELLED)
    forged = type(query)(**(vars(query) | {"inputs": spoil(dict(query.inputs))}))

    for shard in (shard_of([[3, 9, 9]]), shard_of(np.zeros((0, 3)), users=np.zeros(0))):
        with pytest.raises(ConfigError, match="arrays"):
            strategy.answer(forged, shard, rng())


# --- its parts


def test_the_finder_agrees_with_a_plain_search_and_with_itself_on_any_block():
    draw = rng(4)
    cells, bins = np.array([40, 5, 9]), np.array([38, 0, 0])
    candidates, records = (draw.integers(0, cells, (n, 3)).astype(np.int32) for n in (70, 900))
    shown, seen = (draw.integers(0, 256, (n, 20, 17, 2), dtype=np.uint8) for n in (70, 900))
    groups, own = candidates[:, 2].astype(np.int64), records[:, 2].astype(np.int64)
    finder = Finder(candidates, shown, groups, metric=TableMetric(cells, bins, 2, 0.5))

    found, _ = finder.nearest(records, seen, own, 2)
    one_by_one = [
        finder.nearest(records[i : i + 1], seen[i : i + 1], own[i : i + 1], 2)[0][0]
        for i in range(50)
    ]

    assert (found[:50] == one_by_one).all()
    places = [np.where(c[:, 0] < 38, c[:, 0] / 37, 0) for c in (records, candidates)]
    (missing, missing_too) = (np.where(c[:, 0] < 38, -1, c[:, 0]) for c in (records, candidates))
    (sums, white), (others, _) = pooled(seen), pooled(shown)
    plain = ((sums[:, None] / white - others / white) ** 2).sum(axis=(2, 3, 4))
    plain += (places[0][:, None] - places[1]) ** 2
    plain += 0.125 * (missing[:, None] != missing_too) * (missing[:, None] >= 0)
    plain += 0.125 * (missing[:, None] != missing_too) * (missing_too >= 0)
    plain += 0.25 * (records[:, None, 1] != candidates[:, 1])
    plain[own[:, None] != groups] = np.inf
    ranked = np.sort(plain, axis=1)
    sure = ranked[:, 2] - ranked[:, 1] > 0.06  # whole numbers round a little
    assert sure.sum() > 300
    assert (found[sure] == np.sort(np.argsort(plain, axis=1)[:, :2], axis=1)[sure]).all()


def test_equally_near_candidates_count_in_their_order():
    codes = np.array([[3], [5], [5], [7]], dtype=np.int32)
    metric = TableMetric(np.array([9]), np.array([9]), -1, 0.5)
    finder = Finder(codes, None, np.zeros(4, dtype=np.int64), metric=metric)

    found, squared = finder.nearest(codes[1:3], None, np.zeros(2, dtype=np.int64), 1)

    assert found.tolist() == [[1], [1]]
    assert (squared == 0).all()


def test_a_group_with_too_few_candidates_finds_none():
    codes = np.array([[3], [5], [5]], dtype=np.int32)
    metric = TableMetric(np.array([9]), np.array([9]), -1, 0.5)
    finder = Finder(codes, None, np.array([0, 0, 1]), metric=metric)

    found, squared = finder.nearest(codes, None, np.array([0, 1, 2]), 2)

    assert found.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert np.isinf(squared[1:]).all()


def test_votes_that_drown_are_said_once_a_run_with_the_setting_that_helps(caplog):
    strategy = PrivateEvolution(num_rounds=3, num_candidates=40)
    rounds = strategy.rounds(PLANE, 1.0, np.random.default_rng(0))
    query = next(rounds)

    with suppress(StopIteration):
        for number in range(9):
            drowned = NoisySum(np.full(query.answer_dim, -1.0), 1e6, 1)
            query = rounds.send(NoisySum.void(query) if number == 3 else drowned)

    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "of 3 rounds votes could not be told from noise" in told[0]
    assert "set num_candidates below" in told[0]
