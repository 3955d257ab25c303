# SPDX-License-Identifier: Apache-2.0
"""Users with many records: what a cap, a clip or a weight costs, on diabetes130 by patient.

All 71,518 patients with up to 40 encounters each, 14 columns, all 91 pairs, delta 1e-6. The error
is the mean total variation of all pairs' tables from those of the records. `tables` rows are the
noisy tables of one sum of all pairs, negative counts as zeros and nothing else done to them; the
other rows are the distribution that a method learns from the same budget.

    python benchmarks/users.py --json users.json     about ten minutes
    python benchmarks/users.py --quick               3,000 patients, two seeds
"""

import report  # isort: skip  (first: it holds numpy to one thread)

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard, encode
from fedsynth.core import accounting, mechanism
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget, PrivacyUnit, User
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard
from fedsynth.core.schema import Column, Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.independent import Columns
from fedsynth.strategies.mst import Tree
from fedsynth.strategies.parts.graph import Graph
from fedsynth.strategies.parts.histograms import Grid, Histograms, cells_of
from fedsynth.strategies.parts.measuring import best_norm, norm_cells, norm_query, norm_tables
from fedsynth.strategies.registry import build_strategy
from numpy.typing import NDArray

DELTA, MOST_RECORDS, FIGURE = 1e-6, 40, 0.0211  # the figure: a clip of 3 in the notes, epsilon 1
EPSILONS = (1.0, 4.0)
CAPS, CLIPS = (1, 2, 3, 5, 10), (1.0, 1.5, 2.0, 3.0, 4.0)
METHODS = ("independent", "mst", "privsyn", "marginals")
SAMPLED = 400_000  # records by which a synthesizer without exact tables is judged
_USERS = 1 << 13

Tables = list[NDArray[np.float64]]


