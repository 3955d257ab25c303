# SPDX-License-Identifier: Apache-2.0
"""Histograms of one, two and more columns in one query count what they say."""

from dataclasses import replace

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import Lattice, clipped_sum, real_sum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.strategies.parts.histograms import Grid, Histograms, cells_of

_SHAPE = (3, 4, 5, 2)


def _shard(num_records: int = 200) -> BoundedShard:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, s, num_records) for s in _SHAPE], axis=1)
    records = Records(codes.astype(np.int32))
    return BoundedShard(records, np.arange(num_records), num_records, 1)


def _histograms() -> Histograms:
    a, b, c, d = (Grid.whole(i, s) for i, s in enumerate(_SHAPE))
    merged = Grid(2, np.array([0, 0, 1, 1, 2]))
    return Histograms.balanced([(a,), (a, b), (a, merged, d), (d, b, a, c)])


def test_histograms_of_any_number_of_columns_are_exact_counts_without_noise():
    histograms, shard = _histograms(), _shard()
    query = histograms.query("all", noise_multiplier=1.0, max_norm=1.0)

    total = clipped_sum(cells_of(query, shard), query)
    found = histograms.measured(
        real_sum(total, stddev=1.0, lattice=Lattice.of(query), num_clients=1)
    )

    for measured in found:
        counts = np.zeros([grid.size for grid in measured.grids])
        cells = [grid.groups[shard.records.codes[:, grid.column]] for grid in measured.grids]
        np.add.at(counts, tuple(cells), 1.0)
        np.testing.assert_array_equal(measured.counts, counts)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("members", lambda a: np.where(a == 3, 9, a)),
        ("members", lambda a: np.where(a == 3, -2, a)),
        ("members", lambda a: np.full_like(a, -1)),
        ("grid_sizes", lambda a: a * 100),
        ("grid_columns", lambda a: a + 4),
        ("grid_starts", lambda a: a[::-1].copy()),
        ("heights", lambda a: a[1:]),
        ("heights", lambda a: a.astype(np.float32)),
        ("grid_groups", lambda a: np.where(np.arange(len(a)) == 1, 10**9, a).astype(a.dtype)),
        ("grid_groups", lambda a: a - 1),
    ],
)
def test_arrays_that_contradict_each_other_are_refused_before_a_record_is_seen(name, change):
    query = _histograms().query("all", noise_multiplier=1.0, max_norm=1.0)
    forged = replace(query, inputs={**query.inputs, name: change(query.inputs[name])})

    with pytest.raises(ConfigError, match="contradict"):
        cells_of(forged, _shard(0))
