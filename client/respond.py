# SPDX-License-Identifier: Apache-2.0
"""The one door private data leaves by: check, reserve, clip, sum, add noise, store, reply.

What passes is an integer vector of the length that the query announced, or a fixed code.
Nothing else that depends on records: no count, loss, norm or text of an error.
"""

import json
import logging
import math
import traceback
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.choice import chosen
from ..core.embedding import EMBEDDER, Embedder
from ..core.errors import ClientCode, ConfigError, ShardError
from ..core.failpoints import at
from ..core.mechanism import Lattice, clipped_sum, encoded, noised, sent, share_arrives, with_room
from ..core.privacy import NoisePlacement
from ..core.query import Contribution, Query, Strategy, embedder_of, names_files
from ..core.randomness import KeyStream
from ..core.records import BoundedShard
from ..core.wire import Ask, Reply
from ..strategies.registry import build_strategy
from .placing import placed
from .policy import unit_of
from .site import Site
from .turns import whose_turn

_log = logging.getLogger(__name__)
BLOCK_BYTES = 1 << 26  # dense rows held at a time
REFUSED = (ConfigError, ValueError, TypeError, KeyError, IndexError)
"""What a strategy raises for a request that it can answer for nobody."""
MAX_ECHO_BYTES = 1 << 33  # of a client's own sums, kept for a series
_BLOCK_CELLS = 1 << 20  # cells counted at a time


def respond(ask: Ask, site: Site, stream: KeyStream) -> Reply:
    """This client's answer to a query, or the code of its refusal.

    The order is the promise: what the owner allows; whether the shard can answer at all; the plan
    and the budget; a durable reservation; and only then anything is computed from the records.
    The answer is stored durably before it is returned, and asked again it is the same bytes.

    Privacy:
      Adding or removing all records of one user moves the sum by at most the query's clip in L2
      before noise. Under `local` placement the noise of the whole promise is added here. Under
      `central` the exact clipped sum leaves, for a server that the owner's policy trusts. Under
      `distributed` a share is added, which protects nobody unless the sum is secure; the policy
      and the engine see to that. In a series what leaves carries echoes of earlier sums, and the
      promise is that of the whole series. A query over records bounds each record instead of each
      user, and each record joins by a coin of its own. A query that asks a choice bounds each user
      in L1 a block instead; its exact sum leaves under `central` placement only, or what was drawn
      here does.
    """
    refusal = _admission(ask, site)
    if refusal is not None:
        return _refused(ask, refusal)
    try:
        unit = unit_of(ask)
        strategy = _strategy(ask.strategy, ask.settings, site.schema.is_open)
    except (ConfigError, ValueError, TypeError):
        return _refused(ask, ClientCode.STRATEGY_UNKNOWN)
    if names_files(strategy):
        _log.error("a server names no files here: %s must leave its paths empty", ask.strategy)
        return _refused(ask, ClientCode.STRATEGY_UNKNOWN)
    try:
        shard = site.load(unit, ask.public_seed)
    except ShardError as error:
        _log.error("this shard cannot answer: %s", error)
        return _refused(ask, ClientCode.SHARD_INVALID)
    if shard.num_users < site.policy.min_users:
        return _refused(ask, ClientCode.POLICY_REFUSED)
    try:
        embedder = _embedder(ask, strategy, site)
    except (ConfigError, ValueError) as error:
        _log.error("records cannot be placed as %s asks: %s", ask.strategy, error)
        return _refused(ask, ClientCode.EMBEDDER_MISMATCH)
    if embedder is not None:
        shard = placed(shard, embedder, site.state)
    try:
        block_users = users_a_block(strategy, ask.query, shard)
    except REFUSED as error:
        _log.error("a request that %s cannot answer for anybody: %s", ask.strategy, error)
        return _refused(ask, ClientCode.MALFORMED)
    refusal = site.odometer.join(ask, cap=site.policy.cap)
    if refusal is not None:
        return _refused(ask, refusal)
    at("before-client-reserve")
    reserved = site.odometer.reserve(ask)
    at("after-client-reserve")
    if isinstance(reserved, ClientCode):
        return _refused(ask, reserved)
    if isinstance(reserved, bytes):
        total = np.frombuffer(reserved, dtype="<i8").astype(np.int64)
    else:
        alone = _sum_over_users(ask, strategy, shard, block_users, stream)
        total = _noise_share(_echoed(alone, ask, site), ask, unit.max_clients, stream)
        at("before-client-store")
        site.odometer.store(ask, total.astype("<i8").tobytes(), alone=_packed(alone, ask.query))
        at("after-client-store")
    site_name = site.odometer.name
    reply = sent(total, ask.query)
    return Reply(ask.run, ask.round, ask.attempt, ClientCode.OK, reply, site_name)


