# SPDX-License-Identifier: Apache-2.0
"""What all strategies of marginals share: whom they count, a user's clip, and where it is from.

To make a strategy of marginals one of these: derive it from `MarginalStrategy` instead of
`Strategy` and drop its own `max_norm`; rename `__post_init__` to `check`, `rounds` to `learn`
(which is given `max_norm` last, where it used `self.max_norm`) and `answer` to `count`, and say in
`noise` what its sums cost in place of `event`. The class gains `weight`, `norm_quantile` and
`norm_share`, and refuses images.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import Contribution, NoisySum, Query, Rounds, Strategy
from ...core.records import BoundedShard
from ...core.schema import Schema
from .histograms import Grid, Histograms, cells_of
from .simplex import pooled_total, to_simplex

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

NORMS = "norms"  # name of the query by which users' norms are measured
NORM_EDGES = 2.0 ** (np.arange(41) / 4)  # upper ends of the cells of users' norms: 1 to 1024
_MOST_TABLES = 200  # of the tables by which norms are told
_MOST_CELLS = 256  # of a column in them
_BLOCK = 1 << 18  # cells counted at a time
_HAIR = 1e-9  # by which rounding may lengthen a norm
_CLEAR = 3.5  # standard deviations from which the users in a cell are more than noise
_RECORDS = (
    1.25  # a user of norm c has about c^1.25 records: between all equal (1) and all apart (2)
)
# Error in total variation that a clip brings, for each share of all records it takes away, and what
# is left of raw noise once tables are brought to agree. Measured by `benchmarks/users.py`.
_BIAS, _NOISE = 0.15, 0.25


@dataclass(frozen=True)
class MarginalStrategy(Strategy):
    """A strategy that learns from counted cells alone.

    A record lights one cell in each table. What a user adds to a sum is, by `weight`:

    - ``"record"``: the sum over the user's records, its L2 norm clipped at `max_norm` times one
      record's. The tables are those of the records, but for what the clip takes from users
      with many. A greater clip takes less, at the price of more noise.
    - ``"user"``: the mean over the user's records. Every user weighs the same, nothing is
      clipped, and noise is that of one record. The tables are another population's: that of a
      record drawn at random from a user drawn at random.

    Attributes:
      max_norm: L2 bound of a user, in units of one record's norm: a number that is declared, or
        ``"auto"``: the one by which clip and noise together are expected to err least, from
        measured norms. 1 fits users with one record.
      norm_quantile: Instead of `max_norm`: the bound that this share of users stays below, from
        measured norms.
      norm_share: Share of the budget (of mu^2) by which norms are measured, where they are.
      weight: Whom a table counts: ``"record"`` or ``"user"``.

    Privacy:
      The framework clips the user's whole concatenated vector. To measure norms, each user lights
      one cell of one histogram, in a first sum of its own that is part of the event.
    """

    max_norm: float | Literal["auto"] = 1.0
    norm_quantile: float | None = None
    norm_share: float = 0.02
    weight: Literal["record", "user"] = "record"
    norm_ways: ClassVar[int] = 2  # columns of the tables by which norms are told

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything, or contradict each other."""
        if self.max_norm != "auto" and not (
            isinstance(self.max_norm, int | float) and 0 < self.max_norm < math.inf
        ):
            raise ConfigError(
                f"max_norm must be a number above 0, or 'auto', not {self.max_norm!r}"
            )
        if self.norm_quantile is not None and not 0 < self.norm_quantile < 1:
            raise ConfigError(
                f"norm_quantile must lie between 0 and 1, not {self.norm_quantile!r}; leave it"
                " out to declare max_norm"
            )
        if not 0 < self.norm_share < 1:
            raise ConfigError(f"norm_share must lie between 0 and 1, not {self.norm_share!r}")
        if self.weight not in ("record", "user"):
            raise ConfigError(f"weight must be 'record' or 'user', not {self.weight!r}")
        if self.norm_quantile is not None and self.max_norm != 1.0:
            raise ConfigError(
                f"max_norm = {self.max_norm!r} and norm_quantile = {self.norm_quantile!r} both"
                " set the clip; keep one of them"
            )
        if self.weight == "user" and (self.max_norm != 1.0 or self.norm_quantile is not None):
            raise ConfigError(
                "weight = 'user' takes the mean over a user's records, which is never longer than"
                " one record: there is nothing to clip. Leave out max_norm and norm_quantile, or"
                " take weight = 'record'"
            )
        self.check()

    @property
    def measures_norms(self) -> bool:
        """Whether the first sum is one of norms."""
        return self.max_norm == "auto" or self.norm_quantile is not None

    @abstractmethod
    def check(self) -> None:
        """Refuse impossible values of the strategy's own settings, by `ConfigError`."""

    @abstractmethod
    def noise(self, schema: Schema, noise_multiplier: float) -> Sequence[float]:
        """Noise multipliers of all queries but that of norms, all of full participation.

        Args:
          schema: Public schema of the population, without images.
          noise_multiplier: What these queries cost together, as one Gaussian.

        Raises:
          ConfigError: The settings do not fit the schema.
        """

    @abstractmethod
    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """As `Strategy.rounds`, of all queries but that of norms.

        Args:
          schema: Public schema of the population.
          noise_multiplier: What is left for these queries.
          rng: Public randomness.
          max_norm: L2 bound of a user in every query, in units of one record's norm.
        """

    @abstractmethod
    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """As `Strategy.answer`: the cells of each record, each record at its full height."""

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """The sum of norms, if there is one, and all others."""
        from ...core.accounting import compose, single_event

        tables_only(schema, self.name)
        multipliers: list[float] = []
        if self.measures_norms:
            first, noise_multiplier = self._split(noise_multiplier)
            multipliers.append(first)
        multipliers += self.noise(schema, noise_multiplier)
        return compose(single_event(multiplier) for multiplier in multipliers)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Measure norms if the bound is not declared; then learn."""
        self.event(schema, noise_multiplier)  # refuses what does not fit before anything is asked
        if not self.measures_norms:
            return (yield from self.learn(schema, noise_multiplier, rng, self._declared))
        first, others = self._split(noise_multiplier)
        tables = norm_tables(schema, self.norm_ways)
        noisy = yield norm_query(tables, noise_multiplier=first)
        if self.norm_quantile is None:
            max_norm = best_norm(noisy, tables, noise_multiplier=others)
        else:
            max_norm = quantile_norm(noisy, self.norm_quantile)
        return (yield from self.learn(schema, others, rng, max_norm))

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each user's norm, or the cells of the user's records as `weight` says."""
        if self.measures_norms and query.name == NORMS:
            return norm_cells(query, shard)
        counted = self.count(query, shard, rng)
        return counted.user_means() if self.weight == "user" else counted

    @property
    def _declared(self) -> float:
        """The declared bound."""
        return float(self.max_norm)

    def _split(self, noise_multiplier: float) -> tuple[float, float]:
        """Noise multipliers of the sum of norms, and of all that follow."""
        from ...core.accounting import split

        first, others = split(noise_multiplier, (self.norm_share, 1 - self.norm_share))
        return first, others


