# SPDX-License-Identifier: Apache-2.0
"""Tab-PE: records vote for the nearest of a pool of candidate records; the fittest mutate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .independent import split_probs
from .parts.gum import Target
from .parts.histograms import Grid, Histograms, Measured, cells_of, norm_clip, total_of
from .parts.measuring import MarginalStrategy
from .parts.refine import refined
from .parts.rounding import rounded_cells
from .parts.settings import check_range, check_shares
from .parts.simplex import pooled_total, to_simplex
from .parts.tree_model import columns_of
from .parts.votes import ballot, finder_of, label_of, labels_of, warn_of_drowned

_WALKS = 0.5  # chance that an ordered cell moves to one nearby instead of being drawn anew
_PASSES = 5  # of refining a sample towards the columns' histograms
_SMALLEST = 50  # candidates in a pool, however much noise there is


@dataclass(frozen=True)
class TabPe(MarginalStrategy):
    """Private Evolution for tables, good at what no small marginal shows.

    1. ``classes``: the histogram of the label, with a share of the budget of its own. It says
       how many candidates each class has. Nothing about classes is taken as known.
    2. ``columns``: the histograms of all other columns. The first pool is drawn from them.
    3. ``votes``, `num_rounds` times: each record votes for the nearest candidates of its class. A
       user's votes are one vector over all classes. Noisy votes are projected onto the simplex:
       candidates have offspring in proportion to them. A parent stays once; its other offspring
       have each column changed with a chance that falls from round to round (at least one is): a
       cell is drawn anew from the column's histogram or, if ordered, moved to one nearby.

    A candidate's share of the last votes is its weight. A sample holds each candidate as often as
    its weight says; ordered cells are then spread over their column's histogram in the order that
    they have, and as few records as needed are changed until all columns fit (`refined`).

    A record is compared with whole candidates, so dependence of any order counts: a parity of
    four columns, say, of which no pair or triple of columns shows a trace. Pairs of many cells
    are told less well than by methods that measure them.

    Attributes:
      num_rounds: Rounds of votes, all with the same noise.
      num_candidates: Most candidates in the pool.
      least_votes: Votes that a candidate is to have on average, in standard deviations of the
        noise: the pool is made smaller until it has.
      label: Category column that records and candidates must agree on. `None`: the schema's
        target, where that is a category. `""`: none.
      num_votes: How many nearest candidates a record votes for.
      class_share: Share of the budget (of mu^2) for the label's histogram.
      column_share: Share for those of all other columns; the votes have the rest.
      mutation_first: Chance that a column of an offspring is changed, in the first round.
      mutation_last: The same in the last; between them it falls by a constant factor.
      category_weight: Distance of two categories, where the full range of a number is 1.

    Privacy:
      A user's whole vector of votes, over all classes, is clipped once. Clipping each class by
      itself would let a user with records of m classes move the sum by sqrt(m) clips.

    Reference:
      "Tab-PE", https://arxiv.org/abs/2606.08259. A reconstruction from its abstract and settings;
      there, class counts are taken as known. Evolution by votes is that of Lin et al. (2024),
      "Differentially Private Synthetic Data via Foundation Model APIs 1: Images", algorithm 1,
      https://arxiv.org/abs/2305.15560.
    """

    num_rounds: int = 8
    num_candidates: int = 3000
    least_votes: float = 2.0
    label: str | None = None
    num_votes: int = 2
    class_share: float = 0.02
    column_share: float = 0.18
    mutation_first: float = 0.25
    mutation_last: float = 0.03
    category_weight: float = 0.3
    name: ClassVar[str] = "tab_pe"

    def check(self) -> None:
        """Refuse settings that no schema could make sense of."""
        check_range(
            1,
            1_000_000,
            num_rounds=self.num_rounds,
            num_votes=self.num_votes,
            num_candidates=self.num_candidates,
        )
        for key in ("mutation_first", "mutation_last"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"{key} must lie in (0, 1], not {getattr(self, key)!r}")
        check_shares("votes", class_share=self.class_share, column_share=self.column_share)
        if not 0 <= self.least_votes < math.inf:
            raise ConfigError(f"least_votes must be 0 or more, not {self.least_votes!r}")
        if not 0 < self.category_weight <= 10:
            raise ConfigError(f"category_weight must lie in (0, 10], not {self.category_weight!r}")

    def learn(
        self, schema: Schema, noise_multiplier: float, rng: np.random.Generator, max_norm: float
    ) -> Rounds:
        """Measure classes and columns; draw a pool; ask for votes, select and mutate."""
        label = label_of(schema, self.label)
        noises = self.noise(schema, noise_multiplier)
        measured: list[Measured] = []
        whole = Grid.each(schema.shape)
        asked = [("classes", [g for g in whole if g.column == label])] if label >= 0 else []
        asked.append(("columns", [g for g in whole if g.column != label]))
        for (name, grids), noise in zip(asked, noises, strict=False):
            alone = Histograms.balanced([(grid,) for grid in grids])
            noisy = yield alone.query(name, noise_multiplier=noise, max_norm=max_norm)
            measured += alone.measured(noisy)
        total = total_of(measured)
        bins = schema.ordered_cells
        counts = columns_of(schema.shape, measured, total, bins)
        probs = tuple(column / column.sum() for column in counts)

        clip = norm_clip(np.ones(self.num_votes), max_norm)
        codes = self._first_pool(probs, label, self._pool_size(total, noises[-1] * clip), rng)
        weights = np.full(len(codes), 1 / len(codes))
        num_drowned = 0
        for number in range(self.num_rounds):
            pool = Candidates(codes)
            noisy = yield ballot(
                schema, label, pool, clip=clip, noise_multiplier=noises[-1], cells=True
            )
            shares = _shares(noisy)
            if shares is None:  # nothing was learned: the same pool is asked about again
                num_drowned += not noisy.is_void
                continue
            weights = shares
            if number < self.num_rounds - 1:
                rate = self._rate(number)
                codes, weights = _next_pool(codes, shares, probs, bins, label, rate, rng)
        warn_of_drowned(num_drowned, self.num_rounds, len(codes))
        return Evolved(schema, codes, weights, probs)

    def count(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The cell of each record in each histogram, or the candidates that it votes for.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        if query.name != "votes":
            return cells_of(query, shard)
        finder, label = finder_of(query, shard.records, self.category_weight)
        codes = shard.records.codes
        votes, _ = finder.nearest(codes, None, labels_of(codes, label), self.num_votes)
        voting = votes[:, 0] >= 0
        return Contribution.cells(
            votes[voting], shard.user_index[voting], num_users=shard.num_users
        )

    def _check(self, schema: Schema) -> None:
        """Refuse a schema that these settings do not fit."""
        label = label_of(schema, self.label)
        if all(i == label for i in range(len(schema.columns))):
            raise ConfigError("the schema holds nothing but the label; set label = ''")
        fewest = self._fewest(schema.shape[label] if label >= 0 else 1)
        if self.num_candidates < fewest:
            raise ConfigError(
                f"num_candidates = {self.num_candidates} is too few for this label with num_votes"
                f" = {self.num_votes}; use at least {fewest}, or label = '' to go without a label"
            )

    def _fewest(self, num_classes: int) -> int:
        """Candidates that every class needs, so that a record can cast its votes."""
        return num_classes * self.num_votes

    def noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each query, in order: one or two, and one a round of votes."""
        from ..core.accounting import split

        self._check(schema)
        firsts = [self.class_share, self.column_share]
        if label_of(schema, self.label) < 0:
            firsts = [sum(firsts)]
        rest = (1 - sum(firsts)) / self.num_rounds
        return split(noise_multiplier, firsts + [rest] * self.num_rounds)

    def _pool_size(self, total: float, stddev: float) -> int:
        """Candidates for so many records, such that their votes stand out from the noise."""
        votes = total * self.num_votes
        fitting = votes / (self.least_votes * stddev) if self.least_votes else math.inf
        return int(min(max(fitting, _SMALLEST), self.num_candidates))

    def _first_pool(
        self,
        probs: Sequence[NDArray[np.float64]],
        label: int,
        num: int,
        rng: np.random.Generator,
    ) -> NDArray[np.int32]:
        """Candidates of every class, by its share, with all other columns drawn independently."""
        if label >= 0:
            room = max(0, num - self._fewest(len(probs[label])))
            own = np.bincount(rounded_cells(probs[label], room, rng), minlength=len(probs[label]))
            classes = np.repeat(np.arange(len(own)), own + self.num_votes)
            num = len(classes)
        codes = np.empty((num, len(probs)), dtype=np.int32)
        for column, p in enumerate(probs):
            if column == label:
                codes[:, column] = classes
            else:
                codes[:, column] = rng.permutation(rounded_cells(p, num, rng))
        return codes

    def _rate(self, number: int) -> float:
        """Chance that a column of a round's offspring is changed."""
        passed = number / max(1, self.num_rounds - 2)
        return float(self.mutation_first * (self.mutation_last / self.mutation_first) ** passed)


