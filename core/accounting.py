# SPDX-License-Identifier: Apache-2.0
"""What a run costs: events, their epsilon, and the noise that a budget calls for.

A cost is a `dp_accounting.DpEvent`, stored as such and priced anew whenever it is read. Full
participation Gaussian sums compose exactly as Gaussian DP: spending adds up in
1 / noise_multiplier^2. Poisson-sampled sums are priced by privacy loss distributions. RDP is
the cross-check, which must never come out lower.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from .errors import ConfigError, FedsynthError
from .privacy import Budget

PLD_INTERVAL = 1e-3
_MANY_SUMS = 2000  # above so many sums the interval's own error adds up, so a finer one is used
_HOPELESS, _MOST_SAMPLED = 1000.0, 100_000  # an RDP epsilon, and sampled sums, beyond which no
# loss distribution is made: it would fill any memory, and a stranger's plan may ask for it
_LEAST_NOISE, _MAX_NOISE = 1e-3, 1e6  # of an event that is read; no promise lies beyond

Leaves = Counter[tuple[float, float]]
"""How often each (noise_multiplier, sampling_prob) stands in an event."""


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
      ConfigError: The event holds anything but Gaussian sums, full or Poisson-sampled.
    """
    found: Leaves = Counter()
    _collect(event, 1, found)
    return found


def event_of(found: Mapping[tuple[float, float], int]) -> DpEvent:
    """The composed event of single sums; `leaves` turned round."""
    events = [
        SelfComposedDpEvent(single_event(noise, prob), count)
        for (noise, prob), count in sorted(found.items())
        if count
    ]
    return ComposedDpEvent(events) if events else NoOpDpEvent()


def single_event(noise_multiplier: float, sampling_prob: float = 1.0) -> DpEvent:
    """The event of one noisy sum."""
    gaussian = GaussianDpEvent(noise_multiplier)
    return gaussian if sampling_prob >= 1 else PoissonSampledDpEvent(sampling_prob, gaussian)


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """All of `events`, on the same users."""
    total: Leaves = Counter()
    for event in events:
        total.update(leaves(event))
    return event_of(total)


def to_json(event: DpEvent) -> list[dict[str, float]]:
    """Plain data that `from_json` reads back: a list of equal sums and how many of each."""
    return [
        {"noise_multiplier": noise, "sampling_prob": prob, "count": count}
        for (noise, prob), count in sorted(leaves(event).items())
    ]


def from_json(data: Sequence[Mapping[str, Any]]) -> DpEvent:
    """The event that plain data describes.

    Raises:
      ConfigError: An entry is not a Gaussian sum.
    """
    found: Leaves = Counter()
    for entry in data:
        noise, prob, count = entry["noise_multiplier"], entry["sampling_prob"], entry["count"]
        if not (
            isinstance(count, int)
            and 0 < count <= 10**9
            and isinstance(noise, int | float)
            and _LEAST_NOISE <= noise <= _MAX_NOISE
            and isinstance(prob, int | float)
            and 0 < prob <= 1
        ):
            raise ConfigError(f"not an event: {dict(entry)!r}")
        found[(float(noise), float(prob))] += count
    return event_of(found)


def price(event: DpEvent, delta: float) -> Price:
    """Epsilon of an event at `delta`, for one user under add-or-remove or zero-out.

    Raises:
      FedsynthError: The accountants contradict each other; nothing may then be claimed.
    """
    return _price(tuple(sorted(leaves(event).items())), delta)


def epsilon_of(event: DpEvent, delta: float) -> float:
    """Epsilon of an event at `delta`.

    Example:
      >>> round(epsilon_of(GaussianDpEvent(1.0), 1e-5), 4)
      4.3772
    """
    return price(event, delta).epsilon


