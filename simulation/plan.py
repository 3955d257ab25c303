# SPDX-License-Identifier: Apache-2.0
"""Say what a run will cost and what to expect of it, before anything is read or spent."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..client.respond import BLOCK_BYTES
from ..core import accounting
from ..core.choice import epsilon_of_choice
from ..core.config import RunConfig
from ..core.errors import BudgetExceeded
from ..core.privacy import NoisePlacement
from ..core.query import Query, caution_of
from ..models.variation import Estimate
from ..models.workload import workload_of
from ..server.planned import Plan, plan_of
from ..strategies.discovered import Discovered
from ..strategies.parts.signal import Prospect, prospect_of
from .dry_run import Question, questions_of, stddev_of

if TYPE_CHECKING:
    from ..core.leaf import Leaves

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
_BASE_BYTES = 250 << 20  # of a process that has imported what a run needs
_CHECKPOINTS = 10

TRUST = {
    NoisePlacement.CENTRAL: "central noise: clients clip, and trust the server to add the noise",
    NoisePlacement.LOCAL: "local noise: each client adds all of it, and trusts nobody",
    NoisePlacement.DISTRIBUTED: "distributed noise: each client adds a share, seen only in the sum",
}


@dataclass(frozen=True)
class Step:
    """Rounds of a run that ask the same question, whether or not they follow each other.

    Attributes:
      query: Name of the question.
      num_rounds: How often it is asked.
      dim: Length of the longest sum.
      noise_multiplier: Least noise of a sum / its sensitivity.
      noise_multiplier_most: Most noise of a sum / its sensitivity.
      sampling_prob: Probability with which each user answers.
      stddev: Most noise of a sum, in its own unit; of a choice, what would cost as much in a score.
      epsilon_after: Of this run, when the last of them is done.
      bytes_down: Arrays sent to each client in each round.
      bytes_up: Array that each client sends back in each round.
      expect: What to expect of the signal beside the noise, in words; where rounds differ in
        numbers alone, from the least number to the greatest.
    """

    query: str
    num_rounds: int
    dim: int
    noise_multiplier: float
    noise_multiplier_most: float
    sampling_prob: float
    stddev: float
    epsilon_after: float
    bytes_down: int
    bytes_up: int
    expect: str


@dataclass(frozen=True)
class ModelUse:
    """What a run asks of its public model, and where that happens.

    Attributes:
      name: Of the model.
      fingerprint: Of all that its candidates depend on.
      sends_to: Where candidates are sent: empty for nowhere beyond this process, else a URL.
      num_candidates: Candidates that it proposes and varies, at most.
      estimate: About what that takes.
    """

    name: str
    fingerprint: str
    sends_to: str
    num_candidates: int
    estimate: Estimate


@dataclass(frozen=True)
class Outlook:
    """All that can be said of a run beforehand, from public facts and the ledger alone.

    Attributes:
      population: Whose budget pays.
      unit: Whom the promise protects, in words.
      relation: Neighboring relation.
      strategy: The method.
      placement: Where noise is added.
      epsilon: What the run will cost at `delta`; at most its budget.
      delta: At which the run is priced.
      accountant: What gave `epsilon`.
      noise_multiplier: The method's one noise dial, calibrated to the budget.
      largest_odds: The most that a belief of one half in a user's presence can rise to.
      spent: Epsilon already spent on the population, at the cap's delta.
      spent_after: The same once this run is done.
      cap: The most that may ever be spent on the population.
      steps: What will be asked.
      by_round: Epsilon of the run after some of its rounds, as (round, epsilon).
      memory_bytes: A rough estimate for this process (local engine) or for each client.
      per_client: Whether `memory_bytes` is for each client.
      engine: What carries the messages.
      num_clients: Clients that are asked.
      caution: What the method warns the users of its records of; empty for most.
      proposal: Settings that would hear more of the users; empty for most.
      model: The public model that the method asks; `None`: it asks none.
    """

    population: str
    unit: str
    relation: str
    strategy: str
    placement: NoisePlacement
    epsilon: float
    delta: float
    accountant: str
    noise_multiplier: float
    largest_odds: float
    spent: float
    spent_after: float
    cap: float
    steps: tuple[Step, ...]
    by_round: tuple[tuple[int, float], ...]
    memory_bytes: int
    per_client: bool
    engine: str
    num_clients: int
    caution: str = ""
    proposal: str = ""
    model: ModelUse | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        return sum(step.num_rounds for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether the population's budget holds the run."""
        return self.spent_after <= self.cap * (1 + 1e-9)

    def check(self) -> None:
        """Refuse a run that the population's budget does not hold.

        Raises:
          BudgetExceeded: It does not.
        """
        if not self.fits:
            raise BudgetExceeded(
                f"this run would bring population {self.population!r} to epsilon"
                f" {self.spent_after:.3f}, above its budget of {self.cap:.3f}. Nothing was asked;"
                f" {max(0.0, self.cap - self.spent):.3f} is left at most: lower budget.epsilon, or"
                " raise population.epsilon if the people it belongs to agree"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data for other programs."""
        return asdict(self) | {
            "num_rounds": self.num_rounds,
            "fits": self.fits,
            "left_after": max(0.0, self.cap - self.spent_after),
        }


def outlook(config: RunConfig) -> Outlook:
    """What a run will cost, and what to expect of it.

    Reads the schema and the ledger; neither the records nor any client. The method's public half
    is driven with made-up sums, to learn the size of each question.

    Raises:
      ConfigError: A setting, the method or the budget cannot be.
      SchemaError: The schema cannot be read.
    """
    plan = plan_of(config)
    budget = config.run_budget
    unit = config.privacy_unit
    price = accounting.price(plan.event, budget.delta)
    questions = questions_of(plan)
    queries = [question.query for question in questions]
    spent, spent_after = _spent(plan)
    per_client = config.engine.kind in ("superlink", "loopback")
    prospect = prospect_of(plan.strategy, plan.schema, plan.noise_multiplier, plan.heard)
    return Outlook(
        population=config.population.name,
        unit="each record" if unit.column is None else f"each user of {unit.column}",
        relation=unit.relation.value,
        strategy=config.strategy.name,
        placement=config.noise.placement,
        epsilon=price.epsilon,
        delta=budget.delta,
        accountant=price.accountant,
        noise_multiplier=plan.noise_multiplier,
        largest_odds=accounting.largest_odds(price.epsilon),
        spent=spent,
        spent_after=spent_after,
        cap=config.population.cap.epsilon,
        steps=tuple(_steps(plan, questions, prospect)),
        by_round=tuple(_by_round(plan, queries)),
        memory_bytes=_memory(plan, queries, 1 if not per_client else config.engine.clients),
        per_client=per_client,
        engine=config.engine.kind,
        num_clients=config.engine.clients,
        caution=caution_of(plan.strategy),
        proposal="" if prospect is None else prospect.proposal,
        model=_model(plan),
    )


def lines_of(seen: Outlook) -> list[tuple[str, str]]:
    """An outlook as labelled lines for a person."""
    what = "all their records" if seen.unit != "each record" else "it"
    change = f"adding or removing {what}" if seen.relation == "add-or-remove" else "zeroing it out"
    after = f"{seen.spent_after:.2f} after this run" if seen.fits else "which this run would pass"
    lines = [
        (
            "Promise",
            f"(epsilon {seen.epsilon:.4g}, delta {seen.delta:g}) for {seen.unit}, {change}",
        ),
        ("Trust", TRUST[seen.placement]),
        ("Spent", f"{seen.spent:.2f} of {seen.cap:.2f} on {seen.population}; {after}"),
    ]
    for index, step in enumerate(seen.steps):
        rounds = "1 round of" if step.num_rounds == 1 else f"{step.num_rounds} rounds of"
        sampled = (
            f", each user joins with probability {step.sampling_prob:g}"
            if step.sampling_prob < 1
            else ""
        )
        lines.append(
            (
                "" if index else "Costs",
                f"{rounds} {step.query}: epsilon {step.epsilon_after:.2f} when done,"
                f" noise multiplier {_range(step)}{sampled}",
            )
        )
    if seen.num_rounds > len(seen.steps):
        rounds = ", ".join(f"{epsilon:.2f} ({number})" for number, epsilon in seen.by_round)
        lines.append(("", f"epsilon after a round: {rounds}"))
    lines.append(
        (
            "In words",
            "someone who thinks it 50 % likely that a"
            f" {'record' if seen.unit == 'each record' else 'user'} is in the data could at the"
            f" very worst move to {worst_odds(seen.largest_odds)}",
        )
    )
    for index, step in enumerate(seen.steps):
        lines.append(("" if index else "Expect", f"{step.query}: {step.expect}"))
    if seen.proposal:
        lines.append(("Propose", seen.proposal))
    if seen.caution:
        lines.append(("Caution", seen.caution))
    if seen.model is not None:
        lines.append(("Model", _told(seen.model)))
    down = max(step.bytes_down for step in seen.steps)
    up = max(step.bytes_up for step in seen.steps)
    lines.append(
        (
            "Load",
            f"about {_size(down)} down and {_size(up)} up at most for each of {seen.num_clients}"
            f" clients in each of {seen.num_rounds} rounds;"
            f" about {_size(seen.memory_bytes)} of memory"
            f" {'at each client' if seen.per_client else 'in this process'}",
        )
    )
    return lines


def worst_odds(odds: float) -> str:
    """A probability in words, rounded up so that it never promises too much."""
    return f"{math.ceil(odds * 1000 - 1e-9) / 10:g} %"


def _model(plan: Plan) -> ModelUse | None:
    """What the run asks of a public model."""
    work = workload_of(plan.strategy, plan.schema)
    if work is None:
        return None
    return ModelUse(
        name=work.model.name,
        fingerprint=work.model.fingerprint(),
        sends_to=work.model.capabilities().sends_to,
        num_candidates=work.num_candidates,
        estimate=work.estimate,
    )


def _told(model: ModelUse) -> str:
    """What a public model is asked, and what that takes, in words."""
    takes = model.estimate
    parts = (
        f"by {model.name} ({model.fingerprint[:12]})",
        f"sent to {model.sends_to}" if model.sends_to else "made here and sent nowhere",
        f"about {takes.tokens_in:,.3g} tokens in, at most {takes.tokens_out:,.3g} out"
        if takes.tokens_out
        else "",
        f"about {takes.cpu_s:,.3g} CPU-s" if takes.cpu_s else "",
        f"a cost of about {takes.cost:,.3g}" if takes.cost else "",
    )
    return f"at most {model.num_candidates:,} candidates " + "; ".join(filter(None, parts))


def _steps(plan: Plan, questions: list[Question], prospect: Prospect | None) -> Iterator[Step]:
    """Rounds that ask the same question, taken together, in the order of their first."""
    alike: dict[tuple[str, float], list[int]] = {}
    for number, question in enumerate(questions):
        key = (question.query.name, question.query.sampling_prob)
        alike.setdefault(key, []).append(number)
    leaves = [[] if q.query.goes_on else [q.query.leaf] for q in questions]
    for (name, prob), numbers in alike.items():
        same = [questions[number] for number in numbers]
        noises = [question.query.noise_multiplier for question in same]
        stddevs = [stddev_of(plan, question.query) for question in same]
        done = accounting.event_of(Counter(chain.from_iterable(leaves[: numbers[-1] + 1])))
        expected = [
            _expected(plan, q.query, n, prospect) for q, n in zip(same, stddevs, strict=True)
        ]
        yield Step(
            query=name,
            num_rounds=len(same),
            dim=max(question.query.dim for question in same),
            noise_multiplier=min(noises),
            noise_multiplier_most=max(noises),
            sampling_prob=prob,
            stddev=max(stddevs),
            epsilon_after=accounting.epsilon_of(done, plan.config.run_budget.delta),
            bytes_down=max(question.num_bytes for question in same),
            bytes_up=max(question.query.reply_bytes for question in same),
            expect=_together(expected),
        )


def _together(told: list[str]) -> str:
    """What rounds are told to expect, as one text; alike but for numbers: with their ranges."""
    alike: dict[str, list[list[str]]] = {}
    for text in told:
        alike.setdefault(_NUMBER.sub("#", text), []).append(_NUMBER.findall(text))
    texts = []
    for frame, rows in alike.items():
        ranges = iter([_ends(numbers) for numbers in zip(*rows, strict=True)])
        text = re.sub("#", lambda _: next(ranges), frame)  # noqa: B023 - used at once
        texts.append(text if len(alike) == 1 else f"in {len(rows)} of {len(told)} rounds {text}")
    return "; ".join(texts)


def _ends(numbers: Sequence[str]) -> str:
    """The least and the greatest of numbers as they are written, or the one that they are."""
    ordered = sorted(set(numbers), key=lambda number: float(number.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _range(step: Step) -> str:
    """The noise multipliers of a step."""
    return _ends([f"{step.noise_multiplier:.3g}", f"{step.noise_multiplier_most:.3g}"])


def _expected(plan: Plan, query: Query, stddev: float, prospect: Prospect | None) -> str:
    """Signal beside noise, from what is declared of the users alone."""
    if prospect is not None and query.name == prospect.query:
        return f"{prospect.expect}: {_verdict(prospect.ratio)}"
    if isinstance(plan.strategy, Discovered) and (
        told := plan.strategy.expected(plan.schema, query.name, stddev)
    ):
        return told
    if query.choice is not None:
        epsilon = epsilon_of_choice(query.noise_multiplier * math.sqrt(query.choice.count))
        return (
            f"{query.choice.count} of {query.answer_dim} candidates chosen at the"
            f" {query.choice.where} by the exponential mechanism, each at epsilon {epsilon:.3g}"
        )
    users = plan.config.population.num_users * query.sampling_prob
    norm = getattr(plan.strategy, "max_norm", None)
    if query.cells and isinstance(norm, float) and norm > 0:
        lit = max(1, round((query.clip / norm) ** 2))  # cells that a user of one record lights
        count = users * lit * min(1.0, norm) / query.dim
        return (
            f"a cell holds about {count:,.3g} users if they are spread evenly,"
            f" noise ± {stddev:,.3g}: {_verdict(count / stddev)}"
        )
    ratio = users * query.clip / (stddev * math.sqrt(query.dim))
    return (
        f"signal at most {ratio:,.3g} times the noise, if all users agreed: {_verdict(ratio / 3)}"
    )


def _verdict(ratio: float) -> str:
    """A signal-to-noise ratio in words."""
    if ratio >= 5:
        return "clear"
    if ratio >= 1:
        return "usable"
    return "mostly noise; fewer columns or rounds, more users, or a larger epsilon would help"


def _by_round(plan: Plan, queries: list[Query]) -> Iterator[tuple[int, float]]:
    """Epsilon after some of the rounds, the first and the last among them."""
    sampled = any(query.leaf.is_sampled for query in queries)
    wanted = min(len(queries), _CHECKPOINTS // 2 if sampled else _CHECKPOINTS)
    stops = {round(1 + i * (len(queries) - 1) / max(1, wanted - 1)) for i in range(wanted)}
    leaves: Leaves = Counter()
    for number, query in enumerate(queries, start=1):
        leaves[query.leaf] += not query.goes_on
        if number in stops:
            event = accounting.event_of(leaves)
            yield number, accounting.epsilon_of(event, plan.config.run_budget.delta)


def _memory(plan: Plan, queries: list[Query], share: int) -> int:
    """Bytes that a process which holds `1 / share` of the users needs, roughly."""
    config, schema = plan.config, plan.schema
    records = config.population.num_users * config.unit.max_records // share
    width = 4 * schema.num_codes + (schema.image.num_pixels if schema.image else 0)
    sums = 4 * 8 * max(query.dim for query in queries)  # a choice's estimates among them
    dense = 2 * BLOCK_BYTES if any(not query.cells for query in queries) else 0
    return _BASE_BYTES + 3 * records * width + sums + dense


def _spent(plan: Plan) -> tuple[float, float]:
    """Epsilon spent on the population, before and after this run; creates no ledger."""
    from ..server.ledger import Ledger

    config = plan.config
    delta = config.population.cap.delta
    path = config.path(config.ledger)
    before = accounting.compose([])
    if path.exists():
        before = Ledger(path).spent(config.population.name)
    after = accounting.compose([before, plan.event])
    return accounting.epsilon_of(before, delta), accounting.epsilon_of(after, delta)


def _size(num_bytes: int) -> str:
    """Bytes in the unit that reads best."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"
