# SPDX-License-Identifier: Apache-2.0
"""The game of a critic, which alone sees private records, and a network that learns to fool it.

A first sum measures the histogram of every column: it tells how many users there are, where the
network starts, and which cells are too rare for the critic to tell apart. Then each round asks
one gradient of every user that joins. All else happens at the server, on synthetic records.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.query import Contribution, NoisySum, Query, Rounds, Strategy
from ...core.records import BoundedShard
from ...core.schema import Schema
from .coarsen import coarsen, runs
from .critic import Batch, Inputs, Loss, push, read_critic, user_gradients
from .generator import (
    Adam,
    Network,
    Weights,
    backward,
    inputs_of,
    label_column,
    layers,
    others,
    random_weights,
)
from .histograms import Grid, Histograms, cells_of
from .simplex import pooled_total, to_simplex
from .width import refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_COLUMNS, _CRITIC = "columns", "critic"
_CLEAR = 3.0  # standard deviations from which a number is more than noise
_FIRST_WEIGHT = 0.2  # the critic's first weights are uniform up to it
_KEPT_SQUARE = 0.99  # of RMSProp's mean square, at each step
_TINY = np.float32(1e-6)
_RARE = 1e-7  # share of a cell that was measured as empty, within its group
_LEAST_RATE = 0.1  # of the learning rate is left at the end
_LEAK = np.float32(0.02)  # slope that passes a pixel which is full or empty
_PIXEL_NOISE = 0.1
_BALANCED, _BALANCINGS = 4096, 20  # records, and passes over them, to bring columns in balance
_LEAST_SHARE = 1e-5  # below it a share is not told from zero


@dataclass(frozen=True)
class Adversarial(Strategy):
    """A generative adversarial network at the level of users, for tables and small images.

    In each round the server sends the critic's weights, and every user who joins by a secret coin
    answers one vector: the mean over their own records of the gradient of what the critic gains
    on them. The framework clips it as a whole. The noisy sum is divided by the expected number of
    users who join: the number of users as measured once, with noise, times the probability to
    join; never by the number who did. The part of the critic's gradient that synthetic records
    have is made at the server, with their gradients clipped in the same way, so that the two are
    equal where synthetic and real records are.

    Within a round the critic takes `steps_per_round` steps with the one noisy sum, always against
    new synthetic records, and the network as many against the critic. The released network has
    the mean weights of the second half of the rounds. None of that costs privacy.

    Attributes:
      label: Column that the network is told of; `None`: the schema's target if that is a
        category; `""`: none.
      num_rounds: Rounds.
      sampling_prob: Probability that a user joins a round.
      columns_share: Share of the budget (of mu^2, nearly) that the first sum gets.
      max_groups: Most groups of a column's cells that the critic tells apart. Cells too rare to
        be seen through the noise are merged with their neighbors, and drawn from the group in
        their measured shares.
      steps_per_round: Steps of critic and network in a round.
      batch_size: Synthetic records of a step.
      num_critic: Units of the critic's hidden layer.
      num_codes: Gaussian numbers that a synthetic record is made from.
      num_hidden: Units of the network's hidden layers.
      critic_lr: Step of the critic, by RMSProp.
      network_lr: Step of the network, by Adam without momentum.

    Privacy:
      The first sum is of vectors of one record's norm at most. The others are clipped at the
      median norm that synthetic records have, which is public. Users who join are sampled by
      their own secret coins, which is what the event is priced for.
    """

    label: str | None = None
    num_rounds: int = 60
    sampling_prob: float = 0.2
    columns_share: float = 0.1
    max_groups: int = 16
    steps_per_round: int = 15
    batch_size: int = 512
    num_critic: int = 64
    num_codes: int = 32
    num_hidden: int = 128
    critic_lr: float = 0.01
    network_lr: float = 0.001
    loss: ClassVar[Loss]

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for key in (
            "num_rounds",
            "max_groups",
            "steps_per_round",
            "batch_size",
            "num_critic",
            "num_codes",
            "num_hidden",
        ):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob must lie in (0, 1], not {self.sampling_prob!r}")
        if not 0 < self.columns_share < 1:
            raise ConfigError(f"columns_share must lie between 0 and 1, not {self.columns_share!r}")
        for key in ("critic_lr", "network_lr"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie between 0 and 1, not {getattr(self, key)!r}")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse impossible values of the strategy's own settings, by `ConfigError`."""

    @abstractmethod
    def hold(self, weights: NDArray[np.float32]) -> None:
        """Keep the critic's weights in bounds after a step, in place."""

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One sum over all users, and `num_rounds` over those who joined by a coin."""
        from ...core.accounting import compose, event_of, single_event

        label_column(schema, self.label)
        width = max(self.batch_size, 2 * self.num_hidden)  # one-hot records; weights of the network
        refuse_wide(schema, self.name, width * schema.num_cells)
        first, each = self._split(noise_multiplier)
        rounds = event_of({(each, float(self.sampling_prob)): self.num_rounds})
        return compose([single_event(first), rounds])

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Measure every column; then play a round with each noisy sum of gradients."""
        label = label_column(schema, self.label)
        first, each = self._split(noise_multiplier)
        histograms = Histograms.balanced(
            [(Grid.whole(column, size),) for column, size in enumerate(schema.shape)]
        )
        noisy = yield histograms.query(_COLUMNS, noise_multiplier=first, max_norm=1.0)
        known = _Known.of(schema, histograms, noisy)
        expected = self.sampling_prob * known.num_users
        game = _Game(self, schema, label, known, each / expected, rng)
        for number in range(self.num_rounds):
            critic, clip = game.critic.copy(), game.clip()
            noisy = yield Query(
                _CRITIC,
                dim=critic.size,
                clip=clip,
                noise_multiplier=each,
                sampling_prob=float(self.sampling_prob),
                inputs=game.inputs.arrays(critic),
            )
            if not (noisy.is_void or known.is_void):
                real = (noisy.vector / (clip * expected)).astype(np.float32)
                rate = min(1.0, 2 - 2 * number / self.num_rounds)
                game.play(real.reshape(critic.shape), clip, max(_LEAST_RATE, rate))
            if number >= self.num_rounds // 2:
                game.average()
        return game.network()

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The mean over each user's records of their cells, or of the critic's gradients."""
        if query.name == _COLUMNS:
            return cells_of(query, shard).user_means()
        inputs, critic = read_critic(query, shard)
        return Contribution.rows(user_gradients(inputs, critic, shard, self.loss))

    def _split(self, noise_multiplier: float) -> tuple[float, float]:
        """Noise multipliers of the first sum and of each other.

        Chosen so that without sampling all of them together cost as much as one Gaussian with
        `noise_multiplier`; with it, nearly as much while noise is large.
        """
        first = noise_multiplier / self.columns_share**0.5
        each = (self.num_rounds / (1 - self.columns_share)) ** 0.5 * self.sampling_prob
        return first, noise_multiplier * each


@dataclass(frozen=True, eq=False)
class _Known:
    """What the first sum tells.

    Attributes:
      num_users: How many there are; where that is lost in noise, the most that noise can hide.
      shares: Share of each cell, by column.
      is_void: Nothing was measured.
    """

    num_users: float
    shares: list[NDArray[np.float64]]
    is_void: bool

    @staticmethod
    def of(schema: Schema, histograms: Histograms, noisy: NoisySum) -> "_Known":
        measured = histograms.measured(noisy)
        if not measured:
            return _Known(1.0, [np.full(size, 1 / size) for size in schema.shape], is_void=True)
        precision = sum(1 / (m.counts.size * m.stddev**2) for m in measured)
        total = pooled_total((m.counts, m.stddev) for m in measured) or _CLEAR / precision**0.5
        return _Known(total, [to_simplex(m.counts / total) for m in measured], is_void=False)


@dataclass(frozen=True, eq=False)
class _Fakes:
    """Synthetic records, on their way from a network to a critic.

    Attributes:
      values: What each layer of the network made.
      probs: Probabilities of the groups of all columns but the label, side by side.
      lit: How much of a pixel's change shows.
      shown: What the critic sees: pixels, each drawn group and the label's cell, at their height.
    """

    values: list[NDArray[np.float32]]
    probs: NDArray[np.float32]
    lit: NDArray[np.float32]
    shown: NDArray[np.float32]


class _Game:
    """A critic and a network that move against each other."""

    def __init__(
        self,
        settings: Adversarial,
        schema: Schema,
        label: int,
        known: _Known,
        noise: float,
        rng: np.random.Generator,
    ) -> None:
        """Start from columns in their measured shares, dependent at random.

        Args:
          settings: The strategy.
          schema: Schema of the records.
          label: Position of the label column, or -1.
          known: What the first sum told.
          noise: Of a mean gradient's coordinate, as a fraction of the clip.
          rng: Public randomness.
        """
        self._settings, self._schema, self._label, self._rng = settings, schema, label, rng
        self._columns = others(schema, label)
        width = settings.num_critic
        # a group's share, spread over the gradient's coordinates, must stand out of the noise
        least = min(0.5, _CLEAR * noise * ((len(schema.columns) + 1) * width) ** 0.5)
        self._shares = [known.shares[column] for column in self._columns]
        self._groups = [_groups(s, settings.max_groups, least) for s in self._shares]
        labels = np.arange(schema.shape[label] if label >= 0 else 0)
        self._pixels = 0 if schema.image is None else schema.image.num_pixels
        self.inputs = Inputs.of(
            self._pixels,
            [*self._columns, *([label] if label >= 0 else [])],
            [*self._groups, *([labels] if label >= 0 else [])],
        )
        shape = (self.inputs.size + 2, width)
        self.critic = rng.uniform(-_FIRST_WEIGHT, _FIRST_WEIGHT, shape).astype(np.float32)
        self._square, self._steps = np.zeros_like(self.critic), 0
        self._label_probs = known.shares[label] if label >= 0 else np.ones(1)
        self._outputs = self.inputs.size - len(labels)
        hidden = settings.num_hidden
        widths = [settings.num_codes + len(self._label_probs), hidden, hidden, self._outputs]
        self._weights = random_weights(widths, rng, last=1.0)  # smaller learns slower
        weights = [np.bincount(g, s) for g, s in zip(self._groups, self._shares, strict=True)]
        if weights:
            self._weights[-1][self._pixels :] = np.log(np.concatenate(weights) + _LEAST_SHARE)
        self._sizes = np.array([len(w) for w in weights], dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes  # among the groups
        self._aims = np.concatenate(weights) if weights else np.zeros(0)
        self._balance(self._weights)
        self._adam = Adam(self._weights, kept=0.0, kept_square=0.99)
        self._mean: Weights = [np.zeros_like(w) for w in self._weights]
        self._counted = 0

    def clip(self) -> float:
        """The median length of a synthetic record's gradient, where the critic is undecided."""
        batch = Batch.of(self.critic, self._fakes(2 * self._settings.batch_size).shown)
        push_0 = float(push(self._settings.loss, np.zeros(1, dtype=np.float32))[0])
        return max(1e-6, push_0 * float(np.median(batch.lengths)))

    def play(self, real: NDArray[np.float32], clip: float, rate: float) -> None:
        """A round's steps of critic and network.

        The real records' mean gradient was asked of the critic as it stood when the round began,
        `anchor`. So the synthetic records' is taken there too; what has changed since in how hard
        the critic pushes each record is followed on synthetic records.

        Args:
          real: Noisy mean gradient of real records, in clips, `(num_inputs + 2, num_critic)`.
          clip: Where single records' gradients were clipped.
          rate: Factor of the learning rates.
        """
        settings, loss = self._settings, self._settings.loss
        anchor, size = self.critic.copy(), np.float32(settings.batch_size)
        for _ in range(settings.steps_per_round):
            fakes = self._fakes(settings.batch_size)
            there, scores = Batch.of(anchor, fakes.shown), self._scores(fakes.shown)
            most = np.float32(clip) / np.maximum(there.lengths, _TINY)
            up, down, was = (
                np.minimum(push(loss, s), most) for s in (scores, -scores, there.scores)
            )
            heights = (down - up + was) / (np.float32(clip) * size)
            self._move_critic(real - there.gradient(heights.astype(np.float32)))
            self._move_network(fakes, settings.network_lr * rate)

    def average(self) -> None:
        """Let the network as it stands count for the one that is released."""
        self._counted += 1
        for mean, weight in zip(self._mean, self._weights, strict=True):
            mean += (weight - mean) / np.float32(self._counted)

    def network(self) -> Network:
        """The mean network, its groups of cells opened again in their measured shares."""
        weights = [w.copy() for w in self._mean]
        self._balance(weights)
        opened = [np.arange(self._pixels)]
        within = [np.zeros(self._pixels)]
        for groups, shares, first in zip(self._groups, self._shares, self._firsts, strict=True):
            some = shares + _RARE / len(shares)
            opened.append(self._pixels + first + groups)
            within.append(np.log(some / np.bincount(groups, some)[groups]))
        where = np.concatenate(opened)
        weights[2] = np.ascontiguousarray(weights[2][:, where])
        weights[5] = (weights[5][where] + np.concatenate(within)).astype(np.float32)
        noise = _PIXEL_NOISE if self._pixels else 0.0
        return Network(self._schema, self._label, self._label_probs, tuple(weights), noise)

    def _balance(self, weights: Weights) -> None:
        """Move the last biases, in place, until columns come in the shares that were measured."""
        if not len(self._sizes):
            return
        labels = self._rng.choice(len(self._label_probs), _BALANCED, p=self._label_probs)
        inputs = inputs_of(labels, len(self._label_probs), weights, self._rng)
        logits = layers(weights, inputs)[-1][:, self._pixels :]
        for _ in range(_BALANCINGS):
            made = self._probs(logits).mean(axis=0, dtype=np.float64)
            shift = np.log((self._aims + _LEAST_SHARE) / (made + _LEAST_SHARE)).astype(np.float32)
            weights[-1][self._pixels :] += shift
            logits += shift

    def _probs(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of each column's groups, row by row."""
        powers = np.exp(logits - self._spread(np.maximum.reduceat(logits, self._firsts, axis=1)))
        probs: NDArray[np.float32] = powers / self._spread(self._sums(powers))
        return probs

    def _scores(self, shown: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores by the critic as it stands."""
        hidden = np.tanh(shown @ self.critic[:-2] + self.critic[-2])
        scores: NDArray[np.float32] = hidden @ self.critic[-1]
        return scores

    def _move_critic(self, slope: NDArray[np.float32]) -> None:
        """One step of RMSProp upwards."""
        self._steps += 1
        self._square += np.float32(1 - _KEPT_SQUARE) * (slope * slope - self._square)
        fresh = np.float32(1 - _KEPT_SQUARE**self._steps)
        size = np.sqrt(self._square / fresh) + _TINY
        self.critic += np.float32(self._settings.critic_lr) * slope / size
        self._settings.hold(self.critic)

    def _move_network(self, fakes: _Fakes, rate: float) -> None:
        """One step of Adam towards records that the critic scores higher.

        A drawn group passes the critic's slope on to its column's probabilities, as if they had
        been shown themselves.

        Reference:
          Bengio, Léonard, Courville (2013), "Estimating or Propagating Gradients Through
          Stochastic Neurons", arXiv 1308.3432, the straight-through estimator.
        """
        batch = Batch.of(self.critic, fakes.shown)
        heights = -push(self._settings.loss, batch.scores) / np.float32(len(batch.scores))
        slope = (batch.slopes * heights[:, None]) @ self.critic[: self._outputs].T
        pixels, cells = np.split(slope, [self._pixels], axis=1)
        pixels = pixels * fakes.lit * self.inputs.pixel_height
        if len(self._sizes):
            cells = cells * self.inputs.cell_height
            cells = fakes.probs * (cells - self._spread(self._sums(fakes.probs * cells)))
        slope = np.concatenate([pixels, cells], axis=1)
        self._adam.step(self._weights, backward(self._weights, fakes.values, slope), rate)

    def _fakes(self, num_records: int) -> _Fakes:
        """New synthetic records."""
        rng, num_labels = self._rng, len(self._label_probs)
        labels = rng.choice(num_labels, num_records, p=self._label_probs)
        values = layers(self._weights, inputs_of(labels, num_labels, self._weights, rng))
        shown = np.zeros((num_records, self.inputs.size), dtype=np.float32)
        rows = np.arange(num_records)
        if self._label >= 0:
            shown[rows, self._outputs + labels] = self.inputs.cell_height
        pixels, logits = np.split(values[-1], [self._pixels], axis=1)
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(_PIXEL_NOISE)
        shade = pixels + np.float32(0.5) + noise
        shown[:, : self._pixels] = np.clip(shade, 0, 1) * self.inputs.pixel_height
        lit = np.where((shade > 0) & (shade < 1), np.float32(1), _LEAK)
        if not len(self._sizes):
            return _Fakes(values, logits, lit, shown)
        probs = self._probs(logits)
        for column in range(len(self._sizes)):
            part = slice(self._firsts[column], self._firsts[column] + self._sizes[column])
            ends = np.cumsum(probs[:, part], axis=1)
            at = rng.random((num_records, 1), dtype=np.float32) * ends[:, -1:]
            drawn = (ends[:, :-1] <= at).sum(axis=1)
            shown[rows, self._pixels + self._firsts[column] + drawn] = self.inputs.cell_height
        return _Fakes(values, probs, lit, shown)

    def _sums(self, groups: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sums over each column's groups, `(num_records, num_columns)`."""
        return np.add.reduceat(groups, self._firsts, axis=1)

    def _spread(self, columns: NDArray[np.float32]) -> NDArray[np.float32]:
        """Each column's number at each of its groups."""
        return np.repeat(columns, self._sizes, axis=1)


def _groups(shares: NDArray[np.float64], max_groups: int, least: float) -> NDArray[np.int64]:
    """Groups of cells: at most so many, and none much lighter than `least` if that leaves fewer."""
    few = coarsen(shares + _RARE / len(shares), max_groups)
    clear = runs(shares, least)
    return clear if clear[-1] < few[-1] else few
