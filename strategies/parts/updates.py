# SPDX-License-Identifier: Apache-2.0
"""The server's half of training: ask users for their updates, move the weights by the noisy sum."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...core.query import NoisySum, Query

if TYPE_CHECKING:
    from .flower_optimizer import FlowerOptimizer

RESOLUTION = 16  # of an update: with it a sum travels in four bytes a weight


class Updates:
    """Weights on their way from round to round.

    A strategy asks for a sum by `ask`, hands the answer to `take`, and may do what it likes in
    between: train a network of its own on the server, ask others, start from other weights.

    Attributes:
      weights: As they stand, `(num_weights,)`, float64.
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
        optimizer: "FlowerOptimizer",
    ) -> None:
        """Start from weights.

        Args:
          weights: Public, `(num_weights,)`.
          name: Of the query.
          clip: L2 bound of a user's update.
          noise_multiplier: Of each sum.
          sampling_prob: Probability that a user joins a round.
          num_users: Declared, public number of users; with `sampling_prob` it divides the sums.
          optimizer: Moves the weights.
        """
        self.weights: NDArray[np.float64] = np.array(weights, dtype=np.float64)
        self._name, self._clip, self._noise_multiplier = name, clip, noise_multiplier
        self._sampling_prob, self._num_users = float(sampling_prob), num_users
        self._optimizer = optimizer

    def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Query:
        """The question of one round.

        Args:
          inputs: Public arrays that clients need beside the weights, which go as `"weights"`.
        """
        return Query(
            self._name,
            dim=len(self.weights),
            clip=self._clip,
            noise_multiplier=self._noise_multiplier,
            sampling_prob=self._sampling_prob,
            resolution=RESOLUTION,
            inputs={**inputs, "weights": self.weights.astype(np.float32)},
        )

    def take(self, noisy: NoisySum) -> NDArray[np.float64]:
        """Move the weights by an answer; a void one moves nothing. The weights, as they stand."""
        if not noisy.is_void:
            mean = noisy.vector / (self._sampling_prob * self._num_users)
            self.weights = self._optimizer.moved(self.weights, mean)
        return self.weights
