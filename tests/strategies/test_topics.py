# SPDX-License-Identifier: Apache-2.0
"""A corpus is resampled to what users write of, for the price of one sum and no more."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client.shard import Shard
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.config import parse_config
from fedsynth.core.electorate import Electorate
from fedsynth.core.embedding import whole
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Generation, Subject
from fedsynth.core.query import NoisySum
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.corpus import Corpus
from fedsynth.server.planned import plan_of
from fedsynth.server.release import Release, verify
from fedsynth.simulation.check import check_strategy, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.simulation.dry_run import stand_in
from fedsynth.simulation.run import run_local
from fedsynth.strategies.parts.kmeans import centers_of
from fedsynth.strategies.pre_text import PreText
from fedsynth.strategies.private_evolution import PrivateEvolution
from fedsynth.strategies.topics import TOPIC, Topics, resampled

SUBJECTS = {
    "linux": "ubuntu kernel boot disk mount".split(),  # noqa: SIM905
    "food": "recipe butter oven sugar bake".split(),  # noqa: SIM905
    "sport": "football goal team league match".split(),  # noqa: SIM905
}
PLAIN = Schema((), text=TextColumn("message", 120))
KIND = Column("kind", "category", "public: three kinds", categories=tuple(SUBJECTS))
LABELED = Schema((KIND,), text=TextColumn("message", 120))


def written(kinds, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(SUBJECTS[kind], 4)) + f" {i}" for i, kind in enumerate(kinds)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ninety public texts, thirty of each kind."""
    kinds = list(SUBJECTS) * 30
    path = tmp_path / "corpus.jsonl"
    texts = zip(kinds, written(kinds, 0), strict=True)
    path.write_text("".join(json.dumps({"kind": k, "message": t}) + "\n" for k, t in texts))
    return path


