# SPDX-License-Identifier: Apache-2.0
"""Texts survive being packed into plain arrays, and nothing else is taken for them."""

import numpy as np
import pytest
from fedsynth.core.errors import DataError, SchemaError
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema
from fedsynth.core.texts import as_texts, packed, unpacked
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(TEXT, max_size=8))
def test_packed_texts_come_back(texts):
    assert unpacked(*packed(as_texts(texts))).tolist() == texts


@pytest.mark.parametrize(
    ("content", "starts"),
    [
        (b"abc", [0, 2]),
        (b"abc", [1, 3]),
        (b"abc", [0, 3, 2, 3]),
        (b"abc", []),
        ("é".encode(), [0, 1, 2]),
        (b"\xff", [0, 1]),
    ],
)
def test_arrays_that_hold_no_texts_are_refused(content, starts):
    with pytest.raises(DataError, match="packed texts"):
        unpacked(np.frombuffer(content, dtype=np.uint8), np.array(starts, dtype=np.int64))


def records(*texts):
    return Records(np.zeros((len(texts), 0), dtype=np.int32), texts=as_texts(texts))


def test_records_are_taken_and_joined_with_all_they_hold():
    both = Records.joined([records("a", "b"), records("c")])

    assert both.texts.tolist() == ["a", "b", "c"]
    assert both.take(np.array([2, 0])).texts.tolist() == ["c", "a"]
    assert both.take(both.texts != "b").texts.tolist() == ["a", "c"]
    assert both.images is both.owners is both.places is None


def test_a_users_key_depends_on_own_texts_alone():
    def keys(*texts_of_users):
        texts = [text for texts in texts_of_users for text in texts]
        users = np.repeat(np.arange(len(texts_of_users)), [len(t) for t in texts_of_users])
        return BoundedShard(records(*texts), users, len(texts_of_users), 9).user_keys(1)

    first = keys(["hello", "you"], ["x"])

    assert keys(["x"], ["hello", "you"]).tolist() == first[::-1].tolist()
    for number in range(20):  # words of 64 bits, of which floating-point numbers hold 53
        assert keys([f"{number}"])[0] == keys([f"{number}"], ["hello", "x", "y"])[0]
    assert keys(["hello", "yoU"])[0] != first[0]


def test_a_schema_may_have_one_text_column():
    read = Schema.from_json({"columns": {"message": {"type": "text", "max_bytes": 50}}})

    assert read.text.max_bytes == 50
    assert Schema.from_json(read.to_json()) == read
    assert Schema.from_json({"columns": {"message": {"type": "text"}}}).text.max_bytes == 1000


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"a": {"type": "text"}, "b": {"type": "text"}}, "one text column"),
        (
            {"a": {"type": "text"}, "b": {"type": "image", "shape": [8, 8], "origin": "public"}},
            "or",
        ),
        ({"a": {"type": "text", "max_bytes": 0}}, "max_bytes must be 1 to"),
        ({"a": {"type": "text", "max_bytes": True}}, "a whole number"),
        ({"a": {"type": "text", "categories": []}}, "categories"),
    ],
)
def test_other_text_columns_are_refused(columns, says):
    with pytest.raises(SchemaError, match=says):
        Schema.from_json({"columns": columns})
