# SPDX-License-Identifier: Apache-2.0
"""What a run costs: events, their epsilon, and the noise that a budget calls for.

A cost is a `dp_accounting.DpEvent`, stored as such and priced anew whenever it is read. Full
participation Gaussian sums compose exactly as Gaussian DP: spending adds up in
1 / noise_multiplier^2. Poisson-sampled sums, and sums over a user's records that join by a coin
each, are priced by privacy loss distributions. RDP is the cross-check, which must never come out
lower. The best of a secret number of tries (`core/selection.py`) is priced by RDP alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from types import MappingProxyType
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from numpy.typing import NDArray

from .errors import ConfigError, FedsynthError
from .leaf import Leaf, Leaves
from .privacy import Budget
from .quiet import quiet
from .selection import SelectDpEvent, Sums, Tries, selected_rdp

PLD_INTERVAL = 1e-3
_MANY_SUMS = 2000  # above so many sums the interval's own error adds up, so a finer one is used
_HOPELESS, _MOST_SAMPLED = 1000.0, 100_000  # an RDP epsilon, and sampled sums, beyond which no
# loss distribution is made: it would fill any memory, and a stranger's plan may ask for it
_MOST_LOSSES, _COARSEST = 10_000_000, 0.5  # points of a composed distribution; its widest grid
_LEAST_NOISE, _MAX_NOISE = 1e-3, 1e6  # of an event that is read; no promise lies beyond

_CLOSE, _MOST_GUESSES = 1e-5, 24  # how near calibrated noise is to the least, as a share of it
_MOST_RECORDS, _MOST_ROUNDS = 10_000, 1_000_000  # of one sum
_MOST_SWEEPS = 1000  # alike, of one population

Selections = Counter[SelectDpEvent]
"""How often each best of several tries stands in an event."""


@dataclass(frozen=True)
class SeriesDpEvent(DpEvent):  # type: ignore[misc]
    """A series of sums with correlated noise, which together cost one Gaussian sum.

    Attributes:
      noise_multiplier: That of the Gaussian sum, and of each round.
      num_rounds: Rounds of the series.
    """

    noise_multiplier: float
    num_rounds: int


@dataclass(frozen=True)
class RecordsDpEvent(DpEvent):  # type: ignore[misc]
    """A sum over records that each join by a secret coin; a user has at most so many of them.

    Attributes:
      noise_multiplier: Standard deviation of the noise / the clip of one record's vector.
      sampling_prob: Probability with which each record joins.
      records: Most records of one user.

    Reference:
      Ganesh (2024), "Tight Group-Level DP Guarantees for DP-SGD with Sampling via Mixture of
      Gaussians Mechanisms", arXiv 2401.10294, Theorem 3.1: how many of a user's records join is
      binomial, and the sum moves by as many clips.
    """

    noise_multiplier: float
    sampling_prob: float
    records: int


@dataclass(frozen=True)
class Price:
    """The epsilon of an event at a delta.

    Attributes:
      epsilon: The tightest valid figure.
      accountant: `"gaussian-exact"`, `"pld"` or, where that is no looser, `"rdp"`: what gave it.
      rdp_epsilon: The looser figure that it was checked against.
    """

    epsilon: float
    accountant: str
    rdp_epsilon: float


def leaves(event: DpEvent) -> Leaves:
    """The single sums that an event is composed of.

    Raises:
      ConfigError: The event holds anything but Gaussian sums: of all users, of users or records
        that join by coins, or in series.
    """
    found, chosen = parts(event)
    if chosen:
        raise ConfigError(
            "the best of a secret number of tries is not a sum, and none is asked under it: each"
            " try is a run of its own"
        )
    return found


def parts(event: DpEvent) -> tuple[Leaves, Selections]:
    """The single sums that an event is composed of, and what of it is the best of several tries.

    Raises:
      ConfigError: The event holds anything else.
    """
    found: Leaves = Counter()
    chosen: Selections = Counter()
    _collect(event, 1, found, chosen)
    return found, chosen


def event_of(
    found: Mapping[Leaf, int] | Mapping[tuple[float, float], int],
    chosen: Mapping[SelectDpEvent, int] = MappingProxyType({}),
) -> DpEvent:
    """The composed event of single sums, and of the best of tries; `parts` turned round."""
    events = [
        SelfComposedDpEvent(single_event(leaf[0], leaf[1], *map(int, leaf[2:])), count)
        for leaf, count in sorted(found.items())
        if count
    ]
    events += [SelfComposedDpEvent(best, count) for best, count in sorted(chosen.items())]
    return ComposedDpEvent(events) if events else NoOpDpEvent()


def single_event(
    noise_multiplier: float, sampling_prob: float = 1.0, records: int = 1, rounds: int = 1
) -> DpEvent:
    """The event of one noisy sum, or of one series; the arguments are those of `Leaf`."""
    if rounds > 1:
        return SeriesDpEvent(noise_multiplier, rounds)
    if records > 1:
        return RecordsDpEvent(noise_multiplier, sampling_prob, records)
    gaussian = GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_prob >= 1 else PoissonSampledDpEvent(sampling_prob, gaussian)


def select(events: Iterable[DpEvent], *, mean: float, law: Tries) -> SelectDpEvent:
    """The best of a random, secret number of tries.

    Args:
      events: What one try may cost: an event for each setting, which holds the sum that chooses.
      mean: Mean number of tries; above 1.
      law: Its law.

    Raises:
      ConfigError: There are no settings, or the mean is not above 1.

    Example:
      >>> best = select([GaussianDpEvent(2.0)], mean=10, law=Tries.LOGARITHMIC)
      >>> round(epsilon_of(best, 1e-5), 3)
      3.639
    """
    tries = {tuple(sorted(leaves(event).items())) for event in events}
    return SelectDpEvent(tuple(sorted(tries)), float(mean), law)


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """All of `events`, on the same users."""
    total: Leaves = Counter()
    best: Selections = Counter()
    for event in events:
        found, chosen = parts(event)
        total.update(found)
        best.update(chosen)
    return event_of(total, best)


def to_json(event: DpEvent) -> list[dict[str, Any]]:
    """Plain data that `from_json` reads back: equal sums and how many of each, then the rest."""
    found, chosen = parts(event)
    return [
        *_sums_json(sorted(found.items())),
        *(
            {
                "tries": [_sums_json(sums) for sums in best.tries],
                "mean": best.mean,
                "law": best.law.name.lower(),
                "count": count,
            }
            for best, count in sorted(chosen.items())
        ),
    ]


def from_json(data: Sequence[Mapping[str, Any]]) -> DpEvent:
    """The event that plain data describes.

    Raises:
      ConfigError: An entry is neither a Gaussian sum nor the best of tries that are made of them.
    """
    found = _leaves_from(entry for entry in data if "tries" not in entry)
    chosen: Selections = Counter()
    for entry in data:
        if "tries" not in entry:
            continue
        mean, count, law = entry["mean"], entry["count"], str(entry["law"]).upper()
        if (
            not (isinstance(count, int) and 0 < count <= _MOST_SWEEPS)
            or not isinstance(mean, int | float)
            or law not in Tries.__members__
        ):
            raise ConfigError(f"not an event: {dict(entry)!r}")
        tries = [event_of(_leaves_from(sums)) for sums in entry["tries"]]
        chosen[select(tries, mean=mean, law=Tries[law])] += count
    return event_of(found, chosen)


def price(event: DpEvent, delta: float) -> Price:
    """Epsilon of an event at `delta`, for one user under add-or-remove or zero-out.

    Raises:
      FedsynthError: The accountants contradict each other; nothing may then be claimed.
    """
    found, chosen = parts(event)
    return _price(tuple(sorted(found.items())), delta, tuple(sorted(chosen.items())))


def epsilon_of(event: DpEvent, delta: float) -> float:
    """Epsilon of an event at `delta`.

    Example:
      >>> round(epsilon_of(GaussianDpEvent(1.0), 1e-5), 4)
      4.3772
    """
    return price(event, delta).epsilon


def mu_of(event: DpEvent) -> float:
    """The Gaussian DP parameter of an event without sampling or tries; infinite with them."""
    found, chosen = parts(event)
    if chosen or any(leaf.is_sampled for leaf in found):
        return math.inf
    return math.sqrt(
        sum(count * (leaf.records / leaf.noise_multiplier) ** 2 for leaf, count in found.items())
    )


def split(noise_multiplier: float, fractions: Sequence[float]) -> tuple[float, ...]:
    """Noise multipliers of queries that share a budget by fractions of mu^2.

    Together they cost what one Gaussian with `noise_multiplier` costs.

    Example:
      >>> split(1.0, [0.25, 0.75])
      (2.0, 1.1547005383792517)
    """
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"budget fractions must be above 0 and add up to 1, not {fractions!r}")
    return tuple(noise_multiplier / math.sqrt(f) for f in fractions)


def calibrate(event: Callable[[float], DpEvent], budget: Budget) -> float:
    """The smallest noise multiplier at which `event` stays within `budget`.

    Args:
      event: Cost of a run as a function of its noise multiplier; falls as that rises.
      budget: What the run may cost.

    Raises:
      ConfigError: No noise multiplier up to a million is enough.
    """

    def priced(noise: float) -> float:
        return epsilon_of(event(noise), budget.delta)

    low, high = 1e-2, 1.0
    while not priced(high) <= budget.epsilon:
        low, high = high, high * 2
        if high > _MAX_NOISE / 100:
            raise ConfigError(
                f"no amount of noise brings this run to epsilon {budget.epsilon:g} at delta"
                f" {budget.delta:g}; ask for fewer rounds or a larger epsilon"
            )
    too_little, enough = _bracket(priced, budget.epsilon, low, high)
    while high / low > 1 + _CLOSE:
        middle = math.sqrt(low * high)
        if too_little < middle < enough:
            too_little, enough = (
                (too_little, middle) if priced(middle) <= budget.epsilon else (middle, enough)
            )
        low, high = (low, middle) if middle >= enough else (middle, high)
    return high


def _bracket(
    priced: Callable[[float], float], epsilon: float, low: float, high: float
) -> tuple[float, float]:
    """Noise just too little and just enough for an epsilon, between `low` and `high`.

    A price can take seconds, so a straight line through the logarithms of noise and price says
    where to look next; a bisection of what is left needs next to no price more.
    """
    at_high = priced(high)
    at_low = priced(low)
    for number in range(_MOST_GUESSES):
        if at_low <= epsilon:  # so little noise is enough already
            return 0.0, low
        if high / low <= 1 + _CLOSE / 4:
            break
        middle = math.sqrt(low * high)
        if at_high > 0 and at_low < math.inf and number % 4 < 3:
            share = math.log(at_low / epsilon) / math.log(at_low / at_high)
            guess = math.exp(math.log(low) + share * math.log(high / low))
            aside = 1 + (_CLOSE / 8) * (1 if number % 2 else -1)  # so that both ends close in
            middle = min(max(guess * aside, low * (1 + _CLOSE / 16)), high / (1 + _CLOSE / 16))
        at_middle = priced(middle)
        if at_middle <= epsilon:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return low, high


def largest_odds(epsilon: float, prior: float = 0.5) -> float:
    """The most that a belief of `prior` in a user's presence can rise to, as a probability."""
    odds = math.exp(epsilon) * prior / (1 - prior)
    return odds / (1 + odds)


