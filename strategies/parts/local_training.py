# SPDX-License-Identifier: Apache-2.0
"""What each user does with the weights: gradient steps on records of their own, and no others'."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import BoundedShard
from .trainable import Trainable

_ORDER, _CHANCE = 0, 1  # streams of public randomness
_READ_RECORDS = 2048  # read at a time, so that memory is bounded


@dataclass(frozen=True)
class LocalTraining:
    """Gradient steps of each user.

    Attributes:
      steps: Gradient steps; one is federated SGD.
      lr: Their size.
      batch: Records of a step, taken one after the other, and from the first again, in the order
        of a public permutation of places. `None`, or at least as many as the user has: all.
    """

    steps: int
    lr: float
    batch: int | None = None


def updates(
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    *,
    seed: int,
) -> NDArray[np.float32]:
    """Each user's change of the weights, `(num_users, num_weights)`, float32.

    A step goes down the mean loss of its records. A user's row depends on the user's own records
    alone, to the last bit. Which records a step takes, and the randomness of their losses, are
    drawn by the place of a record among its user's, and are the same for every user.

    Args:
      model: The model.
      weights: Where every user starts, `(num_weights,)`.
      shard: The users.
      training: What each does.
      seed: Of the public randomness.

    Raises:
      ConfigError: The weights do not fit the model, or torch is not installed.
    """
    torch = torch_for_training()  # for nobody, too: a client that lacks it says so at once
    model.check_fit(weights)
    rows = np.zeros((shard.num_users, model.num_weights), dtype=np.float32)
    if shard.num_users:
        with one_thread(torch):
            _loop(torch, model, weights, shard, training, seed, rows)
    return rows


def places(num_records: int, training: LocalTraining, *, seed: int) -> list[NDArray[np.int64]]:
    """Places of the records that each local step of a user of `num_records` takes."""
    everything = np.arange(num_records)
    if training.batch is None or training.batch >= num_records:
        return [everything] * training.steps
    keys = np.random.default_rng([seed, _ORDER]).random(num_records)  # by place
    order = np.argsort(keys, kind="stable")
    turns = np.arange(training.steps * training.batch) % num_records
    return list(order[turns].reshape(training.steps, training.batch))


def _loop(
    torch: Any,
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    seed: int,
    rows: NDArray[np.float32],
) -> None:
    """`updates` user by user, into `rows`.

    Every user's numbers lie in the same memory, or in tensors of their own: a product's last bits
    may depend on where in memory its factors begin.
    """
    starts = shard.starts
    chance = _Chance(torch, model, training, int(np.diff(starts).max()), seed)
    start = torch.from_numpy(np.array(weights, dtype=np.float32))
    moved, slope = torch.empty_like(start), torch.empty_like(start)
    now = {name: part.requires_grad_() for name, part in model.split(moved).items()}
    for name, part in model.split(slope).items():
        now[name].grad = part
    for user, seen in _read(torch, model, shard, starts):
        row = torch.from_numpy(rows[user])
        num_records = int(starts[user + 1] - starts[user])
        moved.copy_(start)
        for step, taken in enumerate(places(num_records, training, seed=seed)):
            if step:
                torch.add(start, row, out=moved)
            slope.zero_()
            picked = torch.from_numpy(taken)
            drawn = tuple(part[picked] for part in chance.of_step(step))
            own = tuple(part[picked] for part in seen)
            model.losses(torch, now, own, drawn).mean().backward()
            row.sub_(slope, alpha=training.lr)


def _read(
    torch: Any, model: Trainable, shard: BoundedShard, starts: NDArray[np.int64]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each user's number and records as tensors."""
    first = 0
    while first < shard.num_users:
        last = int(np.searchsorted(starts, starts[first] + _READ_RECORDS, side="right")) - 1
        last = max(first + 1, min(last, shard.num_users))
        seen = model.read(torch, shard.records.take(slice(int(starts[first]), int(starts[last]))))
        for user in range(first, last):
            own = slice(int(starts[user] - starts[first]), int(starts[user + 1] - starts[first]))
            yield user, tuple(part[own] for part in seen)
        first = last


class _Chance:
    """The randomness of losses, by step and place."""

    def __init__(
        self, torch: Any, model: Trainable, training: LocalTraining, most: int, seed: int
    ) -> None:
        self._steps = [
            tuple(
                torch.from_numpy(np.ascontiguousarray(part))
                for part in model.chance(np.random.default_rng([seed, _CHANCE, step]), most)
            )
            for step in range(training.steps)
        ]

    def of_step(self, step: int) -> tuple[Any, ...]:
        """By place, for one step."""
        return self._steps[step]


def torch_for_training() -> Any:
    """Torch, loaded when it is first needed.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "training by users needs torch at the clients: pip install 'fedsynth[train]'"
        ) from error
    return torch


@contextmanager
def one_thread(torch: Any) -> Iterator[None]:
    """One torch thread within the block: on small models more of them only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