@lru_cache(maxsize=16)
def _strategy(name: str, settings: str, is_open: bool) -> Strategy:
    """The installed strategy that a request names; it is immutable, so kept between messages."""
    return build_strategy(name, json.loads(settings), is_open=is_open)


def _embedder(ask: Ask, strategy: Strategy, site: Site) -> Embedder | None:
    """What places this client's records for a query, if it needs them placed.

    Raises:
      ConfigError: It is not installed here, or is another than the server's.
    """
    told = ask.query.inputs.get(EMBEDDER)
    if told is None:
        return None
    embedder = embedder_of(strategy, site.schema)
    if embedder is not None and any(getattr(embedder, key) for key in embedder.paths):
        raise ConfigError("a server names no files here: its embedder must be an installed one")
    if embedder is None or told.dtype != np.uint8 or told.tobytes().hex() != embedder.fingerprint():
        raise ConfigError("the server's embedder is not the one that is installed here")
    return embedder


def _admission(ask: Ask, site: Site) -> ClientCode | None:
    """The first reason not to look at the records at all, if there is one."""
    if ask.schema_digest != site.schema.digest:
        return ClientCode.SCHEMA_MISMATCH
    refusal = site.policy.refuses(ask)
    if refusal is not None:
        return refusal
    if ask.query.sampling_prob < 1 and unit_of(ask).max_clients > 1:
        return ClientCode.OUTSIDE_PLAN  # coins of several clients are not one coin; no price
    if ask.query.turn is not None and _echo_bytes(ask.query) > MAX_ECHO_BYTES:
        return ClientCode.OUTSIDE_PLAN  # more than a client keeps of its own sums
    if ask.query.records and unit_of(ask).max_records > ask.query.records:
        return ClientCode.OUTSIDE_PLAN  # a user may have more records than were priced
    choice, shared = ask.query.choice, ask.placement is NoisePlacement.DISTRIBUTED
    if shared and not site.sum_is_secure:
        return ClientCode.POLICY_REFUSED
    if shared and choice is None:
        share = _share(ask, unit_of(ask).max_clients)
        if not share_arrives(ask.query, stddev=share):
            return ClientCode.POLICY_REFUSED  # the shares' sum would lack some of its noise
    if choice is not None and choice.where == "server" and ask.placement != NoisePlacement.CENTRAL:
        return ClientCode.POLICY_REFUSED  # noise that fits the sum's L2 norm would not cover it
    return site.odometer.witness(ask.population, ask.head)


def _refused(ask: Ask, code: ClientCode) -> Reply:
    """A refusal; it carries a code and nothing else."""
    return Reply(ask.run, ask.round, ask.attempt, code)


