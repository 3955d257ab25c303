# SPDX-License-Identifier: Apache-2.0
"""Drive a strategy's rounds: reserve on the ledger, ask the clients, seal, hand the sum back."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.errors import QuorumError
from ..core.failpoints import at
from ..core.mechanism import Lattice, noised
from ..core.privacy import NoisePlacement
from ..core.query import NoisySum, Query, Rounds
from ..core.randomness import KeyStream
from ..core.synthesizer import Synthesizer
from ..core.wire import Ask
from .federation import Federation
from .ledger import Ledger

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One round as it stands on the ledger."""

    round: int
    query: Query
    noisy: NoisySum
    replayed: bool


def learn(
    rounds: Rounds,
    *,
    draft: Ask,
    max_clients: int,
    ledger: Ledger,
    federation: Federation,
    stream: KeyStream,
    attempts: int = 3,
    on_round: Callable[[Measured], None] = lambda measured: None,
) -> Synthesizer:
    """Run a strategy to its end; rounds that are sealed already are replayed, not asked.

    Args:
      rounds: The strategy's generator, not yet started.
      draft: The run's facts as every request carries them; round, head and query are filled in.
      max_clients: Most clients that hold records of one user.
      ledger: Where the run is committed.
      federation: Who is asked.
      stream: Secret randomness of `central` noise.
      attempts: How often a round is sent before a missed quorum stops the run.
      on_round: Told of every round, replayed or measured.

    Raises:
      QuorumError: A round found too few clients. It stays reserved and can be resumed.
      PrivacyRefusal: A query was not in the plan; nothing was asked.
    """
    number = 0
    noisy: NoisySum | None = None
    while True:
        try:
            query = next(rounds) if noisy is None else rounds.send(noisy)
        except StopIteration as end:
            synthesizer: Synthesizer = end.value
            return synthesizer
        number += 1
        state = ledger.state(draft.run, number)
        replayed = state is not None and state.stage in ("sealed", "released", "void")
        if state is None:
            ledger.reserve(
                draft.run,
                number,
                1,
                query=query.name,
                noise_multiplier=query.noise_multiplier,
                sampling_prob=query.sampling_prob,
            )
        if state is not None and state.stage == "drawing":
            # noise may have been drawn and lost with a crash: charged, and never drawn again
            ledger.void(draft.run, number, state.attempt, "lost-in-crash")
        elif not replayed:
            attempt = 1 if state is None else state.attempt
            ask = replace(draft, round=number, attempt=attempt, query=query, head=ledger.head())
            _measure(ask, max_clients, ledger, federation, stream, attempts)
        noisy = noisy_sum(ledger, draft.run, number, query)
        on_round(Measured(number, query, noisy, replayed))


def noisy_sum(ledger: Ledger, run: str, number: int, query: Query) -> NoisySum:
    """A round's sum as the ledger holds it; void if it was lost."""
    sealed = ledger.sum_of(run, number)
    if sealed is None:
        return NoisySum.void(query)
    state = ledger.state(run, number)
    if state is not None and state.stage == "sealed":
        ledger.release(run, number, state.attempt)
    return NoisySum(sealed.total * sealed.unit, sealed.stddev, sealed.num_clients)


def _measure(
    ask: Ask,
    max_clients: int,
    ledger: Ledger,
    federation: Federation,
    stream: KeyStream,
    attempts: int,
) -> None:
    """Ask one reserved round and seal its noised sum."""
    query, lattice = ask.query, Lattice.of(ask.query)
    for left in reversed(range(attempts)):
        try:
            collected = federation.ask(ask)
            break
        except QuorumError as error:
            if not left:
                raise
            _log.warning("%s\nasking again, %d more times", error, left)
    stddev = query.noise_multiplier * query.clip * max_clients
    total = collected.total
    match ask.placement:
        case NoisePlacement.CENTRAL:
            stddev = query.noise_multiplier * max_clients * federation.aggregator.sensitivity(
                query, lattice
            )
            ledger.draw(ask.run, ask.round, ask.attempt)
            total = noised(total, stddev=stddev, lattice=lattice, stream=stream)
        case NoisePlacement.LOCAL:  # every client's noise is in the sum
            stddev *= math.sqrt(collected.num_clients)
        case NoisePlacement.DISTRIBUTED:  # shares are sized for the fewest clients
            stddev *= math.sqrt(collected.num_clients / ask.num_shares)
    ledger.seal(
        ask.run,
        ask.round,
        ask.attempt,
        total,
        unit=lattice.unit,
        stddev=stddev,
        num_clients=collected.num_clients,
    )
    at("after-measure")
