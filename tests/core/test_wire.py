# SPDX-License-Identifier: Apache-2.0
"""What travels survives the trip, and whatever else arrives is refused in one way."""

import random
import tracemalloc

import numpy as np
import pytest
from fedsynth.core.errors import ClientCode
from fedsynth.core.mechanism import sent
from fedsynth.core.privacy import NoisePlacement
from fedsynth.core.query import Choice, Query
from fedsynth.core.wire import (
    PROTOCOL,
    Ask,
    Reply,
    WireError,
    ask_from_records,
    ask_to_records,
    reply_from_records,
    reply_to_records,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

DIM = 6
ASKED = Query("q", DIM, 1.0, 1.0)


def ask(**change):
    query = Query(
        "votes",
        DIM,
        2.5,
        3.25,
        sampling_prob=0.25,
        inputs={"w": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.array([1, 2], np.int32)},
        cells=True,
    )
    facts = {
        "run": "20260101-mst-ab",
        "population": "people",
        "round": 3,
        "attempt": 1,
        "strategy": "mst",
        "settings": "{}",
        "schema_digest": "ab" * 32,
        "unit": "{}",
        "placement": NoisePlacement.LOCAL,
        "num_shares": 4,
        "plan": "[]",
        "delta": 1e-6,
        "public_seed": 7,
        "head": (12, "cd" * 32),
        "query": query,
    }
    return Ask(**facts | change)


def test_a_request_survives_the_trip():
    sent = ask()

    got = ask_from_records(ask_to_records(sent))

    assert (got.run, got.round, got.head, got.placement) == (
        sent.run,
        sent.round,
        sent.head,
        sent.placement,
    )
    assert got.query.inputs["w"].tolist() == sent.query.inputs["w"].tolist()
    assert got.query.inputs["c"].dtype == np.int32
    assert (got.query.clip, got.query.cells) == (2.5, True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int64", "uint8", "uint32"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_arrays_of_any_shape_survive_the_trip(dtype, shape):
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    query = Query("q", 1, 1.0, 1.0, inputs={"x": values})

    got = ask_from_records(ask_to_records(ask(query=query))).query.inputs["x"]

    assert got.dtype == values.dtype
    assert got.shape == shape
    assert np.array_equal(got, values)


def test_a_reply_survives_the_trip():
    total = np.array([1, -(2**40), 0, 5, 6, 2**46])

    got = reply_from_records(reply_to_records(Reply("r", 1, 2, ClientCode.OK, total, "a1")), ASKED)

    assert got.total.tolist() == total.tolist()
    assert (got.run, got.round, got.attempt, got.code) == ("r", 1, 2, ClientCode.OK)
    assert got.site == "a1"


def test_a_sum_of_coarse_steps_takes_four_bytes_a_cell():
    query = Query("q", DIM, 1.0, 1.0, resolution=12)
    total = np.array([1, -(2**40), 0, 5, 2**31 - 1, 2**46]) * query.grain
    most = (2**31 - 1) * query.grain

    records = reply_to_records(Reply("r", 1, 2, ClientCode.OK, sent(total, query)))

    assert len(records["arrays"]["total"].data) == query.reply_bytes == 4 * DIM
    got = reply_from_records(records, query).total
    assert got.tolist() == [query.grain, -most, 0, 5 * query.grain, most, most]
    assert reply_from_records(records, query).total.dtype == np.int64
    with pytest.raises(WireError):
        reply_from_records(records, ASKED)
    with pytest.raises(WireError):
        reply_from_records(reply_records(), query)


@pytest.mark.parametrize("value", [2**46 + 1, -(2**46) - 1, 2**63 - 1, -(2**63)])
def test_a_cell_that_could_make_a_sum_wrap_is_refused(value):
    records = reply_to_records(Reply("r", 1, 1, ClientCode.OK, np.array([0, value])))

    with pytest.raises(WireError, match="larger than any"):
        reply_from_records(records, Query("q", 2, 1.0, 1.0))


@pytest.mark.parametrize("resolution", [22, 21, 17, 16, 8])
def test_no_cell_of_a_reply_is_larger_on_the_finest_grid_than_a_sum_may_hold(resolution):
    query = Query("q", 2, 1.0, 1.0, resolution=resolution)
    most = min(2**46 // query.grain, int(np.iinfo(query.reply_dtype).max))
    largest, more = (
        Reply("r", 1, 1, ClientCode.OK, np.array([-most - past, 0]).astype(query.reply_dtype))
        for past in (0, 1)
    )

    got = reply_from_records(reply_to_records(largest), query)

    assert np.abs(got.total).max() == most * query.grain <= 2**46
    if query.reply_dtype == np.int64:
        with pytest.raises(WireError, match="larger than any"):
            reply_from_records(reply_to_records(more), query)


@pytest.mark.parametrize("code", [c for c in ClientCode if c is not ClientCode.OK])
def test_a_refusal_carries_its_code_and_no_array(code):
    records = reply_to_records(Reply("r", 1, 1, code))

    assert reply_from_records(records, ASKED).code is code
    assert len(records["arrays"]) == 0


def test_a_python_object_never_travels():
    with pytest.raises(WireError):
        ask_to_records(
            ask(query=Query("q", 1, 1.0, 1.0, inputs={"x": np.array([{}], dtype=object)}))
        )


def raw(data=b"\0" * 8 * DIM, dtype="int64", shape=(DIM,), stype="fedsynth.raw"):
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def reply_records(array=None, extra=None, **config):
    facts = {
        "protocol": PROTOCOL,
        "run": "r",
        "round": 1,
        "attempt": 1,
        "code": 0,
        "site": "s",
    } | config
    arrays = {"total": array or raw()} | (extra or {})
    return RecordDict({"reply": ConfigRecord(facts), "arrays": ArrayRecord(arrays)})


@pytest.mark.parametrize(
    "records",
    [
        reply_records(raw(shape=(DIM + 1,))),
        reply_records(raw(shape=(10**15,))),
        reply_records(raw(shape=(2, 3))),
        reply_records(raw(shape=(-1,))),
        reply_records(raw(data=b"")),
        reply_records(raw(data=b"\0" * 8 * (DIM + 1), shape=(DIM + 1,))),
        reply_records(raw(dtype="float64")),
        reply_records(raw(dtype="object")),
        reply_records(raw(stype="numpy.ndarray")),
        reply_records(extra={"more": raw()}),
        reply_records(code=99),
        reply_records(code=3),
        reply_records(code=0.0),
        reply_records(run="../../etc/passwd"),
        reply_records(run=5),
        reply_records(round=-1),
        reply_records(num_examples=1000),
        reply_records(site="../x"),
        reply_records(protocol=PROTOCOL + 1),
        RecordDict({}),
        RecordDict({"reply": MetricRecord({"code": 0}), "arrays": ArrayRecord({"total": raw()})}),
        RecordDict(dict(reply_records().items()) | {"metrics": MetricRecord({"loss": 0.5})}),
        reply_records(raw(shape=(1,) * 70 + (DIM,))),
        reply_records(raw(data=b"", shape=(0, 2**20, 2**20, 2**20, 2**20))),
        RecordDict(dict(reply_records().items()) | {"arrays": MetricRecord({"total": 1.0})}),
        RecordDict(dict(reply_records().items()) | {"arrays": ConfigRecord({"total": "x"})}),
        RecordDict(dict(reply_records(code=3).items()) | {"arrays": MetricRecord({})}),
    ],
)
def test_a_reply_in_any_other_form_is_refused(records):
    with pytest.raises(WireError):
        reply_from_records(records, ASKED)


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": PROTOCOL + 1},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"noise-multiplier": 0.0},
        {"noise-multiplier": -1.0},
        {"sampling-prob": 2.0},
        {"dim": 0},
        {"dim": 1 << 60},
        {"dim": True},
        {"placement": "none"},
        {"run": "a/b"},
        {"round": 0},
        {"delta": float("inf")},
        {"extra": 1},
        {"settings": "x" * (1 << 21)},
    ],
)
def test_a_request_out_of_range_is_refused(change):
    records = ask_to_records(ask())
    records["ask"] = ConfigRecord(dict(records["ask"]) | change)

    with pytest.raises(WireError):
        ask_from_records(records)


@pytest.mark.parametrize(
    "inputs",
    [
        MetricRecord({"x": 1.0}),
        ConfigRecord({"x": "y"}),
        ArrayRecord({"x": raw(shape=(1,) * 70 + (DIM,))}),
        ArrayRecord({"x": raw(data=b"", shape=(0, *[2**30] * 7))}),
    ],
)
def test_a_request_whose_arrays_are_none_or_cannot_be_is_refused(inputs):
    records = ask_to_records(ask())
    records["inputs"] = inputs

    with pytest.raises(WireError):
        ask_from_records(records)


@pytest.mark.parametrize("key", sorted(ask_to_records(ask())["ask"]))
def test_a_request_without_any_one_key_is_refused(key):
    records = ask_to_records(ask())
    records["ask"] = ConfigRecord({k: v for k, v in records["ask"].items() if k != key})

    with pytest.raises(WireError):
        ask_from_records(records)


def choosing(where):
    choice = Choice.among(
        [2, 3, 1],
        np.arange(6.0),
        penalties=np.array([0.5, 0.25]),
        weights=np.array([1.0, 2.0]),
        against=np.array([[2], [-1]]),
        count=2,
        where=where,
    )
    return ask(query=Query("worst", DIM, 1.0, 2.0, choice=choice))


def test_a_client_that_is_to_choose_is_told_all_and_one_that_is_not_only_the_blocks():
    here = ask_from_records(ask_to_records(choosing("client"))).query.choice
    there = ask_from_records(ask_to_records(choosing("server"))).query.choice

    assert (here.where, here.count, here.starts.tolist()) == ("client", 2, [0, 2, 5, 6])
    assert here.estimates.tolist() == [0, 1, 2, 3, 4, 5]
    assert here.penalties.tolist() == [0.5, 0.25]
    assert here.weights.tolist() == [1.0, 2.0]
    assert here.against.tolist() == [[2], [-1]]
    assert (there.where, there.count, there.starts.tolist()) == ("server", 2, [0, 2, 5, 6])
    assert len(there.estimates) == 0
    assert ask_from_records(ask_to_records(ask())).query.choice is None


def changed(where, config=None, drop=(), **arrays):
    """A request for a choice, changed."""
    records = ask_to_records(choosing(where))
    records["ask"] = ConfigRecord(dict(records["ask"]) | (config or {}))
    kept = {k: v for k, v in records["choice"].items() if k not in drop}
    records["choice"] = ArrayRecord(kept | arrays)
    return records


STARTS = np.array([0, 2, 6, 5], dtype="<i8").tobytes()


@pytest.mark.parametrize(
    "records",
    [
        changed("server", {"choice": "none"}),
        changed("server", {"choice": "client"}),
        changed("client", {"choice": "server"}),
        changed("client", {"choice": "both"}),
        changed("server", {"choice-count": 0}),
        changed("server", {"choice-count": 4}),
        changed("client", {"choice-count": 3}),
        changed("server", {"sampling-prob": 0.5}),
        changed("server", {"dim": 7}),
        changed("server", drop=("starts",)),
        changed("client", drop=("weights",)),
        changed("client", more=raw()),
        changed("server", starts=raw(data=STARTS, shape=(4,))),
        changed("server", starts=raw(data=STARTS, shape=(2, 2))),
        changed("client", starts=raw(data=STARTS, shape=(4,), dtype="float64")),
        changed("client", against=raw(data=b"", shape=(0, 2))),
        changed("client", weights=raw(data=b"\0" * 16, shape=(2,), dtype="float64")),
        changed("client", weights=raw(data=b"\xff" * 16, shape=(2,), dtype="float64")),
        changed("client", estimates=raw(data=b"", shape=(0,), dtype="float64")),
    ],
)
def test_a_request_for_a_choice_that_cannot_be_is_refused(records):
    with pytest.raises(WireError):
        ask_from_records(records)


@pytest.mark.parametrize("total", [[1, 1, 1], [0, 0, 0], [2, 0, 0], [-1, 2, 1], [0, 5, -3]])
def test_a_client_that_draws_other_than_it_was_asked_to_is_refused(total):
    records = reply_to_records(Reply("r", 1, 1, ClientCode.OK, np.array(total)))
    choice = Choice.among([1] * 3, np.zeros(3), count=2, where="client")
    query = Query("q", 3, 1.0, 1.0, choice=choice)

    with pytest.raises(WireError, match="draws other"):
        reply_from_records(records, query)


def mutated(rng):
    """A reply with one to three things changed, and whether it may still be accepted."""
    config = {"protocol": PROTOCOL, "run": "r", "round": 1, "attempt": 1, "code": 0, "site": "s"}
    fields = {"dtype": "int64", "shape": (DIM,), "stype": "fedsynth.raw", "data": b"\0" * 8 * DIM}
    odd = [0, -1, 1, 2**70, 1.5, float("nan"), "", "x" * 300, b"", True, "nan", [1, 2], [2.5]]
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(5):
            case 0:
                config[rng.choice([*config, "loss", "num-examples"])] = rng.choice(
                    [v for v in odd if not (isinstance(v, int) and abs(v) > 2**62)]
                )
            case 1:
                config.pop(rng.choice(list(config)), None)
            case 2:
                fields["shape"] = tuple(
                    rng.choice([0, 1, DIM, DIM + 1, 2**31, -1]) for _ in range(rng.randint(0, 3))
                )
            case 3:
                fields["dtype"] = rng.choice(["int32", "float64", "object", "|S8", "", ">i8"])
            case 4:
                fields["data"] = bytes(rng.randrange(0, 200))
    return RecordDict(
        {"reply": ConfigRecord(config), "arrays": ArrayRecord({"total": Array(**fields)})}
    )


def test_ten_thousand_mutated_replies_neither_crash_nor_grow():
    rng = random.Random(5)
    accepted = 0
    tracemalloc.start()

    for _ in range(10_000):
        records = mutated(rng)
        try:
            reply = reply_from_records(records, ASKED)
        except WireError:
            continue
        accepted += 1
        assert reply.code is not ClientCode.OK or reply.total.shape == (DIM,)

    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert accepted < 2000
    assert grown < 50 << 20
