# SPDX-License-Identifier: Apache-2.0
"""A user with records of many labels is charged in full; by a twin of the public library, is not.

The client mode of DPSDA (commit 9078c67) builds and normalizes a histogram for each label, and
accounts for one. The same property is asked of ours and of a twin that does as it does.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import PrivacyRefusal
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.ledger import Ledger
from fedsynth.simulation.check import check_strategy
from fedsynth.strategies.parts.votes import ballot, label_of
from fedsynth.strategies.private_evolution import PrivateEvolution
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

ORIGIN = "public: made up for this test"
TEN = Column("digit", "category", ORIGIN, categories=tuple("0123456789"))
PLANE = tuple(Column(name, "real", ORIGIN, bounds=(0.0, 1.0), num_bins=64) for name in "xy")
LABELLED = Schema((TEN, *PLANE), target="digit")
ROUNDS, DELTA = 10, 1e-5
RULES = [
    {"vote": "l2_clip"},
    {"vote": "l2_clip", "max_norm": 3.0},
    {"vote": "l2_clip", "num_clusters": 20},
    {"vote": "l2_normalize"},
    {"vote": "l2_normalize", "num_votes": 3},
    {"vote": "l1"},
    {"vote": "one_record"},
    {"vote": "l2_clip", "held_out": 0.5},
    {"vote": "l1", "held_out": 0.5},
]
RECORDS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 63), st.integers(0, 63)), min_size=1, max_size=25
)
ONE_OF_EACH = [(label, 32, 32) for label in range(10)]


class ByLabel(PrivateEvolution):
    """A query for each label, whose votes are normalized by themselves; one is accounted for."""

    def rounds(self, schema, noise_multiplier, rng):
        """The same pool in every round, as if nothing were learned."""
        label, noise = label_of(schema, self.label), self._noises(schema, noise_multiplier)[-1]
        pool = self.blank(schema, label)
        pool.codes[:, 1:] = rng.integers(0, 64, (len(pool), 2))
        for _ in range(self.num_rounds):
            for of in range(10):
                own = Candidates(pool.codes[pool.codes[:, label] == of])
                yield ballot(schema, label, own, clip=1.0, noise_multiplier=noise, cells=False)


def strategy_of(kind=PrivateEvolution, **rule):
    usual = {"num_rounds": ROUNDS, "num_candidates": 60, "num_votes": 1, "grounding": 0.0}
    return kind(**usual | rule)


def noise_of(strategy, epsilon=1.0):
    return accounting.calibrate(lambda z: strategy.event(LABELLED, z), Budget(epsilon, DELTA))


def queries_of(strategy, noise) -> Iterator[Query]:
    """What a run asks in which nothing is learned."""
    rounds = strategy.rounds(LABELLED, noise, np.random.default_rng(0))
    query = next(rounds, None)
    while query is not None:
        yield query
        try:
            query = rounds.send(NoisySum.void(query))
        except StopIteration:
            return


def told_of(strategy, noise, records) -> float:
    """What a run tells of one user: by how many deviations of the noise it can be told, in L2."""
    codes = np.array(records, dtype=np.int32)
    user = BoundedShard(Records(codes), np.zeros(len(codes), np.int64), 1, len(codes))
    squared = 0.0
    for query in queries_of(strategy, noise):
        total = clipped_sum(strategy.answer(query, user, np.random.default_rng(1)), query)
        moved = float(np.linalg.norm(total.astype(np.float64))) * Lattice.of(query).unit
        squared += (moved / (query.noise_multiplier * query.clip)) ** 2
    return squared**0.5


def check_user(strategy, noise, records) -> None:
    """A run tells no more of a user than its event was charged for."""
    charged = accounting.leaves(strategy.event(LABELLED, noise))
    most = sum(count / z**2 for (z, *_), count in charged.items()) ** 0.5

    told = told_of(strategy, noise, records)

    true = accounting.epsilon_of(accounting.event_of(Counter({(1 / told, 1.0): 1})), DELTA)
    claimed = accounting.epsilon_of(strategy.event(LABELLED, noise), DELTA)
    assert told <= most * (1 + 1e-9), (
        f"{told / most:.3f} times as much as was charged: epsilon {claimed:.2f} is {true:.2f}"
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=25, deadline=None)
@given(records=RECORDS)
def test_whatever_a_user_has_a_run_tells_no_more_than_was_charged(rule, records):
    strategy = strategy_of(**rule)

    check_user(strategy, noise_of(strategy), records)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_user_with_a_record_of_each_label_is_charged_in_full(rule):
    """The bound is no loose one: ten labels fill it."""
    strategy = strategy_of(**rule)
    noise = noise_of(strategy)

    check_user(strategy, noise, ONE_OF_EACH)
    if rule["vote"] == "l2_normalize" or rule == {"vote": "l2_clip"}:
        assert told_of(strategy, noise, ONE_OF_EACH) == pytest.approx(1 / noise, rel=2e-3)


def test_the_same_property_refuses_a_twin_that_normalizes_each_label_by_itself():
    twin = strategy_of(ByLabel, vote="l2_normalize")
    noise = noise_of(twin)

    @settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(records=RECORDS)
    def search(records):
        check_user(twin, noise, records)

    with pytest.raises(AssertionError, match="times as much as was charged"):
        search()


def test_by_the_twin_ten_labels_tell_the_square_root_of_ten_and_an_epsilon_of_one_is_3_62():
    twin = strategy_of(ByLabel, vote="l2_normalize")
    noise = noise_of(twin)

    with pytest.raises(
        AssertionError, match=r"3\.162 times as much as was charged: epsilon 1\.00 is 3\.62"
    ):
        check_user(twin, noise, ONE_OF_EACH)
    check_user(twin, noise, ONE_OF_EACH[:1] * 10)  # of one label, nobody notices


def test_the_house_finds_the_twin_out():
    found = {f.name: f.ok for f in check_strategy(strategy_of(ByLabel, num_rounds=2), LABELLED)}

    assert not found["its queries add up to its event"]


def test_the_ledger_asks_one_label_of_the_twin_and_no_second(tmp_path):
    twin = strategy_of(ByLabel, num_rounds=1)
    first, second, *_ = queries_of(twin, 3.0)
    ledger, event = Ledger(tmp_path / "ledger.db"), twin.event(LABELLED, 3.0)
    ledger.open_run("run", "people", cap=Budget(5.0, DELTA), event=event, facts={})

    def reserve(number, query):
        noise = query.noise_multiplier
        ledger.reserve(
            "run", number, 1, query=query.name, noise_multiplier=noise, sampling_prob=1.0
        )

    reserve(1, first)
    with pytest.raises(PrivacyRefusal, match="Nothing was asked"):
        reserve(2, second)
