# SPDX-License-Identifier: Apache-2.0
"""Gradients of single records by Opacus, where no record's bits depend on another.

Opacus takes the gradients of many records in one pass. A record's last bits might then hang on
where in the batch it stands, so batches have one fixed size, and before a model is so taken for the
first time in a process it is tried: a made-up record must have the same gradient to the last bit
at every place, whoever stands beside it, and that of plain differentiation nearly. Where this does
not hold, records are taken as users of one record each (`parts/local_training.py`).
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.records import BoundedShard
from .local_training import LocalTraining, one_thread, torch_for_training, updates
from .module import ModuleTrainable
from .trainable import Made, RecordShape, Trainable
from .verdicts import Verdicts

BATCH = 32
_TOLERANCE = 1e-4
_agreeing: Verdicts[bool] = Verdicts()


def downhill(
    model: Trainable,
    weights: NDArray[np.float32],
    shard: BoundedShard,
    *,
    made: Made,
    seed: int,
) -> NDArray[np.float32]:
    """The negative gradient of each record's loss, `(num_records, num_weights)`, float32.

    Args:
      model: The model.
      weights: Where the gradients are taken, `(num_weights,)`.
      shard: The records, each as a user of its own.
      made: What the model was made of.
      seed: Of the public randomness of losses, which is the same for every record.

    Raises:
      ConfigError: The weights do not fit the model, or torch is not installed.
    """
    one_step = LocalTraining(steps=1, lr=1.0)
    if isinstance(model, ModuleTrainable) and len(shard.records) == shard.num_users > 0:
        torch = torch_for_training()
        model.check_fit(weights)
        with one_thread(torch):
            by_opacus = _ByOpacus(torch, model, weights, seed)
            if by_opacus.agrees(made):
                return by_opacus.rows(shard)
    return updates(model, weights, shard, one_step, made=made, seed=seed)


class _ByOpacus:
    """A module with Opacus' hooks, and given weights."""

    def __init__(
        self, torch: Any, model: ModuleTrainable, weights: NDArray[np.float32], seed: int
    ) -> None:
        from opacus import GradSampleModule

        self._torch, self._model = torch, model
        bound = model.bound(model.with_weights(weights))
        self._hooked = GradSampleModule(bound, strict=False, loss_reduction="sum")
        named = dict(self._hooked.named_parameters())
        self._trained = [named[f"_module.module.{name}"] for name in model.shapes]
        drawn = model.chance(np.random.default_rng([seed, 1, 0]), 1)
        self._chance = tuple(
            torch.from_numpy(np.ascontiguousarray(part)).expand(BATCH, *part.shape[1:])
            for part in drawn
        )
        self._weights, self._seed = weights, seed

    def rows(self, shard: BoundedShard) -> NDArray[np.float32]:
        """The negative gradient of each record, batch after batch."""
        rows = np.empty((shard.num_users, self._model.num_weights), dtype=np.float32)
        for start in range(0, shard.num_users, BATCH):
            some = shard.records.take(slice(start, start + BATCH))
            seen = self._model.read(self._torch, some)
            filled = tuple(self._filled(part) for part in seen)
            rows[start : start + len(some)] = -self._gradients(filled)[: len(some)]
        return rows

    def agrees(self, made: Made) -> bool:
        """Whether made-up records have the same bits at all places, and the right ones."""

        def found() -> bool:
            try:
                return self._tried(made.shape)
            except (RuntimeError, AttributeError, NotImplementedError, ValueError):
                return False  # Opacus cannot do what the model does

        return _agreeing.of(made, (), found)

    def _tried(self, shape: RecordShape) -> bool:
        torch, rng = self._torch, np.random.default_rng(0)

        def made_up() -> tuple[Any, ...]:
            return self._model.read(torch, shape.made_up(rng, BATCH))

        one = made_up()
        same = tuple(part[:1].expand(BATCH, *part.shape[1:]).clone() for part in one)
        alone = self._gradients(same)
        if not (alone == alone[0]).all():
            return False
        for _ in range(2):
            others, held = made_up(), rng.random(BATCH) < 0.5
            mixed = tuple(
                torch.where(torch.from_numpy(held).view(-1, *[1] * (a.dim() - 1)), a, b)
                for a, b in zip(same, others, strict=True)
            )
            if not (self._gradients(mixed)[held] == alone[0]).all():
                return False
        return bool(np.allclose(alone[0], self._plain(same), rtol=_TOLERANCE, atol=_TOLERANCE))

    def _plain(self, seen: tuple[Any, ...]) -> NDArray[np.float32]:
        """The gradient of the first record, by plain differentiation."""
        torch, model = self._torch, self._model
        weights = {
            name: torch.from_numpy(np.array(part)).requires_grad_()
            for name, part in model.split(self._weights).items()
        }
        first = [tuple(part[:1] for part in parts) for parts in (seen, self._chance)]
        loss = model.losses(torch, weights, first[0], first[1]).sum()
        slopes = torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        found: NDArray[np.float32] = torch.cat([slope.reshape(-1) for slope in slopes]).numpy()
        return found

    def _gradients(self, seen: tuple[Any, ...]) -> NDArray[np.float32]:
        """The gradient of each of `BATCH` records, `(BATCH, num_weights)`."""
        for part in self._hooked.parameters():
            part.grad, part.grad_sample = None, None
        with warnings.catch_warnings():  # torch says that records need no gradients, which is so
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            self._hooked(*seen, *self._chance).sum().backward()
        parts = [
            self._torch.zeros((BATCH, part.numel()))
            if part.grad_sample is None
            else part.grad_sample.reshape(BATCH, -1)
            for part in self._trained
        ]
        found: NDArray[np.float32] = self._torch.cat(parts, dim=1).numpy()
        return found

    def _filled(self, part: Any) -> Any:
        """Rows of a batch, filled up with zeros to its fixed size, in memory of its own."""
        whole = self._torch.zeros((BATCH, *part.shape[1:]), dtype=part.dtype)
        whole[: len(part)] = part
        return whole
