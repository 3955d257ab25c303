# SPDX-License-Identifier: Apache-2.0
"""Show a data owner what a server's questions would meet: the shard, its bounds, the policy.

For the owner's own eyes: exact facts of private records, which no message ever carries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigError
from ..core.privacy import PrivacyUnit
from ..core.schema import Schema
from .bounding import bound
from .policy import Policy
from .shard import read_shard
from .unread import Unread

_ENDINGS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet", ".npz")


@dataclass(frozen=True)
class Look:
    """A shard and a policy side by side.

    Attributes:
      shard: The data file.
      schema_digest: What the server's schema must hash to.
      num_records: In the file.
      num_users: In the file.
      max_records: Most records of one user that would be used.
      num_kept: Records left when no user has more than that.
      missing: Share of records that fall into a column's last cell: missing, or not listed.
      unread: What of a column's values, where some are not what the schema says: they count as
        missing.
      broken: Share of records that break a constraint of the schema, by the constraint. They count
        as they are.
      policy: Keys and values of the policy.
      refuses: Why no request is answered; empty when some would be.
    """

    shard: Path
    schema_digest: str
    num_records: int
    num_users: int
    max_records: int
    num_kept: int
    missing: dict[str, float]
    unread: tuple[Unread, ...]
    broken: dict[str, float]
    policy: dict[str, Any]
    refuses: tuple[str, ...]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The facts as labelled lines."""
        gaps = [f"{name} {share:.1%}" for name, share in self.missing.items() if share]
        lines = [
            ("Shard", f"{self.shard}: {self.num_records:,} records of {self.num_users:,} users"),
            ("Used", f"{self.num_kept:,} records, at most {self.max_records} of a user"),
            ("Missing", ", ".join(gaps) or "nothing, and every category is listed"),
            ("Schema", f"digest {self.schema_digest}; the server's must be the same"),
        ]
        for unread in self.unread:
            lines.append(("No cell", str(unread)))
            if unread.is_whole:
                lines.append(("", "a simulation refuses this; mend the file or the schema"))
        against = [f"{share:.1%} not: {fact}" for fact, share in self.broken.items() if share]
        if self.broken:
            lines.append(("Constraints", "; ".join(against) or "kept by every record"))
        if self.refuses:
            return [*lines, ("Policy", f"refuses every request: {'; '.join(self.refuses)}")]
        allow = self.policy["allow"]
        return [
            *lines,
            (
                "Policy",
                f"epsilon {self.policy['max_epsilon']:g} at delta {self.policy['delta']:g} in all,"
                f" for each of {', '.join(allow['populations'])}",
            ),
            ("", f"by {', '.join(allow['strategies'])}; noise {', '.join(allow['placements'])}"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the owner's other programs."""
        return {
            "shard": str(self.shard),
            "schema_digest": self.schema_digest,
            "num_records": self.num_records,
            "num_users": self.num_users,
            "max_records": self.max_records,
            "num_kept": self.num_kept,
            "missing": self.missing,
            "unread": {unread.column.name: unread.share for unread in self.unread},
            "broken": self.broken,
            "policy": self.policy,
            "refuses": list(self.refuses),
        }


def look(
    place: Path,
    *,
    schema: Path | None = None,
    policy: Path | None = None,
    user: str | None = None,
) -> Look:
    """Read a shard as a client would, and hold it against the owner's policy.

    Args:
      place: A data file, or a folder that holds one, with `schema.toml` and `policy.toml`.
      schema: The public schema; `None`: `schema.toml` beside the data.
      policy: The policy; `None`: `policy.toml` beside the data.
      user: Column of user ids; `None`: what the policy says.

    Raises:
      ConfigError: There is no one data file, or the policy cannot be read.
      DataError: The schema or the shard cannot be used; the message says why.
    """
    shard_path = _data_in(place) if place.is_dir() else place
    read = Schema.read(schema or shard_path.parent / "schema.toml")
    terms = Policy.read(policy or shard_path.parent / "policy.toml")
    column = user or terms.user_column or None
    unit = PrivacyUnit(column, max_records=max(1, terms.max_records) if column else 1)
    shard = read_shard(shard_path, read, unit)
    bounded = bound(shard, unit, seed=0)
    codes = shard.records.codes
    missing = {
        column.name: float(np.mean(codes[:, index] == column.num_cells - 1)) if len(codes) else 0.0
        for index, column in enumerate(read.columns)
        if column.missing
    }
    cells = dict(enumerate(codes.T))
    broken = {
        str(constraint): float(np.mean(~rule.holds(cells))) if len(codes) else 0.0
        for constraint, rule in zip(read.constraints, read.rules.single, strict=True)
    }
    refuses = [f"without {', '.join(terms.missing)}"] if terms.missing else []
    if "min_users" not in terms.missing and bounded.num_users < terms.min_users:
        refuses.append("the shard has fewer users than min_users")
    if "user_column" not in terms.missing and user and terms.user_column != user:
        refuses.append(f"its user_column is {terms.user_column!r}, not {user!r}")
    return Look(
        shard=shard_path,
        schema_digest=read.digest,
        num_records=len(shard.records),
        num_users=bounded.num_users,
        max_records=unit.max_records,
        num_kept=len(bounded.records),
        missing=missing,
        unread=tuple(unread for unread in shard.unread if unread.num_unread),
        broken=broken,
        policy=terms.model_dump(mode="json"),
        refuses=tuple(refuses),
    )


def _data_in(folder: Path) -> Path:
    """The one data file of a folder."""
    found = sorted(p for p in folder.iterdir() if p.name.lower().endswith(_ENDINGS))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ConfigError(f"{folder} must hold one data file, but holds {names}; name the file")
    return found[0]
