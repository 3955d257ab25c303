# SPDX-License-Identifier: Apache-2.0
"""Topics: one private histogram says how much of a public corpus is about what users write of."""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.electorate import Electorate
from ..core.embedding import EMBEDDER, MOST_SQUARED, Embedder
from ..core.errors import ConfigError
from ..core.generation import PLACES, Generation, Subject
from ..core.query import MAX_DIM, Contribution, NoisySum, Query, Steps, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from ..models.registry import build_embedder, build_model
from .parts.breeder import proposed, without_places
from .parts.histograms import norm_clip
from .parts.kmeans import centers_of
from .parts.nearest import Finder, TableMetric
from .parts.pool import Pool
from .parts.settings import check_range
from .parts.simplex import CLEAR, pooled_total, to_simplex

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

TOPIC = "topic"
_COLUMN = "column"
_CONTRADICT = "a query for topics comes with arrays that contradict each other"
Weight = Literal["user", "record"]
_NO_COLUMNS = TableMetric(np.zeros(0, np.int64), np.zeros(0, np.int64), -1, 1.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topics(Strategy):
    """A public corpus of texts, resampled to what users' records are about.

    Texts of the corpus are drawn once and sorted into topics. Each user's records are counted by
    topic; the noisy histogram says what share of the release each topic has, and within a topic
    all texts of the corpus count alike. For instructions to tune a model with, or a store that is
    searched: whatever is sampled or looked up there costs nothing more.

    Attributes:
      num_candidates: Texts drawn from the corpus.
      num_topics: Clusters of their embeddings, which are the topics.
      label: Category column whose cells are the topics instead. Empty: clusters.
      weight: Who counts alike: `user`, whose records share one vote, or `record`, as long as no
        user is scaled down.
      max_norm: Bound of a user's votes under `record`, in records of one topic.
      model: Where public texts come from: `corpus`, a file of JSON lines, or another model of
        texts.
      model_settings: Its settings; of `corpus` the `path`.
      embedder: What tells which topic a record is nearest to, the same at all clients; not needed
        with a label.
      embedder_settings: Its settings.

    Privacy:
      One Gaussian sum. Topics are found in public texts alone, before any record is looked at.

    Reference:
      Yu et al. (2024), "Privacy-Preserving Instructions for Aligning Large Language Models",
      section 4.2 (resampling by a private histogram over clusters), arXiv 2402.13659.
    """

    num_candidates: int = 2000
    num_topics: int = 20
    label: str = ""
    weight: Weight = "user"
    max_norm: float = 1.0
    model: str = "corpus"
    model_settings: dict[str, Any] = field(default_factory=dict)
    embedder: str = "minilm"
    embedder_settings: dict[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "topics"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that no schema could make sense of."""
        check_range(2, 1_000_000, num_candidates=self.num_candidates)
        check_range(2, self.num_candidates, num_topics=self.num_topics)
        if self.weight not in Weight.__args__:  # type: ignore[attr-defined]
            raise ConfigError(f"weight must be one of {', '.join(Weight.__args__)}")  # type: ignore[attr-defined]
        if not 0 < self.max_norm < MAX_DIM:
            raise ConfigError(f"max_norm must be a number above 0, not {self.max_norm!r}")
        if self.max_norm != 1 and self.weight != "record":
            raise ConfigError(f"max_norm belongs to weight = 'record', not to {self.weight!r}")

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum."""
        from ..core.accounting import single_event

        self._check(schema)
        return single_event(noise_multiplier)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Draw from the corpus, sort by topic, ask how users are spread over topics, reweigh."""
        request = self._request(schema, rng)
        pool: Candidates = yield request
        inputs: dict[str, NDArray[Any]] = {}
        if self.label:
            column = schema.index(self.label)
            topics = pool.codes[:, column].astype(np.int64)
            inputs, num_topics = {_COLUMN: np.array([column])}, schema.shape[column]
        else:
            centers, topics = centers_of(pool.extras[PLACES], self.num_topics, rng)
            num_topics = self.num_topics
            # where texts are too few for so many, the last center stands again, for no record
            stand = np.minimum(np.arange(num_topics), len(centers) - 1)
            inputs = {PLACES: centers[stand], EMBEDDER: pool.extras[EMBEDDER][0]}
        noisy: NoisySum = yield Query(
            "topics",
            dim=num_topics,
            clip=norm_clip(np.ones(1), self.max_norm),
            noise_multiplier=noise_multiplier,
            inputs=inputs,
            cells=True,
        )
        extras = without_places(pool.extras) | {TOPIC: topics.astype(np.int32)}
        return Pool(
            schema=schema,
            candidates=dataclasses.replace(pool, extras=extras),
            weights=resampled(noisy, topics),
            lineage=np.zeros((0, len(pool)), dtype=np.int32),
            label=-1,
            model=self.model,
            model_settings=json.loads(request.settings),
            sample_degree=0.0,
        )

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each record's topic; a user's topics add up, or share one vote.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        given = {name: array for name, array in query.inputs.items() if name != EMBEDDER}
        records, users = shard.records, shard.user_index
        if self.label:
            column = given.pop(_COLUMN, None)
            if given or column is None or not _is_column(column, records.codes.shape[1]):
                raise ConfigError(_CONTRADICT)
            topics = records.codes[:, int(column[0])].astype(np.int64)[:, None]
        else:
            centers, places = given.pop(PLACES, None), records.places
            if given or centers is None or not _are_centers(centers, query.dim, places):
                raise ConfigError(_CONTRADICT)
            alike = np.zeros(max(len(centers), len(records)), dtype=np.int64)
            nothing = np.zeros((len(alike), 0), dtype=np.int32)
            num = len(centers)
            finder = Finder(nothing[:num], None, alike[:num], metric=_NO_COLUMNS, places=centers)
            num = len(records)
            topics, _ = finder.nearest(nothing[:num], None, alike[:num], places=places)
            is_placed = topics[:, 0] >= 0
            topics, users = topics[is_placed], users[is_placed]
        votes = Contribution.cells(topics, users, num_users=shard.num_users)
        return votes.user_means() if self.weight == "user" else votes

    def embedder_for(self, schema: Schema) -> Embedder | None:
        """What places records and the corpus; `None`: a label tells topics."""
        return None if self.label else build_embedder(self.embedder, self.embedder_settings)

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse a run whose histogram would drown.

        Raises:
          ConfigError: It would; says how many users would be heard.
        """
        num = schema.shape[schema.index(self.label)] if self.label else self.num_topics
        fewest = CLEAR * noise_multiplier * self.max_norm * math.sqrt(num)
        if users.num_users < fewest:
            raise ConfigError(
                f"{users.num_users:,.0f} users spread over {num:,} topics, with noise of"
                f" {noise_multiplier * self.max_norm:,.3g} on each, would not be heard:"
                f" {math.ceil(fewest):,} are needed. Nothing was asked or spent; take fewer topics,"
                " more users or a larger epsilon"
            )

    def _check(self, schema: Schema) -> None:
        """Refuse a schema or a model that these settings do not fit."""
        if schema.text is None:
            raise ConfigError("topics resamples texts, and the schema has no text column")
        categories = [column.name for column in schema.columns if column.is_categorical]
        if self.label and self.label not in categories:
            known = ", ".join(categories) or "none"
            raise ConfigError(f"label = {self.label!r} is no category; there are {known}")
        model = build_model(self.model, self.model_settings)
        model.check(Subject(schema))
        embedder = self.embedder_for(schema)
        if embedder is not None and embedder.modality != "text":
            raise ConfigError(
                f"embedder {embedder.name!r} places {embedder.modality}s, and topics needs texts"
            )

    def _request(self, schema: Schema, rng: np.random.Generator) -> Generation:
        """Texts of the corpus."""
        codes = np.zeros((self.num_candidates, len(schema.columns)), dtype=np.int32)
        return proposed(
            self.model,
            self.model_settings,
            Candidates(codes),
            Subject(schema),
            rng,
            embedder="" if self.label else self.embedder,
            embedder_settings=None if self.label else self.embedder_settings,
        )


def resampled(noisy: NoisySum, topics: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weight of each text of a corpus once each topic has its share of the users' votes.

    A topic without a text gives its share to the others. Where all votes are noise, or those that
    are left are for topics without a text, the corpus stays as it is.

    Args:
      noisy: Votes by topic, `(num_topics,)`.
      topics: Topic of each text, `(num_texts,)`.
    """
    sizes = np.bincount(topics, minlength=len(noisy.vector))
    total = pooled_total([(noisy.vector, noisy.stddev)])
    if not total > 0:
        if not noisy.is_void:
            _log.warning("votes for topics could not be told from noise: the corpus stays as it is")
        return np.full(len(topics), 1 / len(topics))
    shares = np.where(sizes > 0, to_simplex(noisy.vector, total), 0.0)
    if not shares.any():
        return np.full(len(topics), 1 / len(topics))
    weights = (shares / np.maximum(sizes, 1))[topics]
    return np.asarray(weights / weights.sum())


def _is_column(column: NDArray[Any], num_columns: int) -> bool:
    """Whether an array names a column."""
    if column.dtype.kind != "i" or column.shape != (1,):
        return False
    return 0 <= int(column[0]) < num_columns


def _are_centers(centers: NDArray[Any], num_topics: int, places: NDArray[np.int16] | None) -> bool:
    """Whether an array holds a center a topic, of the records' dimension and not too long."""
    if places is None or centers.dtype != np.int16:
        return False
    if centers.shape != (num_topics, places.shape[1]):
        return False
    squared = np.einsum("nd,nd->n", centers, centers, dtype=np.int64)
    return bool((squared <= MOST_SQUARED).all())
