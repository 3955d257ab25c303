# SPDX-License-Identifier: Apache-2.0
"""Scores keep their bound and tell the order; who learns from them writes what is liked."""

import json
import tracemalloc

import numpy as np
import pytest
from fedsynth.client.placing import placed
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.candidates import Candidates
from fedsynth.core.config import parse_config
from fedsynth.core.electorate import Electorate
from fedsynth.core.embedding import STEPS, whole
from fedsynth.core.errors import ConfigError, Interrupted
from fedsynth.core.query import NoisySum
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.words import WordHashes
from fedsynth.server import generations
from fedsynth.server.planned import plan_of, unfinished
from fedsynth.server.release import verify
from fedsynth.simulation.check import small_images, small_table
from fedsynth.simulation.direct import non_private
from fedsynth.simulation.run import run_local
from fedsynth.strategies import popri
from fedsynth.strategies.parts import scores
from fedsynth.strategies.popri import Popri

SCHEMA = Schema((), text=TextColumn("message", 120))
LIKED = ["ubuntu", "kernel", "boot", "disk"]
OTHERS = ["football", "goal", "recipe", "butter", "oven", "sugar"]
SHORT = {
    "num_rounds": 3,
    "num_prompts": 10,
    "num_responses": 6,
    "num_candidates": 60,
    "model": "words",
    "model_settings": {"words": [*LIKED, *OTHERS], "max_words": 6},
    "embedder": "word_hashes",
}


def writers(num_users=60, words=LIKED):
    """Users of two texts each, of four words that they all use."""
    rng = np.random.default_rng(1)
    texts = as_texts(" ".join(rng.choice(words, 4)) for _ in range(2 * num_users))
    records = Records(np.zeros((len(texts), 0), np.int32), texts=texts)
    return BoundedShard(records, np.arange(num_users).repeat(2), num_users, 2)


def share_of_liked(pool):
    words = [word for text in pool.candidates.texts for word in text.split()]
    return np.mean([word in LIKED for word in words])


def test_the_best_and_the_one_at_the_rank_make_a_pair_by_prompt():
    found = scores.pairs_of(
        np.array([0.1, 0.9, 0.5, 0.3, 2.0, 1.0, 5.0]), np.array([0, 0, 0, 0, 1, 1, 2]), 3
    )

    # prompt 0 by rank: 1, 2, 3, 0; prompt 1 has two responses only, prompt 2 but one
    assert found == [(1, 3), (4, 5)]


def many_writers(num_users, dim):
    """Users of one to three records each, which lie anywhere."""
    rng = np.random.default_rng(2)
    index = np.arange(num_users).repeat(rng.integers(1, 4, num_users))
    places = whole(rng.normal(size=(len(index), dim)))
    records = Records(np.zeros((len(index), 0), np.int32), places=places)
    return BoundedShard(records, index, num_users, 3)


def asked_of(form, shard, num_responses=4):
    """A query about responses that are the shard's first records."""
    places = shard.records.places[:num_responses]
    prompts = np.arange(num_responses, dtype=np.int32) // 2
    return scores.sheet(form, places, np.zeros(32, np.uint8), prompts, noise_multiplier=1.0)


@pytest.mark.parametrize("form", ["prompt", "pool", "direction"])
def test_scores_of_many_users_are_those_of_each(form, monkeypatch):
    shard = many_writers(90, 64)
    query = asked_of(form, shard)
    each = np.concatenate([scores.rows_of(query, one, form) for one in shard.blocks(1)])

    monkeypatch.setattr(scores, "_CHUNK", 7 * 64)
    together = scores.rows_of(query, shard, form)

    assert together.tobytes() == each.tobytes()
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0)
    assert scores.rows_of(query, shard.only(np.zeros(90, np.bool_)), form).shape == (0, query.dim)


