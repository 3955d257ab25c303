# SPDX-License-Identifier: Apache-2.0
"""Drive mbi 2 through MST, written here on its interface: the wheel holds no mechanisms.

The steps and settings are those that the authors of MST publish: a third of the budget for the
columns, a third for the edges of the tree by the exponential mechanism, a third for their tables;
cells below three deviations of noise are merged; mirror descent of 2,500 and 10,000 steps.
"""

from itertools import combinations

import jax

jax.config.update("jax_enable_x64", True)  # as mbi itself advises
jax.config.update("jax_enable_compilation_cache", False)

import mbi  # noqa: E402
import numpy as np  # noqa: E402
from protocol import drive, rho_of  # noqa: E402

SELECT_STEPS, FIT_STEPS = 2500, 10_000


def learn(codes, domain, args):
    """MST's synthetic codes."""
    rng = np.random.default_rng(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  (mbi samples with numpy's global generator)
    part = rho_of(args.epsilon, args.delta) / 3
    names = list(domain)
    columns = dict(zip(names, codes.T, strict=True))
    counts = [np.bincount(columns[n], minlength=domain[n]).astype(float) for n in names]
    stddev = np.sqrt(len(names) / (2 * part))
    noisy = [c + rng.normal(0, stddev, c.size) for c in counts]

    kept = {n: y >= 3 * stddev for n, y in zip(names, noisy, strict=True)}
    groups = {n: np.where(k, np.cumsum(k) - 1, k.sum()) for n, k in kept.items()}
    sizes = {n: int(g.max()) + 1 for n, g in groups.items()}
    merged = mbi.Domain(tuple(names), tuple(sizes.values()))
    data = mbi.Dataset({n: groups[n][columns[n]] for n in names}, merged)
    measured = [_merged(n, y, kept[n], stddev) for n, y in zip(names, noisy, strict=True)]

    model = mbi.estimation.MirrorDescent().estimate(merged, measured, iters=SELECT_STEPS)
    errors = {
        pair: float(np.abs(_vector(data, pair) - _vector(model, pair)).sum())
        for pair in combinations(names, 2)
    }
    edges = _tree(names, errors, np.sqrt(8 * part / max(1, len(names) - 1)), rng)
    stddev = np.sqrt(len(edges) / (2 * part))
    for edge in edges:
        table = _vector(data, edge)
        measured.append(
            mbi.LinearMeasurement(table + rng.normal(0, stddev, table.size), edge, stddev)
        )
    model = mbi.estimation.MirrorDescent().estimate(merged, measured, iters=FIT_STEPS)
    made = model.synthetic_data(rows=len(codes)).to_dict()
    return np.column_stack([_apart(np.asarray(made[n]), kept[n], rng) for n in names])


def _merged(name, noisy, kept, stddev):
    """A column's measurement over its kept cells and, where there are others, their sum."""
    lost = int((~kept).sum())
    if not lost:
        return mbi.LinearMeasurement(noisy, (name,), stddev)
    weights = np.append(np.ones(int(kept.sum())), lost**-0.5)  # so that all noise is alike
    vector = np.append(noisy[kept], noisy[~kept].sum()) * weights
    return mbi.LinearMeasurement(vector, (name,), stddev, query=mbi.WeightedQuery(weights))


def _vector(source, pair):
    """Counts of a pair, as a flat array."""
    return np.asarray(source.project(pair).datavector())


def _tree(names, errors, epsilon, rng):
    """A spanning tree, each edge by the exponential mechanism among those that close no loop."""
    part = {n: n for n in names}
    edges = []
    while len(edges) < len(names) - 1:
        open_pairs = [(a, b) for a, b in errors if part[a] != part[b]]
        scores = epsilon / 2 * np.array([errors[p] for p in open_pairs])
        odds = np.exp(scores - scores.max())
        a, b = open_pairs[rng.choice(len(open_pairs), p=odds / odds.sum())]
        edges.append((a, b))
        part = {n: part[a] if p == part[b] else p for n, p in part.items()}
    return edges


def _apart(merged, kept, rng):
    """Codes before merging; cells that were merged share their records evenly."""
    cells = np.append(np.flatnonzero(kept), 0)[merged]
    lost = merged == kept.sum()
    if lost.any():
        cells[lost] = rng.choice(np.flatnonzero(~kept), int(lost.sum()))
    return cells


if __name__ == "__main__":
    drive(learn)
