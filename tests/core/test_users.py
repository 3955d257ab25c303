# SPDX-License-Identifier: Apache-2.0
import decimal
import string
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from fedsynth.core.errors import ConfigError, ShardError
from fedsynth.core.users import canonical_user_ids, near_duplicates, partition_of
from hypothesis import given, settings
from hypothesis import strategies as st

BEYOND = 2**53 + 1  # the first whole number that a float does not hold
READ = {
    "text": (["p-1", "p-2"], ["p-1", "p-2"]),
    "whitespace at the ends": (["  p-1\t", "p-1\r\n", "\u3000p-1\xa0"], ["p-1"] * 3),
    "a space inside": (["Ann Lee", "AnnLee"], ["Ann Lee", "AnnLee"]),
    "a byte order mark": (["\ufeffp-1", "p-1"], ["p-1", "p-1"]),
    "a zero-width space at the end": (["p-1\u200b", "p-1"], ["p-1", "p-1"]),
    "composed and decomposed letters": (["Jose\u0301", "Jos\u00e9"], ["Jos\u00e9", "Jos\u00e9"]),
    "case": (["ann", "Ann"], ["ann", "Ann"]),
    "leading zeros": (["007", "7"], ["007", "7"]),
    "leading zeros before a point": (["007.0", "7.0"], ["007.0", "7"]),
    "a float's text": (["12.0", "12", "12.000"], ["12", "12", "12"]),
    "a negative float's text": (["-3.0", "-0.0"], ["-3", "0"]),
    "text with a point": (["12.5", "1.2.0"], ["12.5", "1.2.0"]),
    "text like an exponent": (["12E5", "1e5"], ["12E5", "1e5"]),
    "integers": ([1, 20, -3], ["1", "20", "-3"]),
    "integers beyond 2^53": (
        pa.array([BEYOND, BEYOND - 1, BEYOND + 1]),
        ["9007199254740993", "9007199254740992", "9007199254740994"],
    ),
    "text of integers beyond 2^53": (
        [str(BEYOND), str(BEYOND - 1)],
        [str(BEYOND), str(BEYOND - 1)],
    ),
    "unsigned integers": (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
    "Python integers beyond 64 bits": ([2**70, 1], ["1180591620717411303424", "1"]),
    "decimals": (
        pa.array([decimal.Decimal("123456789012345678901.00")]),
        ["123456789012345678901"],
    ),
    "whole floats": ([12.0, -0.0, 2.0**53 - 1], ["12", "0", "9007199254740991"]),
    "whole 32-bit floats": (np.array([7, 2**24 - 1], np.float32), ["7", "16777215"]),
    "numbers and text mixed": (["12", 12, 12.0], ["12", "12", "12"]),
    "a dictionary column": (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
    "a chunked column": (pa.chunked_array([["b"], ["a"]]), ["b", "a"]),
    "bytes that are UTF-8": (pa.array(["\u00e9".encode()]), ["\u00e9"]),
    "names that only look like none": (
        ["nancy", "Nullman", "none2"],
        ["nancy", "Nullman", "none2"],
    ),
    "no records": ([], []),
    "a numpy column": (np.array([3, 1], np.uint16), ["3", "1"]),
    "a pandas-like column": (np.array(["x", 4], dtype=object), ["x", "4"]),
    "another script": (["\u6d4b\u8bd5", "\u0661"], ["\u6d4b\u8bd5", "\u0661"]),
}
REFUSED = {
    "null": (["p-1", None], "null ids"),
    "blank": (["p-1", ""], "null ids"),
    "whitespace alone": (["p-1", " \u2003\u200b"], "null ids"),
    "NaN": ([1.0, float("nan")], "null ids"),
    "NaN beside text": (np.array(["a", float("nan")], dtype=object), "null ids"),
    "the text nan": (["p-1", "NaN"], "null ids"),
    "the text None": (["p-1", " none "], "null ids"),
    "the text null": (["p-1", "NULL"], "null ids"),
    "the missing marker": (["p-1", "?"], "null ids"),
    "a column of nothing": (pa.nulls(2), "null ids"),
    "a fraction": ([12.5], "not whole"),
    "an infinity": ([np.inf], "not whole"),
    "a float at 2^53": ([2.0**53], "rounded"),
    "a 32-bit float at 2^24": (np.array([2**24], np.float32), "rounded"),
    "a 16-bit float at 2^11": (np.array([2**11], np.float16), "rounded"),
    "text of a float beyond 2^53": (["9007199254740993.0"], "rounded"),
    "text in a float's exponent form": (["1.2345678901234568e+17"], "rounded"),
    "a decimal fraction": ([decimal.Decimal("1.5")], "not whole"),
    "truth values": ([True, False], "not bool"),
    "truth values beside text": (["a", True], "not bool"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "not date32"),
    "lists": ([["a"]], "not list"),
    "a NUL": (["p\0-1"], "NUL"),
    "a lone surrogate": (["p\ud800"], "not valid Unicode"),
    "bytes that are not UTF-8": (pa.array([b"\xff"]), "not valid UTF-8"),
    "a whole text": (["p" * 257], "longer than 256"),
}


@pytest.mark.parametrize("case", READ)
def test_an_id_has_one_canonical_spelling(case: str):
    values, expected = READ[case]

    assert canonical_user_ids(values).tolist() == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_nobody_or_two_people_is_refused(case: str):
    values, reason = REFUSED[case]

    with pytest.raises(ShardError, match=reason):
        canonical_user_ids(values)


def test_there_are_more_than_thirty_fixtures():
    assert len(READ) + len(REFUSED) > 30


def test_a_refusal_names_the_column_but_no_id_and_no_count():
    with pytest.raises(ShardError) as refusal:
        canonical_user_ids(["secret-4711", None, None], where="visits.csv: column 'who'")

    assert str(refusal.value).startswith("visits.csv: column 'who'")
    assert "secret" not in str(refusal.value)
    assert not set(string.digits) & set(str(refusal.value))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_canonical_ids_come_back_unchanged(texts: list[str]):
    try:
        once = canonical_user_ids(texts)
    except ShardError:
        return

    assert canonical_user_ids(once).tolist() == once.tolist()
    assert all(unicodedata.is_normalized("NFC", user_id) for user_id in once.tolist())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20, unique=True))
def test_different_integers_stay_different_users(numbers: list[int]):
    as_integers = canonical_user_ids(pa.array(numbers, pa.int64()))
    as_text = canonical_user_ids([str(n) for n in numbers])

    assert len(set(as_integers.tolist())) == len(numbers)
    assert as_integers.tolist() == as_text.tolist()


def test_a_partition_depends_on_the_id_alone():
    ids = np.array(["a", "b", "c", "a"])

    whole = partition_of(ids, 7)

    assert whole[0] == whole[3]
    assert partition_of(ids[2:3], 7)[0] == whole[2]
    assert whole.tolist() == [4, 0, 3, 4]  # 0xca978112ca1bbdca % 7 = 4, from `sha256sum`


def test_partitions_are_of_like_size():
    counts = np.bincount(partition_of(np.arange(20_000).astype(str), 10), minlength=10)

    chi_squared = float(((counts - 2000) ** 2 / 2000).sum())

    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001
    assert counts.sum() == 20_000


def test_no_partition_is_refused():
    with pytest.raises(ConfigError, match="num_partitions"):
        partition_of(np.array(["a"]), 0)


def test_near_duplicates_differ_by_case_spaces_or_leading_zeros():
    ids = ["Ann Lee", "ANNLEE", "007", "7", "Bob", "Bob", "70"]

    assert near_duplicates(ids) == 4
