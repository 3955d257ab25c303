# SPDX-License-Identifier: Apache-2.0
"""Any strategy on a schema with open columns: find their domains first, under the same budget."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from ..core.electorate import Electorate
from ..core.embedding import Embedder
from ..core.errors import ConfigError
from ..core.open_codes import MISSING_NUMBER, bytes_of, number_codes, text_words
from ..core.query import (
    Contribution,
    NoisySum,
    Query,
    Steps,
    Strategy,
    check_signal,
    describes_of,
    embedder_of,
    trusts_server,
)
from ..core.records import BoundedShard
from ..core.schema import MAX_OPEN_BYTES, Column, Schema
from ..models.workload import Workload, workload_of
from .parts.heavy_texts import TextSketch, text_keys
from .parts.histograms import norm_clip
from .parts.quantiles import TAIL, CountTree, bin_edges, coarse_edges, finer_edges
from .parts.signal import Prospect, prospect_of

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

OTHER = "(other)"
"""The category that stands for every value that was not found."""

_FOUND = "measured: found in the domain rounds of the run"
_FINE_CELLS = 512  # of a number in the second round
_COARSE_SHARE = 0.4  # of a number's part of the budget, for the first round
_TEXT_NORM = 3**0.5  # of a category's part of a record, where a number's is 1: texts need more
_READABLE = 14.0  # noise deviations of users from which eight letters can mostly be read
_TYPICAL = 20  # cells that an open column may be found to have
_FIRST, _SECOND = "domain", "domain_bins"
_PREFIX = "domain_"


@dataclass(frozen=True)
class Discovered(Strategy):
    """A strategy that sees a closed schema, made from noisy sums in the rounds before its own.

    1. ``domain``: for each open number the counts of a coarse public grid, in a tree of levels;
       for each open category a sketch of hashed texts, from which the frequent ones are read.
    2. ``domain_bins``: where there are open numbers, the counts of a grid that is fine where the
       first was full. Bins of about equal weight follow, and the bounds with them.

    Then the inner strategy runs on the schema that was found. Clients are sent the domain with
    each of its questions and code their records by it. A text that was not found counts as
    `"(other)"`, a number beyond the bounds as the nearest bin.

    Attributes:
      inner: The strategy.
      domain_share: Share of the budget (of mu^2) for the domain rounds.
      domain_values: Most categories that are looked for in a column.
      domain_norm: L2 bound of a user in the domain rounds, in units of one record's norm.
      domain_surprise: Most probability with which the bucket of a text that one user alone has
        passes for a frequent one, when no other user's text shares it.

    Privacy:
      The domain is post-processing of clipped, noised sums over fixed public cells, so the
      rounds cost what Gaussian sums cost, whatever the values are: no threshold is needed for
      the guarantee, as it is where only cells that occur are released. For one user the sum of
      the domain rounds is mu-Gaussian-private with mu = sqrt(domain_share) / noise_multiplier.
      So if a category would show with probability p without a user, it shows with at most
      Phi(Phi^-1(p) + mu) with them. And p is small for a text that nobody else has: a bucket is
      looked into only if it stands Phi^-1(1 - domain_surprise) deviations above what one user
      can add to it; then the text must still be read, byte by byte, out of noise.
      In a round, a record lights one node a level of each number's tree and, for each category,
      one bucket and one cell a slot; a category has three times a number's part of the squared
      norm. A user's records are summed and clipped at `domain_norm` times the norm of one.

    Reference:
      Dong, Roth, Su (2022), "Gaussian Differential Privacy", definition 2.6,
      https://doi.org/10.1111/rssb.12454.
    """

    inner: Strategy
    domain_share: float = 0.1
    domain_values: int = 512
    domain_norm: float = 1.0
    domain_surprise: float = 1e-6
    name: ClassVar[str] = "discovered"
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        if not 0 < self.domain_share < 1:
            raise ConfigError(f"domain_share must lie between 0 and 1, not {self.domain_share!r}")
        if not 1 <= self.domain_values <= 4096:
            raise ConfigError(f"domain_values must be 1 to 4096, not {self.domain_values!r}")
        if not 0 < self.domain_norm < math.inf:
            raise ConfigError(f"domain_norm must be a number above 0, not {self.domain_norm!r}")
        if not 0 < self.domain_surprise < 0.5:
            raise ConfigError(
                f"domain_surprise must lie between 0 and 0.5, not {self.domain_surprise!r}"
            )

    @property
    def trusts_server(self) -> bool:
        """Whether the inner strategy has the server choose by exact sums."""
        return trusts_server(self.inner)

    @property
    def reads_text(self) -> bool:
        """Whether the inner strategy does."""
        return bool(getattr(self.inner, "reads_text", False))

    def embedder_for(self, schema: Schema) -> Embedder | None:
        """What places records for the inner strategy."""
        return embedder_of(self.inner, schema)

    @property
    def caution(self) -> str:
        """What the inner strategy warns of."""
        return str(getattr(self.inner, "caution", ""))

    @property
    def describes(self) -> tuple[str, ...]:
        """Whom the inner strategy's records describe."""
        return describes_of(self.inner)

    @property
    def stops_early(self) -> bool:
        """Whether the inner strategy's rounds may end before its event is spent."""
        return bool(getattr(self.inner, "stops_early", False))

    @property
    def max_norm(self) -> float | None:
        """The inner strategy's, if it has one: a plan reads it."""
        norm = getattr(self.inner, "max_norm", None)
        return norm if isinstance(norm, float) else None

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Refuse what the inner strategy refuses, on a schema such as might be found."""
        check_signal(self.inner, *self._likely(schema, noise_multiplier), users)

    def prospect(
        self, schema: Schema, noise_multiplier: float, users: Electorate
    ) -> Prospect | None:
        """What the inner strategy expects, on a schema such as might be found."""
        return prospect_of(self.inner, *self._likely(schema, noise_multiplier), users)

    @property
    def records_per_user(self) -> int | None:
        """As the inner strategy's."""
        found = getattr(self.inner, "records_per_user", None)
        return None if found is None else int(found)

    def workload(self, schema: Schema) -> Workload | None:
        """What the inner strategy asks of a public model, on a schema such as might be found."""
        likely = _made_up(schema, _TYPICAL) if schema.is_open else schema
        return workload_of(self.inner, likely)

    def _likely(self, schema: Schema, noise_multiplier: float) -> tuple[Schema, float]:
        """A closed schema such as might be found, and the inner strategy's noise multiplier."""
        if not schema.is_open:
            return schema, noise_multiplier
        return _made_up(schema, _TYPICAL), self._noise(schema, noise_multiplier)[-1]

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """One or two Gaussian sums for the domain, then the inner strategy's event.

        Raises:
          ConfigError: What the inner strategy costs depends on the domain.
        """
        from ..core.accounting import compose, leaves, single_event

        if not schema.is_open:
            return self.inner.event(schema, noise_multiplier)
        *domain, noise = self._noise(schema, noise_multiplier)
        events = [self.inner.event(_made_up(schema, cells), noise) for cells in (1, 2, _TYPICAL)]
        if any(leaves(event) != leaves(events[-1]) for event in events):
            raise ConfigError(
                f"what strategy {self.inner.name!r} costs depends on the columns' domains, so they"
                " cannot be left open: declare bounds and categories in the schema, or take another"
                " strategy"
            )
        return compose([*(single_event(noise) for noise in domain), events[-1]])

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Ask for the domains, then what the inner strategy asks."""
        if not schema.is_open:
            return (yield from self.inner.rounds(schema, noise_multiplier, rng))
        noise = self._noise(schema, noise_multiplier)
        numbers = [
            _Bins(i, c, coarse_edges(whole=c.kind == "integer"))
            for i, c in enumerate(schema.columns)
            if c.is_open and c.kind != "category"
        ]
        texts = _texts_of(schema)
        first = _Question(_FIRST, numbers, texts)
        noisy: NoisySum = yield first.query(noise[0], self.domain_norm)
        values = [self._values(first, noisy, i) for i in range(len(texts))]
        numbers = [first.bins(noisy, i) for i in range(len(numbers))]
        if numbers:
            second = _Question(_SECOND, [bins.finer(_FINE_CELLS) for bins in numbers], [])
            noisy = yield second.query(noise[1], self.domain_norm)
            if not noisy.is_void:
                numbers = [second.bins(noisy, i) for i in range(len(numbers))]
        domain = _Domain(schema, numbers, texts, values)
        asked = self.inner.rounds(domain.closed, noise[-1], rng)
        try:
            step = next(asked)
            while True:
                sent = domain.sent_with(step) if isinstance(step, Query) else step
                step = asked.send((yield sent))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Domain cells of each record, or the inner strategy's answer for recoded records."""
        domain = {
            key.removeprefix(_PREFIX): array
            for key, array in query.inputs.items()
            if key.startswith(_PREFIX)
        }
        if not domain:
            return self.inner.answer(query, shard, rng)
        _check(domain, query.name, shard.records.codes.shape[1])
        if "heights" in domain:
            return _domain_cells(domain, shard)
        inputs = {k: v for k, v in query.inputs.items() if not k.startswith(_PREFIX)}
        return self.inner.answer(replace(query, inputs=inputs), _recoded(domain, shard), rng)

    def expected(self, schema: Schema, query: str, stddev: float) -> str:
        """What a domain round will find, in words; empty for a question of the inner strategy.

        Args:
          schema: The open schema.
          query: Name of the question.
          stddev: Noise of each cell of its sum.
        """
        told = []
        if query == _FIRST and any(c.num_words for c in schema.columns):
            threshold = self._threshold(stddev, 0.0) / TextSketch(1).heights[0]
            users = max(threshold, _READABLE * stddev) / _TEXT_NORM / min(self.domain_norm, 1.0)
            told.append(f"a category of about {users:,.0f} users is found, a rarer one is not")
        if query in (_FIRST, _SECOND) and any(c.kind != "category" for c in _open(schema)):
            users = TAIL * stddev * math.sqrt(CountTree(_FINE_CELLS).num_levels)
            told.append(f"bounds of numbers leave out about {users:,.0f} users at either end")
        return "; ".join(told)

    def _threshold(self, stddev: float, clip: float) -> float:
        """What a bucket must reach, so that one user's alone passes only with `domain_surprise`."""
        from scipy.stats import norm

        return float(norm.isf(self.domain_surprise)) * stddev + clip

    def _noise(self, schema: Schema, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multiplier of each domain round and, last, of the inner strategy."""
        from ..core.accounting import split

        opened = _open(schema)
        numbers = sum(column.kind != "category" for column in opened)
        parts = numbers + (len(opened) - numbers) * _TEXT_NORM**2
        fine = (1 - _COARSE_SHARE) * numbers / parts
        shares = [1 - fine, fine] if fine else [1.0]
        return split(
            noise_multiplier, [*(self.domain_share * s for s in shares), 1 - self.domain_share]
        )

    def _values(self, question: "_Question", noisy: NoisySum, index: int) -> list[str]:
        """Categories read from a sketch, the most frequent first."""
        if noisy.is_void:
            return []
        found = question.sketches[index].texts(
            question.part(noisy, len(question.numbers) + index) / _TEXT_NORM,
            stddev=noisy.stddev / _TEXT_NORM,
            threshold=self._threshold(noisy.stddev, question.clip(self.domain_norm)) / _TEXT_NORM,
            max_texts=self.domain_values,
        )
        return [text for text, _ in found if text != OTHER]


@dataclass(frozen=True, eq=False)
class _Bins:
    """A grid on an open number, and what is known of its cells.

    Attributes:
      column: Position of the column.
      of: The open column.
      edges: Of the grid, the two outer ones included; what lies beyond counts as the end cells.
      counts: Of its cells; zeros while nothing is known.
      stddev: Of a node's noise; infinite while nothing is known.
    """

    column: int
    of: Column
    edges: NDArray[np.float64]
    counts: NDArray[np.float64] | None = None
    stddev: float = math.inf

    @property
    def tree(self) -> CountTree:
        """Levels of the grid's cells."""
        return CountTree(len(self.edges) - 1)

    @property
    def _known(self) -> NDArray[np.float64]:
        return np.zeros(len(self.edges) - 1) if self.counts is None else self.counts

    def finer(self, num_cells: int) -> "_Bins":
        """A grid whose cells are small where this one's are full."""
        whole = self.of.kind == "integer"
        edges = finer_edges(self.edges, self._known, self.stddev, num_cells=num_cells, whole=whole)
        return _Bins(self.column, self.of, edges)

    def closed(self) -> Column:
        """The column with bins that are about equally heavy."""
        edges = bin_edges(self.edges, self._known, self.stddev, num_bins=self.of.num_bins)
        return replace(
            self.of,
            origin=_FOUND,
            is_open=False,
            bounds=(float(edges[0]), float(edges[-1])),
            cuts=tuple(edges[1:-1].tolist()),
            num_bins=len(edges) - 1,
        )


@dataclass(frozen=True)
class _Text:
    """Where a record holds the text of an open category: its column, first word and length."""

    column: int
    word: int
    max_bytes: int


@dataclass(frozen=True, eq=False)
class _Question:
    """Grids and sketches that are measured in one query."""

    name: str
    numbers: Sequence[_Bins]
    texts: Sequence[_Text]

    @cached_property
    def sketches(self) -> list[TextSketch]:
        """One a text."""
        return [TextSketch(text.max_bytes) for text in self.texts]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where each part of the sum ends: numbers' trees, then texts' sketches."""
        sizes = [bins.tree.num_nodes for bins in self.numbers] + [s.dim for s in self.sketches]
        return np.cumsum(sizes)

    @cached_property
    def heights(self) -> list[NDArray[np.float64]]:
        """Heights of the cells that a record lights in each part."""
        trees = [bins.tree.num_levels for bins in self.numbers]
        sketches = [sketch.heights * _TEXT_NORM for sketch in self.sketches]
        return [np.full(n, n**-0.5) for n in trees] + sketches

    def clip(self, max_norm: float) -> float:
        """L2 bound of a user."""
        return norm_clip(np.concatenate(self.heights), max_norm)

    def query(self, noise_multiplier: float, max_norm: float) -> Query:
        """The query that measures them all."""
        return Query(
            self.name,
            dim=int(self.ends[-1]),
            clip=self.clip(max_norm),
            noise_multiplier=noise_multiplier,
            inputs={
                **_edge_arrays(self.numbers),
                **_text_arrays(self.texts),
                "domain_heights": np.concatenate(self.heights),
            },
            cells=True,
        )

    def bins(self, noisy: NoisySum, index: int) -> _Bins:
        """A grid with the counts in the query's answer."""
        bins = self.numbers[index]
        if noisy.is_void:
            return bins
        height = float(self.heights[index][0])
        counts = bins.tree.counts(self.part(noisy, index) / height)
        return replace(bins, counts=counts, stddev=noisy.stddev / height)

    def part(self, noisy: NoisySum, index: int) -> NDArray[np.float64]:
        """The cells of one grid or sketch in the query's answer."""
        return np.split(noisy.vector, self.ends)[index]


@dataclass(frozen=True, eq=False)
class _Domain:
    """What was found, and how clients code their records by it.

    Attributes:
      schema: The open schema.
      numbers: Grids on its open numbers, with their counts.
      texts: Its open categories.
      values: The categories found for each of them.
    """

    schema: Schema
    numbers: Sequence[_Bins]
    texts: Sequence[_Text]
    values: Sequence[Sequence[str]]

    @cached_property
    def closed(self) -> Schema:
        """The schema with all domains in it."""
        columns = list(self.schema.columns)
        for bins in self.numbers:
            columns[bins.column] = bins.closed()
        for text, values in zip(self.texts, self.values, strict=True):
            columns[text.column] = replace(
                columns[text.column],
                origin=_FOUND,
                is_open=False,
                categories=(*values, OTHER),
                other=OTHER,
            )
        return replace(self.schema, columns=tuple(columns))

    def sent_with(self, query: Query) -> Query:
        """A question about coded records, with what records are to be coded by."""
        return replace(query, inputs={**query.inputs, **self._arrays})

    @cached_property
    def _arrays(self) -> Mapping[str, NDArray[Any]]:
        closed = [self.closed.columns[bins.column] for bins in self.numbers]
        cells, keys = [], []
        for text, values in zip(self.texts, self.values, strict=True):
            words = text_words(list(values), text.max_bytes)
            of_values = text_keys(bytes_of(words)[:, : text.max_bytes])
            order = np.argsort(of_values)
            cells.append(order.astype(np.int32))
            keys.append(of_values[order].view(np.int64))
        return {
            **_edge_arrays(
                [
                    replace(bins, edges=column.edges)
                    for bins, column in zip(self.numbers, closed, strict=True)
                ]
            ),
            **_text_arrays(self.texts),
            "domain_keys": np.concatenate([np.zeros(0, np.int64), *keys]),
            "domain_key_cells": np.concatenate([np.zeros(0, np.int32), *cells]),
            "domain_key_starts": np.cumsum([0, *map(len, keys)]).astype(np.int64),
            "domain_width": np.array([len(self.schema.columns)], dtype=np.int64),
        }


def _open(schema: Schema) -> list[Column]:
    """The open columns of a schema."""
    return [column for column in schema.columns if column.is_open]


def _texts_of(schema: Schema) -> list[_Text]:
    """Where records hold the texts of a schema's open categories."""
    found, word = [], len(schema.columns)
    for i, column in enumerate(schema.columns):
        if column.num_words:
            found.append(_Text(i, word, column.max_bytes))
            word += column.num_words
    return found


def _made_up(schema: Schema, num_cells: int) -> Schema:
    """A closed schema such as might be found, with so many cells in each column that is open."""
    columns = []
    for column in schema.columns:
        if column.is_open and column.kind == "category":
            values = (*(str(i) for i in range(1, num_cells)), OTHER)
            column = replace(column, is_open=False, categories=values)
        elif column.is_open:
            num_bins = min(num_cells, column.num_bins)
            column = replace(column, is_open=False, bounds=(0.0, 1e3), num_bins=num_bins)
        columns.append(column)
    return replace(schema, columns=tuple(columns))


# --- what clients are sent, and what they make of it --------------------------------------------


def _edge_arrays(numbers: Sequence[_Bins]) -> dict[str, NDArray[Any]]:
    """Inner edges of grids, as codes."""
    edges = [number_codes(bins.edges[1:-1]) for bins in numbers]
    return {
        "domain_numbers": np.array([bins.column for bins in numbers], dtype=np.int32),
        "domain_edges": np.concatenate([np.zeros(0, np.int32), *edges]),
        "domain_edge_starts": np.cumsum([0, *map(len, edges)]).astype(np.int64),
    }


def _text_arrays(texts: Sequence[_Text]) -> dict[str, NDArray[Any]]:
    """Where texts lie in a record."""
    places = [(text.column, text.word, text.max_bytes) for text in texts]
    return {"domain_texts": np.array(places, dtype=np.int32).reshape(-1, 3)}


def _check(domain: Mapping[str, NDArray[Any]], name: str, num_codes: int) -> None:
    """Refuse arrays that contradict each other; looks at no record."""
    always = {"numbers", "edges", "edge_starts", "texts"}
    either = ({"heights"}, {"keys", "key_cells", "key_starts", "width"})
    if set(domain) not in [always | more for more in either]:
        raise ConfigError(f"query {name!r} comes with other domain arrays than are known")
    numbers, texts = domain["numbers"], domain["texts"]
    asking = "heights" in domain
    if not (
        all(domain[key].dtype.kind == ("f" if key == "heights" else "i") for key in domain)
        and all(domain[key].ndim == 1 for key in set(domain) - {"texts"})
        and _are_starts(domain["edge_starts"], len(numbers), len(domain["edges"]))
        and _ascend(domain["edges"], domain["edge_starts"])
        and ((numbers >= 0) & (numbers < num_codes)).all()
        and texts.shape == (len(texts), 3)
        and (texts >= 0).all()
        and ((texts[:, 2] >= 1) & (texts[:, 2] <= MAX_OPEN_BYTES)).all()
        and (texts[:, 0] < num_codes).all()
        and (texts[:, 1] + (texts[:, 2] + 3) // 4 <= num_codes).all()
        and (asking or _are_starts(domain["key_starts"], len(texts), len(domain["keys"])))
        and (asking or domain["keys"].dtype == np.int64)
        and (asking or _ascend(domain["keys"].view(np.uint64), domain["key_starts"]))
        and (asking or len(domain["keys"]) == len(domain["key_cells"]))
        and (asking or (len(domain["width"]) == 1 and 0 < domain["width"][0] <= num_codes))
    ):
        raise ConfigError(f"query {name!r} comes with domain arrays that contradict each other")


def _are_starts(starts: NDArray[Any], num_parts: int, size: int) -> bool:
    """Whether numbers say where each of some parts of an array begins, and where it ends."""
    return bool(
        len(starts) == num_parts + 1
        and starts[0] == 0
        and starts[-1] == size
        and (np.diff(starts) >= 0).all()
    )


def _ascend(values: NDArray[Any], starts: NDArray[Any]) -> bool:
    """Whether the values of each part never fall.

    In others `searchsorted` may find another place for a value when it stands beside others.
    """
    rises = values[1:] >= values[:-1]
    rises[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(values))] - 1] = True
    return bool(rises.all())


