# SPDX-License-Identifier: Apache-2.0
"""The waist: what a strategy may ask of private records, and all that it ever learns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .electorate import Electorate
from .embedding import Embedder
from .errors import ConfigError
from .generation import Generation
from .leaf import Leaf
from .records import BoundedShard
from .schema import Schema
from .series import ONE, Turn
from .synthesizer import Synthesizer

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

MAX_DIM = 100_000_000  # a sum of this length is 0.8 GB; a client keeps it in one SQLite row
MAX_RECORDS = 10_000  # of one user, in a sum over records
MAX_BLOCKS = 1_000_000  # of a choice, whose scores are computed one by one
FINE, COARSEST = 22, 8  # resolutions: float32 holds a coordinate; a vote is told from half a vote
FINEST = 26  # resolution of the grid on which a series' encoded sums lie
MOST_IN_SERIES = 14  # resolution of users' vectors there: whole multiples of coefficients fit
_NARROW = 16  # up to this resolution a client's sum travels in 32 bits a cell
_HUGE = 1e30  # beyond any number that a score may be made of


@dataclass(frozen=True, eq=False)
class Choice:
    """Turns a query's answer into which of its candidates lie farthest from an estimate.

    The vector of a query that asks a choice is cut into blocks, one a candidate (and then, where
    `against` names them, blocks that are only compared with). The score of candidate r is::

        weights[r] * (distance[r] - mean of distance[against[r]] - penalties[r])

    where a distance is the L1 norm of a block's sum over all users less its `estimates`. `count`
    different candidates are drawn by the exponential mechanism, and only which ones is told.

    Attributes:
      starts: Where each block begins and, last, the vector's length, `(num_blocks + 1,)`, int64.
      estimates: What is publicly thought of the sum, `(dim,)`, in the vectors' own unit. Empty
        at the clients of a choice at the server, which need not know.
      penalties: What is taken off each candidate's distance, `(num_candidates,)`.
      weights: Worth of each candidate's distance, `(num_candidates,)`; > 0.
      against: Blocks whose distance is held against each candidate's, `(num_candidates, any)`,
        int64; -1: none. Those of one candidate may not be its own.
      count: How many are drawn.
      where: `"server"`: the server forms the exact sum of all clients and draws. It is trusted
        with that sum, so such a choice is answered under `central` noise only. `"client"`: each
        client draws by its own sum, and the answer counts how many clients drew each candidate.

    Privacy:
      `Query.clip` then bounds the L1 norm of each user's part in every block, so one user moves
      each score by at most `weight * clip`, or twice that where blocks are held against it. See
      `core/choice.py` for the cost, which is that of a sum with `Query.noise_multiplier`.
    """

    starts: NDArray[np.int64]
    estimates: NDArray[np.float64]
    penalties: NDArray[np.float64]
    weights: NDArray[np.float64]
    against: NDArray[np.int64]
    count: int = 1
    where: Literal["server", "client"] = "server"

    def __post_init__(self) -> None:
        num_candidates = len(self.weights) if self.weights.ndim == 1 else 0
        num_blocks, at_client = len(self.starts) - 1, self.where == "client"
        ok = (
            self.starts.ndim == 1
            and self.starts.dtype == self.against.dtype == np.int64
            and 1 <= num_candidates <= num_blocks <= MAX_BLOCKS
            and self.starts[0] == 0
            and bool((self.starts[1:] > self.starts[:-1]).all())
            and self.starts[-1] <= MAX_DIM
            and self.estimates.ndim == 1
            and len(self.estimates) in (self.starts[-1], self.starts[-1] if at_client else 0)
            and self.penalties.shape == (num_candidates,)
            and self.against.ndim == 2
            and len(self.against) == num_candidates
            and bool(((self.against >= -1) & (self.against < num_blocks)).all())
            and bool((self.against != np.arange(num_candidates)[:, None]).all())
        )
        if not ok:
            raise ConfigError("a choice whose arrays contradict each other")
        floats = (self.estimates, self.penalties, self.weights)
        if not all(
            values.dtype == np.float64 and bool((np.abs(values) < _HUGE).all()) for values in floats
        ) or not bool((self.weights > 1 / _HUGE).all()):
            raise ConfigError("a choice's estimates, penalties and weights must be plain numbers")
        if not 1 <= self.count <= num_candidates:
            raise ConfigError(f"a choice of {self.count} among {num_candidates} candidates")
        if self.where not in ("server", "client"):
            raise ConfigError(f"a choice is made at 'server' or 'client', not {self.where!r}")

    @staticmethod
    def among(
        sizes: Sequence[int],
        estimates: NDArray[np.float64],
        *,
        penalties: NDArray[np.float64] | None = None,
        weights: NDArray[np.float64] | None = None,
        against: NDArray[np.int64] | None = None,
        count: int = 1,
        where: Literal["server", "client"] = "server",
    ) -> "Choice":
        """A choice among blocks of given sizes; what is left out is 0, 1 and nothing.

        Args:
          sizes: Cells of each block.
          estimates: As the attribute.
          penalties: As the attribute; `None`: zeros.
          weights: As the attribute; `None`: ones.
          against: As the attribute; `None`: none.
          count: As the attribute.
          where: As the attribute.
        """
        num_candidates = len(sizes) if weights is None else len(weights)
        return Choice(
            np.cumsum([0, *sizes]).astype(np.int64),
            estimates,
            np.zeros(num_candidates) if penalties is None else penalties,
            np.ones(num_candidates) if weights is None else weights,
            np.zeros((num_candidates, 0), dtype=np.int64) if against is None else against,
            count,
            where,
        )

    @property
    def most_clips(self) -> NDArray[np.int64]:
        """By how many clips one user can move each candidate's distance: 1, or 2."""
        return np.asarray(1 + (self.against >= 0).any(axis=1), dtype=np.int64)


