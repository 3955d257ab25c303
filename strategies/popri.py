# SPDX-License-Identifier: Apache-2.0
"""POPri: users score a language model's responses; it learns to prefer what they prefer."""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.electorate import Electorate
from ..core.embedding import EMBEDDER, Embedder
from ..core.errors import ConfigError
from ..core.generation import PLACES, PROMPTS, Generation, Lesson, Subject
from ..core.query import Contribution, NoisySum, Query, Steps, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from ..models.registry import build_embedder, build_model
from ..models.workload import Workload
from .parts.breeder import proposed, without_places
from .parts.pool import Pool
from .parts.scores import (
    Form,
    degrees,
    is_clear,
    pairs_of,
    read_scores,
    rows_of,
    sheet,
)
from .parts.settings import check_range
from .parts.simplex import CLEAR

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_LESSONS = "lessons"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Popri(Strategy):
    """Policy optimization by users' preferences among a public model's own texts.

    A round has the model answer each prompt several times. Users score the responses by how near
    they are to their own texts; the noisy sum of scores says of each prompt which response is
    preferred to which. From these pairs the model learns (by DPO, where it is a language model),
    and the next round's responses are its own again. At the end it writes the synthetic texts.

    Attributes:
      num_rounds: Rounds of responses, scores and lessons.
      num_prompts: Prompts of a round, the same in every round.
      num_responses: Responses to each.
      reject_rank: A response at this rank is rejected in favor of the first; 2 to
        `num_responses`.
      scores: What a user's vector is, always of length one.

        - `direction`: the sum of the embeddings of the user's texts, asked once, before the
          first round. As scores are cosines, their noisy sum tells the scores of all responses of
          all rounds, so the whole budget goes into one sum, as long as an embedding and no longer.
        - `prompt`: scores of a round's responses, made to have mean zero and an equal length for
          each prompt, so that none of the length says how prompts differ.
        - `pool`: scores made to have mean zero over all responses, as the paper has it.
      num_candidates: Texts that the model writes at the end; the release samples from them.
      model: A public model that learns: `policy`, a language model with LoRA; `words`, a bag of
        words; or another that is installed and has a setting `lessons`.
      model_settings: Its settings, but for the lessons.
      embedder: What tells how near a response is to a text, the same at all clients.
      embedder_settings: Its settings.

    Privacy:
      Every user's vector has length one at most, and zeros where all responses are as near. What
      the model learns from is made of noisy sums, so learning and writing cost nothing.

    Reference:
      Hou et al. (2025), "POPri: Private Federated Learning using Preference-Optimized Synthetic
      Data", https://arxiv.org/abs/2504.16438. Its client's z-scores are `pool`.
    """

    num_rounds: int = 4
    num_prompts: int = 16
    num_responses: int = 8
    reject_rank: int = 5
    scores: Form = "direction"
    num_candidates: int = 200
    model: str = "policy"
    model_settings: dict[str, Any] = field(default_factory=dict)
    embedder: str = "minilm"
    embedder_settings: dict[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "popri"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that no schema could make sense of."""
        check_range(
            1,
            1_000_000,
            num_rounds=self.num_rounds,
            num_prompts=self.num_prompts,
            num_candidates=self.num_candidates,
        )
        check_range(2, 1000, num_responses=self.num_responses)
        check_range(2, self.num_responses, reject_rank=self.reject_rank)
        if self.scores not in Form.__args__:  # type: ignore[attr-defined]
            raise ConfigError(f"scores must be one of {', '.join(Form.__args__)}")  # type: ignore[attr-defined]
        if _LESSONS in self.model_settings:
            raise ConfigError("lessons are what the run finds out: leave them out")

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One Gaussian sum a round, or a single one of the direction."""
        from ..core.accounting import compose, single_event

        self._check(schema)
        return compose(map(single_event, self._noises(noise_multiplier)))

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Have responses written and scored; learn from each prompt's best and a worse one."""
        noises = self._noises(noise_multiplier)
        prompts = np.repeat(np.arange(self.num_prompts), self.num_responses).astype(np.int32)
        lessons: list[Lesson] = []
        noisy: NoisySum | None = None
        num_drowned = 0
        for number in range(self.num_rounds):
            request = self._request(schema, prompts, lessons, rng, is_placed=True)
            written: Candidates = yield request
            places = written.extras[PLACES]
            if noisy is None or self.scores != "direction":
                by = written.extras[EMBEDDER][0]
                noise = noises[min(number, len(noises) - 1)]
                noisy = yield sheet(self.scores, places, by, prompts, noise_multiplier=noise)
                num_drowned += not noisy.is_void and not is_clear(noisy, self.scores, prompts)
            lessons += self._lessons(noisy, written, prompts)
        if num_drowned:
            _log.warning(
                "scores of %d of %d sums could not be told from noise: take fewer prompts or"
                " responses, or scores = 'direction'",
                *(num_drowned, len(noises)),
            )
        unseen = np.arange(self.num_candidates) // self.num_responses + self.num_prompts
        last = self._request(schema, unseen.astype(np.int32), lessons, rng, is_placed=False)
        pool: Candidates = yield last
        return Pool(
            schema=schema,
            candidates=dataclasses.replace(pool, extras=without_places(pool.extras)),
            weights=_weights(pool),
            lineage=np.zeros((0, len(pool)), dtype=np.int32),
            label=-1,
            model=self.model,
            model_settings=json.loads(last.settings),
            sample_degree=0.0,
        )

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's scores, or the direction of their texts.

        Raises:
          ConfigError: The query's arrays contradict each other or the shard's shape; whether
            they do does not depend on any record.
        """
        return Contribution.rows(rows_of(query, shard, self.scores))

    def embedder_for(self, schema: Schema) -> Embedder:
        """What places records and responses."""
        return build_embedder(self.embedder, self.embedder_settings)

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse a run of which nothing could be heard even if all users preferred alike.

        Raises:
          ConfigError: They would not be heard; says how many users would be.
        """
        dim = self.num_prompts * self.num_responses
        if self.scores == "direction":
            dim = self.embedder_for(schema).dim
        freedom = degrees(self.scores, dim, self.num_prompts)
        noise = self._noises(noise_multiplier)[0]
        fewest = noise * math.sqrt(CLEAR * math.sqrt(2 * freedom))
        if users.num_users < fewest:
            raise ConfigError(
                f"{users.num_users:,.0f} users scoring {dim:,} numbers with noise of {noise:,.3g}"
                " on each would not be heard even if all preferred alike:"
                f" {math.ceil(fewest):,} are needed. Nothing was asked or spent; more users or a"
                " larger epsilon will do, or fewer rounds, prompts and responses"
            )

    def workload(self, schema: Schema) -> Workload:
        """What the run asks of its model, but for what learning takes."""
        num = self.num_rounds * self.num_prompts * self.num_responses + self.num_candidates
        return Workload(build_model(self.model, self.model_settings), Subject(schema), num)

    def _check(self, schema: Schema) -> None:
        """Refuse a schema or a model that these settings do not fit."""
        if schema.text is None or schema.columns or schema.image is not None:
            raise ConfigError(
                "popri writes texts: the schema must hold a text column, and no other"
            )
        model = build_model(self.model, self.model_settings)
        if _LESSONS not in {f.name for f in dataclasses.fields(model)}:  # type: ignore[arg-type]
            raise ConfigError(f"model {self.model!r} does not learn; take one with lessons: policy")
        model.check(Subject(schema))
        embedder = self.embedder_for(schema)
        if embedder.modality != "text":
            raise ConfigError(
                f"embedder {embedder.name!r} places {embedder.modality}s, and popri needs texts"
            )

    def _noises(self, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each query, in order."""
        from ..core.accounting import split

        num = 1 if self.scores == "direction" else self.num_rounds
        return split(noise_multiplier, [1 / num] * num)

    def _request(
        self,
        schema: Schema,
        prompts: NDArray[np.int32],
        lessons: list[Lesson],
        rng: np.random.Generator,
        *,
        is_placed: bool,
    ) -> Generation:
        """A response to each of some prompts, of the model that has had some lessons."""
        blank = Candidates(np.zeros((len(prompts), 0), dtype=np.int32), extras={PROMPTS: prompts})
        return proposed(
            self.model,
            self.model_settings | {_LESSONS: lessons},
            blank,
            Subject(schema),
            rng,
            embedder=self.embedder if is_placed else "",
            embedder_settings=self.embedder_settings if is_placed else None,
        )

    def _lessons(
        self, noisy: NoisySum, written: Candidates, prompts: NDArray[np.int32]
    ) -> list[Lesson]:
        """What a round teaches: a pair of different responses for each prompt."""
        scores = read_scores(noisy, self.scores, written.extras[PLACES])
        if scores is None or written.texts is None:
            return []
        texts = written.texts
        pairs = pairs_of(scores, prompts, self.reject_rank)
        return [
            (int(prompts[best]), texts[best], texts[worse])
            for best, worse in pairs
            if texts[best] != texts[worse]
        ]


def _weights(pool: Candidates) -> NDArray[np.float64]:
    """Equal weights of all texts that say anything."""
    texts = () if pool.texts is None else pool.texts.tolist()
    said = np.array([bool(text.strip()) for text in texts])
    if not said.any():
        return np.full(len(pool), 1 / len(pool))
    return np.asarray(said / said.sum())
