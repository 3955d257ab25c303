# SPDX-License-Identifier: Apache-2.0
"""Answer what a strategy asks of public models: live, or as it was recorded."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .candidates import Candidates
from .checkpoint import Checkpoint
from .generation import Generation
from .query import Rounds, Steps

if TYPE_CHECKING:
    from .synthesizer import Synthesizer

Source = Callable[[Generation], Candidates]
"""What answers a generation."""

Keep = Callable[[Checkpoint, int], None]
"""What is told of a checkpoint, and after how many rounds it came."""


def without_checkpoints(steps: Steps) -> Rounds:
    """The queries of a strategy that asks no models, and none of its checkpoints."""
    return answered(steps, _asks_no_model)


def _asks_no_model(request: Generation) -> Candidates:
    """Answers nothing."""
    raise TypeError("a request to a public model where queries alone were expected")


def answered(steps: Steps, source: Source, keep: Keep = lambda checkpoint, rounds: None) -> Rounds:
    """A strategy's rounds with all its generations answered, so that queries alone are left.

    Args:
      steps: The strategy's generator, not yet started.
      source: What answers generations, in their order.
      keep: What is done with checkpoints; `None` is kept of a method that asks generations.
    """
    sent: Any = None
    rounds, generations = 0, 0
    while True:
        try:
            asked = steps.send(sent)
        except StopIteration as end:
            learned: Synthesizer = end.value
            return learned
        match asked:
            case Generation():
                sent, generations = source(asked), generations + 1
            case Checkpoint():
                sent = None
                if not generations:
                    keep(asked, rounds)
            case _:
                sent, rounds = (yield asked), rounds + 1
