# SPDX-License-Identifier: Apache-2.0
"""Any strategy of Flower's as the server's optimizer: it is handed the noisy mean as one reply."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp.grid import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.quiet import quiet

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "FlowerOptimizer", "Strategy"]

_WEIGHTS = "weights"
_MOST_DOUBLINGS = 16
_KNOWN = (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad)  # whose state is arrays alone


class FlowerOptimizer:
    """Moves weights as a strategy of Flower's would that had one client, the mean of all users."""

    def __init__(self, kind: type[Strategy], name: str, settings: Mapping[str, Any], seed: int):
        """Build the strategy.

        Args:
          kind: Its class.
          name: As it is called in settings, for messages.
          settings: Of its constructor.
          seed: Of global random generators while it works, which are put back afterwards.

        Raises:
          ConfigError: It does not take these settings.
        """
        self._name, self._seed, self._round = name, seed, 0
        self._nodes = _Nodes()
        try:
            with quiet("flwr"):
                self._strategy = kind(**settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"server optimizer {name!r} does not take server_settings"
                f" {dict(settings)!r}: {error}"
            ) from error

    def moved(
        self, weights: NDArray[np.float64], update: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The weights after one mean update.

        Raises:
          ConfigError: The strategy makes no such weights of one reply.
        """
        self._round += 1
        self._nodes.starts_again()
        try:
            with quiet("flwr"), _of_no_run(), _own_randomness(self._seed + self._round):
                arrays = self._aggregated(weights, weights + update)
        except AppExitException as error:
            raise self._useless(str(error)) from error
        if arrays is None or list(arrays) != [_WEIGHTS]:
            raise self._useless("it gave no arrays, or others than it was handed")
        after = np.array(arrays[_WEIGHTS].numpy(), dtype=np.float64)
        if after.shape != weights.shape or not np.isfinite(after).all():
            raise self._useless("it gave weights of another shape, or that are no numbers")
        return after

    def state(self) -> dict[str, NDArray[Any]] | None:
        """What goes into a checkpoint; `None` where only a replay gives it: of a user's own."""
        if type(self._strategy) not in _KNOWN:
            return None
        found = {"round": np.array([self._round, self._seed, self._nodes.doublings])}
        for key, value in vars(self._strategy).items():
            if isinstance(value, dict):
                found |= {f"{key}/{name}": np.asarray(part) for name, part in value.items()}
            elif isinstance(value, list):
                found |= {f"{key}[{i}": np.asarray(part) for i, part in enumerate(value)}
        return found

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where `state` was taken.

        Raises:
          ConfigError: It is not this optimizer's.
        """
        left = dict(state)
        if "round" not in left or type(self._strategy) not in _KNOWN:
            raise ConfigError("a checkpoint of another optimizer; remove it, and all is replayed")
        self._round, self._seed, self._nodes.doublings = (int(v) for v in left.pop("round"))
        rows: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        for key, value in left.items():
            if "/" in key:
                attribute, name = key.split("/", 1)
                held = getattr(self._strategy, attribute, None)
                setattr(self._strategy, attribute, {**(held or {}), name: np.array(value)})
            else:
                attribute, place = key.split("[", 1)
                rows.setdefault(attribute, []).append((int(place), np.array(value)))
        for attribute, parts in rows.items():
            setattr(self._strategy, attribute, [part for _, part in sorted(parts, key=_place)])

    def _aggregated(
        self, before: NDArray[np.float64], after: NDArray[np.float64]
    ) -> ArrayRecord | None:
        """What the strategy makes of one reply that holds weights after the mean update."""
        arrays = ArrayRecord({_WEIGHTS: Array(before)})
        asked = list(
            self._strategy.configure_train(self._round, arrays, ConfigRecord(), self._nodes)
        )
        if not asked:
            raise self._useless("it asks no client to train")
        key = getattr(self._strategy, "weighted_by_key", "num-examples")
        reply = RecordDict(
            {"arrays": ArrayRecord({_WEIGHTS: Array(after)}), "metrics": MetricRecord({key: 1})}
        )
        result, _ = self._strategy.aggregate_train(
            self._round, [Message(content=reply, reply_to=asked[0])]
        )
        return result

    def _useless(self, why: str) -> ConfigError:
        """It cannot be the server's optimizer."""
        return ConfigError(
            f"server optimizer {self._name!r} cannot move the weights: {why}. A strategy of"
            " Flower's is handed one reply a round; take one that needs no more"
        )


def _place(part: tuple[int, NDArray[Any]]) -> int:
    """By what parts of a list are sorted."""
    return part[0]


class _Nodes(Grid):
    """A grid of as many nodes as a strategy waits for; nobody is ever sent anything."""

    def __init__(self) -> None:
        self.doublings, self._num_asked = 1, 0

    def get_node_ids(self) -> Iterable[int]:
        """Two ids, as Flower wants at the least; twice as many each time that was not enough.

        Flower asks twice where it was: how many there are, and whether they suffice.
        """
        self._num_asked += 1
        self.doublings = min(max(self.doublings, self._num_asked - 1), _MOST_DOUBLINGS)
        return range(1, 1 + (1 << self.doublings))

    def starts_again(self) -> None:
        """Begin a round with as many ids as were enough in the last."""
        self._num_asked = 0

    @property
    def run(self) -> Any:
        """Not of any run."""
        self._refuse()

    def set_run(self, run: Any) -> None:
        """Not of any run."""
        self._refuse()

    def create_message(self, *args: Any, **settings: Any) -> Message:
        """Sends nothing."""
        self._refuse()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends nothing."""
        self._refuse()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receives nothing."""
        self._refuse()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends nothing."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError("a server optimizer may not ask clients itself")


@contextmanager
def _of_no_run() -> Iterator[None]:
    """With an identity by which Flower makes messages; these go nowhere."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Global generators at a seed of their own, put back afterwards as they were.

    Flower picks clients by `random`; what a strategy draws must be the same in a replay.
    """
    plain, bits = random.getstate(), np.random.mtrand.get_bit_generator()
    random.setstate(random.Random(seed).getstate())  # noqa: S311  (of public draws)
    np.random.mtrand.set_bit_generator(np.random.MT19937(seed))
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.mtrand.set_bit_generator(bits)