def tables_only(schema: Schema, strategy: str) -> None:
    """Refuse a schema that marginals cannot describe.

    Raises:
      ConfigError: The schema has an image column, or no table column.
    """
    if schema.image is not None or not schema.columns:
        raise ConfigError(
            f"strategy {strategy!r} learns tables; the schema holds the image column"
            f" {schema.image.name if schema.image else None!r}. Remove it from the schema, or"
            " take a strategy for images: private_evolution, dp_merf, dp_fedavg"
        )


def norm_tables(schema: Schema, ways: int) -> Histograms:
    """Tables by which a user's norm is told: those of all columns, or of their pairs.

    Wide columns are folded, and of very many pairs an even choice is taken: a norm tells how much
    a user's records are alike, for which a part of the tables will do.
    """
    grids = [
        Grid(i, np.arange(cells, dtype=np.int64) % min(cells, _MOST_CELLS))
        for i, cells in enumerate(schema.shape)
    ]
    members = list(combinations(grids, min(ways, len(grids))))
    chosen = np.linspace(0, len(members) - 1, min(len(members), _MOST_TABLES)).round()
    return Histograms.balanced([members[i] for i in chosen.astype(int).tolist()])


def norm_query(tables: Histograms, *, noise_multiplier: float) -> Query:
    """The query for the histogram of users' norms; each user lights one cell.

    Args:
      tables: By which norms are told.
      noise_multiplier: The query's.
    """
    told = tables.query(NORMS, noise_multiplier=noise_multiplier, max_norm=1.0)
    inputs = {**told.inputs, "num_cells": np.array([told.dim], dtype=np.int64)}
    return replace(told, dim=len(NORM_EDGES), clip=1.0, inputs=inputs)


