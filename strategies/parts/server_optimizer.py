# SPDX-License-Identifier: Apache-2.0
"""The server's optimizer: how far the weights move for one noisy mean update."""

import numpy as np
from numpy.typing import NDArray


class ServerOptimizer:
    """Adam or SGD with momentum, over noisy mean updates."""

    def __init__(self, name: str, size: int, *, lr: float, momentum: float) -> None:
        self._name, self._lr, self._momentum = name, lr, momentum
        self._first, self._second = np.zeros(size), np.zeros(size)
        self._steps = 0

    def moved(
        self, weights: NDArray[np.float64], update: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The weights after one mean update."""
        self._steps += 1
        if self._name == "sgd":
            self._first = self._momentum * self._first + update
            return weights + self._lr * self._first
        self._first += (1 - self._momentum) * (update - self._first)
        self._second += 0.01 * (update**2 - self._second)
        first = self._first / (1 - self._momentum**self._steps)
        second = self._second / (1 - 0.99**self._steps)
        return weights + self._lr * first / (np.sqrt(second) + 1e-12)