def _sums_json(sums: Iterable[tuple[Leaf, int]]) -> list[dict[str, Any]]:
    """Equal sums, and how many of each, as plain data."""
    return [
        {
            "noise_multiplier": leaf.noise_multiplier,
            "sampling_prob": leaf.sampling_prob,
            **({"records": leaf.records} if leaf.records > 1 else {}),
            **({"rounds": leaf.rounds} if leaf.rounds > 1 else {}),
            "count": count,
        }
        for leaf, count in sums
    ]


def _leaves_from(data: Iterable[Mapping[str, Any]]) -> Leaves:
    """The sums that plain data describes, and how many there are of each."""
    found: Leaves = Counter()
    for entry in data:
        noise, prob, count = entry["noise_multiplier"], entry["sampling_prob"], entry["count"]
        records, rounds = entry.get("records", 1), entry.get("rounds", 1)
        if not (
            isinstance(count, int)
            and 0 < count <= 10**9
            and isinstance(noise, int | float)
            and _LEAST_NOISE <= noise <= _MAX_NOISE
            and isinstance(prob, int | float)
            and 0 < prob <= 1
            and isinstance(records, int)
            and 1 <= records <= _MOST_RECORDS
            and isinstance(rounds, int)
            and 1 <= rounds <= _MOST_ROUNDS
            and (rounds == 1 or (records == 1 and prob == 1))
        ):
            raise ConfigError(f"not an event: {dict(entry)!r}")
        found[Leaf(float(noise), float(prob), records, rounds)] += count
    return found


