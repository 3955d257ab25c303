# SPDX-License-Identifier: Apache-2.0
"""DP-WGAN: a Wasserstein critic that learns from clipped gradients of users, and a network."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from .parts.adversarial import Adversarial
from .parts.critic import Loss


@dataclass(frozen=True)
class DpWgan(Adversarial):
    """The game of `Adversarial` with a Wasserstein critic, its weights clipped to a box.

    Attributes:
      weight_clip: Largest weight of the critic.

    Reference:
      Srivastava, Alzantot (2018), "Differentially Private Dataset Release using Wasserstein
      GANs", NIST Differential Privacy Synthetic Data Challenge; Arjovsky, Chintala, Bottou
      (2017), "Wasserstein GAN", arXiv 1701.07875, algorithm 1. Written anew from these ideas, not
      from the challenge's code, in which Annamalai, Ganev, De Cristofaro (2024), arXiv
      2405.10994, found a violation of privacy. What is ours: the unit is a user, with one vector
      a round; the first sum of columns, where the network starts; the many steps a round.
    """

    name: ClassVar[str] = "dp_wgan"
    loss: ClassVar[Loss] = "wasserstein"
    weight_clip: float = 0.2

    def check(self) -> None:
        """The weights need room."""
        if not 0 < self.weight_clip < 1e3:
            raise ConfigError(f"weight_clip must be above 0, not {self.weight_clip!r}")

    def hold(self, weights: NDArray[np.float32]) -> None:
        """Clip every weight."""
        np.clip(weights, -self.weight_clip, self.weight_clip, out=weights)