def test_few_scores_of_many_users_take_no_memory_by_the_length_of_embeddings():
    shard = many_writers(40_000, 256)
    query = asked_of("prompt", shard)

    tracemalloc.start()
    rows = scores.rows_of(query, shard, "prompt")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert most - rows.nbytes < shard.records.places.nbytes  # sums of all would be twice of that


def test_scores_have_mean_zero_and_an_equal_part_of_length_one_for_each_prompt():
    groups = np.array([2, 0, 0, 1, 1, 0, 2])
    rows = scores.standardized(np.random.default_rng(0).integers(-999, 999, (5, 7)) * 1.0, groups)

    for group in range(3):
        part = rows[:, groups == group]
        assert np.abs(part.sum(axis=1)).max() < 1e-4
        assert np.allclose((part**2).sum(axis=1), 1 / 3, atol=1e-9)


def test_who_likes_all_alike_or_writes_nothing_counts_as_zeros():
    assert not scores.standardized(np.full((1, 4), 7.0), np.zeros(4, dtype=np.int64)).any()
    assert not scores.unit_rows(np.zeros((2, 3))).any()


@pytest.mark.parametrize("form", ["prompt", "pool", "direction"])
def test_without_noise_scores_order_responses_as_users_mean_cosines_do(form):
    rng, one = np.random.default_rng(2), 1
    responses = whole(rng.normal(size=(24, 16)))
    written = whole(rng.normal(size=(3, 16)) + 1)
    records = Records(np.zeros((3, 0), np.int32), places=written)
    shard = BoundedShard(records, np.zeros(3, np.int64), one, 3)
    prompts = np.repeat(np.arange(4), 6).astype(np.int32)
    query = scores.sheet(form, responses, np.zeros(32, np.uint8), prompts, noise_multiplier=1.0)

    row = scores.rows_of(query, shard, form)
    found = scores.read_scores(NoisySum(row[0], 1e-9, 1), form, responses)

    cosines = (responses.astype(float) @ written.T).mean(axis=1) / STEPS**2
    assert np.linalg.norm(row) == pytest.approx(1.0, abs=1e-9)
    for prompt in range(4):
        assert (
            np.argsort(found[prompts == prompt]) == np.argsort(cosines[prompts == prompt])
        ).all()


def test_noise_alone_is_not_clear_and_users_who_agree_are():
    rng, prompts = np.random.default_rng(3), np.repeat(np.arange(20), 6)
    noise = rng.normal(size=120) * 4.0
    agreed = scores.standardized(rng.integers(-99, 99, (1, 120)) * 1.0, prompts)[0]

    for form in ("prompt", "direction"):
        assert not scores.is_clear(NoisySum(noise, 4.0, 1), form, prompts)
        assert scores.is_clear(NoisySum(noise + 60 * agreed, 4.0, 1), form, prompts)
    # noise a third larger than is said passes for signal, so the test has the power to see it
    assert scores.is_clear(NoisySum(noise * 4 / 3, 4.0, 1), "prompt", prompts)


@pytest.mark.parametrize("form", ["prompt", "pool", "direction"])
def test_a_model_learns_to_write_what_users_write(form):
    strategy = Popri(**SHORT, scores=form)

    learned = non_private(strategy, SCHEMA, writers(), np.random.default_rng(0))

    assert share_of_liked(learned) > 0.6  # four words in ten, before any lesson
    assert learned.model_settings["lessons"]


def test_a_reply_that_says_nothing_is_not_released():
    made = Candidates(np.zeros((4, 0), np.int32), texts=as_texts(["a", "", " ", "b"]))
    nothing = Candidates(np.zeros((2, 0), np.int32), texts=as_texts(["", " "]))

    assert popri._weights(made).tolist() == [0.5, 0, 0, 0.5]
    assert popri._weights(nothing).tolist() == [0.5, 0.5]


def test_fewer_pairs_are_recovered_under_more_noise():
    rng = np.random.default_rng(4)
    exact = rng.normal(size=800)
    prompts = np.repeat(np.arange(100), 8)

    found = [
        scores.recovery(exact + rng.normal(size=800) * noise, exact, prompts, 5)
        for noise in (1e-6, 1.0, 30.0)
    ]

    assert found[0] == 1.0
    assert 0.65 < found[1] < 0.95
    assert 0.35 < found[2] < 0.65  # a coin's