def users(schema=PLAIN, num=80):
    """Users of two texts each, of whom three in four write of linux and the others of food."""
    kinds = np.repeat(["linux", "linux", "linux", "food"] * (num // 4), 2)
    codes = np.zeros((len(kinds), 0), dtype=np.int32)
    if schema.columns:
        codes = np.array([[KIND.categories.index(kind)] for kind in kinds], dtype=np.int32)
    records = Records(codes, texts=as_texts(written(kinds, 1)))
    return BoundedShard(records, np.arange(num).repeat(2), num, 2)


def by_clusters(corpus: Path, **more) -> Topics:
    settings = {"num_candidates": 90, "num_topics": 6, "embedder": "word_hashes"} | more
    return Topics(model_settings={"path": str(corpus)}, **settings)


def by_label(corpus: Path, **more) -> Topics:
    return Topics(model_settings={"path": str(corpus)}, num_candidates=90, label="kind", **more)


def shares(pool):
    kinds = [next(k for k, words in SUBJECTS.items() if t.split()[0] in words)
             for t in pool.candidates.texts]  # fmt: skip
    return {kind: float(pool.weights[np.array(kinds) == kind].sum()) for kind in SUBJECTS}


@pytest.mark.parametrize("weight", ["user", "record"])
@pytest.mark.parametrize("make", [by_clusters, by_label])
def test_it_keeps_all_a_strategy_owes(make, weight, corpus):
    schema = PLAIN if make is by_clusters else LABELED

    findings = check_strategy(make(corpus, weight=weight), schema)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize(("make", "schema"), [(by_clusters, PLAIN), (by_label, LABELED)])
def test_the_release_follows_what_users_write_of(make, schema, corpus):
    strategy = make(corpus)

    exact = shares(non_private(strategy, schema, users(schema), np.random.default_rng(0)))
    noisy = shares(direct_run(strategy, schema, users(schema), 2.0, rng=np.random.default_rng(0)))
    nobody = shares(prior(strategy, schema, 2.0, np.random.default_rng(0)))

    assert exact == pytest.approx({"linux": 0.75, "food": 0.25, "sport": 0.0}, abs=0.02)
    assert noisy == pytest.approx(exact, abs=0.2)
    assert nobody == pytest.approx(dict.fromkeys(SUBJECTS, 1 / 3), abs=1e-6)


def test_a_corpus_of_fewer_texts_than_topics_is_asked_about_as_planned(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"message": "ubuntu disk"}\n{"message": "butter oven"}\n')
    strategy = by_clusters(path, num_candidates=2, num_topics=2)
    rounds = answered(strategy.rounds(PLAIN, 1.0, np.random.default_rng(0)), stand_in)

    assert next(rounds).dim == 2  # also where all candidates are alike
    learned = non_private(strategy, PLAIN, users(), np.random.default_rng(0))
    assert shares(learned)["linux"] > 0.5


def test_shares_are_dealt_out_evenly_within_a_topic_and_lost_topics_go_to_the_others():
    topics = np.array([0, 0, 0, 2, 2])

    found = resampled(NoisySum(np.array([30.0, 40.0, 30.0]), 1e-3, 1), topics)

    assert found == pytest.approx([1 / 6] * 3 + [1 / 4] * 2, abs=1e-4)


@pytest.mark.parametrize("vector", [[1.0, -2.0, 0.5], [0.0, 90.0, 0.0]])
def test_where_nothing_is_heard_the_corpus_stays_as_it_is(vector):
    found = resampled(NoisySum(np.array(vector), 2.0, 1), np.array([0, 0, 0, 2, 2]))

    assert found.tolist() == [0.2] * 5


def test_queries_of_the_store_do_not_move_the_ledger(corpus, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(PLAIN.to_json()))
    config = {
        "population": {"name": "chat", "num_users": 80, "epsilon": 50.0, "delta": 1e-4,
                       "accept_weak": True},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user", "max_records": 2},
        "budget": {"epsilon": 4.0},
        "strategy": {"name": "topics", "num_candidates": 90, "num_topics": 6,
                     "embedder": "word_hashes", "model_settings": {"path": str(corpus)}},
        "engine": {"clients": 2},
        "release": {"num_records": 50},
    }  # fmt: skip
    plan = plan_of(parse_config(config, base=tmp_path), run="run-1")
    everyone = users()
    data = Shard(everyone.records, np.array([f"u{i}" for i in everyone.user_index]))
    folder = run_local(plan, stream=OsKeyStream(), data=data)
    ledgers = [path for path in tmp_path.rglob("*.db") if path.is_file()]
    before = [path.read_bytes() for path in ledgers]
    corpus.unlink()  # a release needs its corpus no more

    synthesizer = Release.open(folder).synthesizer
    for seed in range(20):
        assert len(synthesizer.sample(500, np.random.default_rng(seed))) == 500
    asked = synthesizer.candidates.extras[TOPIC]

    assert len(asked) == 90
    assert [check for check in verify(folder, replay=True) if not check.ok] == []
    assert ledgers
    assert [path.read_bytes() for path in ledgers] == before


def test_a_run_that_would_drown_is_refused_with_the_users_it_needs(corpus):
    with pytest.raises(ConfigError, match="74 are needed"):
        by_clusters(corpus).check_signal(PLAIN, 10.0, Electorate(50))
    by_clusters(corpus).check_signal(PLAIN, 10.0, Electorate(74))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_topics": 91}, "num_topics must be 2 to 90"),
        ({"weight": "votes"}, "weight must be one of"),
        ({"max_norm": 2.0}, "belongs to weight = 'record'"),
        ({"weight": "record", "max_norm": 0.0}, "max_norm must be"),
        ({"label": "color"}, "no category; there are none"),
        ({"embedder": "pixels", "embedder_settings": {"shape": (8, 8, 1)}}, "places images"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says, corpus):
    with pytest.raises(ConfigError, match=says):
        by_clusters(corpus, **settings).event(PLAIN, 1.0)


def test_a_table_and_a_missing_corpus_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="no text column"):
        by_clusters(corpus).event(small_table(), 1.0)
    with pytest.raises(ConfigError, match="there is none at"):
        by_clusters(tmp_path / "nowhere.jsonl").event(PLAIN, 1.0)


@pytest.mark.parametrize("kind", [Topics, PrivateEvolution, PreText])
def test_a_corpus_is_looked_for_before_a_run_and_not_when_one_is_replayed(kind, tmp_path):
    gone = kind(
        model="corpus", model_settings={"path": str(tmp_path / "gone")}, embedder="word_hashes"
    )

    request = next(gone.rounds(PLAIN, 1.0, np.random.default_rng(0)))

    assert isinstance(request, Generation)  # which a replay answers by what was recorded
    with pytest.raises(ConfigError, match="there is none at"):
        gone.event(PLAIN, 1.0)


def drawn(path: Path, num: int, schema=LABELED, label=-1) -> Candidates:
    codes = np.zeros((num, len(schema.columns)), dtype=np.int32)
    if label >= 0:
        codes[:, label] = np.arange(num) % 3
    subject = Subject(schema, label)
    return Corpus(str(path)).random(Candidates(codes), subject, np.random.default_rng(0))


def test_a_corpus_gives_each_of_its_texts_once_with_its_category(corpus):
    found = drawn(corpus, 90)

    assert len(set(found.texts)) == 90
    for text, code in zip(found.texts, found.codes[:, 0], strict=True):
        assert text.split()[0] in SUBJECTS[KIND.categories[code]]


def test_a_label_that_was_asked_for_is_kept(corpus):
    found = drawn(corpus, 30, label=0)

    assert found.codes[:, 0].tolist() == [i % 3 for i in range(30)]


def test_a_packed_corpus_is_read_and_what_cannot_be_used_is_left_out(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    lines = [
        {"message": "a", "kind": "linux"},
        {"message": "a", "kind": "linux"},  # told before
        {"message": "  ", "kind": "food"},
        {"message": "b", "kind": "music"},
        {"message": "c", "kind": "sport"},
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))

    assert sorted(drawn(path, 2).texts) == ["a", "c"]
    with pytest.raises(ConfigError, match="3 different texts are wanted"):
        drawn(path, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"message": "a", "kind": "food"}\n\xff\xfe\n', "line 2"),
        (b'{"message": "a"', "line 1"),
        (b"[1]\n", "not a JSON object"),
        (b'{"text": "a"}\n', "line 1: no text under 'message'"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, content, says):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=says):
        drawn(path, 1)


def test_centers_are_those_of_three_heaps_and_the_same_from_any_sum_order():
    rng = np.random.default_rng(3)
    heaps = np.repeat(np.eye(3, 8), 40, axis=0) + rng.normal(size=(120, 8)) * 0.05
    places = whole(heaps / np.linalg.norm(heaps, axis=1, keepdims=True))

    centers, nearest = centers_of(places, 3, np.random.default_rng(0))

    assert len({tuple(nearest[i * 40 : i * 40 + 40]) for i in range(3)}) == 3
    assert all(len(set(nearest[i * 40 : i * 40 + 40])) == 1 for i in range(3))
    assert centers.dtype == np.int16
    for k in range(3):
        assert (centers[k] == np.rint(places[nearest == k].mean(axis=0))).all()


def test_no_more_centers_come_out_than_there_are_different_embeddings():
    places = np.repeat(np.eye(2, 4) * 2048, 5, axis=0).astype(np.int16)

    centers, nearest = centers_of(places, 6, np.random.default_rng(0))

    assert len(centers) == 2
    assert np.bincount(nearest).tolist() == [5, 5]
