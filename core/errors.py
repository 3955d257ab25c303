# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises on purpose, and the exit code each one gives a command.

::

    FedsynthError                exit 1   a run failed
    ├── ConfigError                   2   a setting or a command that cannot mean anything
    ├── DataError                     3   private or public input that cannot be used
    │   ├── SchemaError               3   the schema itself, or data that does not fit it
    │   └── ShardError                3   a shard that cannot be read or bounded
    ├── PrivacyRefusal                4   what was asked is not covered by a promise
    │   ├── BudgetExceeded            4   ... because the budget does not hold it
    │   └── PolicyRefusal             4   ... because a data owner's policy forbids it
    ├── LedgerError                   1   the ledger's file cannot be read or written
    ├── SecurityRefusal               5   a hash, chain or peer that is not what it claims
    ├── QuorumError                   6   too few clients, or none reachable
    │   └── AnswersLost               6   ... for good: clients' answers went down with a crash
    └── Interrupted                   7   stopped by a person; resumable

A message says what was expected, what came, and what to do. It never shows a record and never
a count of private records. `ClientCode` lists all that a client tells a server of a failure.
"""

from enum import IntEnum


class FedsynthError(Exception):
    """Base of the tree; `exit_code` is what a command returns for it."""

    exit_code = 1


class ConfigError(FedsynthError):
    """A setting or a command that cannot mean anything; nothing was asked or spent."""

    exit_code = 2


class DataError(FedsynthError):
    """Input that cannot be used; nothing was asked or spent."""

    exit_code = 3


class SchemaError(DataError):
    """A schema that contradicts itself, or data that does not fit it."""


class ShardError(DataError):
    """A shard that cannot be read, or whose user ids cannot be trusted. Stays at its owner."""


class PrivacyRefusal(FedsynthError):
    """What was asked is not covered by the privacy promise; it was not done."""

    exit_code = 4


class BudgetExceeded(PrivacyRefusal):
    """A charge would pass the budget of a run or of a population."""


class PolicyRefusal(PrivacyRefusal):
    """A data owner's policy does not allow it."""


class SecurityRefusal(FedsynthError):
    """A hash, chain, or peer is not what it claims to be."""

    exit_code = 5


class LedgerError(FedsynthError):
    """The ledger could not be read or written; whatever it acknowledged before still stands."""


class QuorumError(FedsynthError):
    """Too few clients answered, so no sum was formed."""

    exit_code = 6


class AnswersLost(QuorumError):
    """Clients drew the noise of a round and lost it in a crash, so the round can never be had."""


class Interrupted(FedsynthError):
    """Stopped by a person; what was spent is on the ledger and the run can be resumed."""

    exit_code = 7


class ClientCode(IntEnum):
    """All that a client ever says about itself besides a clipped sum: one of these numbers.

    Flower sends the text of an exception to the server, so no exception may leave a handler;
    none of these codes carries a text. Each depends on public or owner-declared facts only, but
    for two that tell one bit about a shard as a whole: that it does not fit the schema, and that
    it holds fewer users than the floor its owner declared. An owner sees both beforehand by
    `fedsynth client check`.
    """

    OK = 0
    MALFORMED = 1  # the request is not one this version can read
    NO_SHARD = 2  # the owner has configured no shard for this client
    SHARD_INVALID = 3  # the shard does not fit the schema; details are in the owner's own log
    SCHEMA_MISMATCH = 4  # the server's schema digest is not this client's
    POLICY_REFUSED = 5  # the owner's policy does not allow this request
    BUDGET_REFUSED = 6  # the owner's odometer would pass the policy's epsilon
    OUTSIDE_PLAN = 7  # the query is not in the plan that the run committed
    CONFLICT = 8  # another question was already answered under this run, round and attempt
    ANSWER_GONE = 9  # answered before, and the stored answer is no longer kept
    HEAD_REWOUND = 10  # the server's ledger is older than the one this client saw
    STRATEGY_UNKNOWN = 11  # the strategy is not installed here, or not with these settings
    INTERNAL = 12  # anything else; details are in the owner's own log
    EMBEDDER_MISMATCH = 13  # the server's embedder is not this client's, or is not installed here
