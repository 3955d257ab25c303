# SPDX-License-Identifier: Apache-2.0
"""PrE-Text: users vote for texts in a few rounds; a language model expands what survived them."""

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.electorate import Electorate
from ..core.embedding import Embedder
from ..core.errors import ConfigError
from ..core.generation import Shown
from ..core.query import Contribution, NoisySum, Query, Steps, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from ..models.workload import Workload
from .parts.breeder import Breeder, without_places
from .parts.expanded import Expanded
from .parts.parents import Choosing
from .parts.rounding import rounded_cells
from .parts.seeds import Seeds, Voted
from .parts.settings import check_range
from .parts.signal import Prospect
from .parts.tally import Tally
from .parts.votes import label_of, labels_of, warn_of_drowned
from .private_evolution import PrivateEvolution, Vote

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_TOGETHER = 32  # expansions that are shown the same seeds, which a local model reads once
_OWN = ("num_expanded", "num_shown", "seed_share")


@dataclass(frozen=True)
class PreText(Strategy):
    """Texts that users vote for, in few rounds, and many more that are written after them.

    1. A language model writes the first pool from a public brief.
    2. ``votes``, `num_rounds` times: each record votes for the candidates nearest to it among those
       of its label; a user's votes are one vector. The survivors of the noise are resampled by
       their votes and varied by the model. This is `private_evolution`; see there what the
       settings that both have mean.
    3. The different survivors of every round are the seeds, not those of the last alone: rounds
       are few and noisy, and what was voted for once stays good. A seed weighs what its shares of
       the votes add up to, each round weighted by the inverse variance of its shares.
    4. The model writes `num_expanded` new texts, each after a few seeds drawn by weight as
       examples. That is post-processing: it costs no privacy, however many there are.

    A text of the release is a seed or an expansion, and names the seeds it came from.

    The published method lets a user cast up to m votes, all of which may fall on one candidate, and
    so needs noise that grows as m; and its code adds 1.541 * sqrt(2) = 2.18 times the noise that it
    accounts for. Here a user's votes are clipped once, at the norm of one record's, and the noise
    is that of the budget, by the exact curve.

    Attributes:
      num_rounds: Rounds of votes, all with the same noise.
      num_candidates: Size of the pool.
      label: Category column that records and candidates must agree on. `None`: the schema's
        target, where that is a category. `""`: none.
      vote: What a user's vector is, and so what weights estimate.
      max_norm: Bound of `l2_clip`, in units of one record's norm.
      num_votes: How many nearest candidates a record votes for.
      threshold: Votes below this many standard deviations of the noise are dropped and all
        others lowered by as much. `None`: projection onto the simplex.
      keep_parents: A survivor stays in the pool and makes one variation less: the model has less
        to write.
      max_lineage: The most of a label's candidates that may descend from one candidate of the
        first pool, as a share; 1: no limit.
      degree_first: How far the first offspring vary, in (0, 1].
      degree_last: The same for the last; between them it changes by a constant factor.
      model: The public model that writes. `writer`: a language model, SmolLM2 by default.
      model_settings: Its settings.
      embedder: What tells which candidates are near a record; empty: `minilm`.
      embedder_settings: Its settings.
      lookahead: A candidate stands where the mean of so many of its variations does; 0: where it
        stands itself. Multiplies the model's work.
      num_expanded: Texts that are written after the seeds; 0: the seeds alone are released.
      num_shown: Seeds that each of them is written after.
      seed_share: Share of the released records that are seeds; the others are expansions.

    Privacy:
      A user's whole vector, over all labels, is clipped once.

    Reference:
      Hou et al. (2024), "PrE-Text: Training Language Models on Private Federated Data in the Age of
      LLMs", algorithms 1 and 2, https://arxiv.org/abs/2406.02958.
    """

    num_rounds: int = 4
    num_candidates: int = 200
    label: str | None = None
    vote: Vote = "l2_clip"
    max_norm: float = 1.0
    num_votes: int = 3
    threshold: float | None = None
    keep_parents: bool = True
    max_lineage: float = 1.0
    degree_first: float = 0.7
    degree_last: float = 0.4
    model: str = "writer"
    model_settings: dict[str, Any] = field(default_factory=dict)
    embedder: str = ""
    embedder_settings: dict[str, Any] = field(default_factory=dict)
    lookahead: int = 0
    num_expanded: int = 1000
    num_shown: int = 4
    seed_share: float = 0.2
    name: ClassVar[str] = "pre_text"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that no schema could make sense of."""
        check_range(0, 10_000_000, num_expanded=self.num_expanded)
        check_range(1, 64, num_shown=self.num_shown)
        if not 0 <= self.seed_share <= 1:
            raise ConfigError(f"seed_share must lie in [0, 1], not {self.seed_share!r}")
        self._votes  # noqa: B018  (refuses what it shares with private_evolution)

    @cached_property
    def _votes(self) -> PrivateEvolution:
        """What asks for votes, casts and reads them."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OWN}
        return PrivateEvolution(**shared, grounding=0.0)

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum a round."""
        self._check(schema)
        return self._votes.event(schema, noise_multiplier)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Draw a pool; ask for votes, keep survivors and vary them; expand all that survived."""
        from ..core.accounting import split

        self._check(schema)
        votes, label = self._votes, label_of(schema, self.label)
        (noise, *_) = split(noise_multiplier, [1 / self.num_rounds] * self.num_rounds)
        breeder = votes.breeder_of(schema, label, None)
        choosing = Choosing("sample", 1, self.keep_parents, self.max_lineage)
        blank = votes.blank(schema, label)
        pool = yield from breeder.asked("random", blank, 0.0, votes.degree(0), rng)
        parents, origins = np.zeros(0, dtype=np.int64), np.arange(len(pool))
        heard: list[Voted] = []
        num_drowned = 0
        for number in range(self.num_rounds):
            noisy: NoisySum = yield votes.ballot_on(schema, label, pool, Tally(len(pool)), noise)
            shares = None if noisy.is_void else votes.read(noisy)
            num_drowned += shares is None and not noisy.is_void
            if shares is None:  # nothing was learned: ask about the same pool
                continue
            heard.append(Voted(pool, shares, _trust(noisy), parents))
            if number == self.num_rounds - 1:
                break
            groups = labels_of(pool.codes, label)
            kept, varied = choosing.parents(shares, groups, origins, rng)
            parents = np.concatenate([kept, varied])
            offspring = yield from breeder.asked(
                "vary", pool.take(varied), votes.degree(number), votes.degree(number + 1), rng
            )
            pool, origins = Candidates.joined([pool.take(kept), offspring]), origins[parents]
        warn_of_drowned(num_drowned, self.num_rounds, len(pool))
        seeds = Seeds.of(heard) if heard else Seeds.unheard(pool)
        return (yield from self._expanded(seeds, breeder, rng))

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each record's votes, as `private_evolution` casts them.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        return self._votes.answer(query, shard, rng)

    def embedder_for(self, schema: Schema) -> Embedder | None:
        """What places records and candidates."""
        return self._votes.embedder_for(schema)

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse a run whose votes would all drown.

        Raises:
          ConfigError: They would; says what to set instead.
        """
        self._votes.check_signal(schema, noise_multiplier, users)

    def prospect(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Prospect:
        """What to expect of the votes, and which other settings would hear more."""
        return self._votes.prospect(schema, noise_multiplier, users)

    def workload(self, schema: Schema) -> Workload:
        """What the run asks of its model: pools for the votes, and the expansions."""
        voted = self._votes.workload(schema)
        return replace(voted, num_candidates=voted.num_candidates + self.num_expanded)

    def _check(self, schema: Schema) -> None:
        """Refuse a schema without texts."""
        if schema.text is None:
            raise ConfigError(
                "pre_text synthesizes texts, and the schema has no text column; for tables and"
                " images take private_evolution"
            )

    def _expanded(self, seeds: Seeds, breeder: Breeder, rng: np.random.Generator) -> Steps:
        """Seeds, and what the model writes after them."""
        found = replace(seeds.candidates, extras=without_places(seeds.candidates.extras))
        sources = np.full((len(found), self.num_shown), -1)
        sources[:, 0] = seeds.parents
        weights, rounds = seeds.weights, seeds.rounds
        if self.num_expanded:
            groups = labels_of(found.codes, breeder.subject.label)
            index = self._shown(seeds.weights, groups, rng)
            blank = Candidates(found.codes[index[:, 0]])
            written = yield from breeder.expanded(blank, Shown(found, index), rng)
            found = Candidates.joined([found, written])
            sources = np.concatenate([sources, index])
            rest = np.full(len(index), (1 - self.seed_share) / len(index))
            weights = np.concatenate([self.seed_share * weights, rest])
            rounds = np.concatenate([rounds, np.full(len(index), -1)])
        return Expanded(
            schema=breeder.subject.schema,
            candidates=found,
            weights=weights,
            rounds=rounds.astype(np.int32),
            sources=sources.astype(np.int32),
            model=breeder.model,
            model_settings=json.loads(breeder.settings),
        )

    def _shown(
        self, weights: NDArray[np.float64], groups: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Seeds that each expansion is written after, `(num_expanded, num_shown)`.

        A label has its seeds' weight of the expansions, and a seed is shown as often as it weighs.
        """
        by_label = np.bincount(groups, weights=weights)
        sizes = np.bincount(rounded_cells(by_label.astype(np.float64), self.num_expanded, rng))
        rows = []
        for group in np.flatnonzero(sizes):
            members, size = np.flatnonzero(groups == group), int(sizes[group])
            num_slots = -(-size // _TOGETHER) * self.num_shown
            drawn = rng.permutation(rounded_cells(weights[members], num_slots, rng))
            shown = members[drawn].reshape(-1, self.num_shown)
            rows.append(np.repeat(shown, _TOGETHER, axis=0)[:size])
        return np.concatenate(rows)


def _trust(noisy: NoisySum) -> float:
    """Inverse of the variance of a candidate's share of a round's votes."""
    return float((noisy.vector.sum() / noisy.stddev) ** 2)
