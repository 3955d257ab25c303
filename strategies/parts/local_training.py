# SPDX-License-Identifier: Apache-2.0
"""What each user does with the weights: gradient steps on records of their own, and no others'."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import BoundedShard
from .device import device_for
from .trainable import Made, Trainable

PerUser = Literal["auto", "loop", "vmap"]

_ORDER, _CHANCE = 0, 1  # streams of public randomness
_READ_RECORDS = 2048  # read at a time, so that memory is bounded
_SLOPES = 1 << 26  # numbers of records' slopes, for the same reason


@dataclass(frozen=True)
class LocalTraining:
    """Gradient steps of each user.

    Attributes:
      steps: Gradient steps; one is federated SGD.
      lr: Their size.
      batch: Records of a step, taken one after the other, and from the first again, in the order
        of a public permutation of places. `None`, or at least as many as the user has: all.
      per_user: `loop`: users one by one. `vmap`: side by side, where that gives each user the
        same bits whoever stands beside, and else one by one. `auto`: as the model says is faster.
    """

    steps: int
    lr: float
    batch: int | None = None
    per_user: PerUser = "auto"


def updates(
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    *,
    made: Made,
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
      made: What the model was made of.
      seed: Of the public randomness.

    Raises:
      ConfigError: The weights do not fit the model, torch is not installed, or the device that
        this process was told to train on is not there.
    """
    from .side_by_side import side_by_side

    torch = torch_for_training()  # for nobody, too: a client that lacks it says so at once
    device = device_for(torch)
    model.check_fit(weights)
    rows = np.zeros((shard.num_users, model.num_weights), dtype=np.float32)  # nobody else's memory
    if not shard.num_users:
        return rows
    beside = training.per_user == "vmap" or (training.per_user == "auto" and model.side_by_side)
    with one_thread(torch):
        chance = chances(torch, device, model, shard, training, seed=seed)
        task = (torch, device, model, weights)
        if training.steps == 1 and training.per_user == "auto" and model.has_slopes:
            _by_slopes(*task, shard, training, seed, rows)
            return rows
        if not beside:
            _loop(*task, shard, training, seed, chance, rows)
            return rows
        alone = ~side_by_side(*task, made, shard, training, seed, chance, rows)
        if alone.any():
            left = np.zeros((int(alone.sum()), model.num_weights), dtype=np.float32)
            _loop(*task, shard.only(alone), training, seed, chance, left)
            rows[alone] = left
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


def chances(
    torch: Any,
    device: Any,
    model: Trainable,
    shard: BoundedShard,
    training: LocalTraining,
    *,
    seed: int,
) -> list[tuple[Any, ...]]:
    """The randomness of losses for each step, by place."""
    most = int(np.diff(shard.starts).max())
    return [
        tuple(
            torch.from_numpy(np.ascontiguousarray(part)).to(device)
            for part in model.chance(np.random.default_rng([seed, _CHANCE, step]), most)
        )
        for step in range(training.steps)
    ]


def _loop(
    torch: Any,
    device: Any,
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    seed: int,
    chance: list[tuple[Any, ...]],
    rows: NDArray[np.float32],
) -> None:
    """`updates` user by user, into `rows`.

    Every user's numbers lie in the same memory, or in tensors of their own: a product's last bits
    may depend on where in memory its factors begin.
    """
    starts, laid_out = shard.starts, _Layout(torch, model.channels_last)
    start = model.split(torch.from_numpy(np.array(weights, dtype=np.float32)).to(device))
    first = {name: laid_out(part).requires_grad_() for name, part in start.items()}
    moved = {name: laid_out(part) for name, part in start.items()}
    for part in moved.values():
        part.requires_grad_()

    @lru_cache(maxsize=256)
    def taken_by(num_records: int) -> list[Any]:
        steps = places(num_records, training, seed=seed)
        return [torch.from_numpy(taken).to(device) for taken in steps]

    row = torch.empty(model.num_weights, dtype=torch.float32, device=device)
    change = model.split(row)
    for user, seen in _read(torch, device, model, shard, starts):
        for step, taken in enumerate(taken_by(int(starts[user + 1] - starts[user]))):
            now = moved if step else first
            if step:
                with torch.no_grad():
                    for name, part in now.items():
                        torch.add(first[name], change[name], out=part)
            own = tuple(laid_out(part.index_select(0, taken)) for part in seen)
            drawn = tuple(part.index_select(0, taken) for part in chance[step])
            loss = model.losses(torch, now, own, drawn).mean()
            slopes = torch.autograd.grad(
                loss, list(now.values()), allow_unused=True, materialize_grads=True
            )
            for part, slope in zip(change.values(), slopes, strict=True):
                if step:
                    part.sub_(slope, alpha=training.lr)
                else:
                    torch.mul(slope, -training.lr, out=part)
        torch.from_numpy(rows[user]).copy_(row)


def _by_slopes(
    torch: Any,
    device: Any,
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    training: LocalTraining,
    seed: int,
    rows: NDArray[np.float32],
) -> None:
    """`updates` of one step, by the model's own slopes of many users' records, into `rows`."""
    rows[:] = 0
    flat = torch.from_numpy(np.array(weights, dtype=np.float32)).to(device)
    most = max(1, min(_READ_RECORDS, _SLOPES // model.num_weights))
    owners: list[int] = []
    taken: list[int] = []
    for user, (start, end) in enumerate(pairwise(shard.starts.tolist())):
        if end > start:
            own = places(end - start, training, seed=seed)[0].tolist()
            owners += [user] * len(own)
            taken += [start + place for place in own]
    for first in range(0, len(taken), most):
        some, whose = taken[first : first + most], owners[first : first + most]
        seen = model.read(torch, shard.records.take(np.array(some)))
        slopes = model.slopes(torch, flat, tuple(part.to(device) for part in seen))
        for user, slope in zip(whose, slopes, strict=True):
            rows[user] -= slope
    counts = np.maximum(1, np.bincount(owners, minlength=len(rows)))
    rows *= (training.lr / counts)[:, None].astype(np.float32)


class _Layout:
    """Copies a tensor; if asked to, images and kernels with their channels next to each other."""

    def __init__(self, torch: Any, channels_last: bool) -> None:
        self._torch, self._channels_last = torch, channels_last

    def __call__(self, part: Any) -> Any:
        if not (self._channels_last and part.dim() == 4):
            return part.clone(memory_format=self._torch.contiguous_format)
        _, channels, height, width = part.shape
        # strides in full: torch takes an image of one channel for one with its channels apart
        strides = (channels * height * width, 1, width * channels, channels)
        laid_out = self._torch.empty_strided(
            part.shape, strides, dtype=part.dtype, device=part.device
        )
        return laid_out.copy_(part)


def _read(
    torch: Any, device: Any, model: Trainable, shard: BoundedShard, starts: NDArray[np.int64]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each user's number and records as tensors."""
    first = 0
    while first < shard.num_users:
        last = int(np.searchsorted(starts, starts[first] + _READ_RECORDS, side="right")) - 1
        last = max(first + 1, min(last, shard.num_users))
        records = shard.records.take(slice(int(starts[first]), int(starts[last])))
        seen = tuple(part.to(device) for part in model.read(torch, records))
        for user in range(first, last):
            own = slice(int(starts[user] - starts[first]), int(starts[user + 1] - starts[first]))
            yield user, tuple(part[own] for part in seen)
        first = last


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
