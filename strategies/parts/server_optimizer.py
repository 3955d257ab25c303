# SPDX-License-Identifier: Apache-2.0
"""Which optimizer moves the weights at the server, by name and settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigError
from ...core.plugins import installed

if TYPE_CHECKING:
    from .flower_optimizer import FlowerOptimizer

_FLOWER = {
    "fedavg": "strategies.parts.flower_optimizer:FedAvg",
    "fedavgm": "strategies.parts.flower_optimizer:FedAvgM",
    "fedadam": "strategies.parts.flower_optimizer:FedAdam",
    "fedyogi": "strategies.parts.flower_optimizer:FedYogi",
    "fedadagrad": "strategies.parts.flower_optimizer:FedAdagrad",
}
_TAU = 1e-9  # added to a square root of squared updates, which are small: by no means Flower's 1e-3


@dataclass(frozen=True)
class ServerOptimizer:
    """A strategy of Flower's, and what its constructor is given.

    Attributes:
      name: One of Flower's, `fedavg`, `fedavgm`, `fedadam`, `fedyogi` or `fedadagrad`; or one that
        is installed as an entry point of `fedsynth.server_optimizers`.
      lr: Step of those of Flower's.
      momentum: Of those of Flower's that have one.
      settings: More for the constructor; all of it, for one that is not Flower's.

    Flower's classes are loaded when one is built, at the server.
    """

    name: str = "fedadam"
    lr: float = 0.02
    momentum: float = 0.9
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if ":" in self.name:
            raise ConfigError(
                f"server_optimizer {self.name!r}: a strategy of your own must be installed as an"
                " entry point of fedsynth.server_optimizers. Settings stand in a release's card,"
                " and no file may name a module to import"
            )
        if not 0 < self.lr < 1e6:
            raise ConfigError(f"server_lr must be above 0, not {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), not {self.momentum}")

    def build(self, seed: int) -> "FlowerOptimizer":
        """It, before the first round.

        Args:
          seed: For what it may draw at random.

        Raises:
          ConfigError: There is none of that name, or it does not take its settings.
        """
        from .flower_optimizer import FlowerOptimizer, Strategy

        group = "fedsynth.server_optimizers"
        kind = installed("server_optimizer", self.name, _FLOWER, group, Strategy)  # type: ignore[type-abstract]
        return FlowerOptimizer(kind, self.name, {**self._usual(), **self.settings}, seed)

    def _usual(self) -> dict[str, Any]:
        """Step and momentum, as the class calls them."""
        if self.name == "fedavg":
            return {}
        if self.name == "fedavgm":
            return {"server_learning_rate": self.lr, "server_momentum": self.momentum}
        if self.name in ("fedadam", "fedyogi"):
            return {"eta": self.lr, "beta_1": self.momentum, "beta_2": 0.99, "tau": _TAU}
        return {"eta": self.lr, "tau": _TAU} if self.name == "fedadagrad" else {}
