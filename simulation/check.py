# SPDX-License-Identifier: Apache-2.0
"""What every strategy owes, checked on small adversarial populations: `fedsynth check`.

The same checks run over all built-in strategies in `tests/test_every_strategy.py`. Each says
what failed, on the smallest input that it tried.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..client.placing import placed
from ..client.respond import REFUSED, block_sum, users_a_block
from ..client.turns import whose_turn
from ..core import accounting
from ..core.answering import answered
from ..core.candidates import Candidates
from ..core.choice import chosen, score_sensitivity
from ..core.embedding import EMBEDDER
from ..core.errors import ConfigError
from ..core.generation import Generation
from ..core.leaf import num_rounds_of
from ..core.mechanism import Lattice, encoded, noised, real_sum
from ..core.query import NoisySum, Query, Rounds, Strategy, check_reads, embedder_of, trusts_server
from ..core.randomness import OsKeyStream
from ..core.records import BoundedShard, Records
from ..core.schema import Column, ImageColumn, Schema, TextColumn
from ..core.synthesizer import Synthesizer
from ..core.texts import as_texts
from ..models.live import make
from ..strategies.discovered import Discovered
from ..strategies.registry import built, settings_of
from ..strategies.scored import Scored

if TYPE_CHECKING:
    from ..core.randomness import KeyStream
    from ..core.series import Series

_NOISE = 0.7
_MANY = 10_000
_HOSTILE = 120  # requests tried for each query
_RESIZED, _RENAMED = 0.2, 0.1  # share of them with an array of another length, with another name
_WORDS = ("a", "red", "fox", "ran", "over", "two", "hills", "\u00e9t\u00e9")
_WILD = (np.nan, np.inf, 1e30, -1e30, 1e-30, 0.0, -1.0, 3.0)


@dataclass(frozen=True)
class Finding:
    """One thing a strategy owes, and whether it keeps it.

    Attributes:
      name: What is owed, as a claim.
      ok: Whether it held on all that was tried.
      detail: What failed, on the smallest input; empty when nothing did.
    """

    name: str
    ok: bool
    detail: str = ""


def check_strategy(strategy: Strategy, schema: Schema | None = None) -> list[Finding]:
    """Try a strategy on populations made to break it.

    Args:
      strategy: With the settings to be tried; few rounds make it quick.
      schema: The schema to try it on; `None`: a small table, or a small image schema for a
        strategy that refuses tables.

    Returns:
      One finding for each thing owed, in a fixed order.
    """
    trial = _Trial(strategy, schema or _fitting_schema(strategy))
    return [finding_of(claim, check) for claim, check in trial.checks()]


def small_table() -> Schema:
    """A table of five columns of every kind, with a target."""
    public = "public: made up for this check"
    return Schema(
        (
            Column("color", "category", public, categories=("red", "green", "blue")),
            Column("age", "integer", public, bounds=(0, 99), num_bins=10, missing=True),
            Column("weight", "real", public, bounds=(0.0, 1.0), num_bins=5),
            Column("size", "category", public, categories=("S", "M", "L", "XL"), missing=True),
            Column("ill", "category", public, categories=("no", "yes")),
        ),
        target="ill",
    )


def small_images() -> Schema:
    """Images of 8 by 8 pixels with a label of three classes."""
    public = "public: made up for this check"
    return Schema(
        (Column("label", "category", public, categories=("0", "1", "2")),),
        image=ImageColumn("images", (8, 8, 1), public),
        target="label",
    )


def small_texts() -> Schema:
    """Short texts with a label of three classes."""
    public = "public: made up for this check"
    return Schema(
        (Column("label", "category", public, categories=("0", "1", "2")),),
        text=TextColumn("message", 200),
        target="label",
    )


def plain_texts() -> Schema:
    """Short texts and nothing else."""
    return Schema((), text=TextColumn("message", 200))


def made_up(schema: Schema, records_per_user: list[int], seed: int) -> BoundedShard:
    """A shard of random valid records."""
    rng = np.random.default_rng(seed)
    num_records = sum(records_per_user)
    columns = [rng.integers(0, c, num_records) for c in schema.shape]
    codes = np.stack(columns, axis=1) if columns else np.zeros((num_records, 0), dtype=np.int32)
    texts = rng.integers(97, 123, (num_records, 4 * (schema.num_codes - len(schema.columns))))
    codes = np.concatenate([codes, texts.astype(np.uint8).view("<i4")], axis=1)
    images = None
    if schema.image is not None:
        images = rng.integers(0, 256, (num_records, *schema.image.shape), dtype=np.uint8)
    written = None
    if schema.text is not None:
        counts = rng.integers(0, 8, num_records)
        written = as_texts(" ".join(rng.choice(_WORDS, count)) for count in counts)
    users = np.repeat(np.arange(len(records_per_user)), records_per_user)
    return BoundedShard(
        Records(codes.astype(np.int32), images, texts=written),
        users.astype(np.int64),
        len(records_per_user),
        max([1, *records_per_user]),
    )


def joined(first: BoundedShard, second: BoundedShard) -> BoundedShard:
    """The users of both shards, the first one's before."""
    return BoundedShard(
        Records.joined([first.records, second.records]),
        np.concatenate([first.user_index, second.user_index + first.num_users]),
        first.num_users + second.num_users,
        max(first.max_records, second.max_records),
    )


