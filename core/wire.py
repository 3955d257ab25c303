# SPDX-License-Identifier: Apache-2.0
"""What travels between server and clients, and its form in Flower's messages.

The only file in `core` that knows Flower. Whatever comes in is checked before it is decoded:
names, types, sizes, ranges. Anything else is a `WireError`, which names no value of the message.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ClientCode, ConfigError, SecurityRefusal
from .privacy import NoisePlacement
from .query import MAX_BLOCKS, MAX_DIM, MAX_RECORDS, Choice, Query
from .series import MAX_ROUNDS, Series, Turn

if TYPE_CHECKING:
    from flwr.app import RecordDict

PROTOCOL = 4
MESSAGE_TYPE = "query.answer"
MAX_INPUT_BYTES = 1 << 31
MAX_CELL = 1 << 46  # lattice steps: eight million users in one cell, or half a
# million in a series; no sum of clients wraps
_MAX_TEXT = 1 << 20
_MAX_ARRAYS, _MAX_SIDES = 1000, 8
_DTYPES = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class WireError(SecurityRefusal):
    """A message that this version does not accept."""


@dataclass(frozen=True)
class Ask:
    """One query as it reaches a client, with all that the client checks before it answers.

    Attributes:
      run: Identity of the run, unique for ever.
      population: Name of the population whose budget pays.
      round: Position of the query in the run, from 1.
      attempt: How often this round was asked anew with fresh noise, from 1.
      strategy: Name of an installed strategy.
      settings: Its settings, as canonical JSON.
      schema_digest: Of the schema the server works with.
      unit: The privacy unit, as canonical JSON; the client bounds contributions by it.
      placement: Where noise is added.
      num_shares: Fewest clients whose noise shares will be added (`distributed` only).
      plan: The run's whole event, `accounting.to_json` as canonical JSON.
      delta: At which the plan is priced.
      public_seed: Seed of public randomness.
      head: Sequence number and hash of the ledger's last entry.
      query: The question.
    """

    run: str
    population: str
    round: int
    attempt: int
    strategy: str
    settings: str
    schema_digest: str
    unit: str
    placement: NoisePlacement
    num_shares: int
    plan: str
    delta: float
    public_seed: int
    head: tuple[int, str]
    query: Query


@dataclass(frozen=True)
class Reply:
    """A client's answer: an integer sum, or a fixed code that says why there is none.

    Attributes:
      run: As asked.
      round: As asked.
      attempt: As asked.
      code: `OK`, or why there is no sum.
      total: `(dim,)`, int32 or int64 in grains, as `mechanism.sent` makes it; once received, int64
        on the query's lattice. For a choice that clients make, `(num_candidates,)`: ones for what
        this client drew.
      site: Random name of the odometer that answered, by which a server knows two nodes of one
        site apart from two sites; `"none"` with a refusal.
    """

    run: str
    round: int
    attempt: int
    code: ClientCode
    total: NDArray[np.integer] | None = None
    site: str = "none"


def canonical(data: Any) -> str:
    """JSON text that is the same for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def ask_to_records(ask: Ask) -> "RecordDict":
    """The Flower records of an `Ask`."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    query = ask.query
    return RecordDict(
        {
            "ask": ConfigRecord(
                {
                    "protocol": PROTOCOL,
                    "run": ask.run,
                    "population": ask.population,
                    "round": ask.round,
                    "attempt": ask.attempt,
                    "strategy": ask.strategy,
                    "settings": ask.settings,
                    "schema": ask.schema_digest,
                    "unit": ask.unit,
                    "placement": ask.placement.value,
                    "num-shares": ask.num_shares,
                    "plan": ask.plan,
                    "delta": ask.delta,
                    "public-seed": ask.public_seed,
                    "head-number": ask.head[0],
                    "head-hash": ask.head[1],
                    "query": query.name,
                    "dim": query.dim,
                    "clip": query.clip,
                    "noise-multiplier": query.noise_multiplier,
                    "sampling-prob": query.sampling_prob,
                    "cells": query.cells,
                    "resolution": query.resolution,
                    "records": query.records,
                    "position": -1 if query.turn is None else query.turn.position,
                    "num-rounds": 0 if query.turn is None else query.turn.series.num_rounds,
                    "separation": 0 if query.turn is None else query.turn.series.separation,
                    "choice": "none" if query.choice is None else query.choice.where,
                    "choice-count": 0 if query.choice is None else query.choice.count,
                }
            ),
            "inputs": ArrayRecord({k: _array(v, Array) for k, v in query.inputs.items()}),
            "choice": ArrayRecord({k: _array(v, Array) for k, v in told(query.choice).items()}),
            "series": ArrayRecord({k: _array(v, Array) for k, v in echoes(query.turn).items()}),
        }
    )


def ask_from_records(records: Mapping[str, Any]) -> Ask:
    """The `Ask` in Flower records.

    Raises:
      WireError: Anything is missing, superfluous, of another type, or out of range.
    """
    if set(records) != {"ask", "inputs", "choice", "series"}:
        raise WireError("a request holds exactly the records 'ask', 'inputs', 'choice', 'series'")
    take = _Taker(records["ask"])
    if take.whole("protocol", 0, 1 << 30) != PROTOCOL:
        raise WireError(f"this client speaks protocol {PROTOCOL} only; install the same version")
    try:
        query = Query(
            name=take.text("query", 200),
            dim=take.whole("dim", 1, MAX_DIM),
            clip=take.number("clip"),
            noise_multiplier=take.number("noise-multiplier"),
            sampling_prob=take.number("sampling-prob"),
            inputs=_inputs(records["inputs"]),
            cells=take.truth("cells"),
            resolution=take.whole("resolution", 0, 100),
            records=take.whole("records", 0, MAX_RECORDS),
            turn=_turn(
                take.whole("position", -1, MAX_ROUNDS),
                take.whole("num-rounds", 0, MAX_ROUNDS),
                take.whole("separation", 0, MAX_ROUNDS),
                records["series"],
            ),
            choice=_choice(
                take.text("choice", 20), take.whole("choice-count", 0, MAX_DIM), records["choice"]
            ),
        )
        placement = NoisePlacement(take.text("placement", 20))
    except (ConfigError, ValueError) as error:
        raise WireError("a query in the request is out of range") from error
    ask = Ask(
        run=take.identity("run"),
        population=take.identity("population"),
        round=take.whole("round", 1, 1 << 30),
        attempt=take.whole("attempt", 1, 1 << 20),
        strategy=take.text("strategy", 200),
        settings=take.text("settings", _MAX_TEXT),
        schema_digest=take.identity("schema"),
        unit=take.text("unit", 10_000),
        placement=placement,
        num_shares=take.whole("num-shares", 1, 1 << 30),
        plan=take.text("plan", _MAX_TEXT),
        delta=take.number("delta"),
        public_seed=take.whole("public-seed", 0, (1 << 62)),
        head=(take.whole("head-number", 0, 1 << 60), take.identity("head-hash")),
        query=query,
    )
    take.nothing_left()
    return ask


def reply_to_records(reply: Reply) -> "RecordDict":
    """The Flower records of a `Reply`."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {} if reply.total is None else {"total": _array(reply.total, Array)}
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": reply.run,
        "round": reply.round,
        "attempt": reply.attempt,
        "code": int(reply.code),
        "site": reply.site,
    }
    return RecordDict({"reply": ConfigRecord(config), "arrays": ArrayRecord(arrays)})


