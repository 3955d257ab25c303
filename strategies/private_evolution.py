# SPDX-License-Identifier: Apache-2.0
"""Private Evolution: users vote for the candidates nearest to their records; the fittest vary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds, Strategy
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .parts.histograms import Grid, Histograms, cells_of, norm_clip
from .parts.rounding import rounded_cells
from .parts.settings import check_range
from .parts.simplex import pooled_total, to_simplex
from .parts.sketch import NUM_POINTS, Sketches
from .parts.variation import (
    Candidates,
    ImageAugmenter,
    SketchArtist,
    TableMutator,
    VariationModel,
    Variations,
    columns_of,
)
from .parts.votes import ballot, finder_of, label_of, labels_of, warn_of_drowned

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Vote = Literal["l2_clip", "l2_normalize", "l1", "one_record"]
Prior = Literal["strokes", "digits", "blobs"]

_SAMPLED_AT_ONCE = 4096  # images drawn at a time


@dataclass(frozen=True)
class PrivateEvolution(Strategy):
    """A pool of candidates evolves towards what users' records vote for.

    A round shows the pool to all clients. Each record votes for the candidates nearest to it
    among those of its own label; a user's votes are one vector over all labels and candidates.
    The noisy sum says which candidates live on and which are varied, by a public model that sees
    candidates only: tables are mutated, images are drawn by a simulated pen or warped. The last
    round's votes are the weights that candidates are sampled with.

    Attributes:
      num_rounds: Rounds of votes, all with the same noise.
      num_candidates: Size of the pool, the same for each label. Noise is per candidate and votes
        are shared among them: take fewer for few users or a small epsilon.
      label: Category column that records and candidates must agree on. `None`: the schema's
        target, where that is a category. `""`: none.
      vote: What a user's vector is, and so what the pool's weights estimate.

        - `l2_clip`: the sum of the votes of the user's records, scaled down where it is longer
          than `max_norm` records with the same votes would be. Every record counts alike as long
          as no user is scaled down; then a heavy user counts for less.
        - `l2_normalize`: that sum scaled to length 1. A user counts by the square root of the
          number of candidates that the votes are spread over: neither users nor records count
          alike, however little noise there is. Most votes for the noise.
        - `l1`: that sum scaled to add up to 1. Every user counts alike.
        - `one_record`: the votes of one of the user's records, by a public pseudorandom choice,
          another one in each round. Every user counts alike, on average over choices.
      max_norm: Bound of `l2_clip`, in units of one record's norm.
      num_votes: How many nearest candidates a record votes for, each with one vote. More votes
        stand out more from the noise and blur more.
      selection: `sample`: candidates have offspring by their share of the votes of their label.
        `rank`: the best of each label have `num_variations` each.
      num_variations: Offspring of each parent under `rank`.
      keep_parents: A parent stays in the pool and makes one variation less.
      threshold: Votes below this many standard deviations of the noise are dropped and all
        others lowered by as much. `None`: the noisy votes are projected onto the simplex, which
        lowers them by what the noise calls for.
      degree_first: How far the first offspring vary, in (0, 1].
      degree_last: The same for the last; between them it changes by a constant factor.
      sample_degree: How far an image is varied once more whenever it is sampled; 0: not at all.
      grounding: Share of the budget that first measures the histogram of every column, from
        which candidates are then drawn and mutated; 0: all cells alike. Spent only if there is a
        table column besides the label.
      category_weight: Distance of two categories, where the full range of a number is 1.
      prior: What draws images: `strokes` (random curves; give them 12 rounds or more), `digits`
        (handwritten digits; the label's categories must be digits), `blobs` (smooth colors;
        knows nothing of lines).

    Privacy:
      A user's whole vector, over all labels, is clipped once. Clipping or normalizing each label
      by itself would let a user with records of m labels move the sum by sqrt(m) clips.

    Reference:
      Lin et al. (2024), "Differentially Private Synthetic Data via Foundation Model APIs 1:
      Images", algorithm 1, https://arxiv.org/abs/2305.15560; the simulated pen follows Lin et
      al. (2025), "Differentially Private Synthetic Data via APIs 3: Using Simulators Instead of
      Foundation Models", https://arxiv.org/abs/2502.05505.
    """

    num_rounds: int = 6
    num_candidates: int = 1000
    label: str | None = None
    vote: Vote = "l2_clip"
    max_norm: float = 1.0
    num_votes: int = 3
    selection: Literal["sample", "rank"] = "sample"
    num_variations: int = 3
    keep_parents: bool = True
    threshold: float | None = None
    degree_first: float = 0.5
    degree_last: float = 0.2
    sample_degree: float = 0.15
    grounding: float = 0.1
    category_weight: float = 0.3
    prior: Prior = "strokes"
    name: ClassVar[str] = "private_evolution"

    def __post_init__(self) -> None:
        """Refuse settings that no schema could make sense of."""
        check_range(
            1,
            1_000_000,
            num_rounds=self.num_rounds,
            num_votes=self.num_votes,
            num_variations=self.num_variations,
            num_candidates=self.num_candidates,
        )
        for key in ("degree_first", "degree_last"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"{key} must lie in (0, 1], not {getattr(self, key)!r}")
        if not 0 <= self.sample_degree <= 1:
            raise ConfigError(f"sample_degree must lie in [0, 1], not {self.sample_degree!r}")
        if not 0 <= self.grounding < 1:
            raise ConfigError(f"grounding must lie in [0, 1), not {self.grounding!r}")
        if not 0 < self.category_weight <= 10:
            raise ConfigError(f"category_weight must lie in (0, 10], not {self.category_weight!r}")
        if not 0 < self.max_norm < math.inf:
            raise ConfigError(f"max_norm must be a number above 0, not {self.max_norm!r}")
        if self.max_norm != 1 and self.vote != "l2_clip":
            raise ConfigError(f"max_norm belongs to vote = 'l2_clip', not to {self.vote!r}")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold must be a number of 0 or more, not {self.threshold!r}")
        known = {"vote": Vote, "prior": Prior, "selection": Literal["sample", "rank"]}
        for key, choices in known.items():
            if getattr(self, key) not in choices.__args__:  # type: ignore[attr-defined]
                raise ConfigError(f"{key} must be one of {', '.join(choices.__args__)}")  # type: ignore[attr-defined]

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum a round, and one before them if there is something to ground."""
        from ..core.accounting import compose, single_event

        self._check(schema)
        return compose(single_event(noise) for noise in self._noises(schema, noise_multiplier))

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Draw a pool; ask for votes, select and vary; weigh the last pool by its votes."""
        self._check(schema)
        label = label_of(schema, self.label)
        noises = self._noises(schema, noise_multiplier)
        shares = None
        if len(noises) > self.num_rounds:
            marginals = _marginals(schema)
            asked = marginals.query("marginals", noise_multiplier=noises[0], max_norm=self.max_norm)
            shares = _shares(marginals, (yield asked))
        model = _model(schema, label, self.prior, shares)
        pool = model.propose(_blank(schema, label, self.num_candidates), rng)
        weights = np.full(len(pool), 1 / len(pool))
        lineage: list[NDArray[np.int64]] = []
        num_drowned = 0
        for number in range(self.num_rounds):
            noisy = yield self._ballot(schema, label, pool, noises[-1])
            fitness = self._fitness(noisy)
            num_drowned += fitness is None and not noisy.is_void
            weights = weights if fitness is None else fitness
            if number == self.num_rounds - 1:
                break
            if fitness is None:  # nothing was learned: the same pool is asked about again
                lineage.append(np.arange(len(pool)))
                continue
            kept, varied = self._parents(weights, labels_of(pool.codes, label), rng)
            offspring = model.vary(pool.take(varied), self._degree(number), rng)
            pool = pool.take(kept).joined(offspring)
            parents = np.concatenate([kept, varied])
            lineage.append(parents)
            weights = weights[parents] / np.bincount(parents, minlength=len(weights))[parents]
            weights /= weights.sum()
        warn_of_drowned(num_drowned, self.num_rounds, len(pool))
        return Pool(
            schema=schema,
            candidates=pool,
            weights=weights,
            lineage=np.array(lineage, dtype=np.int32).reshape(-1, len(pool)),
            prior=self.prior,
            sample_degree=self.sample_degree,
        )

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each record's votes: cells where a user's vector is their sum, else a row a user.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        if query.name == "marginals":
            return cells_of(query, shard)
        finder, label = finder_of(query, shard.records, self.category_weight)
        chosen = np.arange(len(shard.records))
        if self.vote == "one_record":
            chosen = _one_each(shard, int(rng.integers(1 << 62)))
        codes, images = shard.records.codes[chosen], shard.records.images
        votes, _ = finder.nearest(
            codes,
            images if images is None or len(chosen) == len(images) else images[chosen],
            labels_of(codes, label),
            self.num_votes,
        )
        voting = votes[:, 0] >= 0
        votes, users = votes[voting], shard.user_index[chosen][voting]
        if self._is_linear:
            return Contribution.cells(votes, users, num_users=shard.num_users)
        rows = np.zeros((shard.num_users, query.dim), dtype=np.float32)
        np.add.at(rows, (users[:, None], votes), 1)
        lengths = np.linalg.norm(rows, ord=1 if self.vote == "l1" else 2, axis=1, keepdims=True)
        return Contribution.rows(rows / np.maximum(lengths, 1.0))  # a vote is 1 or more long

    @property
    def _is_linear(self) -> bool:
        """Whether a user's vector is a sum over records, so that cells can be counted."""
        return self.vote in ("l2_clip", "one_record")

    def _check(self, schema: Schema) -> None:
        """Refuse a schema that these settings do not fit."""
        label = label_of(schema, self.label)
        labels = 1 if label < 0 else schema.shape[label]
        if self.num_candidates < labels * self.num_votes:
            raise ConfigError(
                f"num_candidates = {self.num_candidates} is too few for {labels} labels with"
                f" num_votes = {self.num_votes}; use at least {labels * self.num_votes}, or"
                " label = '' to go without a label"
            )
        if schema.image is None and all(j == label for j in range(len(schema.columns))):
            raise ConfigError("the schema holds nothing but the label; set label = ''")
        if schema.image is not None and self.prior == "digits":
            _digits(schema, label)

    def _noises(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each query, in order."""
        from ..core.accounting import split

        others = [j for j in range(len(schema.columns)) if j != label_of(schema, self.label)]
        grounding = [self.grounding] if self.grounding and others else []
        share = (1 - sum(grounding)) / self.num_rounds
        return split(noise_multiplier, grounding + [share] * self.num_rounds)

    def _ballot(self, schema: Schema, label: int, pool: Candidates, noise: float) -> Query:
        """The query for votes on a pool."""
        clip = norm_clip(np.ones(self.num_votes), self.max_norm) if self._is_linear else 1.0
        return ballot(schema, label, pool, clip=clip, noise_multiplier=noise, cells=self._is_linear)

    def _fitness(self, noisy: NoisySum) -> NDArray[np.float64] | None:
        """Each candidate's share of the votes; `None` where the noise leaves nothing to see."""
        if noisy.is_void:
            return None
        if self.threshold is not None:
            above = np.maximum(noisy.vector - self.threshold * noisy.stddev, 0.0)
            total = float(above.sum())
            shares = above / total if total > 0 else None
        else:
            total = pooled_total([(noisy.vector, noisy.stddev)])
            shares = to_simplex(noisy.vector, total) / total if total > 0 else None
        return shares

    def _parents(
        self,
        fitness: NDArray[np.float64],
        groups: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Candidates that stay, and candidates to vary, one entry for each variation.

        A label keeps its number of candidates; one that got no votes keeps its candidates.
        """
        kept, varied = [], []
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            fit, room = fitness[members], len(members)
            if not fit.sum() > 0:
                kept.append(members)
                continue
            if self.selection == "rank":
                num_parents = max(1, room // (self.num_variations + self.keep_parents))
                best = np.argsort(-fit, kind="stable")[:num_parents]
                parents = np.resize(members[best[fit[best] > 0]], room)
            else:
                parents = members[rounded_cells(fit, room, rng)]
            _, first = np.unique(parents, return_index=True)
            stays = np.zeros(room, dtype=np.bool_)
            stays[first] = self.keep_parents
            kept.append(parents[stays])
            varied.append(parents[~stays])
        nobody = np.zeros(0, dtype=np.int64)
        return np.concatenate([nobody, *kept]), np.concatenate([nobody, *varied])

    def _degree(self, number: int) -> float:
        """How far the offspring of a round vary."""
        passed = number / max(1, self.num_rounds - 2)
        return float(self.degree_first * (self.degree_last / self.degree_first) ** passed)


@dataclass(frozen=True, eq=False)
class Pool(Synthesizer):
    """Weighted candidates.

    Attributes:
      schema: Schema of the records.
      candidates: The last round's pool.
      weights: Probability of each candidate, `(num_candidates,)`.
      lineage: Whom each candidate came from: `lineage[t, i]` is the position, in the pool of
        round t, of the parent of candidate i of round t + 1, `(num_rounds - 1, num_candidates)`.
      prior: What drew the images.
      sample_degree: How far an image is varied when it is sampled.
    """

    schema: Schema
    candidates: Candidates
    weights: NDArray[np.float64]
    lineage: NDArray[np.int32]
    prior: Prior
    sample_degree: float
    kind: ClassVar[str] = "pool"

    @property
    def origins(self) -> NDArray[np.int64]:
        """Position in the first pool of each candidate's ancestor, `(num_candidates,)`."""
        origin = np.arange(len(self.candidates))
        for parents in self.lineage[::-1]:
            origin = parents[origin]
        return origin.astype(np.int64)

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Candidates, each as often as its weight says, give or take one; images vary."""
        drawn = rng.permutation(rounded_cells(self.weights, num_records, rng))
        codes = self.candidates.codes[drawn]
        if self.schema.image is None:
            return Records(codes)
        model = _image_model(self.schema, self.prior)
        images = np.empty((num_records, *self.schema.image.shape), dtype=np.uint8)
        for start in range(0, num_records, _SAMPLED_AT_ONCE):
            part = self.candidates.take(drawn[start : start + _SAMPLED_AT_ONCE])
            if self.sample_degree:
                part = model.vary(part, self.sample_degree, rng)
            if part.images is not None:
                images[start : start + _SAMPLED_AT_ONCE] = part.images
        return Records(codes, images)

    def settings(self) -> dict[str, Any]:
        """What draws images, and how far they vary."""
        return {"prior": self.prior, "sample_degree": self.sample_degree}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The candidates, their weights and their lineage."""
        arrays: dict[str, NDArray[Any]] = {
            "codes": self.candidates.codes,
            "weights": self.weights,
            "lineage": self.lineage,
        }
        if self.candidates.images is not None:
            arrays["images"] = self.candidates.images
        if self.candidates.sketches is not None:
            drawn = self.candidates.sketches
            arrays |= {"points": drawn.points, "pen": drawn.pen, "ink": drawn.ink}
        return arrays

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The pool that was saved.

        Raises:
          ConfigError: The arrays are not those of a pool of this schema.
        """
        shape, num = None if schema.image is None else schema.image.shape, len(tensors["codes"])
        expected: dict[str, tuple[tuple[int, ...], type]] = {
            "codes": ((num, len(schema.columns)), np.int32),
            "weights": ((num,), np.float64),
            "lineage": ((len(tensors["lineage"]), num), np.int32),
        }
        if shape is not None:
            expected["images"] = ((num, *shape), np.uint8)
            if settings.get("prior") != "blobs":
                expected["points"] = ((num, NUM_POINTS, 2), np.float32)
                expected["pen"] = ((num, NUM_POINTS - 1), np.uint8)
                expected["ink"] = ((num, 2), np.float32)
        fits = set(tensors) == set(expected) and all(
            tensors[name].shape == shape and tensors[name].dtype == dtype
            for name, (shape, dtype) in expected.items()
        )
        codes, weights, lineage = (tensors[name] for name in ("codes", "weights", "lineage"))
        degree = settings.get("sample_degree")
        if not (
            fits
            and num
            and ((codes >= 0) & (codes < np.array(schema.shape))).all()
            and (weights >= 0).all()
            and abs(float(weights.sum()) - 1) < 1e-6
            and ((lineage >= 0) & (lineage < num)).all()
            and settings.get("prior") in ("strokes", "digits", "blobs")
            and isinstance(degree, int | float)
            and 0 <= degree <= 1
        ):
            raise ConfigError("a saved pool whose arrays or settings do not fit the schema")
        sketches = None
        if "points" in tensors:
            sketches = Sketches(tensors["points"], tensors["pen"], tensors["ink"])
        return cls(
            schema=schema,
            candidates=Candidates(codes, tensors.get("images"), sketches),
            weights=weights,
            lineage=lineage,
            prior=settings["prior"],
            sample_degree=float(degree),
        )


def _blank(schema: Schema, label: int, num: int) -> Candidates:
    """Candidates with a label, alike many of each, and nothing else."""
    codes = np.zeros((num, len(schema.columns)), dtype=np.int32)
    if label >= 0:
        codes[:, label] = np.sort(np.arange(num) % schema.shape[label])
    return Candidates(codes)


def _marginals(schema: Schema) -> Histograms:
    """The histogram of every column."""
    grids = [Grid.whole(j, num_cells) for j, num_cells in enumerate(schema.shape)]
    return Histograms.balanced([(grid,) for grid in grids])


def _shares(marginals: Histograms, noisy: NoisySum) -> list[NDArray[np.float64]] | None:
    """Probability of each cell of each column; `None` if nothing was learned."""
    measured = marginals.measured(noisy)
    total = pooled_total((m.counts, m.stddev) for m in measured)
    if not total > 0:
        return None
    probs = [to_simplex(m.counts, total) for m in measured]
    return [p / p.sum() for p in probs]


def _model(
    schema: Schema, label: int, prior: Prior, shares: Sequence[NDArray[np.float64]] | None
) -> VariationModel:
    """The models that propose and vary whole records."""
    num_cells, num_bins = columns_of(schema)
    models: list[VariationModel] = [TableMutator(num_cells, num_bins, label, shares)]
    if schema.image is not None:
        models.append(_image_model(schema, prior, label))
    return Variations(tuple(models))


def _image_model(schema: Schema, prior: Prior, label: int | None = None) -> VariationModel:
    """The model that varies images and, where `label` is given, draws them."""
    if schema.image is None:
        raise ConfigError("the schema has no image column")
    if prior == "blobs":
        return ImageAugmenter(schema.image.shape)
    if prior == "strokes" or label is None:
        return SketchArtist(schema.image.shape)
    return SketchArtist(schema.image.shape, _digits(schema, label), label)


def _digits(schema: Schema, label: int) -> NDArray[np.int64]:
    """The digit that each label stands for."""
    column = None if label < 0 else schema.columns[label]
    listed = () if column is None else column.categories
    if (
        not listed
        or not set(listed) <= set("0123456789")
        or (column is not None and column.missing)
    ):
        raise ConfigError(
            "prior = 'digits' needs a label whose categories are digits, without a cell for"
            f" missing values; they are {', '.join(listed[:10]) or 'none'}. Use prior = 'strokes'"
        )
    return np.array([int(text) for text in listed], dtype=np.int64)


def _one_each(shard: BoundedShard, salt: int) -> NDArray[np.int64]:
    """One record of each user, chosen by the user's own records and a public number."""
    first, counts = shard.starts[:-1], np.diff(shard.starts)
    if (counts == 1).all():
        return first
    part = (shard.user_keys(salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(first + np.minimum((part * counts).astype(np.int64), counts - 1))
