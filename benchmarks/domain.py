# SPDX-License-Identifier: Apache-2.0
"""Find domains under privacy: the share of records whose category is found, and bins' ranks.

Beside each figure of open categories stands what a trusted server would find that sees every
value and count, adds the same noise to the counts of those that occur, and keeps those above the
same threshold. The budget is a domain's usual tenth.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import report  # isort: skip  (first: it sets up threads and paths)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fedsynth.client.bounding import bound
from fedsynth.client.shard import encode
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget, PrivacyUnit
from fedsynth.core.records import BoundedShard
from fedsynth.core.schema import OPEN, Schema
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.discovered import Discovered
from fedsynth.strategies.independent import Independent
from scipy.stats import norm
from tables import Missing, folder

DELTA, EPSILONS, SEEDS = 1e-6, (0.1, 1.0, 10.0), 5
MOST_RECORDS = 50
CATEGORIES = (
    ("diabetes130", "patient_nbr", "medical_specialty"),
    ("diabetes130", "patient_nbr", "diag_1"),
    ("online_retail_sample", "CustomerID", "Country"),
)
NUMBERS = (
    ("adult", None, "age", "integer"),
    ("adult", None, "fnlwgt", "integer"),
    ("adult", None, "capital_gain", "integer"),
    ("online_retail_sample", "CustomerID", "UnitPrice", "real"),
)


@dataclass(frozen=True)
class Column:
    """One column of a table, open, and its values."""

    name: str
    schema: Schema
    shard: BoundedShard
    values: pa.Array
    users: np.ndarray


def main() -> int:
    """Run the benchmark."""
    args = report.parser(__doc__).parse_args()
    figures = report.Report("domain", args)
    seeds = 1 if args.quick else SEEDS
    opened = [(*names, "category") for names in CATEGORIES[: 1 if args.quick else None]]
    opened += NUMBERS[: 1 if args.quick else None]
    for table, user, name, kind in opened:
        try:
            column = _column(table, user, name, kind)
        except Missing as missing:
            figures.note(f"{name} is left out: {missing}")
            continue
        for epsilon in EPSILONS:
            (_categories if kind == "category" else _numbers)(figures, column, epsilon, seeds)
    found = {f.case: f.mean for f in figures.figures if f.metric == "records found"}
    figures.claim(
        "at epsilon 10, nine records of ten have a category that is found",
        all(mean >= 0.9 for case, mean in found.items() if case.endswith("epsilon=10")),
    )
    invented = [f.mean for f in figures.figures if f.metric == "values invented"]
    figures.claim("hardly a value is found that nobody has", max(invented, default=0.0) <= 0.4)
    return figures.finish(by_case=True)


def _column(table: str, user: str | None, column: str, kind: str) -> Column:
    """A column of a table on this machine."""
    path = folder() / f"{table}.parquet"
    if not path.is_file():
        raise Missing(f"there is no {path}")
    read = pq.read_table(path, columns=[column] + ([user] if user else []))
    if user is not None:
        read = read.filter(pa.compute.is_valid(read[user]))
    domain = {"categories": OPEN} if kind == "category" else {"bounds": OPEN}
    entry = {"type": kind, "missing": True, **domain}
    schema = Schema.from_json({"columns": {column: entry}})
    unit = PrivacyUnit() if user is None else PrivacyUnit(user, max_records=MOST_RECORDS)
    shard = bound(encode(read, schema, unit), unit, seed=0)
    users = np.arange(read.num_rows) if user is None else np.asarray(read[user])
    return Column(column, schema, shard, read[column], users)


def _runs(column: Column, epsilon: float, seeds: int) -> Iterator[tuple[Schema, float, float]]:
    """The schema found, the CPU-seconds that took, and the noise multiplier of the domain."""
    strategy = Discovered(Independent())
    noise = accounting.calibrate(lambda z: strategy.event(column.schema, z), Budget(epsilon, DELTA))
    for seed in range(seeds):
        started = time.process_time()
        learned = direct_run(
            strategy, column.schema, column.shard, noise, rng=np.random.default_rng(seed)
        )
        yield (
            learned.schema,
            time.process_time() - started,
            noise / math.sqrt(strategy.domain_share),
        )


def _categories(figures: report.Report, column: Column, epsilon: float, seeds: int) -> None:
    """Figures of an open category."""
    values = np.array([v if v not in (None, "?") else "" for v in column.values.to_pylist()])
    known, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    counts = np.where(known == "", 0, counts)
    width = column.schema.columns[0].max_bytes
    cut = [value.encode()[:width].decode(errors="ignore") for value in known.tolist()]
    shares = dict.fromkeys(cut, 0.0)
    for value, count in zip(cut, counts.tolist(), strict=True):
        shares[value] += count / counts.sum()
    recall, found, invented, seconds, central = [], [], [], [], []
    weights = _weights(codes, column.users, len(known), known == "")
    for number, (schema, cpu, noise) in enumerate(_runs(column, epsilon, seeds)):
        got = schema.columns[0].categories[:-1]
        recall.append(sum(shares.get(value, 0.0) for value in got))
        found.append(sum(value in shares for value in got))
        invented.append(sum(value not in shares for value in got))
        seconds.append(cpu)
        noisy = weights + np.random.default_rng(number).normal(0, noise, len(weights))
        kept = (counts > 0) & (noisy >= norm.isf(1e-6) * noise + 1)
        central.append(float(counts[kept].sum() / counts.sum()))
    case = f"{column.name} epsilon={epsilon:g}"
    figures.add(case, "records found", recall, unit="share")
    figures.add(case, "found by a trusted server", central, unit="share")
    figures.add(case, "values found", found, unit="values")
    figures.add(case, "values", int((counts > 0).sum()), unit="values")
    figures.add(case, "values invented", invented, unit="values")
    figures.add(case, "CPU", seconds, unit="CPU-s")


def _weights(
    codes: np.ndarray, users: np.ndarray, num_values: int, missing: np.ndarray
) -> np.ndarray:
    """Sum over users of their counts, brought to norm one where they are longer."""
    _, owner = np.unique(users, return_inverse=True)
    pairs, counts = np.unique(owner * num_values + codes, return_counts=True)
    counts = np.where(missing[pairs % num_values], 0, counts)
    norms = np.sqrt(np.bincount(pairs // num_values, counts.astype(np.float64) ** 2))
    heights = counts / np.maximum(norms, 1.0)[pairs // num_values]
    return np.bincount(pairs % num_values, heights, minlength=num_values)


def _numbers(figures: report.Report, column: Column, epsilon: float, seeds: int) -> None:
    """Figures of an open number, against the ranks of its values.

    The heaviest bin is that of those that hold several values; a value alone cannot be divided.
    """
    values = np.sort(np.asarray(column.values.cast(pa.float64()).drop_null()))
    outside, heaviest, bins, seconds = [], [], [], []
    for schema, cpu, _ in _runs(column, epsilon, seeds):
        edges = schema.columns[0].edges
        below, above = (np.searchsorted(values, edge) for edge in (edges[0], edges[-1]))
        outside.append(1 - (above - below) / len(values))
        at = np.searchsorted(values, edges).tolist()
        alone = np.array([len(np.unique(values[a:b])) for a, b in pairwise(at)])
        heaviest.append(float(np.diff(at)[alone > 1].max(initial=0) / len(values)))
        bins.append(len(edges) - 1)
        seconds.append(cpu)
    case = f"{column.name} epsilon={epsilon:g}"
    figures.add(case, "beyond the bounds", outside, unit="share")
    figures.add(case, "heaviest bin", heaviest, unit="share")
    figures.add(case, "bins", bins, unit="bins")
    figures.add(case, "CPU", seconds, unit="CPU-s")


if __name__ == "__main__":
    sys.exit(main())