def reply_from_records(records: Mapping[str, Any], query: Query) -> Reply:
    """The `Reply` in Flower records, its sum on the query's lattice.

    Args:
      records: As received; trusted in nothing.
      query: What was asked.

    Raises:
      WireError: Anything is missing, superfluous, of another type, shape or range.
    """
    if set(records) != {"reply", "arrays"}:
        raise WireError("a reply holds exactly the records 'reply' and 'arrays'")
    take = _Taker(records["reply"])
    if take.whole("protocol", 0, 1 << 30) != PROTOCOL:
        raise WireError(f"a reply in another protocol than {PROTOCOL}")
    code = take.whole("code", 0, 1000)
    if code not in set(ClientCode):
        raise WireError("a reply with an unknown code")
    run, round_, attempt = (
        take.identity("run"),
        take.whole("round", 0, 1 << 30),
        take.whole("attempt", 0, 1 << 20),
    )
    site = take.identity("site")
    take.nothing_left()
    arrays = _arrays(records["arrays"])
    if code != ClientCode.OK:
        if len(arrays):
            raise WireError("a refusal that carries arrays")
        return Reply(run, round_, attempt, ClientCode(code))
    if set(arrays) != {"total"}:
        raise WireError("a reply holds exactly the array 'total'")
    dim, dtype = query.reply_dim, query.reply_dtype.name
    total = _decode(arrays["total"], {dtype}, max_bytes=query.reply_bytes)
    if total.shape != (dim,):
        raise WireError(f"a reply of shape {total.shape} where ({dim},) was asked for")
    if max(int(total.max()), -int(total.min())) > MAX_CELL // query.reply_grain:
        raise WireError("a reply with a cell larger than any client's users could give")
    total = total.astype(np.int64) * query.reply_grain
    choice = query.choice
    drawn = choice.count if choice is not None and choice.where == "client" else 0
    if drawn and not (int(total.min()) >= 0 and int(total.max()) == 1 and total.sum() == drawn):
        raise WireError("a reply that draws other than it was asked to")
    return Reply(run, round_, attempt, ClientCode.OK, total, site)