@dataclass(frozen=True)
class Query:
    """A bounded sum, asked of every client, or a private choice by one.

    Attributes:
      name: Which question of the strategy this is; the same name may be asked many times.
      dim: Length of each user's vector.
      clip: L2 bound of each user's vector, in the vector's own unit; > 0, finite. With a choice:
        L1 bound of each user's part in every block.
      noise_multiplier: Standard deviation of the sum's noise / its sensitivity; > 0, finite.
        With a choice: that of the sum that would cost as much.
      sampling_prob: Each user answers with this probability, by a coin the client flips and
        keeps secret; in (0, 1].
      inputs: Public arrays that clients need to answer: weights, candidates, cliques.
      cells: Users' vectors are counts of cells (`Contribution.cells`), not dense rows: a hint by
        which a plan reckons memory and signal. Clients see for themselves.
      choice: Instead of the sum, tell which candidates were chosen by it.
      resolution: Users' vectors are rounded to a grid of which the clip has 2^resolution to twice
        as many steps. Up to 16 a client's sum travels in 32 bits a cell, which hold what
        2^(30 - resolution) users of one client can put into it; a cell stays at that if more do.
      records: 0: one vector a user. Else: one vector for each record, each clipped on its own and
        each joining by a coin of its own; no user has more than so many records, which each client
        holds against its own bound.
      turn: The query's place in a series with correlated noise, whose rounds all have the same
        name, length, clip, noise and resolution; `None`: it stands alone.

    Privacy:
      Adding or removing one user changes the sum by at most `clip` in L2 (with a choice: in the
      L1 norm of each block; with `records`: by `clip` for each record that joins) at each client
      that holds the user's records, whatever those records are; the framework sees to it. For a
      series see `core.series`.
    """

    name: str
    dim: int
    clip: float
    noise_multiplier: float
    sampling_prob: float = 1.0
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    cells: bool = False
    choice: Choice | None = None
    resolution: int = FINE
    records: int = 0
    turn: Turn | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MAX_DIM:
            raise ConfigError(f"query {self.name!r}: dim must be 1 to {MAX_DIM}, not {self.dim}")
        if not (math.isfinite(self.clip) and 1e-30 < self.clip < 1e30):
            raise ConfigError(
                f"query {self.name!r}: clip must be a number above 0, not {self.clip!r}"
            )
        if not (math.isfinite(self.noise_multiplier) and 0 < self.noise_multiplier <= 1e6):
            raise ConfigError(
                f"query {self.name!r}: noise_multiplier must lie in (0, 1e6],"
                f" not {self.noise_multiplier!r}"
            )
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(
                f"query {self.name!r}: sampling_prob must lie in (0, 1], not {self.sampling_prob!r}"
            )
        if not COARSEST <= self.resolution <= FINE:
            raise ConfigError(
                f"query {self.name!r}: resolution must be {COARSEST} to {FINE}, not"
                f" {self.resolution!r}"
            )
        if self.choice is not None and (
            self.sampling_prob < 1 or self.resolution < FINE or self.choice.starts[-1] != self.dim
        ):
            raise ConfigError(
                f"query {self.name!r}: a choice is made over all users, sampling_prob 1, of finest"
                f" resolution, by blocks that fill the vector of {self.dim} cells"
            )
        if not 0 <= self.records <= MAX_RECORDS:
            raise ConfigError(
                f"query {self.name!r}: records must be 0 to {MAX_RECORDS}, not {self.records!r}"
            )
        if self.choice is not None and (self.records or self.turn is not None):
            raise ConfigError(f"query {self.name!r}: a choice is made by users, and stands alone")
        if self.turn is not None and (
            self.records or self.sampling_prob < 1 or self.resolution > MOST_IN_SERIES
        ):
            raise ConfigError(
                f"query {self.name!r}: in a series users take turns instead of flipping coins, each"
                f" has one vector, and resolution is at most {MOST_IN_SERIES}, not"
                f" {self.resolution}"
            )

    @property
    def answer_dim(self) -> int:
        """Length of what a strategy gets: the sum's, or the number of candidates."""
        return self.dim if self.choice is None else len(self.choice.weights)

    @property
    def reply_dim(self) -> int:
        """Length of what each client sends."""
        at_client = self.choice is not None and self.choice.where == "client"
        return self.answer_dim if at_client else self.dim

    @property
    def finest(self) -> int:
        """Resolution of the lattice that sums lie on."""
        return FINE if self.turn is None else FINEST

    @property
    def grain(self) -> int:
        """Steps of the lattice in one of the grid that users' vectors are rounded to."""
        return 1 << (self.finest - self.resolution)

    @property
    def reply_grain(self) -> int:
        """Steps of the lattice in one of the grid that a client's sum is sent on."""
        return self.grain if self.turn is None else self.grain // ONE

    @property
    def reply_dtype(self) -> np.dtype[Any]:
        """Of the integers that each client sends."""
        is_narrow = self.resolution <= _NARROW and self.turn is None
        return np.dtype(np.int32 if is_narrow else np.int64)

    @property
    def leaf(self) -> Leaf:
        """What the query costs; a series' is that of all its rounds."""
        rounds = 1 if self.turn is None else self.turn.series.num_rounds
        return Leaf(
            float(self.noise_multiplier), float(self.sampling_prob), max(1, self.records), rounds
        )

    @property
    def goes_on(self) -> bool:
        """Whether the query is paid for already, as a later round of a series."""
        return self.turn is not None and self.turn.position > 0

    @property
    def reply_bytes(self) -> int:
        """Of the array that each client sends."""
        return self.reply_dim * self.reply_dtype.itemsize