class Broken(Exception):
    """A check failed; the text says on what."""


def finding_of(claim: str, check: Callable[[], None]) -> Finding:
    """Run one check; a strategy that raises has failed it."""
    try:
        check()
    except Broken as broken:
        return Finding(claim, False, str(broken))
    except Exception as error:  # noqa: BLE001  (a plug-in may raise anything; that is the finding)
        return Finding(claim, False, f"raised {type(error).__name__}: {error}")
    return Finding(claim, True)


def _fitting_schema(strategy: Strategy) -> Schema:
    """A small schema that the strategy accepts."""
    refusals = []
    for schema in (small_table(), small_images(), small_texts(), plain_texts()):
        try:
            check_reads(strategy, schema)
            strategy.event(schema, _NOISE)
        except ConfigError as error:
            refusals.append(str(error))
        else:
            return schema
    raise ConfigError(
        "the strategy fits neither a small table nor small images or texts; give a schema to try"
        f" it on: {'; '.join(dict.fromkeys(refusals))}"
    )


class _Trial:
    """One strategy on one schema, with a transcript to hold later runs against."""

    def __init__(self, strategy: Strategy, schema: Schema) -> None:
        self.strategy, self.schema = strategy, schema
        self.shard = made_up(schema, [1, 3, 1, 2, 5, 1, 1, 4] * 5, seed=1)
        self._transcript: list[tuple[Query, NoisySum]] | None = None
        self._learned: Synthesizer | None = None
        self._made: dict[str, Candidates] = {}
        self._echoes: dict[tuple[str, Series], dict[int, NDArray[np.int64]]] = {}

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is owed, in order."""
        yield "its event is priced, and falls as noise rises", self.event_is_priced
        yield "its settings survive as JSON", self.settings_survive
        yield "its queries add up to its event", self.queries_match_event
        yield "one user moves each sum by at most the clip", self.one_user_is_bounded
        yield "it says beforehand that the server is to choose", self.trust_is_declared
        yield "no user's answer depends on another user's records", self.users_are_apart
        yield (
            "no arrays make a user move more, or lean on others",
            self.hostile_requests_are_bounded,
        )
        yield "an empty shard and a single user are answered", self.small_shards_work
        yield "the same sums give the same synthesizer", self.replay_is_exact
        yield "half a transcript, replayed, ends where the whole one does", self.half_replays
        yield "a void round does not stop it", self.void_rounds_pass
        yield "it leaves global random state alone", self.global_state_is_untouched
        yield "its synthesizer samples the schema", self.samples_fit
        yield "its synthesizer survives saving", self.saving_is_exact

    def event_is_priced(self) -> None:
        low = accounting.epsilon_of(self.strategy.event(self.schema, 4 * _NOISE), 1e-6)
        high = accounting.epsilon_of(self.strategy.event(self.schema, _NOISE), 1e-6)
        if not 0 < low < high:
            raise Broken(f"epsilon {high:.3g} at noise {_NOISE}, {low:.3g} at {4 * _NOISE}")

    def settings_survive(self) -> None:
        settings = json.loads(settings_of(self.strategy))
        wraps = isinstance(self.strategy, Discovered)
        method = self.strategy
        while isinstance(method, Discovered | Scored):
            method = method.inner
        again = built(type(method), settings, "strategy", is_open=wraps)
        if again != self.strategy:
            raise Broken(f"{settings_of(self.strategy)} reads back as {settings_of(again)}")

    def queries_match_event(self) -> None:
        asked = Counter(query.leaf for query, _ in self.transcript if not query.goes_on)
        planned = accounting.leaves(self.strategy.event(self.schema, _NOISE))
        if asked != planned and not (self.stops_early and asked <= planned):
            raise Broken(f"event() holds {dict(planned)}, rounds() asks {dict(asked)}")
        priced = max((leaf.records for leaf in asked), default=1)
        told = getattr(self.strategy, "records_per_user", None)
        if priced > 1 and told != priced:
            raise Broken(
                f"it asks for sums over {priced} records a user; give it `records_per_user ="
                f" {priced}`, by which a run is held against unit.max_records, not {told}"
            )
        self.series_are_whole()

    def series_are_whole(self) -> None:
        turns: dict[tuple[str, Series], list[int]] = {}
        for query, _ in self.transcript:
            if query.turn is not None:
                turns.setdefault((query.name, query.turn.series), []).append(query.turn.position)
        for (name, series), positions in turns.items():
            in_order = positions == list(range(len(positions)))
            if not in_order or (len(positions) < series.num_rounds and not self.stops_early):
                raise Broken(
                    f"query {name!r}: a series of {series.num_rounds} rounds is asked round by"
                    f" round from 0, not {positions}"
                )

    def one_user_is_bounded(self) -> None:
        for query in self.queries:
            without = self.sum_of(query, self.shard)
            for what, user in self.arbitrary_users():
                num_records = len(user.records)
                if query.records and num_records > query.records:
                    continue  # no client lets in such a user
                # over records a user moves the sum by a clip for each record that joins
                most = num_records if query.records else 1
                bound = Lattice.of(query).bound
                for order in ((self.shard, user), (user, self.shard)):
                    length = _length(query, self.sum_of(query, joined(*order)) - without)
                    if length > most * bound * (1 + 1e-12):
                        raise Broken(
                            f"query {query.name!r}: a user with {what} moves the sum by"
                            f" {length / bound:.6f} clips"
                        )

    def trust_is_declared(self) -> None:
        asked = any(q.choice is not None and q.choice.where == "server" for q in self.queries)
        if asked and not trusts_server(self.strategy):
            raise Broken("it asks the server to choose; give it `trusts_server = True`")

    def users_are_apart(self) -> None:
        for query in self.queries:
            together = self.sum_of(query, self.shard)
            alone = sum(self.sum_of(query, user) for user in self.shard.blocks(1))
            if not np.array_equal(together, alone):
                worst = int(np.abs(together - alone).max())
                raise Broken(
                    f"query {query.name!r}: users answered one by one give another sum than"
                    f" together, by {worst} lattice steps"
                )

    def hostile_requests_are_bounded(self) -> None:
        rng = np.random.default_rng(6)
        users = made_up(self.schema, [1, 3, 1, 2, 1, 4], seed=4)
        names = [query.name for query in self.queries]
        for query in (query for query in self.queries for _ in range(_HOSTILE)):
            request = tampered(query, names, rng)
            if request is None or self.refuses(request, users):
                continue
            apart = users.by_record() if request.records else users
            alone = [self.sum_of(request, user) for user in apart.blocks(1)]
            longest = max(_length(request, part) for part in alone) / Lattice.of(request).bound
            if longest > 1 + 1e-12:
                raise Broken(
                    f"query {query.name!r}, with arrays that no server should send: a user moves"
                    f" the sum by {longest:.6f} clips"
                )
            if not np.array_equal(self.sum_of(request, users), sum(alone)):
                raise Broken(
                    f"query {query.name!r}, with arrays that no server should send: users answered"
                    " one by one give another sum than together"
                )

    def small_shards_work(self) -> None:
        nobody = made_up(self.schema, [], seed=0)
        for query in self.queries:
            rng = np.random.default_rng(0)
            answer = self.strategy.answer(query, self.placed(query, nobody), rng)
            if answer.num_users != 0 or self.sum_of(query, nobody).any():
                raise Broken(f"query {query.name!r}: an empty shard gives a sum that is not zero")
            one = self.placed(query, made_up(self.schema, [1], seed=2))
            self.strategy.answer(query, one, rng)

    def replay_is_exact(self) -> None:
        self.same(self.learned, self.replayed([noisy for _, noisy in self.transcript]))

    def half_replays(self) -> None:
        known = [noisy for _, noisy in self.transcript]
        half = len(known) // 2
        rounds = self.rounds()
        query = next(rounds)
        for number, noisy in enumerate(known[:half]):
            if query.name != self.transcript[number][0].name:
                raise Broken(f"round {number + 1} asks {query.name!r} when replayed")
            query = rounds.send(noisy)
        try:
            for noisy in known[half:]:
                query = rounds.send(noisy)
        except StopIteration as end:
            self.same(self.learned, end.value)
            return
        raise Broken("a replayed run asks more than the first one did")

    def void_rounds_pass(self) -> None:
        sums = [noisy for _, noisy in self.transcript]
        for void in [*({0, len(sums) // 2, len(sums) - 1}), None]:
            learned = self.replayed(
                sums, void={void} if void is not None else set(range(len(sums)))
            )
            self.sampled(learned, 20)

    def global_state_is_untouched(self) -> None:
        np.random.seed(1)  # noqa: NPY002  (what is watched is the global generator itself)
        random.seed(1)
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        learned = self.replayed([noisy for _, noisy in self.transcript])
        self.sum_of(self.queries[0], self.shard)
        after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        if before != after:
            raise Broken("it draws from a global random generator; use the rng it is given")
        self.same(self.learned, learned)

    def samples_fit(self) -> None:
        for num_records in (1, 257):
            self.sampled(self.learned, num_records)
        one = self.learned.sample(50, np.random.default_rng(3))
        two = self.learned.sample(50, np.random.default_rng(3))
        if not _equal(one.codes, two.codes) or not _equal(one.images, two.images):
            raise Broken("the same rng gives other samples")

    def saving_is_exact(self) -> None:
        settings = json.loads(json.dumps(self.learned.settings(), allow_nan=False))
        tensors = {name: np.array(t) for name, t in self.learned.tensors().items()}
        again = type(self.learned).restore(self.learned.schema, settings, tensors)
        first = self.learned.sample(50, np.random.default_rng(4))
        second = again.sample(50, np.random.default_rng(4))
        if not _equal(first.codes, second.codes) or not _equal(first.images, second.images):
            raise Broken("restored from settings() and tensors(), it samples something else")

    @property
    def transcript(self) -> list[tuple[Query, NoisySum]]:
        """A whole run over the trial's shard."""
        if self._transcript is None:
            self._transcript = []
            rounds, stream = self.rounds(), OsKeyStream()
            try:
                query = next(rounds)
                while True:
                    noisy = self.measured(query, stream)
                    self._transcript.append((query, noisy))
                    query = rounds.send(noisy)
            except StopIteration as end:
                self._learned = end.value
        return self._transcript

    @property
    def stops_early(self) -> bool:
        """Whether the strategy says that it may ask less than its event holds."""
        return bool(getattr(self.strategy, "stops_early", False))

    @property
    def most_queries(self) -> int:
        """Queries that a run may ask."""
        planned = num_rounds_of(accounting.leaves(self.strategy.event(self.schema, _NOISE)))
        return planned if self.stops_early else len(self.transcript)

    @property
    def learned(self) -> Synthesizer:
        """What the whole run ended in."""
        _ = self.transcript
        if not isinstance(self._learned, Synthesizer):
            raise Broken(f"rounds() returned {type(self._learned).__name__}, not a Synthesizer")
        return self._learned

    @property
    def queries(self) -> list[Query]:
        """One query of each name: the last, whose inputs are furthest from their start."""
        return list({query.name: query for query, _ in self.transcript}.values())

    def rounds(self) -> Rounds:
        """The strategy's generator, with the same public randomness each time."""
        steps = self.strategy.rounds(self.schema, _NOISE, np.random.default_rng([5, 1]))
        return answered(steps, self.made)

    def made(self, request: Generation) -> Candidates:
        """What a public model makes of a request, and makes again when it is asked again."""
        if request.digest not in self._made:
            self._made[request.digest] = make(request)
        return self._made[request.digest]

    def measured(self, query: Query, stream: "KeyStream") -> NoisySum:
        """A noised sum over the trial's shard, or what is chosen by it."""
        if query.choice is not None:
            total = chosen(self.sum_of(query, self.shard), query, max_clients=1, stream=stream)
            nominal = query.noise_multiplier * score_sensitivity(query)
            return NoisySum(total.astype(np.float64), nominal, num_clients=1)
        lattice, stddev = Lattice.of(query), query.noise_multiplier * query.clip
        total = self.sum_of(query, self.having_turn(query, stream))
        if query.turn is not None:
            known = self._echoes.setdefault((query.name, query.turn.series), {})
            known[query.turn.position] = total
            total = encoded(total, query.turn, known.items())
        total = noised(total, stddev=stddev, lattice=lattice, stream=stream)
        return real_sum(total, stddev=stddev, lattice=lattice, num_clients=1)

    def having_turn(self, query: Query, stream: "KeyStream") -> BoundedShard:
        """The trial's shard, of a series those whose turn it is; no coins are flipped."""
        return whose_turn(self.shard, replace(query, records=0, sampling_prob=1.0), stream)

    def refuses(self, query: Query, shard: BoundedShard) -> bool:
        """Whether a client refuses to answer a query for anybody."""
        try:
            users_a_block(self.strategy, query, self.placed(query, shard))
        except REFUSED:
            return True
        return False

    def sum_of(self, query: Query, shard: BoundedShard) -> NDArray[np.int64]:
        """The clipped integer sum over a shard, as a client forms it when every coin comes up."""
        asked = shard.by_record() if query.records else shard
        return block_sum(self.strategy, query, self.placed(query, asked), seed=(5, 1))

    def placed(self, query: Query, shard: BoundedShard) -> BoundedShard:
        """The shard as a client has it for a query: placed, if the query needs that."""
        if EMBEDDER not in query.inputs:
            return shard
        embedder = embedder_of(self.strategy, self.schema)
        if embedder is None:
            raise Broken("it sends an embedder's fingerprint and has no `embedder_for`")
        return placed(shard, embedder)

    def replayed(self, sums: list[NoisySum], void: set[int] | None = None) -> Synthesizer:
        """What a fresh generator makes of recorded sums; those in `void` are withheld.

        What is asked otherwise after a void round is measured anew, and what a run asks that would
        have stopped without it is void too.
        """
        rounds = self.rounds()
        try:
            query = next(rounds)
            for number in range(self.most_queries if void else len(sums)):
                noisy = sums[number] if number < len(sums) else NoisySum.void(query)
                if number in (void or set()):
                    noisy = NoisySum.void(query)
                elif len(noisy.vector) != query.answer_dim:
                    noisy = self.measured(query, OsKeyStream())
                query = rounds.send(noisy)
        except StopIteration as end:
            learned: Synthesizer = end.value
            return learned
        raise Broken("a replayed run asks more than the first one did")

    def arbitrary_users(self) -> Iterator[tuple[str, BoundedShard]]:
        """Users as they should never be, and as they may be."""
        for count in (1, 2, 7, _MANY):
            yield f"{count} random records", made_up(self.schema, [count], seed=count)
        same = made_up(self.schema, [1], seed=9)
        repeated = same.records.take(np.zeros(500, dtype=np.int64))
        yield "500 equal records", BoundedShard(repeated, np.zeros(500, np.int64), 1, 500)
        for value in (-1, np.iinfo(np.int32).max, np.iinfo(np.int32).min):
            wild = made_up(self.schema, [3], seed=3)
            wild.records.codes[1] = value
            yield f"a code of {value}", wild

    def sampled(self, learned: Synthesizer, num_records: int) -> None:
        """A sample must fit the schema."""
        records = learned.sample(num_records, np.random.default_rng(num_records))
        schema = learned.schema  # found by the run, where the given one has open columns
        if records.codes.shape != (num_records, len(schema.columns)):
            raise Broken(f"asked for {num_records} records, it gives {records.codes.shape}")
        if records.codes.dtype != np.int32:
            raise Broken(f"codes must be int32, not {records.codes.dtype}")
        outside = (records.codes < 0) | (records.codes >= np.array(schema.shape))
        if outside.any():
            raise Broken("it samples a code outside the schema")
        if self.schema.image is not None:
            want = (num_records, *self.schema.image.shape)
            if records.images is None or records.images.shape != want:
                raise Broken(f"images must have shape {want}")
            if records.images.dtype != np.uint8:
                raise Broken(f"images must be uint8, not {records.images.dtype}")
        if schema.text is not None:
            texts = records.texts
            if texts is None or texts.shape != (num_records,):
                raise Broken("it samples records without texts")
            if not all(isinstance(text, str) for text in texts):
                raise Broken("texts must be of type str")

    def same(self, first: Synthesizer, second: Synthesizer) -> None:
        """Two synthesizers must be equal to the bit."""
        one, two = first.tensors(), second.tensors()
        if set(one) != set(two) or not all(_equal(one[name], two[name]) for name in one):
            raise Broken("the same sums and the same rng give another synthesizer")
        if first.settings() != second.settings():
            raise Broken("the same sums and the same rng give other settings")


