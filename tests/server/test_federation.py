# SPDX-License-Identifier: Apache-2.0
"""A round has a sum of enough valid answers, each counted once, or none at all (I4)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from fedsynth.core.aggregator import Aggregator, Sum
from fedsynth.core.errors import (
    ClientCode,
    ConfigError,
    FedsynthError,
    PolicyRefusal,
    QuorumError,
    SchemaError,
    SecurityRefusal,
)
from fedsynth.core.privacy import NoisePlacement
from fedsynth.core.query import Query
from fedsynth.core.wire import Ask, Reply, ask_from_records, reply_to_records
from fedsynth.server.federation import Federation
from fedsynth.simulation.local import LocalGrid
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

ASK = Ask(
    run="run-1",
    population="town",
    round=2,
    attempt=1,
    strategy="independent",
    settings="{}",
    schema_digest="0" * 64,
    unit="{}",
    placement=NoisePlacement.CENTRAL,
    num_shares=1,
    plan="[]",
    delta=1e-6,
    public_seed=0,
    head=(0, "0"),
    query=Query("counts", 3, 1.0, 1.0),
)
Answer = Callable[[Ask, int], RecordDict]


def ok(ask: Ask, number: int) -> RecordDict:
    """What an honest client says: its number, in every coordinate."""
    total = np.full(ask.query.dim, number, dtype=np.int64)
    site = f"site-{number}"
    return reply_to_records(Reply(ask.run, ask.round, ask.attempt, ClientCode.OK, total, site))


def says(**changes: Any) -> Answer:
    def answer(ask: Ask, number: int) -> RecordDict:
        total = np.full(ask.query.dim, number, dtype=np.int64)
        site = f"site-{number}"
        reply = Reply(ask.run, ask.round, ask.attempt, ClientCode.OK, total, site)
        return reply_to_records(replace(reply, **changes))

    return answer


def with_array(array: Any) -> Answer:
    def answer(ask: Ask, number: int) -> RecordDict:
        records = ok(ask, number)
        records["arrays"] = ArrayRecord({"total": array})
        return records

    return answer


def metrics(ask: Ask, number: int) -> RecordDict:
    records = ok(ask, number)
    records["arrays"] = MetricRecord({"total": 1.0})
    return records


def raises(ask: Ask, number: int) -> RecordDict:
    raise RuntimeError("a client that breaks")


def federation(
    *answers: Answer, quorum: int = 2, aggregator: Aggregator | None = None, **changes: Any
) -> Federation:
    """Clients that answer as they are told, over a grid of this process."""
    app = ClientApp()

    @app.query("answer")
    def handler(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        said = answers[number](ask_from_records(message.content), number)
        return Message(said, reply_to=message)

    return Federation(
        grid=changes.pop("grid", None) or LocalGrid(app, len(answers)),
        num_clients=len(answers),
        quorum=quorum,
        timeout_s=30.0,
        aggregator=aggregator or Sum(),
        **changes,
    )


BAD: dict[str, Answer] = {
    "another shape": says(total=np.ones(4, dtype=np.int64)),
    "two dimensions": says(total=np.ones((3, 1), dtype=np.int64)),
    "another dtype": says(total=np.ones(3)),
    "no sum at all": says(total=None),
    "another round": says(round=1),
    "another attempt": says(attempt=2),
    "another run": says(run="run-2"),
    "a refusal": says(code=ClientCode.POLICY_REFUSED, total=None),
    "a refusal with a sum": says(code=ClientCode.POLICY_REFUSED),
    "a numpy archive": with_array(Array(np.ones(3, dtype=np.int64))),
    "a metric": metrics,
    "more sides than numpy holds": with_array(
        Array(dtype="int64", shape=(1,) * 70 + (3,), stype="fedsynth.raw", data=bytes(24))
    ),
    "a site that answered already": says(site="site-0"),
    "a cell that makes the sum wrap": says(total=np.full(3, 2**62)),
    "an exception": raises,
}


def test_a_round_is_the_sum_of_all_clients():
    collected = federation(ok, ok, ok, ok).ask(ASK)

    assert collected.total.tolist() == [6, 6, 6]
    assert collected.num_clients == 4


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_a_bad_answer_is_left_out_and_the_others_count(answer: Answer):
    collected = federation(ok, answer, ok, ok).ask(ASK)

    assert collected.total.tolist() == [5, 5, 5]
    assert collected.num_clients == 3


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_below_the_quorum_there_is_no_sum_at_all(answer: Answer):
    with pytest.raises(QuorumError, match="1 of 3 clients gave a valid sum, 2 are needed"):
        federation(ok, answer, answer).ask(ASK)


def test_a_refusal_says_what_to_do_and_shows_no_value():
    with pytest.raises(QuorumError) as refusal:
        federation(says(code=ClientCode.SCHEMA_MISMATCH, total=None), raises).ask(ASK)

    assert "compare the two digests" in str(refusal.value)
    assert "a client that breaks" not in str(refusal.value)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ClientCode.HEAD_REWOUND, SecurityRefusal),
        (ClientCode.POLICY_REFUSED, PolicyRefusal),
        (ClientCode.SCHEMA_MISMATCH, SchemaError),
    ],
)
def test_what_all_refuse_for_good_is_no_missed_quorum(code: ClientCode, kind: type[FedsynthError]):
    refuses = says(code=code, total=None)

    with pytest.raises(kind, match=f"2 x {code.name}"):
        federation(refuses, refuses).ask(ASK)


@pytest.mark.parametrize("other", [ok, raises, says(code=ClientCode.INTERNAL, total=None)])
def test_what_some_refuse_for_good_is_a_missed_quorum(other: Answer):
    refuses = says(code=ClientCode.HEAD_REWOUND, total=None)

    with pytest.raises(QuorumError):
        federation(refuses, other).ask(ASK)


class Doubled(LocalGrid):
    """A grid that delivers every reply twice, the second time after all others."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return [*replies, *reversed(replies)]


