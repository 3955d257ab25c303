# SPDX-License-Identifier: Apache-2.0
"""People to try settings on: of a public file or a release, as many as a population declares."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..client.bounding import bound
from ..client.shard import Shard, read_shard
from ..core.errors import ConfigError
from ..core.records import BoundedShard, Records
from ..server.folder import SUMS
from ..server.planned import Plan
from ..server.release import Release

_HELD_OUT = 0.2  # of a public file's users, to judge by


@dataclass(frozen=True)
class Source:
    """Records that cost nothing to look at.

    Attributes:
      said: What they are, in words.
      digest: Of all that they depend on.
      file: A public file of the run's schema; `None`: a release.
      release: A release folder of the run's schema; `None`: a file.
    """

    said: str
    digest: str
    file: Path | None = None
    release: Path | None = None

    @staticmethod
    def of(public: Path | None, release: Path | None) -> "Source":
        """The one of the two that is given.

        Raises:
          ConfigError: Not one of the two is, or it cannot be read.
        """
        if (public is None) == (release is None):
            raise ConfigError(
                "a sweep is free on records that are public or synthetic: give --public FILE, a"
                " file that anybody may see, or --release FOLDER, one of the two"
            )
        if release is not None:
            Release.open(release)
            listed = (release / SUMS).read_bytes()
            said = f"records drawn from the release {release}: synthetic"
            return Source(said, hashlib.sha256(listed).hexdigest(), release=release)
        path = Path(public or "")
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        return Source(f"{path}, which you say is public", digest, file=path)


def stand_ins(plan: Plan, source: Source, rng: np.random.Generator) -> tuple[BoundedShard, Records]:
    """As many users as are declared, and records of others.

    A public file's users are drawn with replacement where it has too few; a user of a release has
    as many of its records as typical ones are declared to have.

    Args:
      plan: The run whose population is stood in for.
      source: Where they come from.
      rng: Who is drawn.

    Raises:
      ConfigError: The source has another schema, or too few users.
    """
    config, unit = plan.config, plan.config.privacy_unit
    num_users = config.population.num_users
    if source.release is not None:
        release = Release.open(source.release)
        if release.synthesizer.schema.to_json() != plan.schema.to_json():
            raise ConfigError(f"the release {source.release} is of another schema than the run's")
        counts = np.resize(np.array(config.electorate().records), num_users)
        drawn = release.synthesizer.sample(int(counts.sum()), rng)
        records = Records(drawn.codes, drawn.images, texts=drawn.texts)
        ids = np.repeat(np.arange(num_users), counts).astype(np.str_)
        test = release.synthesizer.sample(max(1000, num_users // 4), rng)
        return bound(Shard(records, ids), unit, seed=0), test
    everybody = read_shard(Path(source.file or ""), plan.schema, unit)
    names, user = np.unique(everybody.user_ids, return_inverse=True)
    num_held = int(len(names) * _HELD_OUT)
    if not num_held:
        raise ConfigError(f"{source.file} holds {len(names)} users; a sweep needs 5 or more")
    shuffled = rng.permutation(len(names))
    held, rest = shuffled[:num_held], shuffled[num_held:]
    picked = rng.choice(rest, num_users, replace=len(rest) < num_users)
    order = np.argsort(user, kind="stable")
    starts = np.searchsorted(user[order], np.arange(len(names) + 1))
    rows = [order[starts[one] : starts[one + 1]] for one in picked]
    ids = np.repeat(np.arange(num_users), [len(part) for part in rows]).astype(np.str_)
    shard = Shard(everybody.records.take(np.concatenate(rows)), ids)
    return bound(shard, unit, seed=0), everybody.records.take(np.flatnonzero(np.isin(user, held)))
