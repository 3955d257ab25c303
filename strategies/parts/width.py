# SPDX-License-Identifier: Apache-2.0
"""Refuse a schema that is too wide for a network, before anybody is asked."""

from ...core.errors import ConfigError
from ...core.schema import Schema

MOST_NUMBERS = 1 << 27  # in one array: 512 MiB of float32


def refuse_wide(schema: Schema, strategy: str, num_numbers: int) -> None:
    """Refuse a schema for which a method would hold too many numbers at once.

    Args:
      schema: The schema.
      strategy: Name of the method.
      num_numbers: In its largest array.

    Raises:
      ConfigError: They are above 2^27.
    """
    if num_numbers <= MOST_NUMBERS:
        return
    widest = max(schema.columns, key=lambda c: c.num_cells, default=None)
    column = f"; column {widest.name!r} alone has {widest.num_cells:,} cells" if widest else ""
    raise ConfigError(
        f"strategy {strategy!r} would hold an array of {num_numbers:,} numbers, above"
        f" {MOST_NUMBERS:,}{column}. Give it fewer categories or bins, leave it out, or take a"
        " method of marginals, as marginals or mst"
    )
