# SPDX-License-Identifier: Apache-2.0
"""Where a strategy's public half stands, so that a resumed run need not think it all again.

A run is resumed by replay: the sums that were sealed go through the same generator once more. For
a method that trains a network at the server that is long work; such a method says now and then
where it stands, and can go on from there. A checkpoint holds what the strategy made of noisy sums
and public randomness, and so nothing private: the strategy has nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

State = Mapping[str, NDArray[Any]]
"""All that a strategy needs to go on, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """Yielded by a strategy after a round; whoever drives it keeps the state, or does not.

    Attributes:
      state: Gives the state as it is now; called at once or never.
    """

    state: Callable[[], State]
