# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import numpy as np
import pytest
from fedsynth.client import bounding
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard
from fedsynth.core.errors import ConfigError, ShardError
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.records import BoundedShard, Records
from hypothesis import given, settings
from hypothesis import strategies as st

KEEPS = ("random", "first", "deduplicate")


def shard_of(*pairs: tuple[str, int]) -> Shard:
    """A shard with one column, from (user, code) pairs in file order."""
    codes = np.array([[code] for _, code in pairs], dtype=np.int32).reshape(-1, 1)
    return Shard(Records(codes), np.array([user for user, _ in pairs], dtype=np.str_))


def unit(keep: str = "random", max_records: int = 2) -> PrivacyUnit:
    return PrivacyUnit(column="user", max_records=max_records, keep=keep)  # type: ignore[arg-type]


def kept_by(bounded: BoundedShard) -> list[list[int]]:
    """Codes of each user, in order."""
    return [
        bounded.records.codes[bounded.user_index == user, 0].tolist()
        for user in range(bounded.num_users)
    ]


def test_first_keeps_the_first_in_file_order():
    shard = shard_of(("b", 1), ("a", 2), ("b", 3), ("b", 4), ("a", 5))

    bounded = bound(shard, unit("first"), seed=0)

    assert kept_by(bounded) == [[2, 5], [1, 3]]
    assert bounded.user_index.tolist() == [0, 0, 1, 1]
    assert bounded.max_records == 2


def test_deduplicate_drops_a_users_equal_records_before_choosing():
    shard = shard_of(("a", 1), ("a", 1), ("b", 1), ("a", 1), ("a", 7), ("b", 1))

    bounded = bound(shard, unit("deduplicate"), seed=0)

    assert kept_by(bounded) == [[1, 7], [1]]


def test_of_equal_records_the_first_stays():
    bounded = bound(shard_of(("a", 7), ("a", 1), ("a", 7)), unit("deduplicate"), seed=0)

    assert kept_by(bounded) == [[7, 1]]


def test_records_are_equal_only_if_every_value_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounding, "_fingerprints", lambda records, rows: np.zeros(len(rows)))
    images = np.array([0, 0, 1, 1, 1], dtype=np.uint8)[:, None, None, None]
    codes = np.array([[5], [5], [5], [5], [6]], dtype=np.int32)
    shard = Shard(Records(codes, images), np.array(["a"] * 5))

    bounded = bound(shard, unit("deduplicate", 5), seed=0)

    assert bounded.records.images is not None
    assert bounded.records.codes.ravel().tolist() == [5, 5, 6]
    assert bounded.records.images.ravel().tolist() == [0, 1, 1]


def test_deduplicate_compares_images_too():
    images = np.zeros((3, 2, 2, 1), dtype=np.uint8)
    images[2, 0, 0, 0] = 1
    shard = Shard(Records(np.zeros((3, 1), np.int32), images), np.array(["a", "a", "a"]))

    bounded = bound(shard, unit("deduplicate", 3), seed=0)

    assert bounded.records.images is not None
    assert bounded.records.images.sum(axis=(1, 2, 3)).tolist() == [0, 1]


def test_images_go_with_their_records():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    shard = Shard(
        Records(np.arange(4, dtype=np.int32)[:, None], images), np.array(["b", "a", "b", "b"])
    )

    bounded = bound(shard, unit("random", 1), seed=5)

    assert bounded.records.images is not None
    assert (bounded.records.images.ravel() == bounded.records.codes.ravel()).all()


def test_random_keeps_a_users_records_in_file_order():
    shard = shard_of(*[("a", code) for code in range(50)])

    (kept,) = kept_by(bound(shard, unit("random", 20), seed=1))

    assert kept == sorted(kept)
    assert kept != list(range(20))


def test_every_record_is_a_user_where_the_record_is_the_unit():
    shard = shard_of(("2", 5), ("10", 5), ("1", 6))

    bounded = bound(shard, PrivacyUnit(), seed=0)

    assert bounded.user_index.tolist() == [0, 1, 2]
    assert bounded.records.codes.ravel().tolist() == [5, 5, 6]


def test_users_stand_in_the_order_of_their_ids():
    shard = shard_of(("b", 1), ("\u00e9", 2), ("B", 3), ("10", 4), ("9", 5))

    assert kept_by(bound(shard, unit(), seed=0)) == [[4], [5], [3], [1], [2]]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_shard_without_records_has_no_users(keep: str):
    bounded = bound(shard_of(), unit(keep), seed=0)

    assert bounded.num_users == 0
    assert len(bounded.records) == 0


