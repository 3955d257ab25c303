# SPDX-License-Identifier: Apache-2.0
"""Checks of settings that many strategies have: shares of the budget, numbers in a range."""

from ...core.errors import ConfigError
from ...core.query import MAX_DIM

_MOST_MODEL_MB = 10_000


def check_shares(rest: str, **shares: float) -> None:
    """Refuse shares that are not above 0, or that leave nothing for what has the rest.

    Args:
      rest: What has the rest of the budget, in the plural or singular it is spoken of.
      shares: Shares of mu^2, by the names of their settings.

    Raises:
      ConfigError: One is 0 or less, or together they are 1 or more.
    """
    if not (min(shares.values()) > 0 and sum(shares.values()) < 1):
        raise ConfigError(
            f"{_listed(list(shares))} must be above 0 and leave something of 1 for the {rest},"
            f" not {_listed([repr(share) for share in shares.values()])}"
        )


def check_range(low: int, high: int, **numbers: int) -> None:
    """Refuse numbers outside a range, by the names of their settings.

    Raises:
      ConfigError: One is below `low` or above `high`.
    """
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ConfigError(f"{name} must be {low:,} to {high:,}, not {number!r}")


def check_cells(**numbers: int) -> None:
    """Refuse numbers of cells below two, in which nothing is told apart.

    Raises:
      ConfigError: One is below 2, or above what a query can hold.
    """
    check_range(2, MAX_DIM, **numbers)


def check_model(max_model_mb: float) -> None:
    """Refuse a bound of a model's memory that cannot mean anything.

    Raises:
      ConfigError: It is not above 0, or above what one process should hold.
    """
    if not 0 < max_model_mb <= _MOST_MODEL_MB:
        raise ConfigError(
            f"max_model_mb must be above 0 and at most {_MOST_MODEL_MB:,}, not {max_model_mb!r}"
        )


def _listed(words: list[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
