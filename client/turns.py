# SPDX-License-Identifier: Apache-2.0
"""Who of a client's users a question is put to: each one, each record, or whose turn it is."""

import numpy as np

from ..core.query import Query
from ..core.randomness import KeyStream, coins
from ..core.records import BoundedShard

_TURN = 0x7475726E  # "turn": what a user's turn is drawn by beside the id


def whose_turn(shard: BoundedShard, query: Query, stream: KeyStream) -> BoundedShard:
    """The users that answer a query; for a query over records each record as a user of its own.

    Args:
      shard: All users.
      query: The question.
      stream: Secret randomness of the coins.

    Privacy:
      A user's turn hangs on the user's id alone, or on the user's records where there are no ids,
      so in a series a user answers every `separation`-th round and no other, whatever a server
      says. A coin is flipped for each user, or each record, and nobody learns how it fell.
    """
    if query.records:
        shard = shard.by_record()
    if query.turn is not None:
        separation = np.uint64(query.turn.series.separation)
        now = np.uint64(query.turn.position) % separation
        shard = shard.only(shard.user_words(_TURN) % separation == now)
    if query.sampling_prob < 1:
        shard = shard.only(coins(shard.num_users, query.sampling_prob, stream))
    return shard