def test_the_seed_decides_and_nothing_else():
    shard = shard_of(*[("a", code) for code in range(100)])

    one, two, other = (bound(shard, unit("random", 5), seed=seed) for seed in (1, 1, 2))

    assert kept_by(one) == kept_by(two)
    assert kept_by(one) != kept_by(other)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ConfigError, match="seed"):
        bound(shard_of(("a", 1)), unit(), seed=-1)


def test_user_ids_of_another_length_are_refused():
    with pytest.raises(ShardError, match="differ in length"):
        Shard(Records(np.zeros((2, 1), np.int32)), np.array(["a"]))


records_of_users = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "\u00e9", "10"]), st.integers(0, 3)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(records_of_users, st.sampled_from(KEEPS), st.integers(1, 4), st.integers(0, 2**62))
def test_a_users_kept_records_do_not_depend_on_other_users(
    pairs: list[tuple[str, int]], keep: str, max_records: int, seed: int
):
    everyone = bound(shard_of(*pairs), unit(keep, max_records), seed=seed)
    users = sorted({user for user, _ in pairs})

    alone = [
        kept_by(
            bound(shard_of(*[p for p in pairs if p[0] == user]), unit(keep, max_records), seed=seed)
        )
        for user in users
    ]

    assert kept_by(everyone) == [kept for (kept,) in alone]


@settings(max_examples=300, deadline=None)
@given(records_of_users, st.sampled_from(KEEPS), st.integers(1, 4))
def test_nobody_holds_more_than_the_bound_or_what_was_not_theirs(
    pairs: list[tuple[str, int]], keep: str, max_records: int
):
    bounded = bound(shard_of(*pairs), unit(keep, max_records), seed=3)

    users = sorted({user for user, _ in pairs})
    assert (np.diff(bounded.user_index) >= 0).all()
    for user, kept in zip(users, kept_by(bounded), strict=True):
        own = Counter(code for owner, code in pairs if owner == user)
        available = len(own) if keep == "deduplicate" else own.total()
        assert len(kept) == min(max_records, available)
        assert Counter(kept) <= own
        assert keep != "deduplicate" or len(set(kept)) == len(kept)


def test_each_record_of_a_user_is_as_likely_to_be_kept():
    num_users, each, kept_each = 20_000, 5, 2
    users = np.repeat(np.arange(num_users).astype(str), each)
    codes = np.tile(np.arange(each, dtype=np.int32), num_users)[:, None]

    bounded = bound(Shard(Records(codes), users), unit("random", kept_each), seed=11)

    counts = np.bincount(bounded.records.codes[:, 0], minlength=each)
    fair = np.full(each, num_users * kept_each / each)

    def chi_squared(expected: np.ndarray) -> float:
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_squared(fair) < 18.5  # 4 degrees of freedom, p = 0.001
    assert chi_squared(fair * np.array([4 / 3, 1, 1, 1, 2 / 3])) > 1000


# --- a number of each user's own


def words_of(ids, seed=0, records=None):
    """The word of each user, by id."""
    codes = np.arange(len(ids), dtype=np.int32)[:, None] if records is None else records
    shard = bound(Shard(Records(codes), np.array(ids)), unit(max_records=9), seed=seed)
    return dict(zip(sorted(set(ids)), shard.user_words(5).tolist(), strict=True))


def test_a_users_word_hangs_on_the_id_alone():
    alone, crowd = (
        words_of(["ann", "ann"]),
        words_of(["ann", "b", "a very much longer name", "ann"]),
    )
    others = words_of(["ann"], records=np.array([[77]], dtype=np.int32))

    assert alone["ann"] == crowd["ann"] == others["ann"]
    assert len(set(crowd.values())) == 3
    assert words_of(["ann"], seed=1)["ann"] != alone["ann"]


def test_users_with_equal_records_have_words_of_their_own_and_records_as_users_share_them():
    same = np.zeros((500, 1), dtype=np.int32)
    users = words_of([f"u{i}" for i in range(500)], records=same)
    records = bound(Shard(Records(same), np.arange(500).astype(str)), PrivacyUnit(), seed=0)

    assert len(set(users.values())) == 500
    assert len(set(records.user_words(5).tolist())) == 1


def test_words_stay_with_their_users_in_blocks_and_choices():
    ids = np.array([f"u{i % 20:02}" for i in range(60)])
    shard = bound(Shard(Records(np.zeros((60, 1), np.int32)), ids), unit(max_records=9), seed=0)
    whole = shard.user_words(1)

    blocks = np.concatenate([block.user_words(1) for block in shard.blocks(7)])
    chosen = shard.only(np.arange(20) % 3 == 0).user_words(1)

    assert np.array_equal(blocks, whole)
    assert np.array_equal(chosen, whole[::3])
    assert shard.only(np.zeros(20, dtype=bool)).user_words(1).shape == (0,)
