# SPDX-License-Identifier: Apache-2.0
"""Texts as plain arrays, for files and messages that hold nothing else."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import DataError


def as_texts(texts: Iterable[str]) -> NDArray[np.object_]:
    """Texts as an array that is indexed like any other, `(num_texts,)`."""
    listed = list(texts)
    array = np.empty(len(listed), dtype=np.object_)
    array[:] = listed
    return array


def packed(texts: NDArray[np.object_]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts in UTF-8, end to end, and where each begins and the last ends, `(num_texts + 1,)`."""
    encoded = [text.encode() for text in texts]
    starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), starts


def unpacked(content: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.object_]:
    """The texts that were packed.

    Raises:
      DataError: The arrays are not what `packed` makes.
    """
    if not (
        content.dtype == np.uint8
        and content.ndim == starts.ndim == 1
        and starts.dtype == np.int64
        and len(starts)
        and starts[0] == 0
        and starts[-1] == len(content)
        and (np.diff(starts) >= 0).all()
    ):
        raise DataError("packed texts whose arrays contradict each other")
    whole = content.tobytes()
    try:
        ends = pairwise(starts)
        return as_texts(whole[first:last].decode() for first, last in ends)
    except UnicodeDecodeError as error:
        raise DataError("packed texts that are not UTF-8") from error
