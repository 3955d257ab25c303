# SPDX-License-Identifier: Apache-2.0
"""Answer what a strategy asks of public models: live, or as it was recorded."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .candidates import Candidates
from .generation import Generation
from .query import Rounds, Steps

if TYPE_CHECKING:
    from .synthesizer import Synthesizer

Source = Callable[[Generation], Candidates]
"""What answers a generation."""


def answered(steps: Steps, source: Source) -> Rounds:
    """A strategy's rounds with all its generations answered, so that queries alone are left.

    Args:
      steps: The strategy's generator, not yet started.
      source: What answers generations, in their order.
    """
    sent: Any = None
    while True:
        try:
            asked = steps.send(sent)
        except StopIteration as end:
            learned: Synthesizer = end.value
            return learned
        sent = source(asked) if isinstance(asked, Generation) else (yield asked)
