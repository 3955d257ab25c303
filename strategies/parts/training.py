# SPDX-License-Identifier: Apache-2.0
"""Train a model by clipped updates of users, each round with users by secret coins."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.electorate import Electorate
from ...core.errors import ConfigError
from ...core.query import Contribution, Query, Rounds, Strategy
from ...core.records import BoundedShard
from ...core.schema import Schema
from .local_training import LocalTraining, PerUser, updates
from .proposal import Pull
from .server_optimizer import ServerOptimizer
from .signal import Prospect
from .trainable import RecordShape, Trainable
from .updates import Updates
from .width import refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


@dataclass(frozen=True)
class Training(Strategy):
    """Federated averaging of any `Trainable`, at the level of users.

    In each round every user joins by a secret coin, takes `local_steps` gradient steps from the
    shared weights on their own records, and contributes the change of the weights, clipped
    as a whole. The noisy sum is divided by a fixed, public number and moves the weights by a
    server optimizer. The released weights are the mean over the second half of the rounds, which
    averages noise out and costs nothing.

    Attributes:
      num_users: Declared, public number of users; divides the sum together with
        `sampling_prob`. Never taken from data.
      num_rounds: Rounds.
      sampling_prob: Probability that a user joins a round.
      clip: L2 bound of a user's update.
      local_steps: Gradient steps of each user; 1 is federated SGD.
      local_lr: Their size.
      local_batch: Records of a local step; `None`: all that the user has.
      per_user: How users' steps are taken: `loop`, one user by one; `vmap`, side by side; `auto`,
        as is faster for the model. Speed alone.
      server_optimizer: `adam` (FedAdam) or `sgd` (FedAvg, with momentum: FedAvgM).
      server_lr: Step of the server.
      momentum: Of the server's optimizer.

    Reference:
      McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", arXiv
      1710.06963, Algorithm 1 with the fixed-denominator estimator; Reddi et al. (2021),
      "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2.
    """

    num_users: int = 1000
    num_rounds: int = 100
    sampling_prob: float = 0.2
    clip: float = 1.0
    local_steps: int = 1
    local_lr: float = 0.1
    local_batch: int | None = None
    per_user: PerUser = "auto"
    server_optimizer: Literal["adam", "sgd"] = "adam"
    server_lr: float = 0.02
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for key in ("num_users", "num_rounds", "local_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if self.local_batch is not None and self.local_batch < 1:
            raise ConfigError(f"local_batch must be 1 or more, not {self.local_batch}")
        for key in ("clip", "local_lr", "server_lr"):
            if not 0 < getattr(self, key) < 1e6:
                raise ConfigError(f"{key} must be above 0, not {getattr(self, key)}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob must lie in (0, 1], not {self.sampling_prob}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), not {self.momentum}")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse impossible values of the strategy's own settings, by `ConfigError`."""

    @abstractmethod
    def model_for(self, shape: RecordShape) -> Trainable:
        """The model for records of a shape; built from settings and the shape alone.

        Raises:
          ConfigError: It has none for such records.
        """

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """`num_rounds` sums over users who joined by a coin, each with `noise_multiplier`."""
        from ...core.accounting import event_of

        refuse_wide(schema, self.name, self.model_for(RecordShape.of(schema)).num_weights)
        return event_of({(noise_multiplier, float(self.sampling_prob)): self.num_rounds})

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask for updates and move the weights by them."""
        shape = RecordShape.of(schema)
        model = self.model_for(shape)
        steps = self.updates_from(model.initial(rng), noise_multiplier)
        mean, counted = np.zeros_like(steps.weights), 0
        for number in range(self.num_rounds):
            noisy = yield steps.ask(shape.inputs())
            weights = steps.take(noisy)
            if number >= self.num_rounds // 2:
                counted += 1
                mean += (weights - mean) / counted
        return model.synthesizer(schema, mean.astype(np.float32))

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's change of the weights."""
        shape = RecordShape.from_inputs(query.inputs)
        return self.contribution(self.model_for(shape), shape, query, shard, rng)

    def pull(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Pull:
        """What updates pull in common, beside the noise of a round and of the run."""
        return Pull(
            users.num_users,
            self.model_for(RecordShape.of(schema)).num_weights,
            self.num_rounds,
            float(self.sampling_prob),
            noise_multiplier,
        )

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse a run that would move the weights by noise alone.

        Raises:
          ConfigError: It would; says what to set instead.
        """
        self.pull(schema, noise_multiplier, users).check()

    def prospect(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Prospect:
        """What to expect of the updates, and which other settings would tell more."""
        optimizer = self.server_optimizer
        return self.pull(schema, noise_multiplier, users).prospect(
            "update", step=self.server_lr if optimizer == "adam" else None
        )

    def updates_from(self, weights: NDArray[np.float32], noise_multiplier: float) -> Updates:
        """The server's half of the rounds, from some weights on."""
        optimizer = ServerOptimizer(
            self.server_optimizer, len(weights), lr=self.server_lr, momentum=self.momentum
        )
        return Updates(
            weights,
            clip=self.clip,
            noise_multiplier=noise_multiplier,
            sampling_prob=self.sampling_prob,
            num_users=self.num_users,
            optimizer=optimizer,
        )

    def contribution(
        self,
        model: Trainable,
        shape: RecordShape,
        query: Query,
        shard: BoundedShard,
        rng: np.random.Generator,
    ) -> Contribution:
        """The clients' half of a round: each user's change of the query's weights."""
        weights = query.inputs.get("weights")
        if weights is None or query.dim != model.num_weights:
            raise ConfigError("the request's weights do not fit the model of its settings")
        shape.check(shard.records)
        training = LocalTraining(self.local_steps, self.local_lr, self.local_batch, self.per_user)
        seed = int(rng.integers(1 << 62))
        return Contribution.rows(updates(model, weights, shard, training, seed=seed))