def main() -> int:
    """Measure what was asked for."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="repetitions (default 5)")
    args = options.parse_args()
    figures = report.Report("users", args)
    seeds = 2 if args.quick else args.seeds
    try:
        schema, shard = diabetes(quick=args.quick)
    except tables.Missing as missing:
        figures.note(str(missing))
        return figures.finish()
    whole = bounded(shard, User("patient_nbr", max_records=MOST_RECORDS))
    truth = counted(schema, whole)
    truth = [t / t.sum() for t in truth]
    figures.note(f"the 14 columns (the notes do not name theirs): {', '.join(schema.names)}")
    for epsilon in EPSILONS[:1] if args.quick else EPSILONS:
        noisy_tables(figures, schema, shard, whole, truth, epsilon, seeds)
        learned(figures, schema, whole, truth, epsilon, seeds)
    best = [f for f in figures.figures if f.case.startswith("epsilon=1 method")]
    lowest = min(f.mean for f in best)
    figures.claim(
        f"user-level error at epsilon 1 at or below {FIGURE}: {lowest:.4f}", lowest <= FIGURE
    )
    auto = [f.mean for f in best if f.case.endswith("measured clip")]
    figures.claim(
        f"the same with a clip that nobody declared: {min(auto):.4f}", min(auto) <= FIGURE
    )
    return figures.finish()


def diabetes(*, quick: bool) -> tuple[Schema, Shard]:
    """Schema and records of all patients; bounds as a codebook would give them."""
    origin = "policy: declared"
    counts = {
        "time_in_hospital": (1, 14, 7),
        "num_lab_procedures": (0, 119, 8),
        "num_procedures": (0, 6, 7),
        "num_medications": (0, 79, 8),
        "number_outpatient": (0, 7, 8),
        "number_emergency": (0, 7, 8),
        "number_inpatient": (0, 7, 8),
        "number_diagnoses": (1, 16, 8),
    }
    races = ("AfricanAmerican", "Asian", "Caucasian", "Hispanic", "Other")
    decades = tuple(f"[{ten}-{ten + 10})" for ten in range(0, 100, 10))
    columns = (
        Column("race", "category", origin, races, missing=True),
        Column("gender", "category", origin, ("Female", "Male"), missing=True),
        Column("age", "category", origin, decades),
        *(
            Column(name, "integer", origin, bounds=(float(low), float(high)), num_bins=bins)
            for name, (low, high, bins) in counts.items()
        ),
        Column("change", "category", origin, ("No", "Ch")),
        Column("diabetesMed", "category", origin, ("No", "Yes")),
        Column("readmitted", "category", origin, ("NO", ">30", "<30")),
    )
    schema = Schema(columns)
    path = tables.folder() / "diabetes130.parquet"
    if not path.is_file():
        raise tables.Missing(f"diabetes130.parquet is not at {path.parent}: left out")
    table = pq.read_table(path, columns=["patient_nbr", *schema.names])
    shard = encode(table.slice(0, 4000) if quick else table, schema, User("patient_nbr"))
    return schema, shard


def bounded(shard: Shard, unit: PrivacyUnit) -> BoundedShard:
    """The shard with at most so many records of each user."""
    return bound(shard, unit, seed=0)


def noisy_tables(
    figures: report.Report,
    schema: Schema,
    shard: Shard,
    whole: BoundedShard,
    truth: Tables,
    epsilon: float,
    seeds: int,
) -> None:
    """Rows of one noisy sum of all pairs."""
    noise = accounting.calibrate(accounting.single_event, Budget(epsilon, DELTA))

    def row(what: str, part: BoundedShard, max_norm: float, weight: str = "record") -> None:
        query, total = summed(schema, part, max_norm, noise, weight)
        exact = _error(split(schema, total * mechanism.Lattice.of(query).unit), truth)
        errors = [_error(split(schema, noised(query, total)), truth) for _ in range(seeds)]
        figures.add(f"epsilon={epsilon:g} tables, {what}", "2-way TVD", errors, unit="")
        if epsilon == EPSILONS[0]:
            figures.add(f"no noise, tables, {what}", "2-way TVD", exact, unit="")

    row("every record a user (wrong unit)", bounded(shard, PrivacyUnit()), 1.0)
    for cap in CAPS:
        part = bounded(shard, User("patient_nbr", max_records=cap))
        row(f"at most {cap} records", part, float(cap))
    for clip in CLIPS:
        row(f"clip {clip:g}", whole, clip)
    row("user weights", whole, 1.0, "user")
    measured_clip(figures, schema, whole, truth, epsilon, seeds)


def measured_clip(
    figures: report.Report,
    schema: Schema,
    whole: BoundedShard,
    truth: Tables,
    epsilon: float,
    seeds: int,
) -> None:
    """The row whose clip is found first, by a share of 2 % of the budget."""
    noise = accounting.calibrate(accounting.single_event, Budget(epsilon, DELTA))
    first, others = accounting.split(noise, (0.02, 0.98))
    told = norm_tables(schema, 2)
    query = norm_query(told, noise_multiplier=first)
    lit = sum(
        mechanism.clipped_sum(norm_cells(query, part), query) for part in whole.blocks(_USERS)
    )
    clips, errors = [], []
    for _ in range(seeds):
        answer = NoisySum(noised(query, np.asarray(lit)), query.noise_multiplier, 1)
        clips.append(best_norm(answer, told, noise_multiplier=others))
        pairs, total = summed(schema, whole, clips[-1], others, "record")
        errors.append(_error(split(schema, noised(pairs, total)), truth))
    figures.add(f"epsilon={epsilon:g} tables, measured clip", "2-way TVD", errors, unit="")
    figures.add(f"epsilon={epsilon:g} measured clip", "max_norm", clips, unit="records")


def learned(
    figures: report.Report,
    schema: Schema,
    whole: BoundedShard,
    truth: Tables,
    epsilon: float,
    seeds: int,
) -> None:
    """Rows of what methods make of the same budget."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("clip 1", {"max_norm": 1.0}),
        ("clip 3", {"max_norm": 3.0}),
        ("measured clip", {"max_norm": "auto"}),
        ("clip at the 0.99 quantile", {"norm_quantile": 0.99}),
        ("user weights", {"weight": "user"}),
    ]
    for method in METHODS:
        for what, settings in ways:
            try:
                strategy = build_strategy(method, settings)
            except ConfigError as error:
                figures.note(f"{method}, {what}: left out: {str(error)[:60]}")
                continue
            noise = accounting.calibrate(
                lambda z, s=strategy: s.event(schema, z), Budget(epsilon, DELTA)
            )
            errors = [
                _error(pairs_of(schema, _run(strategy, schema, whole, noise, seed)), truth)
                for seed in range(seeds)
            ]
            case = f"epsilon={epsilon:g} method {method}, {what}"
            figures.add(case, "2-way TVD", errors, unit="")