def test_the_direction_is_asked_once_and_scores_each_round():
    counts = {}
    for form in ("direction", "prompt"):
        event = Popri(**SHORT, scores=form).event(SCHEMA, 2.0)
        counts[form] = sum(accounting.leaves(event).values())
        assert accounting.mu_of(event) == pytest.approx(0.5)

    assert counts == {"direction": 1, "prompt": 3}


@pytest.mark.parametrize("schema", [small_table(), small_images()])
def test_schemas_without_texts_are_refused(schema):
    with pytest.raises(ConfigError, match="text column"):
        Popri(**SHORT).event(schema, 1.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reject_rank": 7}, "reject_rank must be 2 to 6"),
        ({"num_responses": 1, "reject_rank": 2}, "num_responses must be 2"),
        ({"scores": "votes"}, "scores must be one of"),
        ({"model_settings": {"lessons": []}}, "lessons are what the run finds out"),
        ({"model": "strokes", "model_settings": {}}, "does not learn"),
        ({"embedder": "pixels", "embedder_settings": {"shape": (8, 8, 1)}}, "places images"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Popri(**SHORT | settings).event(SCHEMA, 1.0)


def test_a_run_of_which_nothing_can_be_heard_is_refused_and_says_how_many_users_would_do():
    strategy = Popri(**SHORT, scores="prompt")

    with pytest.raises(ConfigError, match=r"(\d+) are needed"):
        strategy.check_signal(SCHEMA, 20.0, Electorate(30))
    strategy.check_signal(SCHEMA, 20.0, Electorate(3000))


def test_a_stopped_run_goes_on_with_the_responses_and_lessons_it_had(tmp_path, monkeypatch):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    config = {
        "population": {"name": "chat", "num_users": 60, "epsilon": 50.0, "delta": 1e-4,
                       "accept_weak": True},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user", "max_records": 2},
        "budget": {"epsilon": 20.0, "accept_weak": True},
        "strategy": {"name": "popri", "scores": "prompt"} | SHORT,
        "engine": {"clients": 2},
        "release": {"num_records": 50},
    }  # fmt: skip
    plan = plan_of(parse_config(config, base=tmp_path), run="run-1")
    folder = plan.config.path(plan.config.release.path) / f"{plan.run}.unfinished"
    users = writers()
    data = Shard(users.records, np.array([f"u{i}" for i in users.user_index]))
    asked, real = [], generations.make

    def counted(request, at):
        asked.append(request.digest)
        return real(request, at)

    def stop(event):
        if event.round == 2 and not event.replayed:
            raise KeyboardInterrupt

    monkeypatch.setattr(generations.kept, "__defaults__", (counted,))
    with pytest.raises(Interrupted):
        run_local(plan, stream=OsKeyStream(), data=data, on_event=stop)
    release = run_local(unfinished(folder), stream=OsKeyStream(), data=data)

    assert len(asked) == len(set(asked)) == 4
    assert [check for check in verify(release, replay=True) if not check.ok] == []


def test_a_users_scores_are_the_same_to_the_bit_whoever_stands_beside():
    shard = placed(writers(9, [*LIKED, *OTHERS]), WordHashes())
    rng = np.random.default_rng(5)
    responses = whole(rng.normal(size=(30, 256)))
    prompts = np.repeat(np.arange(6), 5).astype(np.int32)

    for form in ("prompt", "pool", "direction"):
        query = scores.sheet(form, responses, np.zeros(32, np.uint8), prompts, noise_multiplier=1.0)
        together = scores.rows_of(query, shard, form)
        alone = [scores.rows_of(query, user, form) for user in shard.blocks(1)]
        assert together.tobytes() == np.concatenate(alone).tobytes()
