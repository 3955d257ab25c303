# SPDX-License-Identifier: Apache-2.0
"""Free texts are read whole, cut between characters, bounded and kept like any other value."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard, read_shard
from fedsynth.client.site import _cached
from fedsynth.core.errors import ShardError
from fedsynth.core.privacy import PrivacyUnit, User
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts

SCHEMA = Schema((), text=TextColumn("message", 12))
LINES = [("a", ' hello, "you"\n'), ("b", None), ("a", "été été été été"), ("c", "=1+1\t\u200b👍")]
READ = ['hello, "you"', "", "été été", "=1+1\t\u200b👍"]


def written(path: Path) -> Path:
    if path.suffix == ".parquet":
        users, texts = zip(*LINES, strict=True)
        pq.write_table(pa.table({"user": list(users), "message": list(texts)}), path)
    else:
        path.write_text("".join(json.dumps({"user": u, "message": t}) + "\n" for u, t in LINES))
    return path


@pytest.mark.parametrize("name", ["shard.parquet", "shard.jsonl"])
def test_texts_are_trimmed_and_cut_between_characters(tmp_path: Path, name: str):
    shard = read_shard(written(tmp_path / name), SCHEMA, User("user", max_records=5))

    assert shard.records.texts.tolist() == READ
    assert all(len(text.encode()) <= 12 for text in shard.records.texts)


def test_a_bounded_shard_of_texts_is_kept_and_found_again(tmp_path: Path):
    path, unit = written(tmp_path / "shard.jsonl"), User("user", max_records=1)
    state = tmp_path / "state"
    state.mkdir()

    first, again = (_cached(state, path, SCHEMA, unit, 3, partition=None) for _ in range(2))

    assert first.num_users == 3
    assert again.records.texts.tolist() == first.records.texts.tolist()
    assert set(first.records.texts[1:]) == {"", READ[3]}


def test_a_column_of_numbers_is_no_text(tmp_path: Path):
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"user": ["a"], "message": [1.5]}), path)

    with pytest.raises(ShardError, match="expected texts, found double"):
        read_shard(path, SCHEMA, User("user", max_records=5))


def test_deduplicate_compares_texts():
    records = Records(np.zeros((4, 0), np.int32), texts=as_texts(["x", "y", "x", "x"]))
    unit = PrivacyUnit(column="user", max_records=4, keep="deduplicate")

    bounded = bound(Shard(records, np.array(["a", "a", "a", "b"])), unit, seed=0)

    assert bounded.records.texts.tolist() == ["x", "y", "x"]
