# SPDX-License-Identifier: Apache-2.0
"""Any strategy with one question more at its end: how well what it made serves its users."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from ..core.electorate import Electorate
from ..core.errors import ConfigError
from ..core.query import Contribution, Query, Steps, Strategy, check_signal
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.judge import WEIGHTS, correct_shares, fitted
from .parts.signal import Prospect, prospect_of

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

SCORE = "score"
"""Name of the question."""

_CLIP = 0.5
_MOST_RECORDS = 100_000


@dataclass(frozen=True)
class Scored(Strategy):
    """A strategy, and then the noisy accuracy of a judge that learned from its synthetic records.

    The inner strategy's rounds come first. Then records are drawn from what it learned, a judge of
    the schema's target is fitted to them, and clients are sent the judge: a user's number is the
    share of the user's records that it predicts, less one half. The synthesizer is the inner
    strategy's. A private sweep (`simulation/private_sweep.py`) compares its tries by this sum.

    Attributes:
      inner: The strategy.
      score_share: Share of the budget (of mu^2) for the score.
      score_records: Synthetic records that the judge learns from.

    Privacy:
      One Gaussian sum over all users, of a number in [-1/2, 1/2] that is clipped at 1/2.
    """

    inner: Strategy
    score_share: float = 0.1
    score_records: int = 5000
    name: ClassVar[str] = "scored"
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        if not 0 < self.score_share < 1:
            raise ConfigError(f"score_share must lie between 0 and 1, not {self.score_share!r}")
        if not 1 <= self.score_records <= _MOST_RECORDS:
            raise ConfigError(
                f"score_records must be 1 to {_MOST_RECORDS:,}, not {self.score_records!r}"
            )

    def __getattr__(self, name: str) -> Any:
        """What the inner strategy says of itself; but it does not go on from checkpoints here."""
        if name.startswith("__") or name in ("inner", "rounds_from"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse what the inner strategy refuses."""
        check_signal(self.inner, schema, self._noise(noise_multiplier)[1], users)

    def prospect(
        self, schema: Schema, noise_multiplier: float, users: Electorate
    ) -> Prospect | None:
        """What the inner strategy expects."""
        return prospect_of(self.inner, schema, self._noise(noise_multiplier)[1], users)

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """The inner strategy's event, and a Gaussian sum.

        Raises:
          ConfigError: The schema has no category as its target, or nothing to predict it from.
        """
        from ..core.accounting import compose, single_event

        target = None if schema.target is None else schema.columns[schema.index(schema.target)]
        if target is None or not target.is_categorical:
            raise ConfigError(
                "a score is how well a category is predicted: declare one as the schema's target"
            )
        if len(schema.columns) < 2 and schema.image is None:
            raise ConfigError(
                f"the target {target.name!r} is the only column, so nothing predicts it; a score"
                " needs other columns or an image"
            )
        score, noise = self._noise(noise_multiplier)
        return compose([self.inner.event(schema, noise), single_event(score)])

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """What the inner strategy asks, then the score."""
        score, noise = self._noise(noise_multiplier)
        (own,) = rng.spawn(1)
        synthesizer = yield from self.inner.rounds(schema, noise, rng)
        judge = fitted(synthesizer.sample(self.score_records, own), schema)
        yield Query(SCORE, dim=1, clip=_CLIP, noise_multiplier=score, inputs=judge)
        return synthesizer

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """How well a judge predicts each user's records, or the inner strategy's answer."""
        if WEIGHTS not in query.inputs:
            return self.inner.answer(query, shard, rng)
        return Contribution.rows(correct_shares(query.inputs, shard)[:, None] - _CLIP)

    def _noise(self, noise_multiplier: float) -> tuple[float, float]:
        """Noise multiplier of the score, and of the inner strategy."""
        from ..core.accounting import split

        score, rest = split(noise_multiplier, [self.score_share, 1 - self.score_share])
        return score, rest
