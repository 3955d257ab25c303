# SPDX-License-Identifier: Apache-2.0
"""Drive a strategy's rounds: reserve on the ledger, ask the clients, seal, hand the sum back."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..core.choice import chosen, score_sensitivity
from ..core.errors import AnswersLost, QuorumError, SecurityRefusal
from ..core.mechanism import Lattice, noised
from ..core.privacy import NoisePlacement
from ..core.query import NoisySum, Query, Rounds
from ..core.randomness import KeyStream
from ..core.synthesizer import Synthesizer
from ..core.wire import Ask, series_of
from .federation import Federation
from .ledger import Ledger, RoundState, VoidReason

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
    done: int = 0,
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
      done: Rounds that the generator begins after, where it goes on from a checkpoint.
      on_round: Told of every round, replayed or measured.

    Raises:
      QuorumError: A round found too few clients. It stays reserved and can be resumed.
      SecurityRefusal: All clients refuse, for the ledger was rolled back; as before.
      PolicyRefusal: All refuse by their owners' policies; as before.
      SchemaError: All refuse, for their schema is another; as before.
      PrivacyRefusal: A query was not in the plan; nothing was asked.
      ConfigError: A query asks the server to choose, which the run does not trust with sums.
    """
    number = done
    noisy: NoisySum | None = None
    while True:
        try:
            query = next(rounds) if noisy is None else rounds.send(noisy)
        except StopIteration as end:
            synthesizer: Synthesizer = end.value
            return synthesizer
        number += 1
        if query.choice is not None and query.choice.where == "server":
            federation.check_choice(draft.placement)
        if query.turn is not None:
            federation.check_series(draft.placement)
        sensitivity = _sensitivity(query, draft.placement, federation, max_clients)
        state = ledger.state(draft.run, number)
        _check_same_question(query, number, state)
        if state is None:
            ledger.reserve(
                draft.run,
                number,
                1,
                query=query.name,
                noise_multiplier=query.noise_multiplier,
                sampling_prob=query.sampling_prob,
                sensitivity=sensitivity,
                chooses=0 if query.choice is None else query.choice.count,
                records=query.leaf.records,
                rounds=query.leaf.rounds,
                series=series_of(query),
                position=0 if query.turn is None else query.turn.position,
            )
        asked = state is None or state.stage == "reserved"
        if state is not None and state.stage == "drawing":
            # noise may have been drawn and lost with a crash: charged, and never drawn again
            ledger.void(draft.run, number, state.attempt, VoidReason.LOST_IN_CRASH)
        elif asked:
            attempt = 1 if state is None else state.attempt
            ask = replace(draft, round=number, attempt=attempt, query=query, head=ledger.head())
            try:
                _measure(ask, sensitivity, max_clients, ledger, federation, stream, attempts)
            except AnswersLost as error:
                _log.warning("%s\nround %d is void: charged, and gone on without", error, number)
                ledger.void(draft.run, number, attempt, VoidReason.NO_QUORUM)
        noisy = noisy_sum(ledger, draft.run, number, query)
        on_round(Measured(number, query, noisy, replayed=not asked))


def _sensitivity(
    query: Query, placement: NoisePlacement, federation: Federation, max_clients: int
) -> float:
    """Change of the noised vector, in L2, or of a score, that one user can cause."""
    if query.choice is not None:
        return max_clients * score_sensitivity(query)
    if placement is NoisePlacement.CENTRAL:
        return max_clients * federation.aggregator.sensitivity(query, Lattice.of(query))
    return max_clients * query.clip  # noise is added before sums are combined


def _check_same_question(query: Query, number: int, state: RoundState | None) -> None:
    """A resumed strategy must ask what was reserved, or its replay is not the run it was."""
    position = 0 if query.turn is None else query.turn.position
    asked = (query.name, query.leaf, series_of(query), position)
    if state is not None and asked != (state.query, state.leaf, state.series, state.position):
        raise SecurityRefusal(
            f"round {number} was reserved for query {state.query!r}, but the resumed strategy asks"
            f" {query.name!r} or with another noise; nothing was asked. Resume with the versions"
            " that the run was begun with"
        )


def noisy_sum(ledger: Ledger, run: str, number: int, query: Query) -> NoisySum:
    """A round's sum as the ledger holds it; void if it was lost."""
    sealed = ledger.sum_of(run, number)
    if sealed is None:
        return NoisySum.void(query)
    state = ledger.state(run, number)
    if state is not None and state.stage == "sealed":
        ledger.release(run, number, state.attempt)
    return NoisySum(
        sealed.total.astype(np.float64) * sealed.unit, sealed.stddev, sealed.num_clients
    )


def _measure(
    ask: Ask,
    sensitivity: float,
    max_clients: int,
    ledger: Ledger,
    federation: Federation,
    stream: KeyStream,
    attempts: int,
) -> None:
    """Ask one reserved round and seal its noised sum, or what was chosen."""
    query, lattice = ask.query, Lattice.of(ask.query)
    for left in reversed(range(attempts)):
        try:
            collected = federation.ask(ask)
            break
        except AnswersLost:
            raise
        except SecurityRefusal as error:
            raise SecurityRefusal(
                f"{error}\nrestore {ledger.path} from its copy, or, in a simulation whose budget"
                " may start anew, name another ledger"
            ) from error
        except QuorumError as error:
            if not left:
                raise
            _log.warning("%s\nasking again, %d more times", error, left)
    stddev, total = query.noise_multiplier * sensitivity, collected.total
    if ask.placement is NoisePlacement.CENTRAL:
        ledger.draw(ask.run, ask.round, ask.attempt)
    match ask.placement:
        case _ if query.choice is not None:  # whatever the clients drew is drawn already
            if query.choice.where == "server":
                total = chosen(total, query, max_clients=max_clients, stream=stream)
        case NoisePlacement.CENTRAL:
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
        unit=lattice.unit if query.choice is None else 1.0,
        stddev=stddev,
        num_clients=collected.num_clients,
    )
