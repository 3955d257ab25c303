# SPDX-License-Identifier: Apache-2.0
"""Keep what was found of models in this process, by all that they were made of."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from .trainable import Made

_MOST = 256  # each is a few hundred bytes; a server may ask with ever other settings

T = TypeVar("T")


class Verdicts(Generic[T]):
    """Verdicts on models: what was found once is not tried again."""

    def __init__(self) -> None:
        self._known: dict[Any, T] = {}

    def of(self, made: Made, of_what: tuple[Any, ...], find: Callable[[], T]) -> T:
        """The verdict, found now if it is not known.

        Args:
          made: What the model was made of.
          of_what: What else the verdict hangs on.
          find: Finds it; what it raises is not kept.
        """
        if made.settings is None:
            return find()
        key = (made, of_what)
        with suppress(KeyError):  # another thread may forget all of them at any time
            return self._known[key]
        found = find()
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = found
        return found
