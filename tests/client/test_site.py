# SPDX-License-Identifier: Apache-2.0
"""What a site keeps on its owner's disk: a few bounded shards, for the owner alone to read."""

import os
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client.bounding import bound
from fedsynth.client.shard import read_shard
from fedsynth.client.site import _cached
from fedsynth.core.privacy import PrivacyUnit
from fedsynth.core.schema import Column, Schema

SCHEMA = Schema((Column("a", "category", "public", categories=("x", "y")),))
UNIT = PrivacyUnit("u")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shard.csv"
    path.write_text("u,a\n" + "".join(f"{i % 9},{'xy'[i % 2]}\n" for i in range(40)))
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)  # an owner who was not careful
    return state


def test_a_server_that_names_ever_new_seeds_does_not_fill_the_disk(path: Path, state: Path):
    for seed in range(30):
        _cached(state, path, SCHEMA, UNIT, seed, partition=None)

    assert len(list(state.iterdir())) == 4


def test_what_is_kept_is_the_bounded_shard_and_no_other_client_is_touched(path: Path, state: Path):
    for index in range(3):
        _cached(state, path, SCHEMA, UNIT, 0, partition=(index, 3))
    for seed in range(6):
        _cached(state, path, SCHEMA, UNIT, seed, partition=None)
        again = _cached(state, path, SCHEMA, UNIT, seed, partition=None)
        expected = bound(read_shard(path, SCHEMA, UNIT), UNIT, seed=seed)
        assert np.array_equal(again.records.codes, expected.records.codes)
        assert np.array_equal(again.user_index, expected.user_index)
        assert np.array_equal(again.user_words(3), expected.user_words(3))

    assert len(list(state.glob("shard-*-of-3.*.npz"))) == 3


def test_nobody_else_can_read_a_kept_shard_even_while_it_is_written(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
):
    modes: list[int] = []
    savez = np.savez

    def watching(file, **arrays):
        savez(file, **arrays)
        modes.extend(entry.stat().st_mode & 0o777 for entry in os.scandir(state))

    monkeypatch.setattr(np, "savez", watching)

    _cached(state, path, SCHEMA, UNIT, 0, partition=None)

    assert modes == [0o600]
    assert [entry.stat().st_mode & 0o777 for entry in os.scandir(state)] == [0o600]
