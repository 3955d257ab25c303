# SPDX-License-Identifier: Apache-2.0
"""Drive a strategy in this process, without ledger or client: for research, never for a release."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ..client.placing import placed
from ..client.respond import users_a_block
from ..client.turns import whose_turn
from ..core import mechanism
from ..core.answering import answered
from ..core.choice import best, chosen, score_sensitivity
from ..core.query import NoisySum, Query, Strategy, check_reads, embedder_of
from ..core.randomness import KeyStream, OsKeyStream
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from ..models.live import make

_TINY = 1e-9  # noise multiplier that stands for none


def direct_run(
    strategy: Strategy,
    schema: Schema,
    shard: BoundedShard | Sequence[BoundedShard],
    noise_multiplier: float,
    *,
    rng: np.random.Generator,
    stream: KeyStream | None = None,
) -> Synthesizer:
    """What a strategy learns from its users, with the noise of a run and none of its safeguards.

    The sums are those of a run with central noise: clipped, on the lattice, with noise from the
    operating system. But nothing is charged, no policy is asked and nobody keeps a record, so
    the result is for research and benchmarks and is NOT a release.

    Args:
      strategy: The method.
      schema: Public schema of the records.
      shard: All users, as one client; or one shard a client, which makes a difference only to a
        strategy that has clients choose.
      noise_multiplier: The run's dial, as from `accounting.calibrate`.
      rng: Public randomness of the strategy.
      stream: Secret randomness of noise and sampling; `None`: the operating system's.

    Privacy:
      Each sum has the noise that its query asks for, and is not accounted for anywhere.
    """
    secret = OsKeyStream() if stream is None else stream

    def noisy(query: Query, total: NDArray[np.int64]) -> NDArray[np.int64]:
        if query.choice is not None:
            return chosen(total, query, max_clients=1, stream=secret)
        stddev = query.noise_multiplier * query.clip
        lattice = mechanism.Lattice.of(query)
        return mechanism.noised(total, stddev=stddev, lattice=lattice, stream=secret)

    return _drive(strategy, schema, _clients(shard), noise_multiplier, rng, secret, noisy)


def non_private(
    strategy: Strategy,
    schema: Schema,
    shard: BoundedShard | Sequence[BoundedShard],
    rng: np.random.Generator,
) -> Synthesizer:
    """What a strategy learns from exact sums: the bound that no amount of budget passes.

    Users are clipped and sampled as ever, but no noise is added, and a choice falls on the
    candidates of the highest scores; a sum's standard deviation is
    reported as a billionth of its clip or less, since a strategy may divide by it.

    Args:
      strategy: The method.
      schema: Public schema of the records.
      shard: All users, as one client; or one shard a client.
      rng: Public randomness of the strategy.

    Privacy:
      None. The result is for comparison only and must not leave the owner of the records.
    """

    def exact(query: Query, total: NDArray[np.int64]) -> NDArray[np.int64]:
        return total if query.choice is None else best(total, query)

    return _drive(strategy, schema, _clients(shard), _TINY, rng, OsKeyStream(), exact)


def prior(
    strategy: Strategy, schema: Schema, noise_multiplier: float, rng: np.random.Generator
) -> Synthesizer:
    """What a strategy makes of pure noise: the baseline at epsilon = 0.

    The same run over no users at all, so it holds no information on anyone.

    Args:
      strategy: The method.
      schema: Public schema.
      noise_multiplier: The dial of the run that this is compared with.
      rng: Public randomness of the strategy.
    """
    return direct_run(strategy, schema, _nobody(schema), noise_multiplier, rng=rng)


def _clients(shard: BoundedShard | Sequence[BoundedShard]) -> Sequence[BoundedShard]:
    """One shard a client."""
    return [shard] if isinstance(shard, BoundedShard) else shard


def _drive(
    strategy: Strategy,
    schema: Schema,
    clients: Sequence[BoundedShard],
    noise_multiplier: float,
    rng: np.random.Generator,
    stream: KeyStream,
    noisy: Callable[[Query, NDArray[np.int64]], NDArray[np.int64]],
) -> Synthesizer:
    """The loop: query, answer in blocks, sum, noise, until the strategy returns."""
    check_reads(strategy, schema)
    (local,) = rng.spawn(1)
    if (embedder := embedder_of(strategy, schema)) is not None:
        clients = [placed(shard, embedder) for shard in clients]
    rounds = answered(strategy.rounds(schema, noise_multiplier, rng), make)
    kept: list[dict[int, NDArray[np.int64]]] = [{} for _ in clients]
    query = next(rounds)
    while True:
        sums = (
            _echoed(_summed(strategy, query, shard, local, stream), query, own)
            for shard, own in zip(clients, kept, strict=True)
        )
        if query.choice is not None and query.choice.where == "client":
            total = _added(noisy(query, own) for own in sums)
        else:
            total = noisy(query, _added(sums))
        sent = _as_sent(query, total, len(clients))
        try:
            query = rounds.send(sent)
        except StopIteration as end:
            learned: Synthesizer = end.value
            return learned


def _added(totals: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sum of at least one array."""
    return reduce(np.add, totals)


def _as_sent(query: Query, total: NDArray[np.int64], num_clients: int) -> NoisySum:
    """What a strategy is given: a sum in the vectors' own unit, or what was chosen."""
    if query.choice is not None:
        stddev = query.noise_multiplier * score_sensitivity(query)
        return NoisySum(total.astype(np.float64), stddev, num_clients)
    return mechanism.real_sum(
        total,
        stddev=query.noise_multiplier * query.clip,
        lattice=mechanism.Lattice.of(query),
        num_clients=num_clients,
    )


def _summed(
    strategy: Strategy,
    query: Query,
    shard: BoundedShard,
    rng: np.random.Generator,
    stream: KeyStream,
) -> NDArray[np.int64]:
    """Exact clipped sum of all users, on the query's lattice."""
    shard = whose_turn(shard, query, stream)
    total = np.zeros(query.dim, dtype=np.int64)
    for block in shard.blocks(users_a_block(strategy, query, shard)):
        answer = strategy.answer(query, block, rng)
        total += mechanism.clipped_sum(answer, query, num_users=block.num_users)
    return total


def _echoed(
    alone: NDArray[np.int64], query: Query, kept: dict[int, NDArray[np.int64]]
) -> NDArray[np.int64]:
    """A round's sum with the echoes of one client's earlier rounds, if it is in a series."""
    if query.turn is None:
        return alone
    if query.turn.position == 0:
        kept.clear()
    told = mechanism.encoded(alone, query.turn, kept.items())
    kept[query.turn.position] = alone
    kept.pop(query.turn.position - len(query.turn.series.coefficients) + 1, None)
    return told


def _nobody(schema: Schema) -> BoundedShard:
    """A shard without users."""
    codes = np.zeros((0, schema.num_codes), dtype=np.int32)
    images = None if schema.image is None else np.zeros((0, *schema.image.shape), dtype=np.uint8)
    texts = None if schema.text is None else np.zeros(0, dtype=np.object_)
    return BoundedShard(Records(codes, images, texts=texts), np.zeros(0, dtype=np.int64), 0, 1)
