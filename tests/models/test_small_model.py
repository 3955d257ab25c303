# SPDX-License-Identifier: Apache-2.0
"""The small model learns from texts, the same each time, and refuses what is none of it."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError, DataError
from fedsynth.models.small_model import Shape, SmallModel, fine_tune

pytestmark = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("tokenizers") is None,
    reason="needs torch and tokenizers",
)
SMALL = Shape(vocabulary=320, dim=48, max_tokens=24)
SUBJECTS, VERBS = ("the cat", "a dog", "my horse"), ("eats fish", "sees a mouse", "runs home")


def sentences(num, seed=0, subjects=SUBJECTS, verbs=VERBS):
    draw = np.random.default_rng(seed)
    pairs = draw.integers((len(subjects), len(verbs)), size=(num, 2))
    return [f"{subjects[i]} {verbs[j]} now" for i, j in pairs]


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return fine_tune(sentences(300), shape=SMALL, learning_rate=0.01)


def test_it_learns_to_guess_the_next_token(model):
    assert model.next_token_accuracy(sentences(50, seed=9)) > 0.7
    assert model.next_token_accuracy(["zq xj! 9 %"]) < 0.3


def test_guesses_are_those_of_each_text_by_itself(model):
    texts = [*sentences(5, seed=3), "", "now now now now now now", "\u20ac \ud83d"]

    together = model.guesses(texts)

    assert together.tolist() == [model.guesses([text])[0].tolist() for text in texts]
    assert (together[:, 0] <= together[:, 1]).all()
    assert together[5].tolist()[1] == 1  # of an empty text, its end


def test_a_long_text_is_cut_off(model):
    assert model.guesses(["now " * 1000])[0, 1] == SMALL.max_tokens + 1


def test_the_same_texts_and_seed_give_the_same_weights(model):
    again = fine_tune(sentences(300), shape=SMALL, learning_rate=0.01)
    other = fine_tune(sentences(300), shape=SMALL, learning_rate=0.01, seed=1)

    def same(one, two):
        return all(np.array_equal(one.weights[k], two.weights[k]) for k in one.weights)

    assert same(model, again)
    assert not same(model, other)


def test_a_base_is_tuned_to_other_texts_and_stays_as_it_was(model):
    verbs = ("drinks tea", "sings songs")
    before = {name: array.copy() for name, array in model.weights.items()}

    tuned = fine_tune(sentences(100, 1, verbs=verbs), model, epochs=12, learning_rate=0.01)

    held_out = sentences(40, 2, verbs=verbs)
    assert tuned.next_token_accuracy(held_out) > model.next_token_accuracy(held_out) + 0.1
    assert tuned.tokens == model.tokens
    assert all(np.array_equal(model.weights[name], array) for name, array in before.items())


def test_tuning_never_leaves_a_base_worse_at_what_was_held_out(model):
    tuned = fine_tune(sentences(60, 5), model, learning_rate=0.9)

    accuracy = tuned.next_token_accuracy(sentences(50, seed=9))
    assert accuracy >= model.next_token_accuracy(sentences(50, seed=9)) - 0.02


def test_it_survives_saving(model, tmp_path):
    model.save(tmp_path / "model")

    again = SmallModel.load(tmp_path / "model")

    texts = sentences(20, seed=4)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.safetensors",
        "small_model.json",
    ]
    assert np.array_equal(again.guesses(texts), model.guesses(texts))


@pytest.mark.parametrize("spoil", ["no json", "other shape", "cut weights", "nothing"])
def test_files_that_are_no_model_are_refused(model, tmp_path, spoil):
    model.save(tmp_path)
    told, weights = tmp_path / "small_model.json", tmp_path / "model.safetensors"
    if spoil == "no json":
        told.write_text("{")
    elif spoil == "other shape":
        content = json.loads(told.read_text())
        told.write_text(json.dumps(content | {"shape": content["shape"] | {"dim": 32}}))
    elif spoil == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        weights.unlink()

    with pytest.raises(ConfigError, match="small model"):
        SmallModel.load(tmp_path)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "says"),
    [
        (["a b"] * 39, {}, DataError, "40 texts"),
        (["a b"] * 40, {"epochs": 0}, ConfigError, "epochs"),
        (["a b"] * 40, {"learning_rate": 1.0}, ConfigError, "learning_rate"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(texts, settings, error, says):
    with pytest.raises(error, match=says):
        fine_tune(texts, shape=SMALL, **settings)


def test_a_base_keeps_its_shape_and_a_shape_its_ranges(model):
    with pytest.raises(ConfigError, match="shape of its own"):
        fine_tune(sentences(60), model, shape=SMALL)
    with pytest.raises(ConfigError, match="vocabulary of 258"):
        Shape(vocabulary=100)
    with pytest.raises(DataError, match="no texts"):
        model.next_token_accuracy([])
