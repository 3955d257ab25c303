# SPDX-License-Identifier: Apache-2.0
"""Our estimators against mbi 2: the same noisy tables in, the same marginals out."""

import itertools

import numpy as np
import pytest
from fedsynth.strategies.parts.descent import fit
from fedsynth.strategies.parts.histograms import Grid, Measured
from fedsynth.strategies.parts.tree_model import fit as fit_tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # jax and mbi warn of their own settings
]
SHAPE, TOTAL = (3, 5, 4, 2, 3), 5000.0
NAMES = "abcde"
MODELS = {
    "tree": [(0, 1), (1, 2), (1, 3), (3, 4)],
    "loop": [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)],
    "threes": [(0, 1, 2), (1, 2, 3), (3, 4)],
}


@pytest.fixture(scope="module")
def mbi():
    return pytest.importorskip(
        "mbi", reason="mbi 2 is not installed: pip install 'fedsynth[crosscheck]'"
    )


def noisy_tables(cliques, *, seed):
    """Every column and every clique of a joint that none of the models holds, with noise."""
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.full(np.prod(SHAPE), 0.3)).reshape(SHAPE)
    tables = []
    for columns in [*((c,) for c in range(len(SHAPE))), *cliques]:
        stddev = 120.0 if len(columns) == 1 else 75.0
        exact = TOTAL * joint.sum(axis=tuple(set(range(len(SHAPE))) - set(columns)))
        grids = tuple(Grid.whole(c, SHAPE[c]) for c in columns)
        tables.append(Measured(grids, exact + rng.normal(0, stddev, exact.shape), stddev))
    return tables


def theirs(mbi, tables, *, total):
    """What mbi makes of the tables."""
    measurements = [
        mbi.LinearMeasurement(
            table.counts.ravel(), tuple(NAMES[g.column] for g in table.grids), stddev=table.stddev
        )
        for table in tables
    ]
    domain = mbi.Domain(tuple(NAMES), SHAPE)
    model = mbi.estimation.MirrorDescent().estimate(
        domain, measurements, known_total=total, iters=4000
    )

    def marginal(columns):
        return np.asarray(model.project(tuple(NAMES[c] for c in columns)).values) / total

    return marginal


def apart(ours, marginal, columns):
    """Total variation distance of two marginals."""
    return np.abs(ours.marginal(columns) - marginal(columns)).sum() / 2


ASKED = [*itertools.combinations(range(5), 2), *itertools.combinations(range(5), 3)]


@pytest.mark.parametrize("model", MODELS)
def test_the_graph_model_agrees_with_mbi(mbi, model):
    tables = noisy_tables(MODELS[model], seed=17)
    marginal = theirs(mbi, tables, total=TOTAL)

    ours = fit(SHAPE, tables, total=TOTAL)

    assert max(apart(ours, marginal, columns) for columns in ASKED) < 0.005
    noise = [np.abs(t.counts / TOTAL - marginal([g.column for g in t.grids])) for t in tables[5:]]
    assert max(n.sum() / 2 for n in noise) > 0.03  # the tables are noisier than the fits are apart


def test_the_graph_model_misses_mbi_where_a_table_is_left_out(mbi):
    tables = noisy_tables(MODELS["loop"], seed=17)
    marginal = theirs(mbi, tables, total=TOTAL)

    ours = fit(SHAPE, tables[:-2], total=TOTAL)

    assert max(apart(ours, marginal, columns) for columns in ASKED) > 0.03


def test_the_tree_model_agrees_with_mbi(mbi):
    tables = noisy_tables(MODELS["tree"], seed=18)
    marginal = theirs(mbi, tables, total=TOTAL)

    ours = fit_tree(SHAPE, tables, MODELS["tree"], total=TOTAL, denoise=False)

    assert max(apart(ours, marginal, columns) for columns in ASKED) < 0.005
