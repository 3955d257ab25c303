# SPDX-License-Identifier: Apache-2.0
"""Ask every client one query and combine what comes back, or say that there is no sum.

A secure sum will stand here, between the replies and the aggregator; strategies know nothing
of it. Until then a server sees each client's answer, so `distributed` noise, whose shares
protect nobody singly, is refused unless the grid itself adds clients up in one process.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.aggregator import Aggregator, Sum
from ..core.errors import (
    AnswersLost,
    ClientCode,
    ConfigError,
    FedsynthError,
    PolicyRefusal,
    QuorumError,
    SchemaError,
    SecurityRefusal,
)
from ..core.failpoints import at
from ..core.privacy import NoisePlacement
from ..core.wire import (
    MESSAGE_TYPE,
    Ask,
    WireError,
    ask_to_records,
    reply_from_records,
)

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)
_POLL_S = 1.0

ADVICE = {
    ClientCode.MALFORMED: "its version differs; install the same fedsynth on both sides",
    ClientCode.NO_SHARD: "its node configuration names no shard, schema, policy and state",
    ClientCode.SHARD_INVALID: "its shard does not fit the schema; its own log says where",
    ClientCode.SCHEMA_MISMATCH: "its schema file is not the server's; compare the two digests",
    ClientCode.POLICY_REFUSED: "its owner's policy does not allow this run",
    ClientCode.BUDGET_REFUSED: "its owner's odometer holds no budget for this run",
    ClientCode.OUTSIDE_PLAN: "the query is not in the plan it was shown",
    ClientCode.CONFLICT: "it answered another question under this run, round and attempt",
    ClientCode.ANSWER_GONE: "its answer was lost or is no longer kept",
    ClientCode.HEAD_REWOUND: "it has seen a later state of this ledger: was it rolled back?",
    ClientCode.EMBEDDER_MISMATCH: "its embedder is not the server's; install the same versions",
    ClientCode.STRATEGY_UNKNOWN: "the strategy is not installed there",
    ClientCode.INTERNAL: "it failed; its own log says why",
}

# What a client does not take back when it is asked again, and what it means if all say so.
_FINAL: dict[ClientCode, type[FedsynthError]] = {
    ClientCode.HEAD_REWOUND: SecurityRefusal,
    ClientCode.POLICY_REFUSED: PolicyRefusal,
    ClientCode.SCHEMA_MISMATCH: SchemaError,
    ClientCode.EMBEDDER_MISMATCH: ConfigError,
}


@dataclass(frozen=True)
class Collected:
    """What a round brought in."""

    total: NDArray[np.int64]
    num_clients: int


@dataclass(frozen=True)
class Federation:
    """The clients of a run.

    Attributes:
      grid: Flower's grid, or one of ours.
      num_clients: Clients that are asked.
      quorum: Fewest valid sums that make a round; with fewer there is no sum at all.
      timeout_s: How long a round waits for clients and for their replies.
      aggregator: How the clients' sums become one.
      sums_are_hidden: Nobody can see a single client's sum. Only the local engine may say so.
    """

    grid: "Grid"
    num_clients: int
    quorum: int
    timeout_s: float
    aggregator: Aggregator
    sums_are_hidden: bool = False

    def check(self, placement: NoisePlacement) -> None:
        """Refuse a noise placement that this federation cannot keep.

        Raises:
          ConfigError: `distributed` without a secure sum, or with an aggregator that needs to
            see single sums.
        """
        if placement is not NoisePlacement.DISTRIBUTED:
            return
        if not self.sums_are_hidden:
            raise ConfigError(
                "noise.placement = 'distributed' needs a secure sum, which only the local engine"
                " has so far; use 'local', or 'central' if clients trust the server"
            )
        if self.aggregator.needs_single_sums:
            raise ConfigError(
                f"aggregator {self.aggregator.name!r} looks at single clients' sums, which"
                " 'distributed' noise does not protect; use 'central' or 'local'"
            )

    def check_choice(self, placement: NoisePlacement) -> None:
        """Refuse to let the server choose where it may not see the exact sum of all clients.

        Raises:
          ConfigError: The placement is not `central`, or an aggregator makes something else of
            the sums.
        """
        if placement is not NoisePlacement.CENTRAL:
            raise ConfigError(
                "this strategy lets the server choose by the exact sum of all clients, which it"
                f" sees under noise.placement = 'central' only, not {placement.value!r}; nothing"
                " was asked. Use 'central' if clients trust the server, or a strategy or setting"
                " that needs noisy sums alone, as aim with select = 'sums'"
            )
        if self.aggregator.name != Sum.name:
            raise ConfigError(
                "a choice at the server is made by clients' exact sum, which aggregator"
                f" {self.aggregator.name!r} does not form; nothing was asked. Use 'sum'"
            )

    def check_series(self, placement: NoisePlacement) -> None:
        """Refuse correlated noise on what an aggregator makes of the sums.

        A series is priced by what one user moves over all of its rounds together. An aggregator
        bounds only what one clip moves in one round, and may move as much for the least echo.

        Raises:
          ConfigError: The server adds the noise to something else than the clients' sum.
        """
        if placement is NoisePlacement.CENTRAL and self.aggregator.name != Sum.name:
            raise ConfigError(
                "correlated noise is priced for clients' exact sum, which aggregator"
                f" {self.aggregator.name!r} does not form; nothing was asked. Use 'sum', 'local'"
                " noise, or a strategy or setting without correlated noise"
            )

    def ask(self, ask: Ask) -> Collected:
        """The combined integer sum of one query.

        Raises:
          QuorumError: Fewer than `quorum` clients gave a valid sum; none of them was used.
          AnswersLost: So many lost theirs for good that asking again is in vain.
          SecurityRefusal: All clients have seen a later state of the ledger.
          PolicyRefusal: All refuse, and no owner's policy allows the run.
          SchemaError: All refuse, and hold another schema.
        """
        from flwr.app import Message

        deadline = time.monotonic() + self.timeout_s
        nodes = self._nodes(deadline)
        at("before-send")
        content = ask_to_records(ask)  # one content for all: a grid copies or serializes it
        messages = [
            Message(content=content, dst_node_id=node, message_type=MESSAGE_TYPE) for node in nodes
        ]
        replies = self.grid.send_and_receive(
            messages, timeout=max(1.0, deadline - time.monotonic())
        )
        at("after-send")
        sums, codes = _accepted(replies, ask, set(nodes))
        at("after-collect")
        if len(sums) < self.quorum:
            kind = _kind(codes, len(nodes), self.quorum)
            raise kind(_explained(ask, len(sums), self.quorum, len(nodes), codes))
        at("before-sum")
        total = self.aggregator.combine([sums[node] for node in sorted(sums)])
        if total.shape != (ask.query.reply_dim,) or total.dtype != np.int64:
            raise ConfigError(
                f"aggregator {self.aggregator.name!r} must return int64 of shape"
                f" ({ask.query.reply_dim},), not {total.dtype} {total.shape}"
            )
        at("after-sum")
        return Collected(total, len(sums))

    def _nodes(self, deadline: float) -> list[int]:
        """The clients to ask, once enough are connected or time is up."""
        while True:
            nodes = sorted(self.grid.get_node_ids())[: self.num_clients]
            if len(nodes) >= self.num_clients or time.monotonic() >= deadline:
                break
            if len(nodes) >= self.quorum and time.monotonic() >= deadline - self.timeout_s / 2:
                break
            time.sleep(_POLL_S)
        if len(nodes) < self.quorum:
            raise QuorumError(
                f"{len(nodes)} clients are connected, {self.quorum} are needed; nothing was asked."
                " Start the missing clients, then resume"
            )
        return nodes


def _accepted(
    replies: Iterable["Message"], ask: Ask, nodes: set[int]
) -> tuple[dict[int, NDArray[np.int64]], Counter[str]]:
    """Valid sums by client, each client once, and how often each other thing came."""
    sums: dict[int, NDArray[np.int64]] = {}
    sites: set[str] = set()
    codes: Counter[str] = Counter()
    most = int(np.iinfo(ask.query.reply_dtype).max) * ask.query.reply_grain
    for message in replies:
        node = message.metadata.src_node_id
        if node not in nodes or node in sums:
            codes["a reply nobody asked for"] += 1
            continue
        if message.has_error() or not message.has_content():
            codes["no reply: the client is gone or its app did not start"] += 1
            continue
        try:
            reply = reply_from_records(message.content, ask.query)
        except WireError as error:
            codes[f"a malformed reply: {error}"] += 1
            continue
        if reply.code is not ClientCode.OK or reply.total is None:
            codes[_described(reply.code)] += 1
        elif (reply.run, reply.round, reply.attempt) != (ask.run, ask.round, ask.attempt):
            codes["a reply to another round"] += 1
        elif reply.site in sites:
            codes["a second node of a site that answered already: give each its own state"] += 1
        else:
            if (np.abs(reply.total) == most).any():
                _log.warning(
                    "round %d: a cell of one client's sum is at the most that its reply holds;"
                    " spread its users over more clients",
                    ask.round,
                )
            sums[node] = reply.total.astype(np.int64, copy=False)
            sites.add(reply.site)
    return sums, codes


def _kind(codes: Counter[str], asked: int, quorum: int) -> type[FedsynthError]:
    """What a round without a sum is: whether asking again may help, and else why not."""
    final = {code: count for code in _FINAL if (count := codes[_described(code)])}
    if final and sum(final.values()) == sum(codes.values()) == asked:
        return _FINAL[next(iter(final))]
    gone = codes[_described(ClientCode.ANSWER_GONE)]
    return AnswersLost if asked - gone < quorum else QuorumError


def _described(code: ClientCode) -> str:
    """A client's code, and what to do about it."""
    return f"{code.name}: {ADVICE.get(code, '')}"


def _explained(ask: Ask, valid: int, quorum: int, asked: int, codes: Counter[str]) -> str:
    """Why a round has no sum, by kind of reply."""
    lines = [
        f"round {ask.round} ({ask.query.name}): {valid} of {asked} clients gave a valid sum,"
        f" {quorum} are needed; no sum was formed"
    ]
    lines += [f"  {count} x {what}" for what, count in codes.most_common()]
    silent = asked - valid - sum(codes.values())
    if silent > 0:
        lines.append(f"  {silent} x no reply before the deadline")
    return "\n".join(lines)