def test_a_reply_that_comes_twice_counts_once():
    once = federation(ok, ok, ok)
    twice = replace(once, grid=Doubled(once.grid._app, 3))

    assert twice.ask(ASK).total.tolist() == once.ask(ASK).total.tolist() == [3, 3, 3]


def test_clients_that_nobody_asked_do_not_count():
    wide = federation(ok, ok, ok, ok)

    collected = replace(wide, num_clients=2).ask(ASK)

    assert collected.num_clients == 2


def test_too_few_connected_clients_are_not_asked():
    asked: list[int] = []

    def noting(ask: Ask, number: int) -> RecordDict:
        asked.append(number)
        return ok(ask, number)

    with pytest.raises(QuorumError, match="nothing was asked"):
        replace(federation(noting), num_clients=3, quorum=3, timeout_s=0.1).ask(ASK)

    assert asked == []


@dataclass(frozen=True)
class Odd(Aggregator):
    """Returns what no lattice holds."""

    name: ClassVar[str] = "odd"
    needs_single_sums: ClassVar[bool] = True

    def sensitivity(self, query: Query, lattice: Any) -> float:
        return query.clip

    def combine(self, sums: Any) -> Any:
        return np.mean(sums, axis=0)


def test_an_aggregator_that_leaves_the_lattice_is_refused():
    with pytest.raises(ConfigError, match="must return int64"):
        federation(ok, ok, aggregator=Odd()).ask(ASK)


def test_noise_in_shares_needs_hidden_sums_and_an_aggregator_that_sees_none():
    placement = NoisePlacement.DISTRIBUTED

    federation(ok, sums_are_hidden=True).check(placement)
    with pytest.raises(ConfigError, match="needs a secure sum"):
        federation(ok).check(placement)
    with pytest.raises(ConfigError, match="looks at single clients' sums"):
        federation(ok, sums_are_hidden=True, aggregator=Odd()).check(placement)
    federation(ok).check(NoisePlacement.CENTRAL)
    federation(ok).check(NoisePlacement.LOCAL)


def test_correlated_noise_needs_the_clients_sum_where_the_server_adds_it():
    with pytest.raises(ConfigError, match=r"'odd' does not form; nothing was asked"):
        federation(ok, aggregator=Odd()).check_series(NoisePlacement.CENTRAL)

    federation(ok).check_series(NoisePlacement.CENTRAL)
    federation(ok, aggregator=Odd()).check_series(NoisePlacement.LOCAL)
