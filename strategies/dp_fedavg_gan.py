# SPDX-License-Identifier: Apache-2.0
"""DP-FedAvg-GAN: a critic trained by users' clipped updates, a network trained at the server."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.answering import without_checkpoints
from ..core.checkpoint import Checkpoint, State
from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Rounds, Steps, Strategy
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.adaptive_clip import check_settings, clip_that_follows, with_bit
from .parts.duel import Duel, Play
from .parts.generator import label_column
from .parts.histograms import Grid, Histograms, cells_of
from .parts.image_critic import ImageCritic
from .parts.local_training import LocalTraining, updates
from .parts.settings import check_range
from .parts.simplex import pooled_total, to_simplex
from .parts.trainable import Made, RecordShape
from .parts.updates import Updates
from .parts.width import refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_LABELS, _CRITIC = "labels", "critic"
_LABELS_SHARE = 0.03  # of the budget: shares of labels are easily seen
_CLIP_RATE, _CLIP_BIT_SHARE = 0.2, 0.1
_MOST = 1 << 16


@dataclass(frozen=True)
class DpFedAvgGan(Strategy):
    """A generative adversarial network for images, at the level of users.

    In each round the server sends the critic's weights and a few synthetic images of every label.
    A user who joins by a secret coin takes one gradient step of the critic on their own records
    against those images and contributes the change of the weights. The framework clips it as a
    whole. From the noisy mean change the server knows what real images have in excess of synthetic
    ones, and lets critic and network play on synthetic images alone. Users never hold the network.

    A first sum measures the share of each label, for a small part of the budget. The released
    network has the mean weights of the second half of the rounds.

    Attributes:
      label: Column that the network is told of; `None`: the schema's target if that is a
        category; `""`: none. The schema may hold no other column.
      num_users: Declared, public number of users; divides the sums together with
        `sampling_prob`. Never taken from data.
      num_rounds: Rounds.
      sampling_prob: Probability that a user joins a round.
      clip: L2 bound of a user's update; with `clip_quantile` that of the first round.
      clip_quantile: Share of users whose update shall fit the clip, which then follows it from
        round to round; `None`: the clip is fixed. The whole costs the same.
      num_critic: Units of the critic's hidden layer.
      num_fakes: Synthetic images of each label that users compare theirs with.
      steps_per_round: Steps of critic and network in a round.
      batch_size: Synthetic images of a step.
      gain: How far the critic moves for a gap between real and synthetic images.
      pull: Share of its way from its beginning that the critic loses at each step.
      memory: Share that earlier rounds have in what is known of real images.
      num_codes: Gaussian numbers that a synthetic image is made from.
      num_hidden: Units of the network's two hidden layers.
      network_lr: Step of the network, by Adam without momentum.
      pixel_noise: Noise on a synthetic pixel, as a fraction of its range.

    Privacy:
      The first sum is of mean vectors of one cell a record, of norm one at most. The others are
      clipped. Users who join are sampled by their own secret coins, which is what the event is
      priced for. The network sees noisy sums and the critic made of them, so it costs nothing.

    Reference:
      Augenstein et al. (2020), "Generative Models for Effective ML on Private, Decentralized
      Datasets", arXiv 1911.06679, Algorithm 1. What is ours: one step a user and many at the
      server, by the gradient that synthetic images have; a critic that is pulled back (`Duel`).
    """

    label: str | None = None
    num_users: int = 1000
    num_rounds: int = 40
    sampling_prob: float = 0.2
    clip: float = 1.0
    clip_quantile: float | None = 0.5
    num_critic: int = 24
    num_fakes: int = 8
    steps_per_round: int = 30
    batch_size: int = 100
    gain: float = 0.1
    pull: float = 0.2
    memory: float = 0.9
    num_codes: int = 16
    num_hidden: int = 128
    network_lr: float = 0.004
    pixel_noise: float = 0.2
    name: ClassVar[str] = "dp_fedavg_gan"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        whole = (
            "num_rounds",
            "num_critic",
            "num_fakes",
            "steps_per_round",
            "batch_size",
            "num_codes",
            "num_hidden",
        )
        check_range(1, _MOST, **{key: getattr(self, key) for key in whole})
        if self.num_users < 1:
            raise ConfigError(f"num_users must be 1 or more, not {self.num_users}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob must lie in (0, 1], not {self.sampling_prob!r}")
        for key, most in (("clip", 1e6), ("gain", 1e3), ("pull", 1.0), ("network_lr", 1.0)):
            if not 0 < getattr(self, key) < most:
                raise ConfigError(f"{key} must lie in (0, {most:g}), not {getattr(self, key)!r}")
        if not 0 <= self.memory < 1:
            raise ConfigError(f"memory must lie in [0, 1), not {self.memory!r}")
        if not 0 <= self.pixel_noise <= 1:
            raise ConfigError(f"pixel_noise must lie in [0, 1], not {self.pixel_noise!r}")
        check_settings(
            quantile=0.5 if self.clip_quantile is None else self.clip_quantile,
            rate=_CLIP_RATE,
            bit_share=_CLIP_BIT_SHARE,
        )

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One sum over all users for labels, and `num_rounds` over those who joined by a coin."""
        from ..core.accounting import compose, event_of, single_event

        critic, label = self._critic_for(schema)
        widest = max(critic.num_seen, self.num_hidden)
        refuse_wide(schema, self.name, max(critic.num_weights, widest * self.num_hidden))
        refuse_wide(schema, self.name, self.num_fakes * critic.num_labels * critic.num_seen)
        first, each = self._split(noise_multiplier, label)
        rounds = event_of({(each, float(self.sampling_prob)): self.num_rounds})
        return rounds if label < 0 else compose([single_event(first), rounds])

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Measure labels; then play a round with each noisy sum of updates."""
        return without_checkpoints(self.rounds_from(schema, noise_multiplier, rng, None))

    def rounds_from(
        self,
        schema: Schema,
        noise_multiplier: float,
        rng: np.random.Generator,
        state: State | None,
    ) -> Steps:
        """`rounds` from the state of a checkpoint on; `None`: from the beginning."""
        critic, label = self._critic_for(schema)
        first, each = self._split(noise_multiplier, label)
        if state is not None:
            if (known := state.get("optimizer.probs")) is None:
                raise ConfigError("a checkpoint without this strategy's network; start anew")
            duel, steps = self._begun(critic, known, each, np.random.default_rng(0))
            steps.restore(state)
            duel.rng = rng
        else:
            probs = np.ones(1)
            if label >= 0:
                histogram = Histograms.balanced([(Grid.whole(label, schema.shape[label]),)])
                noisy = yield histogram.query(_LABELS, noise_multiplier=first, max_norm=1.0)
                probs = _label_probs(histogram, noisy, schema.shape[label])
            duel, steps = self._begun(critic, probs, each, rng)
        shape = RecordShape.of(schema).inputs()
        while not duel.is_over:
            noisy = yield steps.ask({**shape, "fakes": duel.fakes()})
            steps.take(noisy)
            duel.ended()
            yield Checkpoint(steps.state)
        return duel.network(schema, label)

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """The mean over each user's records of their label, or each user's change of the critic."""
        if query.name == _LABELS:
            return cells_of(query, shard).user_means()
        shape = RecordShape.from_inputs(query.inputs)
        weights, fakes = query.inputs.get("weights"), query.inputs.get("fakes")
        if weights is None or fakes is None:
            raise ConfigError("the request lacks the critic's weights or the synthetic images")
        critic = ImageCritic.of(shape, self.num_critic, fakes)
        has_bit = self.clip_quantile is not None
        if query.dim != critic.num_weights + has_bit:
            raise ConfigError("the request's weights do not fit the critic of its settings")
        shape.check(shard.records)
        one_step = LocalTraining(steps=1, lr=1.0)
        made = Made(shape, (ImageCritic, self.num_critic, fakes.shape))
        seed = int(rng.integers(1 << 62))
        rows = updates(critic, weights, shard, one_step, made=made, seed=seed)
        if has_bit:
            rows = with_bit(rows, clip=query.clip, bit_share=_CLIP_BIT_SHARE)
        return Contribution.rows(rows)

    def _critic_for(self, schema: Schema) -> tuple[ImageCritic, int]:
        """The critic of a schema's images, and the position of their label or -1."""
        critic = ImageCritic.of(RecordShape.of(schema), self.num_critic)
        label = label_column(schema, self.label)
        if critic.label and label < 0:
            raise ConfigError(
                f"column {schema.names[0]!r} stands beside the image but is no label: leave it out"
                f" of the schema, or set label = {schema.names[0]!r}"
            )
        return critic, label

    def _split(self, noise_multiplier: float, label: int) -> tuple[float, float]:
        """Noise multipliers of the sum of labels and of each other.

        Chosen so that without sampling all of them together cost as much as one Gaussian with
        `noise_multiplier`; with it, nearly as much while noise is large.
        """
        share = _LABELS_SHARE if label >= 0 else 0.0
        each = (self.num_rounds / (1 - share)) ** 0.5 * self.sampling_prob
        return noise_multiplier / _LABELS_SHARE**0.5, noise_multiplier * each

    def _begun(
        self,
        critic: ImageCritic,
        probs: NDArray[np.float64],
        noise_multiplier: float,
        rng: np.random.Generator,
    ) -> tuple[Duel, Updates]:
        """Critic and network before the first round, and who asks users for updates of the critic.

        Args:
          critic: The critic's form.
          probs: Share of each label.
          noise_multiplier: Of each sum of updates.
          rng: Public randomness.
        """
        play = Play(
            steps=self.steps_per_round,
            batch=self.batch_size,
            gain=self.gain,
            pull=self.pull,
            memory=self.memory,
            rate=self.network_lr,
        )
        duel = Duel(
            critic,
            play,
            num_codes=self.num_codes,
            num_hidden=self.num_hidden,
            num_fakes=self.num_fakes,
            pixel_noise=self.pixel_noise,
            label_probs=probs,
            num_rounds=self.num_rounds,
            rng=rng,
        )
        return duel, Updates(
            duel.start,
            name=_CRITIC,
            clip=self.clip,
            noise_multiplier=noise_multiplier,
            sampling_prob=self.sampling_prob,
            num_users=self.num_users,
            optimizer=duel,
            adaptive=clip_that_follows(
                self.clip,
                quantile=self.clip_quantile,
                rate=_CLIP_RATE,
                bit_share=_CLIP_BIT_SHARE,
                num_users=self.num_users,
                sampling_prob=self.sampling_prob,
            ),
        )


def _label_probs(histogram: Histograms, noisy: NoisySum, num_labels: int) -> NDArray[np.float64]:
    """Share of each label; equal ones where the sum is but noise."""
    for found in histogram.measured(noisy):
        total = pooled_total([(found.counts, found.stddev)])
        if total > 0:
            return to_simplex(found.counts / total)
    return np.full(num_labels, 1 / num_labels)