def _collect(event: DpEvent, times: int, found: Leaves, chosen: Selections) -> None:
    """Add the sums in `event`, `times` over, to `found`, and the best of tries to `chosen`."""
    match event:
        case NoOpDpEvent():
            return
        case GaussianDpEvent():
            _add(Leaf(float(event.noise_multiplier)), times, found)
        case PoissonSampledDpEvent(event=GaussianDpEvent()):
            noise, prob = event.event.noise_multiplier, event.sampling_probability
            _add(Leaf(float(noise), float(prob)), times, found)
        case RecordsDpEvent():
            noise, prob = float(event.noise_multiplier), float(event.sampling_prob)
            _add(Leaf(noise, prob, int(event.records)), times, found)
        case SeriesDpEvent():
            leaf = Leaf(float(event.noise_multiplier), rounds=int(event.num_rounds))
            _add(leaf, times, found)
        case SelfComposedDpEvent():
            _collect(event.event, times * int(event.count), found, chosen)
        case ComposedDpEvent():
            for part in event.events:
                _collect(part, times, found, chosen)
        case SelectDpEvent():
            if times > 0:
                chosen[event] += times
        case _:
            raise ConfigError(
                f"{type(event).__name__} is not a sum that this package can price; a strategy's"
                " event is made of GaussianDpEvent, PoissonSampledDpEvent of it, and this"
                " package's SeriesDpEvent and RecordsDpEvent"
            )