def mu_of(event: DpEvent) -> float:
    """The Gaussian DP parameter of an event without sampling; infinite with it."""
    found = leaves(event)
    if any(prob < 1 for _, prob in found):
        return math.inf
    return math.sqrt(sum(count / noise**2 for (noise, _), count in found.items()))


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

    def fits(noise: float) -> bool:
        return epsilon_of(event(noise), budget.delta) <= budget.epsilon

    low, high = 1e-2, 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > _MAX_NOISE / 100:
            raise ConfigError(
                f"no amount of noise brings this run to epsilon {budget.epsilon:g} at delta"
                f" {budget.delta:g}; ask for fewer rounds or a larger epsilon"
            )
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def largest_odds(epsilon: float, prior: float = 0.5) -> float:
    """The most that a belief of `prior` in a user's presence can rise to, as a probability."""
    odds = math.exp(epsilon) * prior / (1 - prior)
    return odds / (1 + odds)


def _collect(event: DpEvent, times: int, found: Leaves) -> None:
    """Add the sums in `event`, `times` over, to `found`."""
    match event:
        case NoOpDpEvent():
            return
        case GaussianDpEvent():
            _add(float(event.noise_multiplier), 1.0, times, found)
        case PoissonSampledDpEvent(event=GaussianDpEvent()):
            _add(
                float(event.event.noise_multiplier),
                float(event.sampling_probability),
                times,
                found,
            )
        case SelfComposedDpEvent():
            _collect(event.event, times * int(event.count), found)
        case ComposedDpEvent():
            for part in event.events:
                _collect(part, times, found)
        case _:
            raise ConfigError(
                f"{type(event).__name__} is not a sum that this package can price; a strategy's"
                " event is made of GaussianDpEvent and PoissonSampledDpEvent of it"
            )


def _add(noise: float, prob: float, times: int, found: Leaves) -> None:
    """Count one kind of sum."""
    if not 0 < noise < math.inf or not 0 < prob <= 1:
        raise ConfigError(
            f"noise_multiplier must be above 0 and sampling_prob in (0, 1], not {noise}, {prob}"
        )
    if times > 0:
        found[(noise, prob)] += times


@lru_cache(maxsize=4096)
def _price(found: tuple[tuple[tuple[float, float], int], ...], delta: float) -> Price:
    """`price` of an event given by its sorted leaves."""
    if not 0 < delta < 1:
        raise ConfigError(f"privacy delta must lie between 0 and 1, not {delta!r}")
    if not found:
        return Price(0.0, "gaussian-exact", 0.0)
    event = event_of(dict(found))
    mu = mu_of(event)
    rdp = _accountant_epsilon(dp_accounting.rdp.RdpAccountant(), event, delta)
    if math.isfinite(mu):
        return _checked(
            float(dp_accounting.get_epsilon_gaussian(1 / mu, delta)), "gaussian-exact", rdp
        )
    if rdp > _HOPELESS or sum(count for (_, prob), count in found if prob < 1) > _MOST_SAMPLED:
        return Price(rdp, "rdp", rdp)
    many = sum(count for _, count in found) > _MANY_SUMS
    for interval in (PLD_INTERVAL / 10,) if many else (PLD_INTERVAL, PLD_INTERVAL / 10):
        pld = dp_accounting.pld.PLDAccountant(value_discretization_interval=interval)
        epsilon = _accountant_epsilon(pld, event, delta)
        if epsilon <= rdp:  # a coarse grid overstates tiny epsilons; a finer one settles it
            break
    return _checked(min(epsilon, rdp), "pld" if epsilon <= rdp else "rdp", rdp)


def _accountant_epsilon(accountant: Any, event: DpEvent, delta: float) -> float:
    """Epsilon by one of dp_accounting's accountants."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of dropped orders, which errs on the safe side
    try:
        return float(accountant.compose(event).get_epsilon(delta))
    finally:
        log.setLevel(level)


def _checked(epsilon: float, accountant: str, rdp: float) -> Price:
    """A price whose cross-check holds."""
    if not epsilon <= rdp * (1 + 1e-6) + 1e-9:
        raise FedsynthError(
            f"the accountants contradict each other: {accountant} gives epsilon {epsilon!r}, RDP"
            f" {rdp!r}, which may never be lower. Nothing was asked; please report this plan"
        )
    return Price(epsilon, accountant, rdp)
