# SPDX-License-Identifier: Apache-2.0
"""Train a small generator by clipped updates of users, each round with users by secret coins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from dp_accounting.dp_event import DpEvent
from numpy.typing import NDArray

from ..core import accounting
from ..core.errors import ConfigError
from ..core.query import Contribution, Query, Rounds, Strategy
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .parts.autoencoder import LocalTraining, Net, net_data, parse_net, updates
from .parts.width import refuse_wide


@dataclass(frozen=True)
class DpFedAvg(Strategy):
    """Federated averaging of a variational autoencoder, at the level of users.

    In each round every user joins by a secret coin, takes `local_steps` gradient steps from the
    shared weights on all their own records, and contributes the change of the weights, clipped
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
      server_optimizer: `adam` (FedAdam) or `sgd` (FedAvg, with momentum: FedAvgM).
      server_lr: Step of the server.
      momentum: Of the server's optimizer.
      model: `mlp`, or `cnn` for images.
      hidden: Units of the hidden layers.
      latent: Units of the code.
      kl_weight: Weight of the code's divergence from the standard normal; on
        scikit-learn's digits 100 rounds learn far more with 0.2 than with 1.

    Reference:
      McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", arXiv
      1710.06963, Algorithm 1 with the fixed-denominator estimator; Reddi et al. (2021),
      "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2.
    """

    name: ClassVar[str] = "dp_fedavg"
    num_users: int = 1000
    num_rounds: int = 100
    sampling_prob: float = 0.2
    clip: float = 1.0
    local_steps: int = 1
    local_lr: float = 0.1
    server_optimizer: Literal["adam", "sgd"] = "adam"
    server_lr: float = 0.02
    momentum: float = 0.9
    model: Literal["mlp", "cnn"] = "mlp"
    hidden: int = 128
    latent: int = 8
    kl_weight: float = 0.2

    def __post_init__(self) -> None:
        for key in ("num_users", "num_rounds", "local_steps", "hidden", "latent"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, not {getattr(self, key)}")
        for key in ("clip", "local_lr", "server_lr"):
            if not 0 < getattr(self, key) < 1e6:
                raise ConfigError(f"{key} must be above 0, not {getattr(self, key)}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob must lie in (0, 1], not {self.sampling_prob}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), not {self.momentum}")
        if not 0 <= self.kl_weight < 1e6:
            raise ConfigError(f"kl_weight must be 0 or more, not {self.kl_weight}")

    def event(self, schema: Schema, noise_multiplier: float) -> DpEvent:
        """`num_rounds` sums over users who joined by a coin, each with `noise_multiplier`."""
        self._net(schema)
        return accounting.event_of({(noise_multiplier, float(self.sampling_prob)): self.num_rounds})

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask for updates and move the weights by them."""
        net = self._net(schema)
        weights = net.initial(rng).astype(np.float64)
        optimizer = _Optimizer(self, len(weights))
        mean, counted = np.zeros_like(weights), 0
        shape = np.array([net.num_pixels, *net.cells], dtype=np.int64)
        for number in range(self.num_rounds):
            noisy = yield Query(
                "update",
                dim=net.num_weights,
                clip=self.clip,
                noise_multiplier=noise_multiplier,
                sampling_prob=float(self.sampling_prob),
                inputs={
                    "weights": weights.astype(np.float32),
                    "shape": shape,
                    "image": np.array(net.image or (), dtype=np.int64),
                },
            )
            if not noisy.is_void:
                weights = weights + optimizer.step(
                    noisy.vector / (self.sampling_prob * self.num_users)
                )
            if number >= self.num_rounds // 2:
                counted += 1
                mean += (weights - mean) / counted
        return Autoencoder(schema, net, mean.astype(np.float32))

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's change of the weights."""
        image = tuple(int(side) for side in query.inputs["image"])
        cells = tuple(int(size) for size in query.inputs["shape"][1:])
        net = Net(
            self.model,
            cells,
            (image[0], image[1], image[2]) if len(image) == 3 else None,
            self.hidden,
            self.latent,
        )
        weights = query.inputs["weights"]
        if net.num_weights != query.dim or weights.shape != (query.dim,):
            raise ConfigError("the request's weights do not fit the model of its settings")
        training = LocalTraining(self.local_steps, self.local_lr, self.kl_weight)
        seed = int(rng.integers(1 << 62))
        return Contribution.rows(updates(net, weights, shard, training, seed=seed))

    def _net(self, schema: Schema) -> Net:
        """The model for a schema."""
        shape = schema.image.shape if schema.image else None
        net = Net(self.model, schema.shape, shape, self.hidden, self.latent)
        refuse_wide(schema, self.name, net.num_weights)
        return net


class _Optimizer:
    """The server's optimizer, over noisy mean updates."""

    def __init__(self, settings: DpFedAvg, size: int) -> None:
        self._settings = settings
        self._first, self._second = np.zeros(size), np.zeros(size)
        self._steps = 0

    def step(self, update: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far the weights move for one mean update."""
        settings = self._settings
        self._steps += 1
        if settings.server_optimizer == "sgd":
            self._first = settings.momentum * self._first + update
            return settings.server_lr * self._first
        self._first += (1 - settings.momentum) * (update - self._first)
        self._second += 0.01 * (update**2 - self._second)
        first = self._first / (1 - settings.momentum**self._steps)
        second = self._second / (1 - 0.99**self._steps)
        return settings.server_lr * first / (np.sqrt(second) + 1e-12)


@dataclass(frozen=True)
class Autoencoder(Synthesizer):
    """A variational autoencoder; records are decoded from standard normal codes."""

    kind: ClassVar[str] = "autoencoder"
    schema: Schema
    net: Net
    weights: NDArray[np.float32]

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """`num_records` decoded records."""
        return self.net.sampled(self.weights, num_records, rng)

    def settings(self) -> dict[str, Any]:
        """The model's shape."""
        return net_data(self.net)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights, as one flat vector."""
        return {"weights": self.weights}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The autoencoder that was saved."""
        net = parse_net(settings)
        weights = np.asarray(tensors["weights"], dtype=np.float32)
        if weights.shape != (net.num_weights,) or net.cells != schema.shape:
            raise ConfigError("the saved weights do not fit the saved model or the schema")
        return cls(schema, net, weights)