def _run(
    strategy: Any, schema: Schema, whole: BoundedShard, noise: float, seed: int
) -> Synthesizer:
    return direct_run(strategy, schema, whole, noise, rng=np.random.default_rng(seed))


def summed(
    schema: Schema, shard: BoundedShard, max_norm: float, noise: float, weight: str
) -> tuple[Query, NDArray[np.int64]]:
    """The query for all pairs' tables, and its exact clipped sum."""
    grids = [Grid.whole(i, cells) for i, cells in enumerate(schema.shape)]
    members = list(combinations(grids, 2))
    query = Histograms(tuple(members), np.ones(len(members))).query(
        "pairs", noise_multiplier=noise, max_norm=max_norm
    )
    total = np.zeros(query.dim, dtype=np.int64)
    for part in shard.blocks(_USERS):
        cells = cells_of(query, part)
        total += mechanism.clipped_sum(cells.user_means() if weight == "user" else cells, query)
    return query, total


def noised(query: Query, total: NDArray[np.int64]) -> NDArray[np.float64]:
    """A sum with its noise, in its own unit."""
    lattice, stddev = mechanism.Lattice.of(query), query.noise_multiplier * query.clip
    steps = mechanism.noised(total, stddev=stddev, lattice=lattice, stream=OsKeyStream())
    return mechanism.real_sum(steps, stddev=stddev, lattice=lattice, num_clients=1).vector


def split(schema: Schema, vector: NDArray[np.float64]) -> Tables:
    """Tables laid end to end, as distributions: what is below zero counts as nothing."""
    sizes = [a * b for a, b in combinations(schema.shape, 2)]
    parts = [np.maximum(part, 0.0) for part in np.split(vector, np.cumsum(sizes)[:-1])]
    return [part / max(part.sum(), 1e-9) for part in parts]


def counted(schema: Schema, shard: BoundedShard) -> Tables:
    """Counts of all pairs of columns."""
    return _counts(schema, shard.records.codes)


def pairs_of(schema: Schema, synthesizer: Synthesizer) -> Tables:
    """Probabilities of all pairs of columns, exact where the synthesizer has them."""
    pairs = list(combinations(range(len(schema.columns)), 2))
    if isinstance(synthesizer, Columns):
        return [np.outer(synthesizer.probs[a], synthesizer.probs[b]).ravel() for a, b in pairs]
    if isinstance(synthesizer, Graph):
        inside = [
            probs / grid.merge(probs)[grid.groups]
            for grid, probs in zip(synthesizer.grids, synthesizer.columns, strict=True)
        ]
        groups = [grid.groups for grid in synthesizer.grids]
        return [
            (table[np.ix_(groups[a], groups[b])] * np.outer(inside[a], inside[b])).ravel()
            for (a, b), table in zip(pairs, synthesizer.model.marginals(pairs), strict=True)
        ]
    if isinstance(synthesizer, Tree):
        return [synthesizer.model.marginal(pair).ravel() for pair in pairs]
    records = synthesizer.sample(SAMPLED, np.random.default_rng(0))
    return [table / SAMPLED for table in _counts(schema, records.codes)]


def _counts(schema: Schema, codes: NDArray[np.int32]) -> Tables:
    shape = schema.shape
    return [
        np.bincount(
            codes[:, a].astype(np.int64) * shape[b] + codes[:, b], minlength=shape[a] * shape[b]
        ).astype(np.float64)
        for a, b in combinations(range(len(shape)), 2)
    ]


def _error(found: Sequence[NDArray[np.float64]], truth: Tables) -> float:
    """Mean total variation over all pairs."""
    return float(np.mean([0.5 * np.abs(f - t).sum() for f, t in zip(found, truth, strict=True)]))


if __name__ == "__main__":
    raise SystemExit(main())