@dataclass(frozen=True)
class NoisySum:
    """All that a strategy ever learns about private records.

    Attributes:
      vector: Sum over users of clipped vectors, with noise, `(dim,)`, float64. For a query that
        asks a choice: how often each candidate was chosen, `(num_candidates,)`; no noise is in it.
      stddev: Standard deviation of the noise in each coordinate. Infinite for a void round,
        whose vector is zeros: it carries no information, and a strategy goes on without it.
        For a choice: noise that would have cost as much in a score.
      num_clients: Clients whose sums are in it; 0 for a void round.
    """

    vector: NDArray[np.float64]
    stddev: float
    num_clients: int

    @staticmethod
    def void(query: Query) -> "NoisySum":
        """The sum of a round that was lost or missed its quorum."""
        return NoisySum(np.zeros(query.answer_dim), math.inf, 0)

    @property
    def is_void(self) -> bool:
        """Whether the round gave nothing."""
        return math.isinf(self.stddev)


@dataclass(frozen=True)
class Contribution:
    """What a block of users adds to a query: one vector a user, neither clipped nor noised.

    Made by `rows` or by `cells`. The vectors are trusted in nothing: a row that is not finite,
    or a cell out of range, makes its user count as zeros; a wrong shape makes all of them zeros.
    """

    num_users: int
    dense: NDArray[Any] | None = None  # (num_users, dim)
    indices: NDArray[np.int64] | None = None  # (num_records, cells_per_record)
    user_index: NDArray[np.int64] | None = None  # (num_records,), non-decreasing
    weights: NDArray[np.float64] | None = None  # (cells_per_record,)
    scales: NDArray[np.float64] | None = None  # (num_records,) or (num_records, cells_per_record)

    @staticmethod
    def rows(rows: NDArray[Any]) -> "Contribution":
        """One dense vector a user, `(num_users, dim)`, float32 or float64."""
        return Contribution(num_users=len(rows), dense=rows)

    @staticmethod
    def cells(
        indices: NDArray[Any],
        user_index: NDArray[np.int64],
        *,
        num_users: int,
        weights: NDArray[np.float64] | None = None,
        scales: NDArray[np.float64] | None = None,
    ) -> "Contribution":
        """One count vector a user, given by the cells that each of the user's records lights.

        A record adds to its cell in each histogram the histogram's height times the record's own
        scale. A user of whom a scale is not finite counts as zeros.

        Args:
          indices: Cell of each record in each measured histogram, `(num_records, num_cells)`,
            integers in `[0, dim)`.
          user_index: User of each record, `(num_records,)`, non-decreasing in `[0, num_users)`.
          num_users: Users in the block.
          weights: Height of a cell in each histogram, `(num_cells,)`; `None`: all one.
          scales: What each record's heights are multiplied by, `(num_records,)`, or each of its
            cells', `(num_records, num_cells)`; `None`: all one.
        """
        height = np.ones(indices.shape[1]) if weights is None else weights
        return Contribution(
            num_users=num_users,
            indices=np.asarray(indices, dtype=np.int64),
            user_index=user_index,
            weights=height,
            scales=None if scales is None else np.asarray(scales, dtype=np.float64),
        )

    def user_means(self) -> "Contribution":
        """The same counted cells, each user's the mean over the user's records and not their sum.

        A mean of vectors is no longer than the longest of them, so a user of any number of records
        moves a sum by at most what one record can.

        Raises:
          ConfigError: These are dense rows, which know of no records.
        """
        if self.indices is None or self.user_index is None:
            raise ConfigError("only counted cells can be averaged over a user's records")
        counts = np.bincount(self.user_index, minlength=self.num_users)
        share = 1.0 / counts[self.user_index]
        scales = share if self.scales is None else (self.scales.T * share).T
        return replace(self, scales=scales)