def _add(leaf: Leaf, times: int, found: Leaves) -> None:
    """Count one kind of sum."""
    if not 0 < leaf.noise_multiplier < math.inf or not 0 < leaf.sampling_prob <= 1:
        raise ConfigError(
            "noise_multiplier must be above 0 and sampling_prob in (0, 1], not"
            f" {leaf.noise_multiplier}, {leaf.sampling_prob}"
        )
    if not (1 <= leaf.records <= _MOST_RECORDS and 1 <= leaf.rounds <= _MOST_ROUNDS):
        raise ConfigError(
            f"a sum is of 1 to {_MOST_RECORDS:,} records a user, a series of 1 to"
            f" {_MOST_ROUNDS:,} rounds, not {leaf.records} and {leaf.rounds}"
        )
    if times > 0:
        found[leaf] += times


def _is_mixture(leaf: Leaf) -> bool:
    """Whether how many of a user's vectors join is a matter of chance, and may be several."""
    return leaf.is_sampled and leaf.records > 1


def _exact(leaf: Leaf) -> DpEvent:
    """What `dp_accounting` prices by itself; no mixture."""
    noise, prob = leaf.noise_multiplier, leaf.sampling_prob
    if not leaf.is_sampled:
        return GaussianDpEvent(noise / leaf.records)
    return PoissonSampledDpEvent(prob, GaussianDpEvent(noise))


def rdp_of(event: DpEvent) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """Orders, and the Rényi divergence of an event at each of them."""
    return _rdp(sorted(leaves(event).items()))


def _rdp(found: Sequence[tuple[Leaf, int]]) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """`rdp_of` an event given by its leaves."""
    accountant = dp_accounting.rdp.RdpAccountant()
    mixtures = [(leaf, n) for leaf, n in found if _is_mixture(leaf)]
    orders = tuple(float(order) for order in accountant.orders)
    with quiet("absl"):  # about orders that it drops, which errs on the safe side
        total = accountant.compose(_others(found)).rdp
    if mixtures:
        from .mixture import mixture_rdp

        for leaf, n in mixtures:
            total = total + n * mixture_rdp(*leaf[:3], orders)
    return orders, np.asarray(total, dtype=np.float64)


def rdp_to_epsilon(orders: Sequence[float], rdp: NDArray[np.float64], delta: float) -> float:
    """Epsilon at `delta` of what has these Rényi divergences at these orders."""
    with quiet("absl"):  # about orders that it drops, which errs on the safe side
        return float(dp_accounting.rdp.compute_epsilon(orders, rdp, delta)[0])


def _rdp_epsilon(found: Sequence[tuple[Leaf, int]], delta: float) -> float:
    """Epsilon by Rényi differential privacy."""
    return rdp_to_epsilon(*_rdp(found), delta)


