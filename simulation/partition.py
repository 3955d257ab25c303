# SPDX-License-Identifier: Apache-2.0
"""Deal a population's users out to simulated clients."""

import numpy as np

from ..client.bounding import bound
from ..client.shard import Shard
from ..core.privacy import PrivacyUnit
from ..core.records import BoundedShard
from ..core.users import partition_of


def bounded_partitions(
    shard: Shard, unit: PrivacyUnit, *, num_clients: int, seed: int
) -> list[BoundedShard]:
    """One bounded shard a client, each user whole at the client that the user's id hashes to.

    The same users meet at the same client on every engine, and the same records are kept.
    """
    part = partition_of(shard.user_ids, num_clients)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(num_clients + 1))
    shards = []
    for client in range(num_clients):
        rows = order[ends[client] : ends[client + 1]]
        mine = Shard(shard.records.take(rows), shard.user_ids[rows])
        shards.append(bound(mine, unit, seed=seed))
    return shards
