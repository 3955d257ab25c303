# SPDX-License-Identifier: Apache-2.0
"""Local steps of several users at once, where no user's bits depend on another.

Where a model is but products of records with matrices, users share these (`parts/factored.py`);
else `torch.func` gives each user weights of its own.

A product of many users' numbers may round a user's by where they stand in it. So users stand in
chunks of fixed shapes, each with weights of their own in memory of the same alignment, and before
a shape is used for the first time in a process it is tried: a made-up user must come out the same
to the last bit at every place of a chunk, whoever stands at the others. Where that does not hold,
users are taken one by one.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...core.records import BoundedShard
from .factored import APART, FactoredSteps
from .trainable import Made, RecordShape, Trainable
from .verdicts import Verdicts

if TYPE_CHECKING:
    from .local_training import LocalTraining

_CHUNK_WEIGHTS = 1 << 21  # of a chunk's users together; with more the memory is new each time
_CHUNK_NUMBERS = 1 << 22  # of a chunk's records in one step
_MOST_USERS = 64
_CALL = 4  # users whose steps take as long as what a chunk takes beside its users
_ALIGNED = 16  # numbers of 64 bytes

_agreeing: Verdicts[tuple[int, ...]] = Verdicts()


def side_by_side(
    torch: Any,
    device: Any,
    model: Trainable,
    weights: NDArray[np.float32],
    made: Made,
    shard: BoundedShard,
    training: "LocalTraining",
    seed: int,
    chance: list[tuple[Any, ...]],
    rows: Any,
) -> NDArray[np.bool_]:
    """Fill `rows`, of `room_for`, of the users with whom that can be done to the bit; who they are.

    Whether it can be done with a user hangs on how many records that user has, and on nobody else.
    """
    from .local_training import places

    starts = shard.starts
    counts = np.diff(starts)
    padded = np.array([_padded(int(count), training.batch) for count in counts])
    given = (torch, model, weights, training.lr, device)
    ways: dict[int, tuple[_Way, tuple[int, ...]]] = {}
    done = np.zeros(len(counts), dtype=np.bool_)
    tried = FactoredSteps(*given), _Steps(*given)
    for size in np.unique(padded):
        for steps in tried:
            if allowed := _sizes(steps, made, chance, int(size)):
                ways[int(size)] = (steps, allowed)
                done |= padded == size
                break

    @lru_cache(maxsize=256)
    def taken_by(num_records: int) -> list[NDArray[np.int64]]:
        size = _padded(num_records, training.batch)
        return [np.resize(part, size) for part in places(num_records, training, seed=seed)]

    @lru_cache(maxsize=256)
    def needed_by(num_records: int) -> NDArray[np.int64]:
        return np.unique(np.concatenate(taken_by(num_records)))

    for size, (steps, allowed) in ways.items():
        users = np.flatnonzero(padded == size)
        for begin, end in _chunks(len(users), allowed):
            some = users[begin:end]
            places_of = [taken_by(int(counts[user])) for user in some]
            lengths = [min(int(counts[user]), training.batch or size, size) for user in some]
            room = next(number for number in allowed if number >= len(some))
            filled = np.resize(np.arange(len(some)), room)  # again from the first
            needed = [needed_by(int(counts[user])) for user in some]
            firsts = np.cumsum([0, *(len(part) for part in needed[:-1])])
            read = np.concatenate([starts[u] + n for u, n in zip(some, needed, strict=True)])
            seen = [p.to(device) for p in model.read(torch, shard.records.take(read))]
            share = np.zeros((len(some), size), dtype=np.float32)
            for place, length in enumerate(lengths):
                share[place, :length] = np.float32(1 / length)
            batches = []
            for step in range(training.steps):
                taken = np.stack([parts[step] for parts in places_of])
                rank = [np.searchsorted(n, t) for n, t in zip(needed, taken, strict=True)]
                at = torch.from_numpy((np.stack(rank) + firsts[:, None])[filled]).to(device)
                drawn = torch.from_numpy(taken[filled]).to(device)
                batches.append((tuple(p[at] for p in seen), tuple(p[drawn] for p in chance[step])))
            first, last = int(some[0]), int(some[-1]) + 1
            in_place = rows.device == device and last - first == len(some) == room
            to = rows[first:last] if in_place else _memory.rows(torch, device, room, rows.shape[1])
            steps(batches, torch.from_numpy(share[filled]).to(device), parts_of(model, to))
            if not in_place:
                rows[torch.from_numpy(some)] = to[: len(some)].to(rows.device)
    return done


def room_for(torch: Any, num_users: int, model: Trainable, device: Any) -> Any:
    """Zeros for users' changes, `(num_users, num_weights)`; rows are aligned as each other."""
    width = -(-model.num_weights // _ALIGNED) * _ALIGNED
    memory = torch.zeros((num_users, width), dtype=torch.float32, device=device)
    return memory[:, : model.num_weights]


def parts_of(model: Trainable, rows: Any) -> dict[str, Any]:
    """Views of each weight in rows of users' weights, `(num_users, *shape)`."""
    parts, start = {}, 0
    for name, shape in model.shapes.items():
        size = math.prod(shape)
        parts[name] = rows[:, start : start + size].unflatten(1, shape)
        start += size
    return parts


def _chunks(num_users: int, allowed: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Where chunks of users begin and end; the last may fill only a part of its own."""
    begin, most = 0, allowed[-1]
    while begin < num_users:
        left = num_users - begin
        size = most if left >= 2 * most else _chunk_sizes(left, allowed)[0]
        yield begin, min(begin + size, num_users)
        begin += size


@lru_cache(maxsize=256)
def _chunk_sizes(num_users: int, allowed: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the chunks that take a few users in the least time, the largest first."""
    if num_users <= 0:
        return ()
    options: list[tuple[int, ...]] = []
    for size in allowed:
        if size >= num_users:
            options.append((size,))
            break
    if size != num_users and (smaller := [size for size in allowed if size < num_users]):
        options.append((smaller[-1], *_chunk_sizes(num_users - smaller[-1], allowed)))
    return min(options, key=lambda sizes: sum(sizes) + _CALL * len(sizes))


def _padded(num_records: int, batch: int | None) -> int:
    """Records of a step of a user, with what fills it up: a power of two, or the batch."""
    if batch is not None and num_records >= batch:
        return batch
    power = 1 << (num_records - 1).bit_length()
    return power if batch is None else min(power, batch)


class _Steps:
    """Gradient steps of a chunk of users from common weights."""

    def __init__(
        self, torch: Any, model: Trainable, weights: NDArray[np.float32], lr: float, device: Any
    ) -> None:
        self.torch, self.model, self.device, self._lr = torch, model, device, lr
        self._offsets, end = {}, 0
        for name, shape in model.shapes.items():
            self._offsets[name] = end
            end += -(-math.prod(shape) // _ALIGNED) * _ALIGNED
        self._start = torch.zeros(end, dtype=torch.float32, device=device)
        given = model.split(torch.from_numpy(np.array(weights, dtype=np.float32)))
        for name, part in self._parts(self._start[None]).items():
            part[0].copy_(given[name])

        def loss(
            weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...], share: Any
        ) -> Any:
            return (model.losses(torch, weights, seen, chance) * share).sum()

        self._slopes = torch.func.vmap(torch.func.grad(loss))

    def __call__(
        self,
        batches: Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]],
        share: Any,
        out: Mapping[str, Any],
    ) -> None:
        """As `FactoredSteps`, whatever the model does with its weights."""
        moved = self._parts(_memory(self.torch, self.device, len(share), len(self._start)))
        start = self._parts(self._start.expand(len(share), -1))
        for number, (seen, chance) in enumerate(batches):
            if number:
                for name, part in moved.items():
                    self.torch.add(start[name], out[name], out=part)
            slopes = self._slopes(moved if number else start, seen, chance, share)
            for name, part in out.items():
                if number:
                    part.sub_(slopes.pop(name), alpha=self._lr)
                else:
                    self.torch.mul(slopes.pop(name), -self._lr, out=part)

    def _parts(self, flat: Any) -> dict[str, Any]:
        """Views of each weight in memory that is aligned, `(num_users, *shape)`."""
        return {
            name: flat[:, at : at + math.prod(shape)].unflatten(1, shape)
            for (name, shape), at in zip(
                self.model.shapes.items(), self._offsets.values(), strict=True
            )
        }


