# SPDX-License-Identifier: Apache-2.0
"""What is promised and to whom: the privacy unit, the budget, and where noise is added."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from .errors import ConfigError

WEAK_EPSILON = 10.0
MAX_EPSILON = 100.0
MIN_DELTA = 1e-12  # below, the tail that floating-point noise cannot reach would count


class Relation(StrEnum):
    """Neighboring data sets: which one change of the data the promise covers.

    Replace-one is left out on purpose: it doubles the sensitivity of a sum, and accountants
    disagree on who applies the factor.
    """

    ADD_OR_REMOVE = "add-or-remove"
    ZERO_OUT = "zero-out"


class NoisePlacement(StrEnum):
    """Where noise is added, and so whom the promise holds against."""

    DISTRIBUTED = "distributed"  # every client a share; needs a secure sum
    CENTRAL = "central"  # clients clip, the server adds noise; the server is trusted
    LOCAL = "local"  # each client's own noise suffices; nobody else is trusted


@dataclass(frozen=True)
class PrivacyUnit:
    """What one change of the neighboring relation protects.

    Attributes:
      column: The column of user ids; `None`: every record is a user of its own.
      max_records: Most records of one user that are used; the rest is left out at the client.
      keep: Which of a user's records are kept: at random, the first, or at random after exact
        duplicates within the user are dropped.
      relation: Neighboring relation.
      max_clients: Most clients that hold records of one user; sensitivity is multiplied by it.
    """

    column: str | None = None
    max_records: int = 1
    keep: Literal["random", "first", "deduplicate"] = "random"
    relation: Relation = Relation.ADD_OR_REMOVE
    max_clients: int = 1

    def __post_init__(self) -> None:
        if self.max_records < 1:
            raise ConfigError(f"unit.max_records must be 1 or more, not {self.max_records}")
        if self.max_clients < 1:
            raise ConfigError(f"unit.max_clients must be 1 or more, not {self.max_clients}")
        if self.keep not in ("random", "first", "deduplicate"):
            raise ConfigError(
                f"unit.keep must be 'random', 'first' or 'deduplicate', not {self.keep!r}"
            )
        if self.column is None and self.max_records != 1:
            raise ConfigError(
                "unit.max_records above 1 needs unit.column: without user ids a record is a user"
            )
        if not isinstance(self.relation, Relation):
            raise ConfigError(
                f"unit.relation must be one of {[r.value for r in Relation]}, not {self.relation!r}"
            )

    @property
    def level(self) -> str:
        """`"user"` or, where no column of user ids is given, `"record"`."""
        return "record" if self.column is None else "user"


def User(  # noqa: N802  (reads as a noun where it is used: unit=fs.User("patient_id"))
    column: str,
    *,
    max_records: int = 1,
    keep: Literal["random", "first", "deduplicate"] = "random",
    max_clients: int = 1,
) -> PrivacyUnit:
    """The privacy unit "one user", found by a column of user ids."""
    return PrivacyUnit(column=column, max_records=max_records, keep=keep, max_clients=max_clients)


@dataclass(frozen=True)
class Budget:
    """An (epsilon, delta) guarantee to stay within.

    Attributes:
      epsilon: > 0. Above 10 the promise is weak and `accept_weak` must say so.
      delta: In (0, 1); a run also demands `delta < 1 / num_users`.
      accept_weak: The caller knows that epsilon above 10 promises little.

    Example:
      >>> Budget(epsilon=2, delta=1e-6).epsilon
      2
    """

    epsilon: float
    delta: float
    accept_weak: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.epsilon, int | float) and 0 < self.epsilon < math.inf):
            raise ConfigError(
                f"privacy epsilon must be a number above 0, not {self.epsilon!r};"
                " 0.1 is strong, 1 usual, 10 weak"
            )
        if self.epsilon > MAX_EPSILON:
            raise ConfigError(
                f"privacy epsilon = {self.epsilon:g} promises nothing; use at most {MAX_EPSILON:g}"
            )
        if self.epsilon > WEAK_EPSILON and not self.accept_weak:
            raise ConfigError(
                f"privacy epsilon = {self.epsilon:g} is above {WEAK_EPSILON:g}, which promises"
                " little; lower it, or set accept_weak = true to go on knowingly"
            )
        if not (isinstance(self.delta, float) and MIN_DELTA <= self.delta < 1):
            raise ConfigError(
                f"privacy delta must lie between {MIN_DELTA:g} and 1, not {self.delta!r};"
                " use less than 1 / (10 x users)"
            )

    def check_users(self, num_users: int) -> None:
        """Refuse a delta that would let whole users be exposed.

        Args:
          num_users: Declared, public lower bound on the number of users.

        Raises:
          ConfigError: `delta >= 1 / num_users`.
        """
        if num_users < 1:
            raise ConfigError(f"population.num_users must be 1 or more, not {num_users}")
        if self.delta >= 1 / num_users:
            raise ConfigError(
                f"privacy delta = {self.delta:g} is too weak for {num_users:,} users:"
                f" one in {max(1, round(1 / self.delta)):,} could be exposed outright;"
                f" use delta <= {1 / (10 * num_users):.1g}, below 1 / (10 x users)"
            )