def told(choice: Choice | None) -> dict[str, NDArray[Any]]:
    """What clients are told of a choice: its blocks, and the rest only if they are to draw."""
    if choice is None:
        return {}
    if choice.where == "server":
        return {"starts": choice.starts}
    return {
        "starts": choice.starts,
        "estimates": choice.estimates,
        "penalties": choice.penalties,
        "weights": choice.weights,
        "against": choice.against,
    }


def series_of(query: Query) -> str:
    """A name for the series that a query belongs to, by all that its rounds must share; or ""."""
    if query.turn is None:
        return ""
    series = query.turn.series
    said = {
        "query": query.name,
        "dim": query.dim,
        "clip": float(query.clip),
        "noise_multiplier": float(query.noise_multiplier),
        "resolution": query.resolution,
        "coefficients": series.coefficients,
        "num_rounds": series.num_rounds,
        "separation": series.separation,
    }
    return hashlib.sha256(canonical(said).encode()).hexdigest()


def echoes(turn: Turn | None) -> dict[str, NDArray[Any]]:
    """The coefficients that clients are told of a series."""
    if turn is None:
        return {}
    return {"coefficients": np.array(turn.series.coefficients, dtype=np.int64)}


def _turn(position: int, num_rounds: int, separation: int, record: Any) -> Turn | None:
    """The place in a series that a request says it has."""
    arrays = {
        str(key): _decode(value, {"int64"}, max_bytes=8 * MAX_ROUNDS)
        for key, value in _arrays(record).items()
    }
    if position < 0:
        if arrays or num_rounds or separation:
            raise WireError("a request that stands alone and comes with a series")
        return None
    if set(arrays) != {"coefficients"} or arrays["coefficients"].ndim != 1:
        raise WireError("a request of a series without its coefficients")
    series = Series(tuple(arrays["coefficients"].tolist()), num_rounds, separation)
    return Turn(series, position)