def tampered(query: Query, names: Sequence[str], rng: np.random.Generator) -> Query | None:
    """A query with a few numbers of its arrays changed, or their length, or under another name.

    Returns:
      `None` if what came out is no query at all.
    """
    inputs = {name: array.copy() for name, array in query.inputs.items()}
    for name in rng.choice(list(inputs), 2) if inputs else ():
        array = inputs[name]
        if array.ndim and (not array.size or rng.random() < _RESIZED):
            inputs[name] = array[:-1] if rng.random() < 0.5 else np.concatenate([array, array[:1]])
            continue
        places = rng.integers(0, array.size, 3)
        if array.dtype.kind == "f":
            array.reshape(-1)[places] = rng.choice(_WILD, 3)
        else:
            info = np.iinfo(array.dtype)
            wild = [-1, 0, 1, 3, 40, info.min, info.max, query.dim - 1, query.dim, -query.dim]
            array.reshape(-1)[places] = np.array(rng.choice(wild, 3)).astype(array.dtype)
    renamed = str(rng.choice(names)) if rng.random() < _RENAMED else query.name
    try:
        return replace(query, name=renamed, inputs=inputs)
    except ConfigError:
        return None


def _length(query: Query, moved: NDArray[np.int64]) -> float:
    """How far a sum was moved: in L2, or, for a choice, in L1 in the block that it hit hardest."""
    steps = np.abs(moved.astype(np.float64))
    if query.choice is not None:
        return float(np.add.reduceat(steps, query.choice.starts[:-1]).max())
    return float(np.sqrt(steps @ steps))


def _equal(one: NDArray[Any] | None, two: NDArray[Any] | None) -> bool:
    """Whether two arrays are equal to the bit, or both missing."""
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
