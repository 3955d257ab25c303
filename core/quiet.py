# SPDX-License-Identifier: Apache-2.0
"""Silence about what a library says of its own workings."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Nothing below an error from a library's logger.

    By a filter: to set a level makes every logger of the process forget what it knew.
    """
    log = logging.getLogger(logger)

    def worth_saying(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log.addFilter(worth_saying)
    try:
        yield
    finally:
        log.removeFilter(worth_saying)