def norm_cells(query: Query, shard: BoundedShard) -> Contribution:
    """The cell of each user's norm.

    Raises:
      ConfigError: The query's arrays contradict each other or the number of columns.

    Privacy:
      A user's cell depends on that user's records and the query alone.
    """
    sizes = query.inputs.get("num_cells", np.zeros(0))
    if sizes.shape != (1,) or sizes.dtype.kind != "i" or query.dim != len(NORM_EDGES):
        raise ConfigError(f"query {query.name!r} comes with arrays that contradict each other")
    inputs = {name: array for name, array in query.inputs.items() if name != "num_cells"}
    told = replace(query, dim=int(sizes[0]), inputs=inputs)
    width = len(query.inputs.get("members", ())) or 1
    block = max(1, _BLOCK // (width * shard.max_records))
    norms = np.concatenate([_norms(told, part) for part in shard.blocks(block)])
    cells = np.searchsorted(NORM_EDGES[:-1], norms * (1 - _HAIR))
    return Contribution.cells(cells[:, None], np.arange(shard.num_users), num_users=shard.num_users)


def _norms(query: Query, shard: BoundedShard) -> NDArray[np.float64]:
    """L2 norm of each user's counted cells, in units of one record's, `(num_users,)`."""
    counted = cells_of(query, shard)
    if counted.indices is None or counted.weights is None:
        return np.zeros(0)
    keys = shard.user_index[:, None] * query.dim + counted.indices
    found, inverse = np.unique(keys, return_inverse=True)
    lit = np.broadcast_to(counted.weights, keys.shape).ravel()
    values = np.bincount(inverse.ravel(), weights=lit, minlength=len(found))
    squares = np.bincount(found // query.dim, weights=values * values, minlength=shard.num_users)
    return np.asarray(np.sqrt(squares / float(counted.weights @ counted.weights)))


def quantile_norm(noisy: NoisySum, quantile: float) -> float:
    """The bound that a share of users stays below; 1 where norms are lost in noise."""
    probs = _norm_probs(noisy)[1]
    below = np.cumsum(probs) >= quantile * (1 - _HAIR)
    return float(NORM_EDGES[int(np.argmax(below))]) if below.any() else 1.0


def best_norm(noisy: NoisySum, tables: Histograms, *, noise_multiplier: float) -> float:
    """The bound at which clip and noise are expected to err least; 1 where norms are unknown.

    Both errors are predicted from the measured norms alone: what a clip takes, from the share of
    records that it takes away; what noise adds, from that of all `tables` measured at once.

    Args:
      noisy: The measured norms.
      tables: By which they were told.
      noise_multiplier: Of what is still to be measured, as one sum.
    """
    total, probs = _norm_probs(noisy)
    records = probs * NORM_EDGES**_RECORDS
    kept = np.minimum(1.0, NORM_EDGES[:, None] / NORM_EDGES) @ records  # by bound, a user
    lost = 1 - kept / records.sum()
    cells = np.array(tables.sizes)
    length = math.sqrt(float(tables.heights @ tables.heights))
    stddev = NORM_EDGES * noise_multiplier * length  # in cells of height one
    spread = math.sqrt(0.5 / math.pi) * float((cells / tables.heights).mean()) * stddev
    with np.errstate(divide="ignore"):
        error = _BIAS * lost + _NOISE * spread / (total * kept)
    return float(NORM_EDGES[int(np.argmin(error))])


def _norm_probs(noisy: NoisySum) -> tuple[float, NDArray[np.float64]]:
    """Number of users, and the share of them in each cell; 0 and the first cell if unknown.

    What lies above the last cell that stands out of the noise is noise: long norms weigh much.
    """
    total = pooled_total([(noisy.vector, noisy.stddev)])
    clear = np.flatnonzero(noisy.vector > _CLEAR * noisy.stddev)
    if total <= 0 or not len(clear):
        return 0.0, np.eye(1, len(NORM_EDGES))[0]
    probs = np.zeros(len(NORM_EDGES))
    probs[: clear[-1] + 1] = to_simplex(noisy.vector[: clear[-1] + 1] / total)
    return total, probs
