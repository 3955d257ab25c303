# SPDX-License-Identifier: Apache-2.0
"""PrE-Text: survivors of every round are seeds, texts are written after them, noise is as told."""

from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from fedsynth.client.placing import placed
from fedsynth.core import accounting
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Generation, Shown, Subject
from fedsynth.core.mechanism import Lattice, clipped_sum
from fedsynth.core.privacy import Budget
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.live import make
from fedsynth.simulation.check import small_table, small_texts
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.parts.expanded import Expanded
from fedsynth.strategies.parts.seeds import Seeds, Voted
from fedsynth.strategies.pre_text import PreText

TOPICS = ("ubuntu kernel boot disk", "football goal team league", "recipe butter oven sugar")
LABEL = Column("topic", "category", "public: three channels", categories=("0", "1", "2"))
SCHEMA = Schema((LABEL,), target="topic", text=TextColumn("message", 120))
WORDS = tuple(sorted({word for topic in TOPICS for word in topic.split()}))
QUICK = {
    "num_rounds": 3,
    "num_candidates": 60,
    "num_votes": 1,
    "num_expanded": 200,
    "model": "words",
    "model_settings": {"words": WORDS, "max_words": 6},
    "embedder": "word_hashes",
}
PUBLISHED = {"sigma": 11.3, "rounds": 11, "delta": 3e-6, "epsilon": 1.2875}  # of the paper's 1.29


def rng(seed=0):
    return np.random.default_rng(seed)


def population(num_users=400, seed=0, shares=(1 / 3, 1 / 3, 1 / 3)):
    """Users who write three messages each, of four words of their topic."""
    draw = rng(seed)
    topics = draw.choice(3, size=num_users, p=shares).repeat(3)
    texts = [" ".join(draw.choice(TOPICS[topic].split(), 4)) for topic in topics]
    records = Records(topics[:, None].astype(np.int32), texts=as_texts(texts))
    return BoundedShard(records, np.arange(num_users).repeat(3), num_users, 3)


def on_topic(records):
    """Mean share of a text's words that are of its topic; a third where nobody votes."""
    texts = zip(records.codes[:, 0], records.texts, strict=True)
    own = [[word in TOPICS[topic].split() for word in text.split()] for topic, text in texts]
    return float(np.mean([np.mean(words) for words in own if words]))


@pytest.fixture(scope="module")
def learned() -> Expanded:
    found = non_private(PreText(**QUICK), SCHEMA, population(), rng())
    assert isinstance(found, Expanded)
    return found


def test_seeds_and_expansions_come_to_look_like_their_topic(learned):
    seeds, rest = slice(0, learned.num_seeds), slice(learned.num_seeds, None)
    blind = prior(PreText(**QUICK), SCHEMA, 1.0, rng())

    told = on_topic(learned.sample(300, rng()))

    assert told > on_topic(blind.sample(300, rng())) + 0.15
    assert on_topic(learned.candidates.take(seeds)) > on_topic(learned.candidates.take(rest)) > 0.4


def test_survivors_of_every_round_are_seeds_and_stand_there_once(learned):
    codes, texts = learned.candidates.codes[:, 0], learned.candidates.texts
    seeds = list(zip(codes, texts, strict=True))[: learned.num_seeds]

    assert len(set(seeds)) == len(seeds)
    assert {*learned.rounds[: learned.num_seeds].tolist()} == {1, 2, 3}
    assert (learned.rounds[learned.num_seeds :] == -1).all()


def test_every_text_names_the_seeds_that_it_came_from(learned):
    num, codes = learned.num_seeds, learned.candidates.codes[:, 0]
    parents, shown = learned.sources[:num, 0], learned.sources[num:]

    assert (learned.sources[:num, 1:] == -1).all()
    assert (parents[learned.rounds[:num] == 1] == -1).all()
    assert (parents[learned.rounds[:num] == 3] >= 0).mean() > 0.5
    later = np.flatnonzero(parents >= 0)
    assert (learned.rounds[parents[later]] < learned.rounds[later]).all()
    assert ((shown >= 0) & (shown < num)).all()
    assert (codes[shown] == codes[num:, None]).all()


def test_a_seed_is_shown_as_often_as_it_weighs():
    strategy = PreText(**QUICK | {"num_expanded": 32 * 500})
    weights = np.array([0.4, 0.1, 0.0, 0.3, 0.2])
    groups = np.array([0, 0, 1, 1, 1])

    index = strategy._shown(weights, groups, rng())

    counts = np.bincount(index.ravel(), minlength=5) / index.size
    assert counts == pytest.approx(weights, abs=0.002)
    assert (groups[index] == groups[index[:, :1]]).all()