def _shares(noisy: NoisySum) -> NDArray[np.float64] | None:
    """Each candidate's share of the votes; `None` where the noise leaves nothing to see."""
    total = 0.0 if noisy.is_void else pooled_total([(noisy.vector, noisy.stddev)])
    return to_simplex(noisy.vector, total) / total if total > 0 else None


def _next_pool(
    codes: NDArray[np.int32],
    shares: NDArray[np.float64],
    probs: Sequence[NDArray[np.float64]],
    bins: Mapping[int, int],
    label: int,
    rate: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Parents, each once, and their mutated offspring; and what is known of their shares.

    A class keeps its number of candidates; one that got no votes keeps its candidates.
    """
    parents = []
    for group in np.unique(labels_of(codes, label)):
        members = np.flatnonzero(labels_of(codes, label) == group)
        fit = shares[members]
        parents.append(members[rounded_cells(fit, len(members), rng)] if fit.sum() > 0 else members)
    parent = np.concatenate(parents)
    _, first = np.unique(parent, return_index=True)
    varied = np.ones(len(parent), dtype=np.bool_)
    varied[first] = False
    offspring = codes[parent]
    offspring[varied] = mutated(offspring[varied], probs, bins, label, rate, rng)
    expected = shares[parent] / np.bincount(parent, minlength=len(codes))[parent]
    return offspring, expected / expected.sum()


def mutated(
    codes: NDArray[np.int32],
    probs: Sequence[NDArray[np.float64]],
    bins: Mapping[int, int],
    label: int,
    rate: float,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Candidates with some columns changed, at least one each, and never the label.

    Args:
      codes: What to start from, `(num_candidates, num_columns)`.
      probs: From which each column is drawn anew.
      bins: Columns whose first so many cells are ordered: they may move to a cell nearby instead.
      label: Column that keeps its code, or -1.
      rate: Chance that a column is changed; also how far an ordered cell moves, as the standard
        deviation in units of its range.
      rng: Public randomness.
    """
    num, num_columns = codes.shape
    others = np.array([column for column in range(num_columns) if column != label])
    changes = rng.random((num, num_columns)) < rate
    changes[np.arange(num), rng.choice(others, num)] = True
    result = codes.copy()
    for column in others.tolist():
        rows = np.flatnonzero(changes[:, column])
        cells = rng.choice(len(probs[column]), size=len(rows), p=probs[column])
        size = bins.get(column, 0)
        if size:
            old = codes[rows, column]
            step = rng.normal(0.0, max(1.0, rate * size), len(rows))
            walked = np.clip(np.rint(old + step), 0, size - 1).astype(np.int64)
            walks = (rng.random(len(rows)) < _WALKS) & (old < size)
            cells = np.where(walks, walked, cells)
        result[rows, column] = cells
    return result


@dataclass(frozen=True, eq=False)
class Evolved(Synthesizer):
    """Weighted candidates, and the histograms of their columns.

    Attributes:
      schema: Schema of the records.
      codes: The candidates, `(num_candidates, num_columns)`, int32.
      weights: Probability of each candidate, `(num_candidates,)`.
      probs: Probability of each cell, one array a column.
    """

    schema: Schema
    codes: NDArray[np.int32]
    weights: NDArray[np.float64]
    probs: tuple[NDArray[np.float64], ...]
    kind: ClassVar[str] = "evolved"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Candidates by their weights, then edited so that every column has its histogram."""
        codes = self.codes[rng.permutation(rounded_cells(self.weights, num_records, rng))]
        for column, declared in enumerate(self.schema.columns):
            size = declared.num_ordered_cells
            inside = np.flatnonzero(codes[:, column] < size)
            shares = self.probs[column][:size]
            if len(inside) and shares.sum() > 0:
                # equal codes in random order; each takes the cell of its rank
                order = rng.permutation(len(inside))
                order = order[np.argsort(codes[inside[order], column], kind="stable")]
                codes[inside[order], column] = rounded_cells(shares, len(inside), rng)
        targets = [Target((Grid.whole(i, len(p)),), p) for i, p in enumerate(self.probs)]
        return Records(refined(codes, targets, rng, passes=_PASSES))

    def settings(self) -> dict[str, Any]:
        """Nothing: all it knows are arrays."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The candidates, their weights, and all columns' probabilities laid end to end."""
        return {
            "codes": self.codes,
            "weights": self.weights,
            "probs": np.concatenate(self.probs),
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: The arrays are not those of an `Evolved` of this schema.
        """
        if set(tensors) != {"codes", "weights", "probs"}:
            raise ConfigError("a saved pool holds exactly codes, weights and probs")
        codes, weights = tensors["codes"], np.asarray(tensors["weights"], dtype=np.float64)
        if not (
            codes.ndim == 2
            and codes.dtype == np.int32
            and codes.shape == (len(weights), len(schema.columns))
            and len(codes)
            and weights.ndim == 1
            and ((codes >= 0) & (codes < np.array(schema.shape))).all()
            and (weights >= 0).all()
            and abs(float(weights.sum()) - 1) < 1e-6
        ):
            raise ConfigError("a saved pool whose arrays do not fit the schema")
        return cls(schema, codes, weights, split_probs(schema, tensors["probs"]))
