# SPDX-License-Identifier: Apache-2.0
"""Private Evolution: users vote for the candidates nearest to their records; the fittest vary."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.electorate import Electorate
from ..core.embedding import Embedder
from ..core.errors import ConfigError
from ..core.generation import PLACES, Subject
from ..core.query import Contribution, NoisySum, Query, Steps, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from ..models.registry import build_embedder, build_model
from ..models.workload import Workload
from .parts.breeder import Breeder, modality_of, without_places
from .parts.distances import (
    Curve,
    Reading,
    is_settled,
    judged,
    judges,
    reading_of,
    ruler_of,
    with_ruler,
    without_ruler,
)
from .parts.histograms import Grid, Histograms, cells_of, norm_clip
from .parts.parents import Choosing, Selection
from .parts.pool import Pool
from .parts.settings import check_range
from .parts.signal import Prospect, Signal
from .parts.simplex import pooled_total, to_simplex
from .parts.tally import Estimate, Tally, clusters_of
from .parts.votes import (
    ballot,
    features_of,
    finder_of,
    label_of,
    labels_of,
    tally_of,
    warn_of_drowned,
)

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Vote = Literal["l2_clip", "l2_normalize", "l1", "one_record"]
_DESCRIBES: dict[Vote, str] = {
    "l2_clip": "It counts every record equally, but for what the clip takes: a user whose votes"
    " together are longer than {max_norm:g} times one record's counts with all of them, scaled"
    " down. Users with many records are therefore underrepresented.",
    "l2_normalize": "It counts a user by the square root of the number of candidates that the"
    " user's votes are spread over: neither users nor records count equally.",
    "l1": "It counts every user equally: a user's records share one vote. It describes a record"
    " drawn at random from a user drawn at random.",
    "one_record": "It counts every user equally: one record of each votes, another in each round."
    " It describes a record drawn at random from a user drawn at random.",
}
_MOST_HELD_OUT = 0.5
_USUAL_MODEL = {"table": "table", "image": "strokes", "text": "writer"}


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
      num_candidates: Size of the pool. Noise is per candidate and votes are shared among them:
        take fewer for few users or a small epsilon.
      label: Category column that records and candidates must agree on. `None`: the schema's
        target, where that is a category. `""`: none.
      label_shares: Share of the pool that each of the label's categories has, and of the records,
        as is publicly known. Empty: the pool is dealt out evenly, and the votes say how the
        records are.
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
      remember: Votes for a candidate are held against those for its parent in the last round,
        weighted by the noise in each: less noise, and slower to change.
      num_clusters: A vote counts for about so many clusters of candidates too, whose larger counts
        stand out from the noise where single candidates do not; 0: none. For large pools.
      cluster_share: Of a vote's squared norm, what its cluster has.
      max_lineage: The most of a label's candidates that may descend from one candidate of the
        first pool, as a share, against a loss of diversity; 1: no limit.
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
        `glyphs`: handwritten characters, gray, 28 by 28. `blobs`: smooth colors; knows nothing of
        lines. `library`: images of a public file. `diffuser`: a diffusion model in a local
        folder. `writer`: texts by a language model. `corpus`: texts of a public file. Empty:
        `strokes` for images, `writer` for texts. Or another that is installed.
      model_settings: Its settings.
      embedder: What tells which candidates are near a record, the same at all clients. Empty:
        `minilm` for texts; for images their pixels, blurred and averaged.
      embedder_settings: Its settings.
      lookahead: A candidate of images or texts stands where the mean of so many of its
        variations does; 0: where it stands itself. Multiplies the model's work.
      held_out: Share of the users, the same in all rounds, who do not vote but say how far their
        records are from the nearest candidate. The curve of distances, with its noise, stands on
        the card; it costs their votes, and nothing besides. Where a record is the unit, equal
        records have one role: leave it at 0 for tables of few different ones. 0: everybody votes.
      patience: Stop, and spend no more, once that distance fell for so many rounds by no more
        than its noise explains; 0: never. Needs `held_out`.

    Privacy:
      A user's whole vector, over all labels, is clipped once. Clipping or normalizing each label
      by itself would let a user with records of m labels move the sum by sqrt(m) clips. A user who
      is held out has cells of the same vector and no votes in it, so one clip bounds both roles.

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
    label_shares: tuple[float, ...] = ()
    selection: Selection = "sample"
    num_variations: int = 3
    keep_parents: bool = True
    threshold: float | None = None
    remember: bool = False
    num_clusters: int = 0
    cluster_share: float = 0.5
    max_lineage: float = 1.0
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
    held_out: float = 0.0
    patience: int = 0
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
        if not 0 <= self.held_out <= _MOST_HELD_OUT:
            raise ConfigError(
                f"held_out must lie in [0, {_MOST_HELD_OUT}], not {self.held_out!r}: others vote"
            )
        if not 0 <= self.patience <= self.num_rounds:
            raise ConfigError(f"patience must be 0 to num_rounds, not {self.patience!r}")
        if self.patience and not self.held_out:
            raise ConfigError(
                "patience needs users who judge: set held_out, to 0.2 for one in five"
            )
        if not 0 <= self.num_clusters <= self.num_candidates:
            raise ConfigError(
                f"num_clusters must be 0 to num_candidates, not {self.num_clusters!r}"
            )
        if self.num_clusters and self.threshold is not None:
            raise ConfigError("clusters are read by projection: leave threshold out")
        for key in ("cluster_share", "max_lineage"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"{key} must lie in (0, 1], not {getattr(self, key)!r}")
        if self.cluster_share == 1:
            raise ConfigError("cluster_share = 1 leaves nothing for the candidates")
        if self.label_shares and not (
            min(self.label_shares) > 0 and abs(sum(self.label_shares) - 1) < 1e-6
        ):
            raise ConfigError("label_shares must be above 0 and add up to 1")
        known = {"vote": Vote, "selection": Selection}
        for key, choices in known.items():
            if getattr(self, key) not in choices.__args__:  # type: ignore[attr-defined]
                raise ConfigError(f"{key} must be one of {', '.join(choices.__args__)}")  # type: ignore[attr-defined]

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum a round, and one before them if there is something to ground."""
        from ..core.accounting import compose, single_event

        self._check(schema)
        self._check_model(schema)
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
        breeder = self.breeder_of(schema, label, shares)
        blank = self.blank(schema, label)
        pool = yield from breeder.asked("random", blank, 0.0, self.degree(0), rng)
        weights = np.full(len(pool), 1 / len(pool))
        lineage: list[NDArray[np.int64]] = []
        origins = families = np.arange(len(pool))
        earlier: Estimate | None = None
        num_drowned = 0
        ruler: NDArray[np.float64] | None = None
        readings: list[Reading | None] = []
        for number in range(self.num_rounds):
            groups = labels_of(pool.codes, label)
            tally = self._tally(schema, label, pool, groups)
            asked = self.ballot_on(schema, label, pool, tally, noises[-1])
            if self.held_out:
                ruler = ruler_of(asked, self.category_weight) if ruler is None else ruler
                asked = with_ruler(asked, ruler)
            answer: NoisySum = yield asked
            noisy, counts = (
                replace(answer, vector=part) for part in np.split(answer.vector, [tally.dim])
            )
            if self.held_out:
                readings.append(reading_of(counts, asked.clip))
            found = None if noisy.is_void else tally.read(noisy, earlier, families)
            fitness = None if found is None else self._fitness(noisy, tally, found)
            num_drowned += fitness is None and not noisy.is_void
            weights = weights if fitness is None else fitness
            if number == self.num_rounds - 1 or is_settled(readings, self.patience):
                break
            if fitness is None or found is None:  # nothing was learned: ask about the same pool
                lineage.append(np.arange(len(pool)))
                continue
            kept, varied = self._choosing.parents(weights, groups, origins, rng)
            degree, next_degree = self.degree(number), self.degree(number + 1)
            offspring = yield from breeder.asked(
                "vary", pool.take(varied), degree, next_degree, rng
            )
            pool = Candidates.joined([pool.take(kept), offspring])
            parents = np.concatenate([kept, varied])
            lineage.append(parents)
            origins, families = origins[parents], parents
            earlier = found.of_offspring(parents, fitness) if self.remember else None
            weights = weights[parents] / np.bincount(parents, minlength=len(weights))[parents]
            weights /= weights.sum()
        warn_of_drowned(num_drowned, number + 1, len(pool))
        return Pool(
            schema=schema,
            candidates=replace(pool, extras=without_places(pool.extras)),
            weights=self._as_declared(weights, labels_of(pool.codes, label)),
            lineage=np.array(lineage, dtype=np.int32).reshape(-1, len(pool)),
            label=label,
            model=breeder.model,
            model_settings=json.loads(breeder.settings),
            sample_degree=self.sample_degree if breeder.is_exact else 0.0,
            curve=Curve.of(readings, held_out=self.held_out, num_rounds=self.num_rounds)
            if readings
            else None,
        )

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each record's votes: cells where a user's vector is their sum, else a row a user.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        if query.name == "marginals":
            return cells_of(query, shard)
        asked, ruler = without_ruler(query)
        finder, label = finder_of(asked, shard.records, self.category_weight)
        is_judge = np.zeros(shard.num_users, dtype=np.bool_)
        if ruler is not None:
            is_judge = judges(shard, self.held_out)
        used = np.ones(len(shard.records), dtype=np.bool_)
        if self.vote == "one_record":
            used = is_judge[shard.user_index]
            used[_one_each(shard, int(rng.integers(1 << 62)))] = True
        records, users = shard.records, shard.user_index[used]
        if not used.all():
            records = records.take(used)
        votes, squared = finder.nearest(
            records.codes,
            None if PLACES in asked.inputs else records.images,
            labels_of(records.codes, label),
            self.num_votes,
            places=records.places if PLACES in asked.inputs else None,
        )
        near = votes[:, 0] >= 0
        votes, users, squared = votes[near], users[near], squared[near]
        tally = tally_of(asked, self.cluster_share)
        cells, heights = tally.cells(votes), tally.heights(self.num_votes)
        scales = None
        if ruler is not None:
            bins = asked.dim + np.searchsorted(ruler, squared, side="right")
            cells, heights, scales = judged(cells, heights, bins, users, is_judge, query.clip)
        if self._is_linear:
            return Contribution.cells(
                cells, users, num_users=shard.num_users, weights=heights, scales=scales
            )
        lit = heights if scales is None else heights * scales
        rows = np.zeros((shard.num_users, query.dim), dtype=np.float32)
        np.add.at(rows, (users[:, None], cells), lit.astype(np.float32))
        if self.vote == "l1":
            lengths = np.bincount(users, minlength=shard.num_users) * float(self.num_votes)
        else:
            lengths = np.linalg.norm(rows, axis=1)
        rows /= np.where((lengths > 0) & ~is_judge, lengths, 1.0)[:, None].astype(np.float32)
        return Contribution.rows(rows)

    @property
    def _is_linear(self) -> bool:
        """Whether a user's vector is a sum over records, so that cells can be counted."""
        return self.vote in ("l2_clip", "one_record")

    def _check(self, schema: Schema) -> None:
        """Refuse a schema that these settings do not fit."""
        label = label_of(schema, self.label)
        labels = 1 if label < 0 else schema.shape[label]
        if self.num_candidates < self._fewest(schema):
            raise ConfigError(
                f"num_candidates = {self.num_candidates} is too few for {labels} labels with"
                f" num_votes = {self.num_votes}; use at least {self._fewest(schema)}, or"
                " label = '' to go without a label"
            )
        if modality_of(schema) == "table" and len(schema.columns) == (label >= 0):
            raise ConfigError("the schema holds nothing but the label; set label = ''")
        embedder = self.embedder_for(schema)
        if embedder is not None and embedder.modality != modality_of(schema):
            raise ConfigError(
                f"embedder {embedder.name!r} places {embedder.modality}s, and the schema holds none"
            )
        if self.label_shares and len(self.label_shares) != labels:
            raise ConfigError(
                f"label_shares has {len(self.label_shares)} shares for {labels} categories"
            )
        if self.lookahead and embedder is None:
            raise ConfigError("lookahead needs an embedder, whose embeddings have a mean")

    def _check_model(self, schema: Schema) -> None:
        """Refuse a model that cannot work: before a run, for a replay needs none of its files."""
        name, settings = self._model(schema)
        build_model(name, settings).check(Subject(schema, label_of(schema, self.label)))

    @property
    def describes(self) -> tuple[str, ...]:
        """What the pool's weights estimate, by the rule of votes."""
        return (_DESCRIBES[self.vote].format(max_norm=self.max_norm),)

    @property
    def stops_early(self) -> bool:
        """Whether a run may end before its plan."""
        return self.patience > 0

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
        return self.model or _USUAL_MODEL[modality_of(schema)], self.model_settings

    def _noises(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each query, in order."""
        from ..core.accounting import split

        others = [j for j in range(len(schema.columns)) if j != label_of(schema, self.label)]
        grounding = [self.grounding] if self.grounding and others else []
        share = (1 - sum(grounding)) / self.num_rounds
        return split(noise_multiplier, grounding + [share] * self.num_rounds)

    def breeder_of(
        self, schema: Schema, label: int, shares: Sequence[NDArray[np.float64]] | None
    ) -> Breeder:
        """What proposes and varies candidates."""
        model, settings = self._model(schema)
        embedder = self.embedder_for(schema)
        return Breeder.of(
            Subject(schema, label),
            shares,
            model=model,
            settings=settings,
            embedder="" if embedder is None else self.embedder or embedder.name,
            embedder_settings=self.embedder_settings,
            lookahead=self.lookahead,
        )

    def signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Signal:
        """What users' votes will be beside their noise.

        Args:
          schema: Public schema.
          noise_multiplier: As in `event`.
          users: Who votes, as far as is declared.
        """
        noise = self._noises(schema, noise_multiplier)[-1]
        num_labels = 1 if (label := label_of(schema, self.label)) < 0 else schema.shape[label]
        num_clusters = max(self.num_clusters, num_labels) if self.num_clusters else 0
        share = self.cluster_share if num_clusters else 0.0
        fine, coarse = math.sqrt(1 - share), math.sqrt(share)
        longest = math.hypot(fine * math.sqrt(self.num_votes), coarse * self.num_votes)
        held = np.array(users.records, dtype=np.float64)
        spread = np.sqrt(users.spread(self.num_candidates / self.num_votes))
        # how many records' votes of a user are heard, where one record's votes are `longest` long
        clip, heard = {
            "l2_clip": (self.max_norm * longest, np.minimum(held, self.max_norm * spread)),
            "one_record": (longest, np.ones_like(held)),
            "l1": (1.0, np.full_like(held, 1 / self.num_votes)),
            "l2_normalize": (1.0, spread / longest),
        }[self.vote]
        stddev = noise * clip / float(heard.mean())
        return Signal(
            num_users=users.num_users * (1 - self.held_out),
            num_candidates=self.num_candidates,
            num_votes=self.num_votes,
            stddev=stddev / fine,
            num_clusters=num_clusters,
            cluster_stddev=stddev / coarse if num_clusters else math.inf,
        )

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse a run whose votes would all drown.

        Raises:
          ConfigError: They would; says what to set instead.
        """
        found = self.signal(schema, noise_multiplier, users)
        found.check(self.num_rounds, self._fewest(schema))

    def prospect(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Prospect:
        """What to expect of the votes, and which other settings would hear more."""
        # by no other rule do users, whatever they hold, add more to a sum beside its noise
        loudest = replace(self, vote="l2_clip", max_norm=1.0)
        found, louder = (s.signal(schema, noise_multiplier, users) for s in (self, loudest))
        return found.prospect(
            *("votes", self.num_rounds, self._fewest(schema)),
            louder=louder,
            rule="vote = 'l2_clip' with max_norm = 1",
        )

    def workload(self, schema: Schema) -> Workload:
        """What the run asks of its model: a pool a round at most, with all that it looks ahead."""
        name, settings = self._model(schema)
        subject = Subject(schema, label_of(schema, self.label))
        num = self.num_candidates * self.num_rounds * (1 + self.lookahead)
        return Workload(build_model(name, settings), subject, num)

    def _fewest(self, schema: Schema) -> int:
        """Candidates that every label needs, so that a record can cast its votes."""
        label = label_of(schema, self.label)
        return self.num_votes * (1 if label < 0 else schema.shape[label])

    @property
    def _choosing(self) -> Choosing:
        """How parents are chosen."""
        return Choosing(self.selection, self.num_variations, self.keep_parents, self.max_lineage)

    def _tally(
        self, schema: Schema, label: int, pool: Candidates, groups: NDArray[np.int64]
    ) -> Tally:
        """What the votes on a pool are counted in."""
        if not self.num_clusters:
            return Tally(len(pool))
        features = features_of(schema, label, pool, self.category_weight)
        clusters = clusters_of(features, groups, self.num_clusters)
        return Tally(len(pool), clusters, self.cluster_share)

    def ballot_on(
        self, schema: Schema, label: int, pool: Candidates, tally: Tally, noise: float
    ) -> Query:
        """The query for votes on a pool."""
        clip = 1.0
        if self._is_linear:
            clip = norm_clip(np.ones(1), self.max_norm) * tally.longest(self.num_votes)
        elif self.vote == "l1":
            clip = tally.longest(1)
        return ballot(
            schema,
            label,
            pool,
            clip=clip,
            noise_multiplier=noise,
            cells=self._is_linear,
            clusters=tally.clusters,
        )

    def read(self, noisy: NoisySum) -> NDArray[np.float64] | None:
        """Each candidate's share of one round's votes; `None` where they cannot be told from noise.

        Args:
          noisy: Votes on candidates without clusters.
        """
        tally = Tally(len(noisy.vector))
        found = tally.read(noisy, None, np.arange(len(noisy.vector)))
        return self._fitness(noisy, tally, found)

    def _fitness(
        self, noisy: NoisySum, tally: Tally, found: Estimate
    ) -> NDArray[np.float64] | None:
        """Each candidate's share of the votes; `None` where the noise leaves nothing to see."""
        if self.threshold is None:
            return tally.shares(noisy, found)
        above = np.maximum(found.votes - self.threshold * np.sqrt(found.variance), 0.0)
        total = float(above.sum())
        return above / total if total > 0 else None

    def blank(self, schema: Schema, label: int) -> Candidates:
        """Candidates with a label, as many of each as it has a share, and nothing else."""
        codes = np.zeros((self.num_candidates, len(schema.columns)), dtype=np.int32)
        if label >= 0:
            shares = np.array(self.label_shares or np.ones(schema.shape[label]))
            spare = self.num_candidates - self.num_votes * len(shares)  # a label needs some
            ends = np.rint(np.cumsum(shares / shares.sum()) * spare).astype(np.int64)
            sizes = np.diff(ends, prepend=0) + self.num_votes
            codes[:, label] = np.repeat(np.arange(len(shares)), sizes)
        return Candidates(codes)

    def _as_declared(
        self, weights: NDArray[np.float64], groups: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The weights, with each label's sum as `label_shares` declares it."""
        if not self.label_shares:
            return weights
        scaled = weights.copy()
        for group, share in enumerate(self.label_shares):
            members = groups == group
            total = float(weights[members].sum())
            fit = weights[members] / total if total > 0 else 1 / members.sum()
            scaled[members] = share * fit
        return np.asarray(scaled / scaled.sum())

    def degree(self, number: int) -> float:
        """How far the offspring of a round vary."""
        passed = number / max(1, self.num_rounds - 2)
        return float(self.degree_first * (self.degree_last / self.degree_first) ** passed)


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