class _Memory(threading.local):
    """What the chunks of a thread share, one after the other: new memory is slow to come by."""

    held: Any = None
    held_rows: Any = None

    def __call__(self, torch: Any, device: Any, num_users: int, width: int) -> Any:
        """Anything, `(num_users, width)`."""
        self.held = _enough(torch, device, num_users * width, self.held)
        return self.held[: num_users * width].view(num_users, width)

    def rows(self, torch: Any, device: Any, num_users: int, width: int) -> Any:
        """Anything, `(num_users, width)`, in other memory and aligned as by `room_for`."""
        room = -(-width // _ALIGNED) * _ALIGNED
        self.held_rows = _enough(torch, device, num_users * room, self.held_rows)
        return self.held_rows[: num_users * room].view(num_users, room)[:, :width]


def _enough(torch: Any, device: Any, size: int, held: Any) -> Any:
    """Memory of at least as many numbers: what is held, where that is enough."""
    if held is None or held.device != device or len(held) < size:
        return torch.zeros(size, dtype=torch.float32, device=device)
    return held


_memory = _Memory()


_Way = FactoredSteps | _Steps


def _sizes(steps: _Way, made: Made, chance: list[tuple[Any, ...]], size: int) -> tuple[int, ...]:
    """Numbers of users that a chunk may have so that all of them give the same bits; or none.

    Looks at made-up records only: what the records are may not decide how users are taken.
    """
    model = steps.model
    given = model.read(steps.torch, made.shape.made_up(np.random.default_rng(0), 1))
    per_user = size * sum(math.prod(part.shape[1:]) for part in given)
    most = min(_CHUNK_WEIGHTS // model.num_weights, _CHUNK_NUMBERS // max(1, per_user), _MOST_USERS)
    if most < 2:
        return ()
    most = 1 << (most.bit_length() - 1)

    def found() -> tuple[int, ...]:
        try:
            return _tried(steps, made.shape, chance, size, most)
        except (RuntimeError, TypeError, AttributeError):  # it cannot do what the model does
            return ()

    # a request may say more of a model than what it is made of, as which column is the label
    shapes = tuple(model.shapes.items()), tuple(tuple(part.shape[1:]) for part in given)
    of_what = (type(steps), shapes, min(2, len(chance)), size, most, str(steps.device))
    return _agreeing.of(made, of_what, found)


def _tried(
    steps: _Way,
    shape: RecordShape,
    chance: list[tuple[Any, ...]],
    size: int,
    most: int,
) -> tuple[int, ...]:
    """`_sizes`, by trying; further steps are as the second."""
    chance = chance[:2]
    torch, rng = steps.torch, np.random.default_rng(0)

    def made_up(num_users: int) -> list[list[Any]]:
        """Records of each step."""
        read = [steps.model.read(torch, shape.made_up(rng, num_users * size)) for _ in chance]
        return [[part.unflatten(0, (num_users, size)) for part in parts] for parts in read]

    one = made_up(1)
    drawn = [[p[:1].expand(size, *p.shape[1:]) for p in parts] for parts in chance]

    def trial(num_users: int, is_one: NDArray[np.bool_], steps: _Way = steps) -> Any:
        """What each place of a chunk gives where some of them hold the one user."""
        held, batches = torch.from_numpy(is_one), []
        for mine, theirs, noise in zip(one, made_up(num_users), drawn, strict=True):
            seen = tuple(
                torch.where(held.view(-1, *[1] * (b.dim() - 1)), a, b).to(steps.device)
                for a, b in zip(mine, theirs, strict=True)
            )
            batches.append((seen, tuple(p.expand(num_users, *p.shape).clone() for p in noise)))
        share = torch.full((num_users, size), 1 / size, device=steps.device)
        rows = room_for(torch, num_users, steps.model, steps.device)
        steps(batches, share, parts_of(steps.model, rows))
        return rows

    everybody = np.ones(most, dtype=np.bool_)
    expected = trial(most, everybody)[0]
    if not bool((trial(most, everybody) == expected).all()):
        return ()
    if isinstance(steps, FactoredSteps):
        same = _Steps(torch, steps.model, steps.weights, steps.lr, steps.device)
        plain = trial(most, everybody, same)[0]
        if not bool((expected - plain).abs().max() <= APART * plain.abs().max()):
            return ()
    half = rng.random(most) < 0.5
    for is_one in (half, ~half):
        if not bool((trial(most, is_one)[torch.from_numpy(is_one)] == expected).all()):
            return ()
    agreeing = [most]
    number = most // 2
    while number >= 1:
        if bool((trial(number, np.ones(number, dtype=np.bool_)) == expected).all()):
            agreeing.append(number)
        number //= 2
    return tuple(sorted(agreeing))
