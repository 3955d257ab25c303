# SPDX-License-Identifier: Apache-2.0
"""A torch module of one's own, with a loss for each record, as a model that users can train."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .local_training import torch_for_training
from .trainable import Trainable


class ModuleTrainable(Trainable):
    """Any `torch.nn.Module`, with a function that gives the loss of each record.

    What is trained, sent and released are the module's parameters that require a gradient. Other
    parameters and the buffers are constants: each side has them from `build`, with the weights of
    a fixed seed, or whatever public ones `build` loads. A module whose buffers change when it
    is run is refused (`parts/unfit.py`), and so is one that mixes records.

    Example:
      In a strategy, for a table whose first column is to be told from the others::

          def model_for(self, shape):
              def build():
                  return torch.nn.Linear(len(shape.cells) - 1, shape.cells[0])

              def loss(module, codes):
                  logits = module(codes[:, 1:].float())
                  return torch.nn.functional.cross_entropy(logits, codes[:, 0], reduction="none")

              return ModuleTrainable(build, loss, synthesizer=MySynthesizer)
    """

    def __init__(
        self,
        build: Callable[[], Any],
        loss: Callable[..., Any],
        *,
        synthesizer: Callable[[Schema, NDArray[np.float32]], Synthesizer],
        read: Callable[[Any, Records], tuple[Any, ...]] | None = None,
        chance: Callable[[np.random.Generator, int], tuple[NDArray[Any], ...]] | None = None,
    ) -> None:
        """Make a model of a module.

        Args:
          build: Makes the module, drawing its first weights from torch's generator, which is
            seeded for it and restored.
          loss: Called with the module and what `read` and `chance` give; the loss of each record,
            `(num_records,)`.
          synthesizer: Makes what samples records by a schema and trained weights, `(num_weights,)`.
          read: Records as tensors, each from that record alone; it gets torch and the records.
            `None`: `codes`, `(num_records, num_columns)`, int64; before them, if there are images,
            `pixels` in [0, 1], `(num_records, channels, height, width)`.
          chance: As `Trainable.chance`; `None`: losses without randomness.
        """
        self._build, self._loss, self._synthesizer = build, loss, synthesizer
        self._read, self._chance = read, chance

    def __repr__(self) -> str:
        parts = [self._loss, self._read, self._chance]
        return f"ModuleTrainable({self.module!r}, {', '.join(map(_said, parts))})"

    @cached_property
    def module(self) -> Any:
        """The module with the weights of a fixed seed, whose constants count."""
        return self._built(seed=0)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that requires a gradient, in the module's order."""
        return {name: tuple(part.shape) for name, part in self._trained(self.module)}

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The weights that `build` draws."""
        return self.weights_of(self._built(seed=int(rng.integers(1 << 62))))

    def weights_of(self, module: Any) -> NDArray[np.float32]:
        """The trained parameters of a module that `build` made, as one vector."""
        parts = [part.detach().cpu().numpy().ravel() for _, part in self._trained(module)]
        return np.concatenate(parts).astype(np.float32)

    def with_weights(self, weights: NDArray[np.float32]) -> Any:
        """A module with given weights, `(num_weights,)`, to sample from."""
        self.check_fit(weights)
        torch, module = torch_for_training(), self._built(seed=0)
        given = self.split(np.array(weights, dtype=np.float32))
        with torch.no_grad():
            for name, part in self._trained(module):
                part.copy_(torch.from_numpy(given[name]))
        return module

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """What the module's loss sees of records."""
        if self._read is not None:
            return self._read(torch, records)
        codes = torch.from_numpy(records.codes.astype(np.int64))
        if records.images is None:
            return (codes,)
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(records.images, 3, 1)))
        return pixels.to(torch.float32).div_(255), codes

    def chance(self, rng: np.random.Generator, num_records: int) -> tuple[NDArray[Any], ...]:
        """The randomness of one step's losses, by place."""
        return () if self._chance is None else self._chance(rng, num_records)

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Loss of each record, `(num_records,)`."""
        device = next(iter(weights.values())).device
        whole = {f"module.{name}": part for name, part in weights.items()}
        return torch.func.functional_call(self._bound(device), whole, (*seen, *chance))

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> Synthesizer:
        """What samples records by trained weights."""
        return self._synthesizer(schema, weights)

    def bound(self, module: Any) -> Any:
        """A module whose output is the loss of each record under `module`."""
        torch, loss = torch_for_training(), self._loss

        class Bound(torch.nn.Module):  # type: ignore[misc,name-defined]
            """`module` and its loss as one."""

            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, *given: Any) -> Any:
                return loss(self.module, *given)

        return Bound()

    def _bound(self, device: Any) -> Any:
        """`bound` of this model's own module, on a device; kept."""
        kept = self.__dict__.setdefault("_kept", {})
        if device not in kept:
            module = self.module if device.type == "cpu" else self._built(seed=0).to(device)
            kept[device] = self.bound(module)
        return kept[device]

    def _built(self, *, seed: int) -> Any:
        """A fresh module."""
        torch = torch_for_training()
        with _seeded(torch, seed):
            module = self._build()
        if not isinstance(module, torch.nn.Module):
            raise ConfigError(f"a model is a torch.nn.Module, not {type(module).__name__}")
        return module

    @staticmethod
    def _trained(module: Any) -> list[tuple[str, Any]]:
        """Names and parameters that are trained.

        Raises:
          ConfigError: There are none, or they are not float32.
        """
        found = [(name, part) for name, part in module.named_parameters() if part.requires_grad]
        kinds = sorted({str(part.dtype) for _, part in found})
        if kinds != ["torch.float32"]:
            raise ConfigError(
                "a model has parameters of float32 that require a gradient, not"
                f" {', '.join(kinds) or 'none'}; turn it to float32 by .float()"
            )
        return found


def _said(function: Any) -> str:
    """A function by all that its results hang on, as far as that can be said."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    held = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__} {hash(code):x} {held}"


@contextmanager
def _seeded(torch: Any, seed: int) -> Iterator[None]:
    """Torch's own generator of the processor, seeded within the block and restored after it."""
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