def test_the_share_of_seeds_is_as_told_and_without_expansions_there_is_nothing_else(learned):
    few = PreText(**QUICK | {"num_expanded": 0, "seed_share": 0.5})

    alone = non_private(few, SCHEMA, population(), rng())

    assert learned.weights[: learned.num_seeds].sum() == pytest.approx(0.2)
    assert alone.num_seeds == len(alone.candidates)
    assert alone.weights.sum() == pytest.approx(1.0)


def test_labels_are_as_frequent_as_votes_say():
    skewed = population(900, shares=(0.7, 0.2, 0.1))

    found = non_private(PreText(**QUICK), SCHEMA, skewed, rng()).sample(1000, rng())

    counted = np.bincount(found.codes[:, 0], minlength=3) / 1000
    assert counted == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_rounds_are_pooled_by_how_little_noise_is_in_them():
    def pool(*texts):
        return Candidates(np.zeros((len(texts), 0), np.int32), texts=as_texts(texts))

    first = Voted(pool("a", "b", "c"), np.array([0.5, 0.5, 0.0]), 3.0, np.zeros(0, np.int64))
    # "a" stays, "d" and "e" vary "b", and "c" comes back as a variation of "a"
    second = Voted(
        pool("a", "d", "e", "c"), np.array([0.2, 0.4, 0.0, 0.4]), 1.0, np.array([0, 1, 1, 0])
    )
    third = Voted(pool("f", "g"), np.array([0.25, 0.75]), 1.0, np.array([2, 3]))

    seeds = Seeds.of([first, second, third])

    assert seeds.candidates.texts.tolist() == ["a", "b", "d", "c", "f", "g"]
    assert seeds.weights * 5 == pytest.approx([1.7, 1.5, 0.4, 0.4, 0.25, 0.75])
    assert seeds.parents.tolist() == [-1, -1, 1, 0, 1, 3]
    assert seeds.rounds.tolist() == [1, 1, 2, 2, 3, 3]


def test_where_nothing_is_heard_the_first_pool_is_expanded_alike():
    strategy = PreText(**QUICK)

    void = drive(strategy, population(), lambda noisy, query: NoisySum.void(query))

    assert (void.rounds[: void.num_seeds] == 0).all()
    assert void.num_seeds == 60
    assert len(void.candidates) == 260


def drive(strategy, shard, heard):
    """A whole run of exact sums, each as `heard` has it."""
    shard = placed(shard, strategy.embedder_for(SCHEMA))
    rounds = answered(strategy.rounds(SCHEMA, 1.0, rng()), make)
    try:
        query = next(rounds)
        while True:
            exact = clipped_sum(strategy.answer(query, shard, rng()), query)
            sum_ = NoisySum(exact * Lattice.of(query).unit, 1e-9, 1)
            query = rounds.send(heard(sum_, query))
    except StopIteration as end:
        return end.value


def test_an_expansion_is_asked_for_once_with_its_examples():
    steps, asked = PreText(**QUICK).rounds(SCHEMA, 1.0, rng()), []

    def source(request):
        asked.append(request)
        return make(request)

    rounds = answered(steps, source)
    query = next(rounds)
    try:
        while True:
            query = rounds.send(NoisySum(np.ones(query.dim), 1e-3, 1))
    except StopIteration as end:
        found = end.value

    # words need no record of what they make: what is placed by an embedder is recorded
    assert [request.task for request in asked] == ["random", "vary", "vary"]
    assert (found.rounds == -1).sum() == 200


@pytest.mark.parametrize(
    "shown", [None, Shown(Candidates(np.zeros((1, 1), np.int32)), np.zeros((3, 1), np.int64))]
)
def test_an_expansion_has_examples_for_each_candidate(shown):
    blank = Candidates(np.zeros((2, 1), np.int32))

    with pytest.raises(ConfigError, match="needs examples"):
        Generation("words", "{}", "expand", blank, 0.0, Subject(SCHEMA, 0), 1, shown=shown)


def test_a_request_with_other_examples_has_another_digest():
    seeds = Candidates(np.zeros((2, 1), np.int32), texts=as_texts(["a", "b"]))
    blank = Candidates(np.zeros((1, 1), np.int32))

    def digest(examples, index):
        shown = Shown(examples, np.array(index))
        return Generation(
            "words", "{}", "expand", blank, 0.0, Subject(SCHEMA, 0), 1, shown=shown
        ).digest

    other = replace(seeds, texts=as_texts(["a", "c"]))
    digests = {
        digest(seeds, [[0, 1]]),
        digest(seeds, [[1, 0]]),
        digest(seeds, [[0]]),
        digest(other, [[0, 1]]),
    }

    assert len(digests) == 4
    with pytest.raises(ConfigError, match="shown by their positions"):
        digest(seeds, [[2]])