def _domain_cells(domain: Mapping[str, NDArray[Any]], shard: BoundedShard) -> Contribution:
    """Nodes and sketch cells that each record lights; none for what is missing."""
    codes = shard.records.codes
    cells, scales, first = [], [], 0
    for column, edges in _number_parts(domain):
        tree = CountTree(len(edges) + 1)
        cells.append(tree.nodes(np.searchsorted(edges, codes[:, column], side="right")) + first)
        known = codes[:, column] != MISSING_NUMBER
        scales.append(np.repeat(known[:, None], tree.num_levels, axis=1).astype(np.float64))
        first += tree.num_nodes
    for column, texts, sketch in _text_parts(domain, codes):
        lit, loud, known = sketch.cells(texts)
        cells.append(lit + first)
        scales.append(loud * (known & (codes[:, column] == 0))[:, None])
        first += sketch.dim
    return Contribution.cells(
        np.concatenate(cells, axis=1),
        shard.user_index,
        num_users=shard.num_users,
        weights=domain["heights"],
        scales=np.concatenate(scales, axis=1),
    )


def _recoded(domain: Mapping[str, NDArray[Any]], shard: BoundedShard) -> BoundedShard:
    """The shard with every open column's code in the cells that were found."""
    given = shard.records.codes
    codes = given[:, : int(domain["width"][0])].copy()
    for column, edges in _number_parts(domain):
        cells = np.searchsorted(edges, given[:, column], side="right")
        missing = given[:, column] == MISSING_NUMBER
        codes[:, column] = np.where(missing, len(edges) + 1, cells)
    starts = domain["key_starts"]
    for i, (column, texts, _) in enumerate(_text_parts(domain, given)):
        keys = domain["keys"][starts[i] : starts[i + 1]].view(np.uint64)
        cells = domain["key_cells"][starts[i] : starts[i + 1]]
        other = len(keys)
        codes[:, column] = np.where(given[:, column] == 0, other, other + 1)
        if other:
            wanted = text_keys(texts)
            place = np.minimum(np.searchsorted(keys, wanted), other - 1)
            known = (keys[place] == wanted) & (given[:, column] == 0)
            codes[known, column] = cells[place[known]]
    return replace(shard, records=replace(shard.records, codes=codes))


def _number_parts(
    domain: Mapping[str, NDArray[Any]],
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Column and inner edges of each open number."""
    starts = domain["edge_starts"]
    for i, column in enumerate(domain["numbers"].tolist()):
        yield column, domain["edges"][starts[i] : starts[i + 1]]


def _text_parts(
    domain: Mapping[str, NDArray[Any]], codes: NDArray[np.int32]
) -> Iterator[tuple[int, NDArray[np.uint8], TextSketch]]:
    """Column, bytes and sketch of each open category."""
    for column, word, max_bytes in domain["texts"].tolist():
        words = codes[:, word : word + (max_bytes + 3) // 4]
        yield column, bytes_of(words)[:, :max_bytes], TextSketch(max_bytes)