def _choice(where: str, count: int, record: Any) -> Choice | None:
    """The choice that a request asks, as far as clients are told of it."""
    arrays = {
        str(key): _decode(value, {"int64", "float64"}, max_bytes=8 * (MAX_DIM + 1))
        for key, value in _arrays(record).items()
    }
    if where == "none":
        if arrays or count:
            raise WireError("a request that asks a sum and comes with a choice")
        return None
    starts = arrays.pop("starts", np.zeros(0))
    if starts.dtype != np.int64 or starts.ndim != 1 or not 2 <= len(starts) <= MAX_BLOCKS + 1:
        raise WireError("a request for a choice without blocks")
    if where == "server" and not arrays:
        alike = len(starts) - 1
        nothing, none = np.zeros(0), np.zeros((alike, 0), dtype=np.int64)
        return Choice(starts, nothing, np.zeros(alike), np.ones(alike), none, count)
    if where == "client" and set(arrays) == {"estimates", "penalties", "weights", "against"}:
        return Choice(starts, **arrays, count=count, where="client")
    raise WireError("a request for a choice with other arrays than it needs")


class _Taker:
    """Takes entries out of a config record, each of one type and range, each once."""

    def __init__(self, record: Any) -> None:
        if not isinstance(record, Mapping):
            raise WireError("a message whose record is of another kind")
        self._left = dict(record)

    def _take(self, key: str, kind: type) -> Any:
        value = self._left.pop(key, None)
        if type(value) is not kind:
            raise WireError(f"a message whose {key!r} is missing or of another type")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        value: int = self._take(key, int)
        if not low <= value <= high:
            raise WireError(f"a message whose {key!r} is out of range")
        return value

    def number(self, key: str) -> float:
        value: float = self._take(key, float)
        if not math.isfinite(value):
            raise WireError(f"a message whose {key!r} is not finite")
        return value

    def truth(self, key: str) -> bool:
        value: bool = self._take(key, bool)
        return value

    def text(self, key: str, longest: int) -> str:
        value: str = self._take(key, str)
        if len(value) > longest:
            raise WireError(f"a message whose {key!r} is too long")
        return value

    def identity(self, key: str) -> str:
        value = self.text(key, 128)
        if not _ID.fullmatch(value):
            raise WireError(f"a message whose {key!r} is not a plain name")
        return value

    def nothing_left(self) -> None:
        if self._left:
            raise WireError("a message with keys that this version does not know")


def _array(values: NDArray[Any], kind: Any) -> Any:
    """A Flower array in the plain little-endian layout that `_decode` reads."""
    if values.dtype.name not in _DTYPES:
        raise WireError(f"an array of dtype {values.dtype.name} does not travel")
    data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return kind(dtype=values.dtype.name, shape=tuple(values.shape), stype="fedsynth.raw", data=data)


def _decode(array: Any, dtypes: set[str], *, max_bytes: int) -> NDArray[Any]:
    """The values of a Flower array, after its claims were held against its bytes."""
    shape = tuple(array.shape)
    if array.stype != "fedsynth.raw" or array.dtype not in dtypes:
        raise WireError("an array in another layout or dtype")
    if len(shape) > _MAX_SIDES or not all(
        type(side) is int and 0 <= side <= max_bytes for side in shape
    ):
        raise WireError("an array with an impossible shape")
    dtype = np.dtype(array.dtype).newbyteorder("<")
    if math.prod(max(1, side) for side in shape) * dtype.itemsize > max_bytes:
        raise WireError("an array with an impossible shape")  # one without values, too
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > max_bytes or claimed != len(array.data):
        raise WireError("an array whose size is not what it claims")
    values = np.frombuffer(array.data, dtype=dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _inputs(record: Any) -> dict[str, NDArray[Any]]:
    """The arrays that come with a query."""
    return {
        str(key): _decode(value, _DTYPES, max_bytes=MAX_INPUT_BYTES)
        for key, value in _arrays(record).items()
    }


def _arrays(record: Any) -> Mapping[str, Any]:
    """A record that holds arrays; metrics and texts come in records that look alike."""
    from flwr.app import ArrayRecord

    if not isinstance(record, ArrayRecord) or len(record) > _MAX_ARRAYS:
        raise WireError("a message whose arrays are of another kind")
    return record
