# SPDX-License-Identifier: Apache-2.0
"""Tables agree on what they share after the least-squares correction, and become plausible."""

import numpy as np
import pytest
from fedsynth.strategies.parts.consistency import agreed, plausible
from fedsynth.strategies.parts.histograms import Grid, Measured

A, B, C = Grid.whole(0, 3), Grid.whole(1, 4), Grid.whole(2, 2)


def measured(grids, seed, stddev):
    rng = np.random.default_rng(seed)
    return Measured(grids, 100 + stddev * rng.normal(size=[g.size for g in grids]), stddev)


def test_tables_agree_with_columns_and_on_shared_pairs():
    columns = [np.array([500.0, 400.0, 300.0]), np.full(4, 300.0), np.array([700.0, 500.0])]
    tables = [measured((A, B, C), 0, 9.0), measured((A, B), 1, 3.0), measured((C, B), 2, 5.0)]

    three, two, other = agreed(tables, columns)

    assert np.allclose(three.sum(axis=2), two)
    assert np.allclose(three.sum(axis=0), other.T)
    for table, axes in ((three, (0, 1, 2)), (two, (0, 1)), (other, (2, 1))):
        for axis, column in enumerate(axes):
            others = tuple(a for a in range(table.ndim) if a != axis)
            assert np.allclose(table.sum(axis=others), columns[column])


def test_what_is_shared_is_averaged_by_inverse_variance():
    flat = [np.full(3, 4.0), np.full(4, 3.0)]
    exact, rough = measured((A, B), 3, 1.0), measured((A, B), 4, 2.0)

    first, second = agreed([exact, rough], flat)

    alone = [agreed([table], flat)[0] for table in (exact, rough)]
    assert np.allclose(first, second)
    assert np.allclose(first, 0.8 * alone[0] + 0.2 * alone[1])


def test_a_merged_column_is_moved_to_the_merged_counts():
    merged = Grid(0, np.array([0, 1, 0]))

    (table,) = agreed([measured((merged, C), 5, 1.0)], [np.array([10.0, 20, 30]), [], [25, 35.0]])

    assert np.allclose(table.sum(axis=1), [40, 20])


def test_a_plausible_table_has_its_margins_and_nothing_below_zero():
    rng = np.random.default_rng(6)
    margins = [np.array([5.0, 0.0, 55.0]), np.array([20.0, 20, 10, 10]), np.array([45.0, 15.0])]

    table = plausible(3 * rng.normal(size=(3, 4, 2)), margins)

    assert (table >= 0).all()
    assert table.sum() == pytest.approx(60)
    assert table[1].sum() == 0
    for axis, margin in enumerate(margins):
        found = table.sum(axis=tuple(a for a in range(3) if a != axis))
        assert np.abs(found - margin).max() < 1.0


def test_a_table_that_could_be_is_hardly_moved():
    table = np.array([[5.0, 1.0], [2.0, 7.0]])

    assert np.abs(plausible(table, [table.sum(axis=1), table.sum(axis=0)]) - table).max() < 0.01