Rounds = Generator[Query, NoisySum, Synthesizer]
"""Queries alone, each answered by its noisy sum."""

Steps = Generator[Query | Generation | Checkpoint, Any, Synthesizer]
"""Queries; requests to public models, each answered by candidates; and, of `rounds_from`,
checkpoints, which are answered by nothing."""


class Strategy(ABC):
    """One method: a frozen dataclass whose fields are its settings.

    The server half (`event`, `rounds`) and the client half (`answer`) stand in one class. It
    neither clips, nor adds noise, nor charges: the framework does, before and after.

    A strategy uses no clock, no file, no network and no global random state: the same sums and
    the same `rng` give the same synthesizer, so that a run can be resumed and checked.

    A strategy that asks a choice at the server says so beforehand, by an attribute or a property
    `trusts_server` that is true; see `trusts_server`.

    A strategy that reads the free text of records says so, by an attribute or a property
    `reads_text` that is true; see `check_reads`.

    A strategy that compares embeddings has a method `embedder_for(schema)`, which gives the
    embedder or `None`. Clients then answer with `shard.records.places` filled in, and refuse a
    query whose input `embedder`, 32 bytes, is another fingerprint than their own embedder's.

    A strategy that knows what it will hear of so many users has methods `check_signal(schema,
    noise_multiplier, users)`, which refuses a hopeless run, and `prospect` of the same arguments,
    which a plan shows; `users` is an `Electorate`. One that asks a public model has a method
    `workload(schema)`, by which a plan says what that takes.

    A strategy whose rounds may end before its event is spent says so, by an attribute or a property
    `stops_early` that is true. What was not asked by then is not charged.

    A strategy whose public half is long work has a method `rounds_from(schema, noise_multiplier,
    rng, state)`. It is `rounds`, but also yields a `Checkpoint` after rounds, and goes on from the
    state of one, `rng` then standing where it stood; `None`: from the beginning.

    A strategy with settings that name files, as a folder of weights, lists them in an attribute
    `paths`. They are for work in one process: a client refuses a request that fills one in.

    Whom its records describe, and how much each user counts in them, stands in an attribute or a
    property `describes`: plain sentences, which the card of a release shows; see `describes_of`.

    What whoever uses its records must be warned of stands in an attribute or a property `caution`:
    plain sentences, which a plan and the card of a release show; see `caution_of`.
    """

    name: ClassVar[str]

    @abstractmethod
    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """Privacy cost of a whole run, known before it starts.

        Made of `GaussianDpEvent` and `PoissonSampledDpEvent` of it, composed: one for each query
        that `rounds` yields, choices included, with that query's `noise_multiplier` and
        `sampling_prob`. For a query over `records` an `accounting.RecordsDpEvent`; for a whole
        series one `accounting.SeriesDpEvent`.

        Args:
          schema: Public schema of the population.
          noise_multiplier: The run's one noise dial. By convention a run of full-participation
            queries costs the same as one Gaussian with this multiplier, split among its queries
            by fractions of 1 / noise_multiplier^2 (see `accounting.split`).

        Raises:
          ConfigError: The settings are impossible, or do not fit the schema.
        """

    @abstractmethod
    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Server half: yield queries, receive noisy sums, return a synthesizer.

        May also yield a `Generation`, and receives the candidates that a public model made.

        Must end in a synthesizer whatever the sums are, void ones included.

        Args:
          schema: Public schema of the population.
          noise_multiplier: As in `event`; the queries yielded must add up to that event.
          rng: Public randomness, seeded by the run.
        """

    @abstractmethod
    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Client half: one vector a user of the block, neither clipped nor noised.

        Args:
          query: What is asked. It came over a network; its arrays are public but untrusted.
          shard: A block of users; may be empty.
          rng: Randomness of this answer; it carries no privacy claim.

        Privacy:
          No user's vector may depend on another user's records.
        """