def _pld_epsilon(
    found: Sequence[tuple[Leaf, int]], delta: float, interval: float, *, is_wide: bool
) -> float:
    """Epsilon by privacy loss distributions, on a grid of losses of a given interval.

    The grid of mixtures is coarser where it would take too long; so it is where Rényi's figure
    `is_wide`, which for rare but large sums it may be although epsilon is not.
    """
    mixtures = [(leaf, n) for leaf, n in found if _is_mixture(leaf)]
    if not mixtures:
        accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=interval)
        return _accountant_epsilon(accountant, _others(found), delta)
    from dp_accounting.pld import privacy_loss_distribution

    from .mixture import least_interval, losses_span, mixture_pld

    interval = max([interval, *(least_interval(*leaf[:3]) for leaf, _ in mixtures)])
    if is_wide:
        span = sum(n * losses_span(*leaf[:3]) for leaf, n in mixtures)
        interval = max(interval, span / _MOST_LOSSES)
    if interval > _COARSEST:
        return math.inf
    parts = [mixture_pld(*leaf[:3], interval).self_compose(n) for leaf, n in mixtures]
    for leaf, n in found:
        if not _is_mixture(leaf):
            alone = privacy_loss_distribution.from_gaussian_mechanism(
                leaf.noise_multiplier / leaf.records,
                value_discretization_interval=interval,
                sampling_prob=leaf.sampling_prob,
            )
            parts.append(alone.self_compose(n))
    return float(reduce(lambda one, two: one.compose(two), parts).get_epsilon_for_delta(delta))


def _others(found: Iterable[tuple[Leaf, int]]) -> DpEvent:
    """The sums of an event that are no mixtures, as `dp_accounting` prices them."""
    return ComposedDpEvent(
        [SelfComposedDpEvent(_exact(leaf), n) for leaf, n in found if not _is_mixture(leaf)]
    )


@lru_cache(maxsize=4096)
def _price(found: Sums, delta: float, chosen: tuple[tuple[SelectDpEvent, int], ...] = ()) -> Price:
    """`price` of an event given by its sorted parts."""
    if not 0 < delta < 1:
        raise ConfigError(f"privacy delta must lie between 0 and 1, not {delta!r}")
    if chosen:
        return _price_of_best(found, delta, chosen)
    if not found:
        return Price(0.0, "gaussian-exact", 0.0)
    mu = mu_of(event_of(dict(found)))
    rdp = _rdp_epsilon(found, delta)
    if math.isfinite(mu):
        return _checked(
            float(dp_accounting.get_epsilon_gaussian(1 / mu, delta)), "gaussian-exact", rdp
        )
    num_sampled = sum(n for leaf, n in found if leaf.is_sampled)
    if num_sampled > _MOST_SAMPLED or (rdp > _HOPELESS and not all(map(_is_mixture, dict(found)))):
        return Price(rdp, "rdp", rdp)
    many = sum(count for _, count in found) > _MANY_SUMS
    for interval in (PLD_INTERVAL / 10,) if many else (PLD_INTERVAL, PLD_INTERVAL / 10):
        epsilon = _pld_epsilon(found, delta, interval, is_wide=rdp > _HOPELESS)
        if epsilon <= rdp:  # a coarse grid overstates tiny epsilons; a finer one settles it
            break
    return _checked(min(epsilon, rdp), "pld" if epsilon <= rdp else "rdp", rdp)


@lru_cache(maxsize=4096)
def _curve(sums: Sums) -> NDArray[np.float64]:
    """Rényi divergences of a try, by order."""
    return _rdp(sums)[1]


def _price_of_best(
    found: Sums, delta: float, chosen: tuple[tuple[SelectDpEvent, int], ...]
) -> Price:
    """The price of sums beside the best of tries: by the Rényi divergences of all of it.

    Where that is less: each of the two by itself, at half of delta.
    """
    orders, of_sums = _rdp(found)
    at = np.array(orders)
    of_best = np.zeros(len(orders))
    for best, count in chosen:
        worst = np.max([_curve(sums) for sums in best.tries], axis=0)
        of_best = of_best + count * selected_rdp(at, worst, mean=best.mean, law=best.law)
    epsilon = rdp_to_epsilon(orders, of_sums + of_best, delta)
    if not found:
        return Price(epsilon, "rdp", epsilon)
    apart = _price(found, delta / 2).epsilon + rdp_to_epsilon(orders, of_best, delta / 2)
    return Price(min(epsilon, apart), "rdp", epsilon)


def _accountant_epsilon(accountant: Any, event: DpEvent, delta: float) -> float:
    """Epsilon by one of dp_accounting's accountants."""
    with quiet("absl"):  # about orders that it drops, which errs on the safe side
        return float(accountant.compose(event).get_epsilon(delta))


def _checked(epsilon: float, accountant: str, rdp: float) -> Price:
    """A price whose cross-check holds."""
    if not epsilon <= rdp * (1 + 1e-6) + 1e-9:
        raise FedsynthError(
            f"the accountants contradict each other: {accountant} gives epsilon {epsilon!r}, RDP"
            f" {rdp!r}, which may never be lower. Nothing was asked; please report this plan"
        )
    return Price(epsilon, accountant, rdp)
