# SPDX-License-Identifier: Apache-2.0
"""What of a shard has no cell is told from what is missing, whatever type holds it."""

import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fedsynth.client import files
from fedsynth.client.shard import encode, read_shard
from fedsynth.client.unread import Unread, check_read
from fedsynth.core.errors import SchemaError
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.schema import Column, Schema

ORIGIN = "policy: test"
NUMBER = Column("x", "real", ORIGIN, bounds=(0, 9), num_bins=3, missing=True)
WORD = Column("x", "category", ORIGIN, ("a", "1"), missing=True)
DAY = Column("x", "date", ORIGIN, bounds=(0, 9), num_bins=10, missing=True)
CASES: dict[str, tuple[Column, Any, tuple[int, int]]] = {
    "text that spells no number": (NUMBER, ["3", "1,5", "", " ? ", "NaN", None], (2, 1)),
    "text by view": (NUMBER, pa.array(["3", "x", ""], pa.string_view()), (2, 1)),
    "bytes": (NUMBER, pa.array([b"3", b"x", b""]), (2, 1)),
    "text in a dictionary": (NUMBER, pa.array(["3", "x", "", None]).dictionary_encode(), (2, 1)),
    "floats": (NUMBER, [1.0, float("nan"), None], (1, 0)),
    "half floats": (NUMBER, pa.array(np.array([1, np.nan], np.float16)), (1, 0)),
    "no type": (NUMBER, pa.nulls(2), (0, 0)),
    "categories": (WORD, ["a", "b", "", None, "a"], (3, 1)),
    "floats as categories": (WORD, [1.0, 2.0, float("nan")], (2, 1)),
    "decimals as categories": (WORD, [decimal.Decimal(1), decimal.Decimal(2), None], (2, 1)),
    "dates of another country": (DAY, ["1970-01-02", "02.01.1970", ""], (2, 1)),
    "timestamps": (DAY, pa.array([0, None], pa.timestamp("s")), (1, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_is_there_and_has_no_cell_is_unread(case: str):
    column, values, expected = CASES[case]
    table = pa.table({"x": values if isinstance(values, pa.Array) else pa.array(values)})

    (unread,) = encode(table, Schema((column,)), PrivacyUnit()).unread

    assert (unread.num_values, unread.num_unread) == expected


def test_an_unlisted_value_that_counts_as_another_category_is_read():
    column = Column("x", "category", ORIGIN, ("a", "rest"), missing=True, other="rest")

    (unread,) = encode(pa.table({"x": ["b", "c"]}), Schema((column,)), PrivacyUnit()).unread

    assert unread.share == 0


def test_batches_are_taken_together(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_BATCH", 2)
    lines = ['{"x": "no"}'] * 4 + ['{"x": 1}', '{"x": null}']
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")

    (unread,) = read_shard(tmp_path / "s.jsonl", Schema((NUMBER,)), PrivacyUnit()).unread

    assert (unread.num_values, unread.num_unread) == (5, 4)


def test_the_refusal_shows_no_value():
    shard = encode(pa.table({"x": ["zebra", "yak"]}), Schema((NUMBER,)), PrivacyUnit())

    with pytest.raises(SchemaError) as refusal:
        check_read(shard.unread)

    assert "column 'x': not one of its values is a number" in str(refusal.value)
    assert "zebra" not in str(refusal.value)


def test_a_few_of_many_values_are_not_said_to_be_none_at_all():
    said = str(Unread(WORD, num_values=100_000, num_unread=3))

    assert "less than 0.01% of the values count as missing" in said
