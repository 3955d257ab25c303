# SPDX-License-Identifier: Apache-2.0
"""What each user does with the weights: gradient steps on records of their own, and no others'."""

import math
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
from .factored import APART, Factored
from .trainable import Made, Trainable
from .verdicts import Verdicts

PerUser = Literal["auto", "loop", "vmap"]

_ORDER, _CHANCE = 0, 1  # streams of public randomness
_READ_RECORDS = 2048  # read at a time, so that memory is bounded
_SLOPES = 1 << 26  # numbers of records' slopes, for the same reason
_FEWER = 2  # times as many numbers has a matrix as its factors, to be kept as these

_agreeing: Verdicts[frozenset[str]] = Verdicts()


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
    from .side_by_side import room_for, side_by_side

    torch = torch_for_training()  # for nobody, too: a client that lacks it says so at once
    device = device_for(torch)
    model.check_fit(weights)
    rows = room_for(torch, shard.num_users, model, torch.device("cpu"))
    changes: NDArray[np.float32] = rows.numpy()
    if not shard.num_users:
        return changes
    beside = training.per_user == "vmap" or (training.per_user == "auto" and model.side_by_side)
    with one_thread(torch):
        chance = chances(torch, device, model, shard, training, seed=seed)
        task = (torch, device, model, weights)
        if training.steps == 1 and training.per_user == "auto" and model.has_slopes:
            _by_slopes(*task, shard, training, seed, changes)
            return changes
        left = np.ones(shard.num_users, dtype=np.bool_)
        if beside:
            left &= ~side_by_side(*task, made, shard, training, seed, chance, rows)
        if left.any():
            num = int(left.sum())
            alone = rows if num == len(rows) else room_for(torch, num, model, rows.device)
            _loop(*task, made, shard.only(left), training, seed, chance, alone)
            if alone is not rows:
                rows[torch.from_numpy(left)] = alone
    return changes


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
    made: Made,
    shard: BoundedShard,
    training: LocalTraining,
    seed: int,
    chance: list[tuple[Any, ...]],
    rows: Any,
) -> None:
    """`updates` user by user, into `rows`, of `room_for`."""
    given = (torch, device, model, weights, training.lr)
    one_by_one = _OneByOne(*given, _shared_products(given, made, training, chance))

    @lru_cache(maxsize=256)
    def taken_by(num_records: int) -> list[Any]:
        steps = places(num_records, training, seed=seed)
        return [torch.from_numpy(taken).to(device) for taken in steps]

    starts = shard.starts
    for user, seen in _read(torch, device, model, shard, starts):
        one_by_one(seen, taken_by(int(starts[user + 1] - starts[user])), chance)
        rows[user].copy_(one_by_one.row)


class _OneByOne:
    """Gradient steps of one user after the other, into `row`.

    Every user's numbers lie in the same memory, or in tensors of their own: a product's last bits
    may depend on where in memory its factors begin.
    """

    def __init__(
        self,
        torch: Any,
        device: Any,
        model: Trainable,
        weights: NDArray[np.float32],
        lr: float,
        factored: frozenset[str] = frozenset(),
    ) -> None:
        """Lay out what users share.

        Args:
          torch: The library.
          device: Where users' numbers lie.
          model: The model.
          weights: Where every user starts, `(num_weights,)`.
          lr: Size of a step.
          factored: Matrices whose changes are kept as what went in and the slopes of what came out.
        """
        self._torch, self._model, self._lr = torch, model, lr
        self._laid_out = _Layout(torch, model.channels_last)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        start = model.split(torch.from_numpy(np.array(weights, dtype=np.float32)).to(device))
        self._wide = {name: part for name, part in start.items() if name in factored}
        plain = {name: part for name, part in start.items() if name not in factored}
        self._first = {n: self._laid_out(part).requires_grad_() for n, part in plain.items()}
        self._moved = {n: self._laid_out(part) for n, part in plain.items()}
        for part in self._moved.values():
            part.requires_grad_()
        self.row = torch.empty(model.num_weights, dtype=torch.float32, device=device)
        self._change = model.split(self.row)

    def __call__(
        self, seen: tuple[Any, ...], taken: list[Any], chance: list[tuple[Any, ...]]
    ) -> None:
        """A user's change of the weights, into `row`.

        Args:
          seen: The user's records.
          taken: Places of the records that each step takes.
          chance: The randomness of losses for each step, by place.
        """
        torch = self._torch
        records = (1, len(taken[0]))
        wide = {
            name: Factored(torch, part, records, self._lr, self._anchor)
            for name, part in self._wide.items()
        }
        for step, at in enumerate(taken):
            now = self._moved if step else self._first
            if step:
                with torch.no_grad():
                    for name, part in now.items():
                        torch.add(self._first[name], self._change[name], out=part)
            own = tuple(self._laid_out(part.index_select(0, at)) for part in seen)
            drawn = tuple(part.index_select(0, at) for part in chance[step])
            loss = self._model.losses(torch, {**now, **wide}, own, drawn).mean()
            *slopes, _ = torch.autograd.grad(
                loss, [*now.values(), self._anchor], allow_unused=True, materialize_grads=True
            )
            for name, slope in zip(now, slopes, strict=True):
                if step:
                    self._change[name].sub_(slope, alpha=self._lr)
                else:
                    torch.mul(slope, -self._lr, out=self._change[name])
            for weight in wide.values():
                weight.end_step()
        for name, weight in wide.items():
            weight.write(self._change[name][None])


def _shared_products(
    given: tuple[Any, Any, Trainable, NDArray[np.float32], float],
    made: Made,
    training: LocalTraining,
    chance: list[tuple[Any, ...]],
) -> frozenset[str]:
    """Matrices whose changes are few outer products, where the model uses them as is known.

    Looks at made-up records only: what the records are may not decide how users are taken.
    """
    torch, device, model, *_ = given
    if training.batch is None:
        return frozenset()
    num = training.batch
    matrices = frozenset(
        name
        for name, shape in model.shapes.items()
        if len(shape) == 2 and math.prod(shape) > _FEWER * training.steps * num * sum(shape)
    )
    if not matrices:
        return frozenset()
    # of the first place alone: how many there are hangs on how many records others have
    drawn = [tuple(p[:1].expand(num, *p.shape[1:]) for p in step) for step in chance]

    def found() -> frozenset[str]:
        records = made.shape.made_up(np.random.default_rng(0), num)
        seen = tuple(part.to(device) for part in model.read(torch, records))
        taken = [torch.arange(num, device=device)] * min(2, training.steps)
        rows = []
        for names in (frozenset[str](), matrices):
            steps = _OneByOne(*given, names)
            try:
                steps(seen, taken, drawn)
            except (RuntimeError, TypeError, AttributeError):  # it cannot do what the model does
                return frozenset()
            rows.append(steps.row)
        plain, ours = rows
        agree = bool((ours - plain).abs().max() <= APART * plain.abs().max())
        return matrices if agree else frozenset()

    of_what = (matrices, tuple(model.shapes.items()), num, min(2, training.steps), str(device))
    return _agreeing.of(made, of_what, found)


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
