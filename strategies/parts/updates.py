# SPDX-License-Identifier: Apache-2.0
"""The server's half of training: ask users for their updates, move the weights by the noisy sum."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.checkpoint import State
from ...core.errors import ConfigError
from ...core.query import MOST_IN_SERIES, NoisySum, Query
from ...core.series import Series, Turn
from .adaptive_clip import AdaptiveClip
from .factorization import Decoder

RESOLUTION = 16  # of an update: with it a sum travels in four bytes a weight


class Optimizer(Protocol):
    """What moves weights by users' mean update."""

    def moved(
        self, weights: NDArray[np.float64], update: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The weights after one mean update, both `(num_weights,)`."""


class Updates:
    """Weights on their way from round to round.

    A strategy asks for a sum by `ask`, hands the answer to `take`, and may do what it likes in
    between: train a network of its own on the server, ask others, start from other weights.

    Attributes:
      weights: As they stand, `(num_weights,)`, float64.
      position: Rounds taken.
    """

    def __init__(
        self,
        weights: NDArray[Any],
        *,
        name: str = "update",
        clip: float,
        noise_multiplier: float,
        sampling_prob: float,
        num_users: int,
        records: int = 0,
        mean_records: float = 1.0,
        optimizer: Optimizer,
        adaptive: AdaptiveClip | None = None,
        series: Series | None = None,
    ) -> None:
        """Start from weights.

        Args:
          weights: Public, `(num_weights,)`.
          name: Of the query.
          clip: L2 bound of a user's update.
          noise_multiplier: Of each sum.
          sampling_prob: Probability that a user joins a round.
          num_users: Declared, public number of users; with `sampling_prob` it divides the sums.
          records: Most records of a user, each of which has a vector of its own and joins by a coin
            of its own; 0: each user has one vector.
          mean_records: Declared, public mean number of records of a user, where they have vectors
            of their own; it divides the sums, too.
          optimizer: Moves the weights.
          adaptive: Moves the clip, by the bit that then ends each user's vector; `None`: fixed.
          series: The rounds' noise is correlated, and users take turns; `None`: neither.
        """
        self.weights: NDArray[np.float64] = np.array(weights, dtype=np.float64)
        self._name, self._clip, self._noise_multiplier = name, clip, noise_multiplier
        self._sampling_prob = float(sampling_prob)
        self._optimizer, self._adaptive, self._series = optimizer, adaptive, series
        self._decoder = None if series is None else Decoder(series.coefficients)
        self._records = records
        num_vectors = num_users * mean_records
        self._cohort = self._sampling_prob * num_vectors / (series.separation if series else 1)
        self.position = 0

    def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Query:
        """The question of one round.

        Args:
          inputs: Public arrays that clients need beside the weights, which go as `"weights"`.
        """
        return Query(
            self._name,
            dim=len(self.weights) + (self._adaptive is not None),
            clip=self._clip if self._adaptive is None else self._adaptive.clip,
            noise_multiplier=self._noise_multiplier,
            sampling_prob=self._sampling_prob,
            inputs={**inputs, "weights": self.weights.astype(np.float32)},
            records=self._records,
            resolution=RESOLUTION if self._series is None else MOST_IN_SERIES,
            turn=None if self._series is None else Turn(self._series, self.position),
        )

    def take(self, noisy: NoisySum) -> NDArray[np.float64]:
        """Move the weights by an answer; a void one moves nothing. The weights, as they stand."""
        self.position += 1
        if self._decoder is not None:
            noisy = self._decoder.take(noisy)
        if self._adaptive is not None:
            noisy = self._adaptive.take(noisy)
        if not noisy.is_void:
            self.weights = self._optimizer.moved(self.weights, noisy.vector / self._cohort)
        return self.weights

    @property
    def can_be_kept(self) -> bool:
        """Whether `state` is all that it takes to go on; not with an optimizer of a user's own."""
        state = getattr(self._optimizer, "state", None)
        return state is not None and state() is not None

    def state(self) -> dict[str, NDArray[Any]]:
        """What goes into a checkpoint; made of noisy sums and public numbers alone."""
        found = {"weights": self.weights, "position": np.array(self.position)}
        for name, part in self._parts().items():
            found |= {f"{name}.{key}": value for key, value in (part.state() or {}).items()}
        return found

    def restore(self, state: State) -> None:
        """Go on where `state` was taken.

        Raises:
          ConfigError: It is of another model, or of other settings.
        """
        weights = state.get("weights")
        if weights is None or weights.shape != self.weights.shape or "position" not in state:
            raise ConfigError(
                f"a checkpoint of another model: expected {len(self.weights):,} weights. Remove it,"
                " and all sums are replayed"
            )
        self.weights, self.position = np.array(weights), int(state["position"])
        for name, part in self._parts().items():
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in state.items()
                if key.startswith(f"{name}.")
            }
            part.restore(own)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, by name."""
        parts = {"optimizer": self._optimizer, "clip": self._adaptive, "decoder": self._decoder}
        return {name: part for name, part in parts.items() if part is not None}
