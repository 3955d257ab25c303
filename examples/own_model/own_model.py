# SPDX-License-Identifier: Apache-2.0
"""A torch model of your own, trained at its users: each column told from those before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.strategies.parts.module import ModuleTrainable
from fedsynth.strategies.parts.trainable import RecordShape
from fedsynth.strategies.parts.training import Training
from numpy.typing import NDArray


@dataclass(frozen=True)
class OwnModel(Training):
    """Everything but the model is `Training`'s: rounds, clipping, noise, price, optimizer."""

    name: ClassVar[str] = "own_model"

    def check(self) -> None:
        """No settings of its own."""

    def model_for(self, shape: RecordShape) -> ModuleTrainable:
        """The model: a module, and the loss of each record."""
        return ModuleTrainable(lambda: chain(shape.cells), losses, synthesizer=Chain)


def chain(cells: tuple[int, ...]) -> Any:
    """A linear layer for each column, which sees the columns before it."""
    import torch

    seen = [1 + sum(cells[:number]) for number in range(len(cells))]
    return torch.nn.ModuleList(map(torch.nn.Linear, seen, cells))


def losses(module: Any, codes: Any) -> Any:
    """Surprise at each record, `(num_records,)`; `codes` are its cells."""
    import torch

    known, total = torch.ones((len(codes), 1)), torch.zeros(len(codes))
    for number, layer in enumerate(module):
        cell, size = codes[:, number], layer.out_features
        total = total + torch.nn.functional.cross_entropy(layer(known), cell, reduction="none")
        known = torch.cat([known, torch.nn.functional.one_hot(cell, size).float()], dim=1)
    return total


@dataclass(frozen=True)
class Chain(Synthesizer):
    """Columns drawn one after the other; plain numpy, so that a release needs no torch."""

    schema: Schema
    weights: NDArray[np.float32]
    kind: ClassVar[str] = "own_chain"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Draw each column by the layer that sees the columns before."""
        known, start = np.ones((num_records, 1)), 0
        codes = np.empty((num_records, len(self.schema.shape)), dtype=np.int32)
        for number, size in enumerate(self.schema.shape):
            width = known.shape[1]
            layer = self.weights[start : start + size * width].reshape(size, width)
            bias = self.weights[start + size * width : start + size * (width + 1)]
            start += size * (width + 1)
            logits = known @ layer.T + bias + rng.gumbel(size=(num_records, size))
            codes[:, number] = logits.argmax(axis=1)
            known = np.concatenate([known, np.eye(size)[codes[:, number]]], axis=1)
        return Records(codes)

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights."""
        return {"weights": self.weights}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """From a release folder."""
        return cls(schema, np.asarray(tensors["weights"], dtype=np.float32))
