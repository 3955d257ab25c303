# SPDX-License-Identifier: Apache-2.0
"""Train a model by clipped updates of users, each round with users by secret coins."""

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.answering import without_checkpoints
from ...core.checkpoint import Checkpoint, State
from ...core.electorate import Electorate
from ...core.errors import ConfigError
from ...core.leaf import Leaf
from ...core.query import MAX_RECORDS, Contribution, Query, Rounds, Steps, Strategy
from ...core.records import BoundedShard
from ...core.schema import Schema
from .adaptive_clip import check_settings, clip_that_follows, with_bit
from .example_training import downhill
from .factorization import Correlation, check_turns, series_of
from .local_training import LocalTraining, PerUser, updates
from .proposal import Pull
from .server_optimizer import ServerOptimizer
from .signal import Prospect
from .trainable import Made, RecordShape, Trainable
from .unfit import refuse_unfit
from .updates import Updates
from .width import refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Level = Literal["user", "example"]
_SCALE_FREE = ("fedadam", "fedyogi", "fedadagrad")  # move by their step, however long an update is


@dataclass(frozen=True)
class Training(Strategy):
    """Federated averaging of any `Trainable`, at the level of users or of their records.

    In each round every user joins by a secret coin (with `correlation`: by turns), takes
    `local_steps` gradient steps from the shared weights on their own records, and contributes the
    change of the weights, clipped as a whole. The noisy sum is divided by a fixed, public number
    and moves the weights by a server optimizer. The released weights are the mean over the second
    half of the rounds, which averages noise out and costs nothing.

    Attributes:
      num_users: Declared, public number of users; divides the sum together with
        `sampling_prob`. Never taken from data.
      num_rounds: Rounds.
      sampling_prob: Probability that a user joins a round.
      clip: L2 bound of a user's update; with `clip_quantile` that of the first round.
      clip_quantile: Share of users whose update shall fit the clip, which then follows it from
        round to round; `None`: the clip is fixed. The whole costs the same.
      clip_rate: How fast it follows.
      clip_bit_share: Share of the clip that the bit takes by which it follows. A larger one tells
        more clearly how many updates fitted; updates are clipped to sqrt(1 - share^2) of the clip.
      correlation: Noise of later rounds takes back what earlier rounds' added, so that the weights
        carry less of it: `banded`, or `blt` with coefficients of few powers. Users then take turns
        instead of flipping coins, which needs `sampling_prob` 1. `server_optimizer` should then be
        `fedavgm`: Adam divides by the spread of single rounds, which correlation makes wider.
      separation: With `correlation`: rounds from one turn of a user to the next.
      level: Whose vectors are clipped and summed. `user`: each user's update. `example`: each
        record's gradient, by a coin of its own (DP-SGD). What is promised is the same, to users;
        the noise is then priced by how many of a user's records may join at once.
      records_per_user: With `level` `example`: most records of a user; as `unit.max_records`.
      mean_records: With `level` `example`: declared, public mean number of records of a user, by
        which the sum is divided, too. `None`: 1. Never taken from data.
      local_steps: Gradient steps of each user; 1 is federated SGD.
      local_lr: Their size.
      local_batch: Records of a local step; `None`: all that the user has.
      per_user: How users' steps are taken: `loop`, one user by one; `vmap`, side by side; `auto`,
        as is faster for the model. Speed alone.
      server_optimizer: A strategy of Flower's, which is handed the noisy mean as its one reply:
        `fedavg`, `fedavgm`, `fedadam`, `fedyogi`, `fedadagrad`; or your own, installed as an entry
        point of `fedsynth.server_optimizers`.
      server_lr: Step of the server, but for `fedavg`, which takes the mean as it is.
      momentum: Of `fedavgm`, `fedadam` and `fedyogi`.
      server_settings: More for the optimizer's constructor; all of it, for your own.

    Reference:
      McMahan et al. (2018), "Learning Differentially Private Recurrent Language Models", arXiv
      1710.06963, Algorithm 1 with the fixed-denominator estimator; Reddi et al. (2021),
      "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2. Of the clip that follows:
      `parts/adaptive_clip.py`; of correlated noise: `parts/factorization.py`. Of sums over
      records: Abadi et al. (2016), "Deep Learning with Differential Privacy", arXiv 1607.00133,
      Algorithm 1, and for their price `core/mixture.py`.
    """

    num_users: int = 1000
    num_rounds: int = 100
    sampling_prob: float = 0.2
    clip: float = 1.0
    local_steps: int = 1
    local_lr: float = 0.1
    local_batch: int | None = None
    per_user: PerUser = "auto"
    server_optimizer: str = "fedadam"
    server_lr: float = 0.02
    momentum: float = 0.9
    server_settings: dict[str, Any] = field(default_factory=dict)
    clip_quantile: float | None = None
    clip_rate: float = 0.2
    clip_bit_share: float = 0.1
    correlation: Correlation = "none"
    separation: int = 10
    level: Level = "user"
    records_per_user: int | None = None
    mean_records: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for key in ("num_users", "num_rounds", "local_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if self.local_batch is not None and self.local_batch < 1:
            raise ConfigError(f"local_batch must be 1 or more, not {self.local_batch}")
        for key in ("clip", "local_lr"):
            if not 0 < getattr(self, key) < 1e6:
                raise ConfigError(f"{key} must be above 0, not {getattr(self, key)}")
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob must lie in (0, 1], not {self.sampling_prob}")
        check_settings(
            quantile=0.5 if self.clip_quantile is None else self.clip_quantile,
            rate=self.clip_rate,
            bit_share=self.clip_bit_share,
        )
        self._check_correlation()
        self._optimizer()
        self._check_level()
        self.check()

    def _check_correlation(self) -> None:
        """Refuse what correlated noise does not go with."""
        if self.correlation not in ("none", "banded", "blt"):
            raise ConfigError(
                f"correlation must be 'none', 'banded' or 'blt', not {self.correlation!r}"
            )
        if self.correlation == "none":
            return
        check_turns(self.num_rounds, self.separation)
        if self.sampling_prob != 1:
            raise ConfigError(
                "with correlated noise users take turns instead of flipping coins: set"
                f" sampling_prob to 1, not {self.sampling_prob}, and separation to the rounds from"
                " one turn of a user to the next"
            )
        if self.clip_quantile is not None:
            raise ConfigError(
                "rounds whose noise is correlated have one clip: leave out clip_quantile, or"
                " correlation"
            )

    def _check_level(self) -> None:
        """Refuse what sums over users or over records have no use for."""
        if self.level not in ("user", "example"):
            raise ConfigError(f"level must be 'user' or 'example', not {self.level!r}")
        most, mean = self.records_per_user, self.mean_records
        if self.level == "user":
            if most is not None or mean is not None:
                raise ConfigError(
                    "records_per_user and mean_records are of level = 'example': at the level of"
                    " users each has one update, whatever number of records it was made of"
                )
            return
        if most is None or not 1 <= most <= MAX_RECORDS:
            raise ConfigError(
                f"with level = 'example' a user's price is that of records_per_user records, 1 to"
                f" {MAX_RECORDS:,}, not {most}. Set it to unit.max_records"
            )
        if mean is not None and not 0 < mean <= most:
            raise ConfigError(
                f"mean_records must lie above 0 and at most at records_per_user = {most}, not"
                f" {mean}"
            )
        alone = {"local_steps": (1,), "local_batch": (None, 1), "clip_quantile": (None,)}
        for key, fitting in alone.items():
            if getattr(self, key) not in fitting:
                raise ConfigError(
                    "with level = 'example' each record's gradient is clipped on its own, once and"
                    f" at a fixed clip: leave out {key} = {getattr(self, key)}"
                )
        if self.correlation != "none":
            raise ConfigError("records join by coins: leave out correlation, or level = 'example'")

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
        """`num_rounds` sums over users who joined by a coin, each with `noise_multiplier`.

        With correlated noise one series, which costs one sum with it.
        """
        from ...core.accounting import event_of, single_event

        self._optimizer().build(seed=0)
        shape = RecordShape.of(schema)
        model = self.model_for(shape)
        refuse_wide(schema, self.name, model.num_weights)
        if find_spec("torch") is not None:  # else clients refuse, before they look at a record
            refuse_unfit(model, self.made(shape), level=self.level)
        if self.correlation != "none":
            return single_event(noise_multiplier, rounds=self.num_rounds)
        leaf = Leaf(noise_multiplier, float(self.sampling_prob), self.records_per_user or 1)
        return event_of({leaf: self.num_rounds})

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """Ask for updates and move the weights by them."""
        return without_checkpoints(self.rounds_from(schema, noise_multiplier, rng, None))

    def rounds_from(
        self,
        schema: Schema,
        noise_multiplier: float,
        rng: np.random.Generator,
        state: State | None,
    ) -> Steps:
        """`rounds` from the state of a checkpoint on; `None`: from the beginning."""
        shape = RecordShape.of(schema)
        model = self.model_for(shape)
        start = np.zeros(model.num_weights) if state is not None else model.initial(rng)
        steps = self.updates_from(start, noise_multiplier, rng if state is None else None)
        mean = np.zeros(model.num_weights)
        if state is not None:
            steps.restore(state)
            mean = np.array(state["mean"])
        for number in range(steps.position, self.num_rounds):
            noisy = yield steps.ask({**shape.inputs(), **model.inputs()})
            weights = steps.take(noisy)
            if number >= self.num_rounds // 2:
                mean = mean + (weights - mean) / (number - self.num_rounds // 2 + 1)
            if steps.can_be_kept:
                yield Checkpoint(partial(_state_of, steps, mean))
        return model.synthesizer(schema, mean.astype(np.float32))

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's change of the weights."""
        shape = RecordShape.from_inputs(query.inputs)
        return self.contribution(self.model_for(shape), shape, query, shard, rng)

    def pull(self, schema: Schema, noise_multiplier: float, users: Electorate) -> Pull | None:
        """What updates pull in common, beside the noise; `None` where that is not reckoned."""
        if self.correlation != "none":
            return None
        return Pull(
            users.num_users * (self.mean_records or 1.0),
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
        pull = self.pull(schema, noise_multiplier, users)
        if pull is not None:
            pull.check()

    def prospect(
        self, schema: Schema, noise_multiplier: float, users: Electorate
    ) -> Prospect | None:
        """What to expect of the updates, and which other settings would tell more."""
        pull = self.pull(schema, noise_multiplier, users)
        step = self.server_lr if self.server_optimizer in _SCALE_FREE else None
        clip = self.clip if self.clip_quantile is None else None
        return None if pull is None else pull.prospect("update", step=step, clip=clip)

    def updates_from(
        self,
        weights: NDArray[Any],
        noise_multiplier: float,
        rng: np.random.Generator | None,
    ) -> Updates:
        """The server's half of the rounds, from some weights on.

        Args:
          weights: Public, `(num_weights,)`.
          noise_multiplier: Of each sum.
          rng: Public randomness of the optimizer; `None`: a checkpoint will be restored.
        """
        adaptive = clip_that_follows(
            self.clip,
            quantile=self.clip_quantile,
            rate=self.clip_rate,
            bit_share=self.clip_bit_share,
            num_users=self.num_users,
            sampling_prob=self.sampling_prob,
        )
        return Updates(
            weights,
            clip=self.clip,
            noise_multiplier=noise_multiplier,
            sampling_prob=self.sampling_prob,
            num_users=self.num_users,
            records=self.records_per_user or 0,
            mean_records=self.mean_records or 1.0,
            optimizer=self._optimizer().build(seed=int(rng.integers(1 << 31)) if rng else 0),
            adaptive=adaptive,
            series=series_of(
                self.correlation, num_rounds=self.num_rounds, separation=self.separation
            ),
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
        has_bit = self.clip_quantile is not None
        if weights is None or query.dim != model.num_weights + has_bit:
            raise ConfigError("the request's weights do not fit the model of its settings")
        shape.check(shard.records)
        if (query.records > 0) != (self.level == "example"):
            raise ConfigError(f"a request that is not at the level of {self.level}s")
        model.check_inputs(query.inputs)
        refuse_unfit(model, self.made(shape), level=self.level)
        seed = int(rng.integers(1 << 62))
        if self.level == "example":
            return Contribution.rows(
                downhill(model, weights, shard, made=self.made(shape), seed=seed)
            )
        training = LocalTraining(self.local_steps, self.local_lr, self.local_batch, self.per_user)
        rows = updates(model, weights, shard, training, made=self.made(shape), seed=seed)
        if has_bit:
            rows = with_bit(rows, clip=query.clip, bit_share=self.clip_bit_share)
        return Contribution.rows(rows)

    def made(self, shape: RecordShape) -> Made:
        """What the model is made of that is trained on records of a shape."""
        return Made(shape, (type(self), repr(self)))

    def _optimizer(self) -> ServerOptimizer:
        """The server's optimizer, by its name."""
        return ServerOptimizer(
            self.server_optimizer, self.server_lr, self.momentum, self.server_settings
        )


def _state_of(steps: Updates, mean: NDArray[np.float64]) -> State:
    """What goes into a checkpoint."""
    return {**steps.state(), "mean": mean}
