# SPDX-License-Identifier: Apache-2.0
"""An aggregator's declared sensitivity holds, and one that lies about it is found out."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from fedsynth.core.aggregator import Aggregator, Sum
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Query
from fedsynth.simulation.check_aggregator import check_aggregator
from fedsynth.strategies.registry import build_aggregator
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

BOUNDED = "one user moves what it returns by at most its sensitivity"


def broken(aggregator):
    """What the check finds wrong, by claim."""
    return {f.name: f.detail for f in check_aggregator(aggregator) if not f.ok}


@st.composite
def neighbors(draw):
    """Clients' sums, and a user's vector within the bound of a query."""
    dim, num_clients = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    query = Query("q", dim, draw(st.floats(1e-3, 1e3)), 1.0)
    bound = Lattice.of(query).bound
    sums = draw(hnp.arrays(np.int64, (num_clients, dim), elements=st.integers(-(2**40), 2**40)))
    way = draw(hnp.arrays(np.float64, dim, elements=st.floats(-1, 1)))
    user = np.trunc(way * (bound / max(1.0, float(np.linalg.norm(way))))).astype(np.int64)
    return query, sums, user


@given(neighbors())
def test_one_user_moves_a_sum_by_at_most_the_clip(drawn):
    query, sums, user = drawn
    lattice = Lattice.of(query)
    with_user = [sums[0] + user, *sums[1:]]

    moved = Sum().combine(with_user) - Sum().combine(list(sums))

    assert (moved == user).all()
    assert np.linalg.norm(moved) * lattice.unit <= Sum().sensitivity(query, lattice) * (1 + 1e-12)


@given(neighbors(), st.randoms())
def test_a_sum_is_the_same_in_any_order_and_split(drawn, random):
    _, sums, _ = drawn
    shuffled = list(sums)
    random.shuffle(shuffled)

    assert (Sum().combine(shuffled) == Sum().combine(list(sums))).all()
    assert (Sum().combine([Sum().combine(shuffled)]) == sums.sum(axis=0)).all()


def test_the_sum_keeps_all_that_an_aggregator_owes():
    findings = check_aggregator(Sum())

    assert len(findings) == 4
    assert all(f.ok for f in findings)


def test_a_sum_leaves_what_it_is_given_alone():
    sums = [np.array([1, 2]), np.array([3, 4])]

    Sum().combine(sums)

    assert sums[0].tolist() == [1, 2]


@dataclass(frozen=True)
class Twin(Aggregator):
    """The sum, broken in one way."""

    fault: str
    name: ClassVar[str] = "twin"
    needs_single_sums: ClassVar[bool] = True

    def sensitivity(self, query, lattice):
        share = {"a third less": 2 / 3, "a hair less": 1 - 1e-4, "nothing": 0.0, "nan": math.nan}
        return query.clip * share.get(self.fault, 1.0)

    def combine(self, sums):
        stacked = np.stack(sums)
        match self.fault:
            case "longest":  # picks one client's sum: a user may tip the choice
                return stacked[np.argmax((stacked.astype(float) ** 2).sum(axis=1))]
            case "median times clients":
                return (np.median(stacked, axis=0) * len(sums)).astype(np.int64)
            case "first counts twice":
                return stacked.sum(axis=0) + stacked[0]
            case "drops the last":
                return stacked[:-1].sum(axis=0)
            case "floats":
                return stacked.sum(axis=0) * 1.0
            case "in place":
                sums[0] += 1
                return sums[0] * 0
            case "rounds up":  # to whole units, which may carry a small change a long way
                return -(-stacked.sum(axis=0) // 2**24) * 2**24
            case "raises":
                raise RuntimeError("no")
        return stacked.sum(axis=0)


@pytest.mark.parametrize(
    "fault",
    [
        "a third less",
        "a hair less",
        "longest",
        "median times clients",
        "first counts twice",
        "rounds up",
        "raises",
    ],
)
def test_an_aggregator_that_lies_about_its_sensitivity_is_found_out(fault):
    assert BOUNDED in broken(Twin(fault))


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        ("nothing", "its sensitivity is a number above 0"),
        ("nan", "its sensitivity is a number above 0"),
        ("floats", "it returns int64 of the sums' length, and leaves the sums alone"),
        ("in place", "it returns int64 of the sums' length, and leaves the sums alone"),
        ("first counts twice", "the same sums in another order give the same"),
        ("drops the last", "the same sums in another order give the same"),
    ],
)
def test_other_debts_are_found_out(fault, claim):
    assert claim in broken(Twin(fault))


def test_a_lie_is_shown_on_the_smallest_input():
    detail = broken(Twin("a third less"))[BOUNDED]

    assert "sums [[0]] and a user [" in detail
    assert detail.count(",") < 4


def test_a_whole_twin_passes():
    assert broken(Twin("")) == {}


def test_the_sum_is_found_by_its_name():
    assert build_aggregator("sum", {}) == Sum()


def test_an_unknown_aggregator_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'sum'"):
        build_aggregator("sums", {})


def test_a_class_that_is_no_aggregator_is_refused():
    with pytest.raises(ConfigError, match="not a subclass"):
        build_aggregator("collections:OrderedDict", {})


def test_a_setting_that_an_aggregator_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="unknown key 'norm'"):
        build_aggregator("sum", {"norm": 1})
