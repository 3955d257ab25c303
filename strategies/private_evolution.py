# SPDX-License-Identifier: Apache-2.0
"""Private Evolution: users vote for the candidates nearest to their records; the fittest vary."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.embedding import Embedder
from ..core.errors import ConfigError, DataError
from ..core.generation import PLACES, Generation, Subject
from ..core.query import Contribution, NoisySum, Query, Steps, Strategy
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from ..models.live import make
from ..models.registry import build_embedder, build_model, canonical
from ..models.table import TableMutator
from ..models.variation import Modality
from .parts.histograms import Grid, Histograms, cells_of, norm_clip
from .parts.rounding import rounded_cells
from .parts.settings import check_range
from .parts.simplex import pooled_total, to_simplex
from .parts.votes import ballot, finder_of, label_of, labels_of, warn_of_drowned

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Vote = Literal["l2_clip", "l2_normalize", "l1", "one_record"]
_USUAL_MODEL = {"table": "table", "image": "strokes", "text": "writer"}
_SAMPLED_AT_ONCE = 4096  # images drawn at a time


@dataclass(frozen=True)
class PrivateEvolution(Strategy):
    """A pool of candidates evolves towards what users' records vote for.

    A round shows the pool to all clients. Each record votes for the candidates nearest to it
    among those of its own label; a user's votes are one vector over all labels and candidates.
    The noisy sum says which candidates live on and which are varied, by a public model that sees
    candidates only: tables are mutated, images drawn by a simulated pen or warped, texts written
    by a language model. The last round's votes are the weights that candidates are sampled with.

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
        Texts are sampled as they are.
      grounding: Share of the budget that first measures the histogram of every column, from
        which candidates are then drawn and mutated; 0: all cells alike. Spent only if there is a
        table column besides the label.
      category_weight: Distance of two categories, where the full range of a number is 1.
      model: The public model that makes images or texts. `strokes`: random curves; give them 12
        rounds or more. `digits`: handwritten digits; the label's categories must be digits.
        `blobs`: smooth colors; knows nothing of lines. `writer`: a language model. Empty:
        `strokes` for images, `writer` for texts. Another that is installed, or `module:Name`.
      model_settings: Its settings.
      embedder: What tells which candidates are near a record, the same at all clients. Empty:
        `minilm` for texts; for images their pixels, blurred and averaged.
      embedder_settings: Its settings.
      lookahead: A candidate of images or texts stands where the mean of so many of its
        variations does; 0: where it stands itself. Multiplies the model's work.

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
    model: str = ""
    model_settings: dict[str, Any] = field(default_factory=dict)
    embedder: str = ""
    embedder_settings: dict[str, Any] = field(default_factory=dict)
    lookahead: int = 0
    name: ClassVar[str] = "private_evolution"
    reads_text: ClassVar[bool] = True

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
        if not 0 <= self.lookahead <= 64:
            raise ConfigError(f"lookahead must be 0 to 64, not {self.lookahead!r}")
        known = {"vote": Vote, "selection": Literal["sample", "rank"]}
        for key, choices in known.items():
            if getattr(self, key) not in choices.__args__:  # type: ignore[attr-defined]
                raise ConfigError(f"{key} must be one of {', '.join(choices.__args__)}")  # type: ignore[attr-defined]

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum a round, and one before them if there is something to ground."""
        from ..core.accounting import compose, single_event

        self._check(schema)
        return compose(single_event(noise) for noise in self._noises(schema, noise_multiplier))

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Draw a pool; ask for votes, select and vary; weigh the last pool by its votes."""
        self._check(schema)
        label = label_of(schema, self.label)
        noises = self._noises(schema, noise_multiplier)
        shares = None
        if len(noises) > self.num_rounds:
            marginals = _marginals(schema)
            asked = marginals.query("marginals", noise_multiplier=noises[0], max_norm=self.max_norm)
            shares = _shares(marginals, (yield asked))
        breeder = _Breeder.of(self, Subject(schema, label), shares)
        blank = _blank(schema, label, self.num_candidates)
        pool = yield from breeder.asked("random", blank, 0.0, self._degree(0), rng)
        weights = np.full(len(pool), 1 / len(pool))
        lineage: list[NDArray[np.int64]] = []
        num_drowned = 0
        for number in range(self.num_rounds):
            noisy: NoisySum = yield self._ballot(schema, label, pool, noises[-1])
            fitness = self._fitness(noisy)
            num_drowned += fitness is None and not noisy.is_void
            weights = weights if fitness is None else fitness
            if number == self.num_rounds - 1:
                break
            if fitness is None:  # nothing was learned: the same pool is asked about again
                lineage.append(np.arange(len(pool)))
                continue
            kept, varied = self._parents(weights, labels_of(pool.codes, label), rng)
            degree, next_degree = self._degree(number), self._degree(number + 1)
            offspring = yield from breeder.asked(
                "vary", pool.take(varied), degree, next_degree, rng
            )
            pool = Candidates.joined([pool.take(kept), offspring])
            parents = np.concatenate([kept, varied])
            lineage.append(parents)
            weights = weights[parents] / np.bincount(parents, minlength=len(weights))[parents]
            weights /= weights.sum()
        warn_of_drowned(num_drowned, self.num_rounds, len(pool))
        return Pool(
            schema=schema,
            candidates=replace(pool, extras=_without_places(pool.extras)),
            weights=weights,
            lineage=np.array(lineage, dtype=np.int32).reshape(-1, len(pool)),
            label=label,
            model=breeder.model,
            model_settings=json.loads(breeder.settings),
            sample_degree=self.sample_degree if breeder.is_exact else 0.0,
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
        records = shard.records
        if len(chosen) < len(records):
            records = records.take(chosen)
        votes, _ = finder.nearest(
            records.codes,
            None if PLACES in query.inputs else records.images,
            labels_of(records.codes, label),
            self.num_votes,
            places=records.places if PLACES in query.inputs else None,
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
        if _modality(schema) == "table" and len(schema.columns) == (label >= 0):
            raise ConfigError("the schema holds nothing but the label; set label = ''")
        name, settings = self._model(schema)
        build_model(name, settings).check(Subject(schema, label))
        embedder = self.embedder_for(schema)
        if embedder is not None and embedder.modality != _modality(schema):
            raise ConfigError(
                f"embedder {embedder.name!r} places {embedder.modality}s, and the schema holds none"
            )
        if self.lookahead and embedder is None:
            raise ConfigError("lookahead needs an embedder, whose embeddings have a mean")

    def embedder_for(self, schema: Schema) -> Embedder | None:
        """What places records and candidates; `None`: their columns and pixels do."""
        name = self.embedder or ("minilm" if schema.text is not None else "")
        if not name:
            if self.embedder_settings:
                raise ConfigError("embedder_settings without an embedder: name one")
            return None
        return build_embedder(name, self.embedder_settings)

    def _model(self, schema: Schema) -> tuple[str, dict[str, Any]]:
        """Name and settings of the model."""
        return self.model or _USUAL_MODEL[_modality(schema)], self.model_settings

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
        embedder = self.embedder_for(schema)
        return ballot(
            schema,
            label,
            pool,
            clip=clip,
            noise_multiplier=noise,
            cells=self._is_linear,
            fingerprint="" if embedder is None else embedder.fingerprint(),
        )

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
      label: Column whose category a candidate was made for, or -1.
      model: What made the images or texts.
      model_settings: Its settings.
      sample_degree: How far an image is varied when it is sampled.
    """

    schema: Schema
    candidates: Candidates
    weights: NDArray[np.float64]
    lineage: NDArray[np.int32]
    label: int
    model: str
    model_settings: dict[str, Any]
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
        if self.candidates.images is None or not self.sample_degree:
            chosen = self.candidates.take(drawn)
            return Records(chosen.codes, chosen.images, texts=chosen.texts)
        model = build_model(self.model, self.model_settings)
        subject = Subject(self.schema, self.label)
        images = np.empty((num_records, *self.candidates.images.shape[1:]), dtype=np.uint8)
        for start in range(0, num_records, _SAMPLED_AT_ONCE):
            part = self.candidates.take(drawn[start : start + _SAMPLED_AT_ONCE])
            varied = model.vary(part, self.sample_degree, subject, rng).images
            if varied is not None:
                images[start : start + _SAMPLED_AT_ONCE] = varied
        return Records(self.candidates.codes[drawn], images)

    def settings(self) -> dict[str, Any]:
        """What made the candidates, and how far they vary."""
        return {
            "label": self.label,
            "model": self.model,
            "model_settings": self.model_settings,
            "sample_degree": self.sample_degree,
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The candidates, their weights and their lineage."""
        return {
            **self.candidates.tensors(),
            "weights": self.weights,
            "lineage": self.lineage,
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The pool that was saved.

        Raises:
          ConfigError: The arrays are not those of a pool of this schema.
        """
        model, degree, label = (settings.get(k) for k in ("model", "sample_degree", "label"))
        given = settings.get("model_settings")
        try:
            candidates = Candidates.restore(schema, tensors)
            weights, lineage = tensors["weights"], tensors["lineage"]
        except (DataError, KeyError) as error:
            raise ConfigError(f"a saved pool that does not fit the schema: {error}") from error
        num = len(candidates)
        if not (
            num
            and weights.shape == (num,)
            and weights.dtype == np.float64
            and lineage.shape == (len(lineage), num)
            and lineage.dtype == np.int32
            and (weights >= 0).all()
            and abs(float(weights.sum()) - 1) < 1e-6
            and ((lineage >= 0) & (lineage < num)).all()
            and isinstance(degree, int | float)
            and 0 <= degree <= 1
            and isinstance(model, str)
            and ":" not in model  # never import a module because a file names it
            and isinstance(given, dict)
            and isinstance(label, int)
            and -1 <= label < len(schema.columns)
        ):
            raise ConfigError("a saved pool whose arrays or settings do not fit the schema")
        return cls(
            schema=schema,
            candidates=candidates,
            weights=weights,
            lineage=lineage,
            label=label,
            model=model,
            model_settings=given,
            sample_degree=float(degree),
        )


@dataclass(frozen=True)
class _Breeder:
    """What proposes and varies whole records: the table's columns here, the rest by a model.

    Attributes:
      subject: What candidates are of.
      table: For their columns; `None` where there are none besides the label.
      model: Name of the model of their images or texts; of a table: its own.
      settings: Its settings, as canonical JSON.
      is_exact: Its candidates come out the same again, and need not be recorded.
      embedder: Name of the embedder, or empty.
      embedder_settings: Its settings, as canonical JSON.
      lookahead: Variations whose mean embedding stands for a candidate.
    """

    subject: Subject
    table: TableMutator | None
    model: str
    settings: str
    is_exact: bool
    embedder: str
    embedder_settings: str
    lookahead: int

    @staticmethod
    def of(
        strategy: PrivateEvolution,
        subject: Subject,
        shares: Sequence[NDArray[np.float64]] | None,
    ) -> "_Breeder":
        """What a strategy's settings call for."""
        schema = subject.schema
        name, settings = strategy._model(schema)
        embedder = strategy.embedder_for(schema)
        others = len(schema.columns) > (subject.label >= 0)
        return _Breeder(
            subject,
            TableMutator(tuple(tuple(p.tolist()) for p in shares or ())) if others else None,
            name,
            canonical(settings),
            build_model(name, settings).capabilities().is_exact and embedder is None,
            "" if embedder is None else strategy.embedder or embedder.name,
            canonical(strategy.embedder_settings),
            strategy.lookahead,
        )

    def asked(
        self,
        task: Literal["random", "vary"],
        candidates: Candidates,
        degree: float,
        next_degree: float,
        rng: np.random.Generator,
    ) -> Generator[Generation, Any, Candidates]:
        """Candidates proposed or varied, in all their parts."""
        if self.table is not None and task == "random":
            candidates = self.table.random(candidates, self.subject, rng)
        elif self.table is not None:
            candidates = self.table.vary(candidates, degree, self.subject, rng)
        if _modality(self.subject.schema) == "table":
            return candidates
        request = Generation(
            model=self.model,
            settings=self.settings,
            task=task,
            candidates=replace(candidates, extras=_without_places(candidates.extras)),
            degree=degree,
            subject=self.subject,
            seed=int(rng.integers(1 << 62)),
            embedder=self.embedder,
            embedder_settings=self.embedder_settings,
            lookahead=self.lookahead,
            lookahead_degree=next_degree,
        )
        if self.is_exact:
            return make(request)
        made: Candidates = yield request
        return made


def _modality(schema: Schema) -> Modality:
    """What a public model is to make of the records."""
    if schema.image is not None:
        return "image"
    return "table" if schema.text is None else "text"


def _without_places(extras: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All extras but embeddings, which are sent to clients and made anew."""
    return {name: rows for name, rows in extras.items() if name != PLACES}


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


def _one_each(shard: BoundedShard, salt: int) -> NDArray[np.int64]:
    """One record of each user, chosen by the user's own records and a public number."""
    first, counts = shard.starts[:-1], np.diff(shard.starts)
    if (counts == 1).all():
        return first
    part = (shard.user_keys(salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(first + np.minimum((part * counts).astype(np.int64), counts - 1))
