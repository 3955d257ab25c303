# SPDX-License-Identifier: Apache-2.0
"""Dates as whole numbers: units of a resolution since 1970, without time zones."""

import re
from typing import Literal, get_args

import numpy as np

Resolution = Literal["day", "hour", "minute", "second"]
RESOLUTIONS: tuple[Resolution, ...] = get_args(Resolution)
SECONDS: dict[str, int] = {"day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
"""Length of a unit of each resolution."""

_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2})?)?")


def units_of(text: str, resolution: Resolution) -> int:
    """An ISO 8601 date or time as whole units of a resolution since 1970-01-01.

    Raises:
      ValueError: The text is no date or time, has an offset from UTC, or lies between two units.

    Example:
      >>> units_of("1970-01-03", "day"), units_of("1970-01-01T02:00", "hour")
      (2, 2)
    """
    if not _ISO.fullmatch(text):
        raise ValueError("expected the form 2024-12-31 or 2024-12-31T08:30:00, without an offset")
    units, rest = divmod(int(np.datetime64(text, "s").astype(np.int64)), SECONDS[resolution])
    if rest:
        raise ValueError(f"it lies within one {resolution}, not at the start of it")
    return units


def iso_of(units: int, resolution: Resolution) -> str:
    """The ISO 8601 spelling of so many units since 1970-01-01.

    Example:
      >>> iso_of(2, "day"), iso_of(2, "hour")
      ('1970-01-03', '1970-01-01T02:00:00')
    """
    moment = np.datetime64(units * SECONDS[resolution], "s")
    return str(moment.astype("datetime64[D]") if resolution == "day" else moment)


def resolution_of(*texts: str) -> Resolution:
    """`day` if no text has a time of day, else `second`."""
    return "second" if any(len(text) > len("2024-12-31") for text in texts) else "day"