def users_a_block(strategy: Strategy, query: Query, shard: BoundedShard) -> int:
    """Users answered at a time, so that memory is bounded by blocks and not by the shard.

    Answers for nobody first: what fails here fails for everyone, by the request's own fault, and
    no record was looked at.
    """
    nobody = shard.only(np.zeros(shard.num_users, dtype=np.bool_))
    answer = strategy.answer(query, nobody, np.random.default_rng(0))
    if not isinstance(answer, Contribution):
        raise TypeError("its answer is not a Contribution")
    clipped_sum(answer, query, num_users=0)
    if answer.indices is None:
        return max(1, BLOCK_BYTES // (8 * query.dim))
    width = int(answer.indices.shape[1])
    return max(1, _BLOCK_CELLS // max(1, width * shard.max_records))


def _sum_over_users(
    ask: Ask, strategy: Strategy, shard: BoundedShard, block_users: int, stream: KeyStream
) -> NDArray[np.int64]:
    """Exact sum of clipped vectors of the users whose secret coin came up, `(dim,)`."""
    query = ask.query
    shard = whose_turn(shard, query, stream)
    total = np.zeros(query.dim, dtype=np.int64)
    failed: list[Exception] = []
    at("before-clip")
    for block in shard.blocks(block_users):
        total += block_sum(strategy, query, block, seed=(ask.public_seed, ask.round), failed=failed)
    at("after-clip")
    if failed:  # for the owner's own log
        _log.error(
            "the records of %d users made %s fail; they count as zeros: %s",
            len(failed),
            ask.strategy,
            origin_of(failed[0]),
        )
    return total


def block_sum(
    strategy: Strategy,
    query: Query,
    block: BoundedShard,
    *,
    seed: tuple[int, int],
    failed: list[Exception] | None = None,
) -> NDArray[np.int64]:
    """Sum of clipped vectors over one block of users, `(dim,)`.

    An error that depends on records must neither reach the server nor void other users'
    contributions, so a block that fails is halved until the users who cause it stand alone;
    those count as zeros.

    Args:
      strategy: Whose client half answers.
      query: What is asked.
      block: The users.
      seed: Of public randomness; every block starts from the same.
      failed: Where the errors of users who count as zeros are added.
    """
    try:
        contribution = strategy.answer(query, block, np.random.default_rng(seed))
        if not isinstance(contribution, Contribution):
            raise TypeError("a strategy's answer must be a Contribution")
        return clipped_sum(contribution, query, num_users=block.num_users)
    except Exception as error:  # noqa: BLE001  (closed: the user counts as zeros, nothing is said)
        if block.num_users <= 1:
            if failed is not None:
                failed.append(error)
            return np.zeros(query.dim, dtype=np.int64)
    total = np.zeros(query.dim, dtype=np.int64)
    for part in block.blocks((block.num_users + 1) // 2):
        total += block_sum(strategy, query, part, seed=seed, failed=failed)
    return total


def origin_of(error: BaseException) -> str:
    """An error's kind and where it arose; not its text, which may hold a record."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return f"{type(error).__name__} at {where}"


def _echoed(alone: NDArray[np.int64], ask: Ask, site: Site) -> NDArray[np.int64]:
    """A round's sum with what it owes to earlier rounds of its series, if it is in one."""
    turn = ask.query.turn
    if turn is None:
        return alone
    kept = site.odometer.earlier(ask)
    return encoded(alone, turn, ((then, _unpacked(stored, ask.query)) for then, stored in kept))


def _echo_bytes(query: Query) -> int:
    """What a client keeps of its own sums for a series, in bytes, roughly."""
    return 0 if query.turn is None else 4 * query.dim * len(query.turn.series.coefficients)


def _packed(alone: NDArray[np.int64], query: Query) -> bytes:
    """A round's exact sum as this client keeps it for the echoes; nothing outside of a series."""
    if query.turn is None:
        return b""
    grains = alone // query.grain
    fits = max(int(grains.max()), -int(grains.min())) <= np.iinfo(np.int32).max
    return grains.astype("<i4" if fits else "<i8").tobytes()


def _unpacked(stored: bytes, query: Query) -> NDArray[np.int64]:
    """A sum that `_packed` packed."""
    width = "<i4" if len(stored) == 4 * query.dim else "<i8"
    return np.frombuffer(stored, dtype=width).astype(np.int64) * query.grain


def _noise_share(
    total: NDArray[np.int64], ask: Ask, max_clients: int, stream: KeyStream
) -> NDArray[np.int64]:
    """The sum with the noise that this client owes under the run's placement, or its choice."""
    query: Query = ask.query
    if query.choice is not None and query.choice.where == "client":
        return chosen(total, query, max_clients=max_clients, stream=stream)
    if ask.placement is NoisePlacement.CENTRAL:
        return total
    share = _share(ask, max_clients)
    if ask.placement is NoisePlacement.DISTRIBUTED:
        total = with_room(total, query, stddev=share)
    return noised(total, stddev=share, lattice=Lattice.of(query), stream=stream)


def _share(ask: Ask, max_clients: int) -> float:
    """Standard deviation of the noise that one client adds, where clients add it."""
    stddev = ask.query.noise_multiplier * ask.query.clip * max_clients
    shares = ask.num_shares if ask.placement is NoisePlacement.DISTRIBUTED else 1
    return stddev / math.sqrt(shares)