# --- noise


def published(sigma, rounds, delta):
    """Epsilon as the published code reckons it, by moments."""
    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(sigma), rounds))
    return accountant.get_epsilon(delta)


def test_the_published_noise_is_more_than_twice_what_its_epsilon_calls_for():
    sigma, rounds, delta, epsilon = PUBLISHED.values()
    added = 1.541 * np.sqrt(2) * sigma  # as its code draws it, a record of a user

    strategy = PreText(**QUICK | {"num_rounds": rounds})
    dial = accounting.calibrate(lambda z: strategy.event(SCHEMA, z), Budget(epsilon, delta))
    ours = next(iter(accounting.leaves(strategy.event(SCHEMA, dial))))[0]

    assert published(sigma, rounds, delta) == pytest.approx(epsilon, abs=0.01)
    assert accounting.epsilon_of(
        accounting.compose([accounting.single_event(sigma)] * rounds), delta
    ) == pytest.approx(1.189, abs=0.01)
    assert added / sigma == pytest.approx(2.18, abs=0.005)
    assert added / ours == pytest.approx(2.34, abs=0.03)


@pytest.mark.parametrize("factor", [1.0, 4 / 3])
def test_votes_carry_the_noise_of_the_budget_and_a_third_more_would_show(factor):
    strategy, shard = PreText(**QUICK), population()
    at_clients = placed(shard, strategy.embedder_for(SCHEMA))
    dial = accounting.calibrate(lambda z: strategy.event(SCHEMA, z), Budget(2.0, 1e-5))
    seen: list[np.ndarray] = []

    class Watching:
        """The strategy, with what it is told beyond the exact sums written down."""

        def __getattr__(self, name):
            return getattr(strategy, name)

        def rounds(self, schema, noise, draw):
            steps = strategy.rounds(schema, noise, draw)
            sent = None
            while True:
                try:
                    asked = steps.send(sent)
                except StopIteration as end:
                    return end.value
                sent = yield asked
                if isinstance(sent, NoisySum):
                    answer = strategy.answer(asked, at_clients, rng())
                    exact = clipped_sum(answer, asked) * Lattice.of(asked).unit
                    seen.append((sent.vector - exact) / (asked.clip * asked.noise_multiplier))

    while sum(map(len, seen)) < 1500:
        direct_run(Watching(), SCHEMA, shard, dial, rng=rng(len(seen)))  # type: ignore[arg-type]

    spread = np.concatenate(seen).std() * factor
    assert (abs(spread - 1.0) < 0.1) == (factor == 1.0)


# --- what it refuses


@pytest.mark.parametrize(
    ("settings", "schema", "says"),
    [
        ({}, small_table(), "no text column"),
        ({"model": "strokes", "model_settings": {}}, small_texts(), "makes images"),
        ({"num_candidates": 2}, small_texts(), "too few"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(settings, schema, says):
    with pytest.raises(ConfigError, match=says):
        PreText(**QUICK | settings).event(schema, 1.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed_share": 1.5}, "seed_share"),
        ({"num_shown": 0}, "num_shown"),
        ({"num_expanded": -1}, "num_expanded"),
        ({"vote": "cap"}, "vote must be one of"),
        ({"degree_first": 0.0}, "degree_first"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        PreText(**settings)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("weights", lambda a: a * 2),
        ("weights", lambda a: a.astype(np.float32)),
        ("rounds", lambda a: a[::-1].copy()),
        ("rounds", lambda a: a - 2),
        ("sources", lambda a: a + 60_000),
        ("sources", lambda a: a[1:]),
        ("sources", lambda a: a.astype(np.int64)),
        ("texts", lambda a: a[:-1]),
    ],
)
def test_saved_seeds_that_were_tampered_with_are_refused(learned, name, spoil):
    tensors = learned.tensors()
    tensors[name] = spoil(tensors[name])

    with pytest.raises(ConfigError, match="saved seeds"):
        Expanded.restore(SCHEMA, learned.settings(), tensors)


def test_candidates_may_stand_where_their_variations_do():
    far = PreText(**QUICK | {"lookahead": 3, "num_expanded": 0})

    found = non_private(far, SCHEMA, population(), rng())

    blind = prior(far, SCHEMA, 1.0, rng())
    assert on_topic(found.sample(300, rng())) > on_topic(blind.sample(300, rng())) + 0.15