def describes_of(strategy: Strategy) -> tuple[str, ...]:
    """Whom a strategy's records describe; nothing where it does not say."""
    return tuple(getattr(strategy, "describes", ()))


def caution_of(strategy: Strategy) -> str:
    """What a strategy warns the users of its records of; empty for most."""
    return str(getattr(strategy, "caution", ""))


def check_reads(strategy: Strategy, schema: Schema) -> None:
    """Refuse a schema with free text for a strategy that does not say it reads any.

    Raises:
      ConfigError: The text would be left out in silence.
    """
    if schema.text is not None and not getattr(strategy, "reads_text", False):
        raise ConfigError(
            f"strategy {strategy.name!r} does not read texts, and the schema holds the text column"
            f" {schema.text.name!r}. Remove it from the schema, or take a strategy for texts:"
            " private_evolution, pre_text, popri, topics or dp_lora"
        )


def check_signal(
    strategy: Strategy, schema: Schema, noise_multiplier: float, users: Electorate
) -> None:
    """Refuse a run of which a strategy knows beforehand that nothing can be learned.

    A strategy that knows has a method `check_signal(schema, noise_multiplier, users)`.

    Raises:
      ConfigError: It is hopeless.
    """
    found = getattr(strategy, "check_signal", None)
    if found is not None:
        found(schema, noise_multiplier, users)


def embedder_of(strategy: Strategy, schema: Schema) -> Embedder | None:
    """What places the records of a strategy that needs them placed; `None` for most."""
    found = getattr(strategy, "embedder_for", None)
    return None if found is None else found(schema)


def names_files(strategy: Strategy) -> bool:
    """Whether a strategy's settings name files of one machine, which no client takes from a server.

    Those settings stand in an attribute `paths`, of a strategy or of the one `inner` to it.
    """
    inner = getattr(strategy, "inner", None)
    if isinstance(inner, Strategy) and names_files(inner):
        return True
    return any(getattr(strategy, key) for key in getattr(strategy, "paths", ()))


def trusts_server(strategy: Strategy) -> bool:
    """Whether a strategy asks choices at the server, and so runs under `central` noise only."""
    return bool(getattr(strategy, "trusts_server", False))
