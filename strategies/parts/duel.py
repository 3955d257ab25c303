# SPDX-License-Identifier: Apache-2.0
"""The server's half of a federated GAN: a network that draws, against a critic that users train.

Users tell by how much real images' gradients exceed those of synthetic images they were sent. All
else happens here, on synthetic images, and costs no privacy.

A game of few, noisy rounds has to be damped, or critic and network chase each other. So within a
round the critic is pulled back to where it began, as the one that maximizes its gain less a
squared distance would be: it then says where synthetic images are off *now*, and is at rest where
nothing is to be told. The network follows the difference from the critic's beginning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.schema import Schema
from .generator import Adam, Network, Weights, backward, inputs_of, layers, random_weights
from .image_critic import ImageCritic

_LEAK = np.float32(0.02)  # slope that passes a pixel which is full or empty
_LEAST_RATE = 0.1  # of the learning rate is left at the end
_FIRST = 0.3  # factor of the network's last matrix at first


@dataclass(frozen=True)
class Play:
    """How a round is played.

    Attributes:
      steps: Steps of critic and network in a round.
      batch: Synthetic images of a step.
      gain: How far the critic moves for a gap between real and synthetic images.
      pull: Share of its way from its beginning that it loses at each step.
      memory: Share that what was known of real images has, against a new round's sum; less in the
        first rounds, where there is less to know.
      rate: Step of the network, by Adam without momentum; falls over the second half of rounds.
    """

    steps: int
    batch: int
    gain: float
    pull: float
    memory: float
    rate: float


class Duel:
    """Critic and network, on their way from round to round.

    The critic's weights are `Updates.weights`: this is its optimizer.

    Attributes:
      start: The critic's first weights.
      rng: Public randomness; of a run that goes on, set after `restore`.
    """

    def __init__(
        self,
        critic: ImageCritic,
        play: Play,
        *,
        num_codes: int,
        num_hidden: int,
        num_fakes: int,
        pixel_noise: float,
        label_probs: NDArray[np.float64],
        num_rounds: int,
        rng: np.random.Generator,
    ) -> None:
        """Start from gray images.

        Args:
          critic: The critic's form.
          play: How a round is played.
          num_codes: Gaussian numbers that an image is made from.
          num_hidden: Units of the network's two hidden layers.
          num_fakes: Synthetic images of each label that users are sent.
          pixel_noise: Standard deviation of noise on a pixel, as a fraction of its range.
          label_probs: Share of each label.
          num_rounds: Rounds of the whole run.
          rng: Public randomness.
        """
        self._critic, self._play, self.rng = critic, play, rng
        self._num_fakes, self._num_rounds = num_fakes, num_rounds
        self._pixel_noise, self._probs = pixel_noise, label_probs
        self._seen_noise = np.float32(pixel_noise / critic.pool)  # of a mean of pool^2 pixels
        self.start = critic.initial(rng)
        widths = [num_codes + critic.num_labels, num_hidden, num_hidden, critic.num_seen]
        self._weights = random_weights(widths, rng, last=_FIRST)
        self._adam = Adam(self._weights, kept=0.0, kept_square=0.99)
        self._mean: Weights = [w.copy() for w in self._weights]
        self._counted, self._round = 0, 0
        self._real = np.zeros(critic.num_weights, dtype=np.float32)
        self._told = 0
        self._sent = np.zeros((0, critic.num_labels, critic.num_seen), dtype=np.float32)

    def fakes(self) -> NDArray[np.float32]:
        """Synthetic images to be sent to users, `(num_fakes, num_labels, num_seen)`."""
        labels = np.tile(np.arange(self._critic.num_labels), self._num_fakes)
        _, shown, _ = self._drawn(labels)
        self._sent = shown.reshape(self._num_fakes, self._critic.num_labels, -1)
        return self._sent

    def moved(
        self, weights: NDArray[np.float64], update: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The critic's weights after a round that is played with the users' mean update.

        The users' update is what real images have in excess of `fakes`, both at the weights where
        the round began. So the fakes' own gradient there is added again, and that of every new
        batch of synthetic images taken off. The critic stays close to its beginning, so real
        images' gradients hardly change from round to round, and their mean over rounds has less
        noise.
        """
        critic, play, num_labels = self._critic, self._play, self._critic.num_labels
        anchor = weights.astype(np.float32)
        sent, every = (
            self._sent.reshape(-1, critic.num_seen),
            np.tile(np.arange(num_labels), self._num_fakes),
        )
        shares = (self._probs[every] / self._num_fakes).astype(np.float32)
        real = update.astype(np.float32) + critic.gradient(anchor, sent, every, shares)
        self._told += 1
        self._real += np.float32(max(1 - play.memory, 1 / self._told)) * (real - self._real)
        each = np.full(play.batch, 1 / play.batch, dtype=np.float32)
        now, rate = anchor.copy(), play.rate * max(_LEAST_RATE, min(1.0, 2 * self._left))
        for _ in range(play.steps):
            labels = self.rng.choice(num_labels, play.batch, p=self._probs)
            values, shown, lit = self._drawn(labels)
            gap = self._real - critic.gradient(anchor, shown, labels, each)
            now += np.float32(play.gain) * gap - np.float32(play.pull) * (now - self.start)
            wanted = critic.uphill(now, shown, labels) - critic.uphill(self.start, shown, labels)
            slope = -wanted * lit / np.float32(play.batch)
            self._adam.step(self._weights, backward(self._weights, values, slope), rate)
        return now.astype(np.float64)

    def ended(self) -> None:
        """A round is over, played or void; in the second half networks are averaged."""
        if self._round >= self._num_rounds // 2:
            self._counted += 1
            for mean, weight in zip(self._mean, self._weights, strict=True):
                mean += (weight - mean) / np.float32(self._counted)
        self._round += 1

    def network(self, schema: Schema, label: int) -> Network:
        """The mean network of the second half, at the images' own size."""
        weights = [w.copy() for w in self._mean]
        if self._critic.pool > 1:
            wide = _widened(self._critic)
            weights[2], weights[5] = weights[2] @ wide, weights[5] @ wide
        return Network(schema, label, self._probs, tuple(weights), self._pixel_noise)

    @property
    def is_over(self) -> bool:
        """Whether all rounds have been."""
        return self._round >= self._num_rounds

    @property
    def _left(self) -> float:
        """Share of the rounds that is left."""
        return 1 - self._round / self._num_rounds

    def _drawn(
        self, labels: NDArray[np.int64]
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.float32]]:
        """New images: the network's layers, what is seen, and how much of a change of it shows."""
        inputs = inputs_of(labels, self._critic.num_labels, self._weights, self.rng)
        values = layers(self._weights, inputs)
        noise = self.rng.standard_normal(values[-1].shape, dtype=np.float32) * self._seen_noise
        shade = values[-1] + np.float32(0.5) + noise
        lit = np.where((shade > 0) & (shade < 1), np.float32(1), _LEAK)
        return values, np.clip(shade, 0, 1), lit

    def state(self) -> dict[str, NDArray[Any]]:
        """All of it, for a checkpoint."""
        arrays: dict[str, NDArray[Any]] = {"start": self.start, "probs": self._probs}
        arrays["real"] = self._real
        parts = self._parts()
        for name, weights in parts.items():
            arrays |= {f"{name}{number}": w for number, w in enumerate(weights)}
        return arrays | {
            "counts": np.array([self._counted, self._round, self._told, self._adam.steps])
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where `state` was taken; `rng` is to be set to the randomness of then.

        Raises:
          ConfigError: It is another duel's.
        """
        mine = self.state()
        if any(n not in state or state[n].shape != a.shape for n, a in mine.items()):
            raise ConfigError("a checkpoint of another network; start from another or anew")
        self.start, self._probs = state["start"].copy(), state["probs"].copy()
        self._real = state["real"].copy()
        for name, weights in self._parts().items():
            for number, weight in enumerate(weights):
                weight[:] = state[f"{name}{number}"]
        self._counted, self._round, self._told, self._adam.steps = map(int, state["counts"])

    def _parts(self) -> dict[str, Weights]:
        """All that is laid out as the network's weights."""
        slope, square = self._adam.mean, self._adam.square
        return {"network": self._weights, "mean": self._mean, "slope": slope, "square": square}


def _widened(critic: ImageCritic) -> NDArray[np.float32]:
    """From images as they are seen to images, smooth, so that they are seen just so.

    Returns:
      `(num_seen, num_pixels)`; each pixel is a sum of seen ones with weights that add up to one.
    """
    sides = [_side(number, critic.pool) for number in critic.seen_shape[:2]]
    wide = np.kron(np.kron(sides[0], sides[1]), np.eye(critic.image[2]))
    return wide.astype(np.float32)


def _side(number: int, pool: int) -> NDArray[np.float64]:
    """Along one side, `(number, number * pool)`: linear between squares, then made exact."""
    places = (np.arange(number * pool) + 0.5) / pool - 0.5
    apart = np.abs(np.clip(places, 0, number - 1) - np.arange(number)[:, None])
    linear = np.maximum(0.0, 1.0 - apart)
    pooled = linear.reshape(number, number, pool).mean(axis=2)
    return np.linalg.solve(pooled, linear)
