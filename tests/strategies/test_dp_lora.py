# SPDX-License-Identifier: Apache-2.0
"""Users tune adapters of a public language model, whose weights stay and are told by a digest."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.column import Column
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.core.query import names_files
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models import lora as lora_module
from fedsynth.simulation.check import made_up
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.dp_lora import DpLora
from fedsynth.strategies.parts.local_training import LocalTraining, updates
from fedsynth.strategies.parts.trainable import Made, RecordShape
from fedsynth.strategies.parts.tuned_language import LanguageTexts
from fedsynth.strategies.registry import build_strategy

for package in ("transformers", "torch"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

MADE = Made(RecordShape((), None, 200))
TEXTS = Schema((), text=TextColumn("text", 60))
KIND = Column("kind", "category", "public: made up for this test", categories=("low", "high"))
CODED = Schema((KIND,), text=TextColumn("text", 60))


@pytest.fixture(scope="module")
def folder(tiny_llama) -> Path:
    """A model of three layers in which heads share keys, and whose weights say something."""
    return tiny_llama(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2
    )


@pytest.fixture
def lora(folder: Path) -> DpLora:
    """Adapters in the middle layer of three."""
    return DpLora(
        num_users=40,
        num_rounds=3,
        sampling_prob=1.0,
        about="chats",
        examples=("aa",),
        first_layer=1,
        num_layers=1,
        parts=("v_proj", "down_proj"),
        rank=2,
        max_tokens=24,
        path=str(folder),
    )


def shard_of(texts: list[list[str]], kinds: list[int] | None = None) -> BoundedShard:
    """Users with texts, each user's of one kind."""
    owners = np.array([user for user, own in enumerate(texts) for _ in own], dtype=np.int64)
    columns = 0 if kinds is None else 1
    codes = np.zeros((len(owners), columns), np.int32)
    if kinds is not None:
        codes[:, 0] = np.array(kinds)[owners]
    written = as_texts(text for own in texts for text in own)
    return BoundedShard(Records(codes, texts=written), owners, len(texts), 4)


def model_of(strategy: DpLora, schema: Schema = TEXTS):
    return strategy.model_for(RecordShape.of(schema))


@pytest.mark.parametrize("examples", [(), ("aa", "bb cc")])
def test_without_adapters_it_is_the_public_model(lora, examples):
    import torch

    model = model_of(replace(lora, examples=examples))
    base = model.base
    prompt = model.prompts.of(base, 0)
    read = base.tokenizer(prompt + "hello", add_special_tokens=False)["input_ids"]
    network = load(lora.path)
    scores = network(input_ids=torch.tensor([read])).logits[0, -6:].log_softmax(-1)
    wanted = -scores[torch.arange(6), torch.tensor([*read[-5:], base.end])]

    tokens = tuple(read[-5:])
    lost, _ = base.losses(prompt, tokens, {}, 1)

    assert torch.allclose(lost, wanted, atol=0.1)
    assert not torch.allclose(lost, wanted.flip(0), atol=0.1)


def load(path: str):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path).eval()


def test_an_update_is_the_slope_of_the_loss(lora):
    model = model_of(lora)
    shard = shard_of([["hello there"]])
    rng = np.random.default_rng(0)
    weights = (0.1 * rng.standard_normal(model.num_weights)).astype(np.float32)
    down = updates(model, weights, shard, LocalTraining(1, 1.0), made=MADE, seed=0)[0]
    step = 0.3 * down / np.linalg.norm(down)

    surprise = [model.guesses(weights + s * step, shard.records)[0, 2] / 12 for s in (-1, 1)]

    assert (surprise[0] - surprise[1]) / 0.6 == pytest.approx(np.linalg.norm(down), rel=0.25)


def test_a_users_row_is_the_same_to_the_bit_whoever_stands_beside(lora):
    model, texts = model_of(lora), [["ab"], ["some longer text", "b"], ["x y z"]]
    weights = np.full(model.num_weights, 0.01, np.float32)
    training = LocalTraining(2, 0.5, 1)

    together = updates(model, weights, shard_of(texts), training, made=MADE, seed=1)
    alone = updates(model, weights, shard_of(texts[2:]), training, made=MADE, seed=1)
    model.base._kept.clear()
    afresh = updates(model, weights, shard_of(texts[2:]), training, made=MADE, seed=1)

    assert together[2].tobytes() == alone[0].tobytes() == afresh[0].tobytes()


def test_no_other_users_texts_however_often_take_a_user_away(lora, monkeypatch):
    """What is kept is counted once, so that there is always something that can go."""
    model, training = model_of(lora), LocalTraining(1, 1.0)
    weights, base = np.full(model.num_weights, 0.01, np.float32), model.base
    base._kept.clear()
    monkeypatch.setattr(base, "_kept_bytes", 0)
    alone = updates(model, weights, shard_of([["x y z"]]), training, made=MADE, seed=1)
    room = 3 * base._kept_bytes
    monkeypatch.setattr(lora_module, "_KEPT_BYTES", room)

    for _ in range(6):
        updates(model, weights, shard_of([["ab cd"]] * 9), training, made=MADE, seed=1)
        updates(model, weights, shard_of([["efghi"]] * 9), training, made=MADE, seed=1)
        updates(model, weights, shard_of([["jklmn"]] * 9), training, made=MADE, seed=1)
    again = updates(model, weights, shard_of([["x y z"]]), training, made=MADE, seed=1)

    assert again.tobytes() == alone.tobytes()
    assert sum(states.nbytes for states in base._kept.values()) == base._kept_bytes <= room


def test_what_is_kept_for_guesses_of_any_number_of_texts_is_in_no_users_row(lora):
    model, training = model_of(lora), LocalTraining(1, 1.0)
    weights, shard = np.full(model.num_weights, 0.01, np.float32), shard_of([["x y z"]])
    model.base._kept.clear()
    afresh = updates(model, weights, shard, training, made=MADE, seed=1)
    model.base._kept.clear()

    model.guesses(weights, shard.records)
    for states in model.base._kept.values():
        states *= 2
    row = updates(model, weights, shard, training, made=MADE, seed=1)

    assert row.tobytes() == afresh.tobytes()


def test_a_texts_loss_does_not_depend_on_the_users_other_texts(lora):
    model, training = model_of(lora), LocalTraining(1, 1.0)
    weights = model.initial(np.random.default_rng(0))

    one, two, both = (
        updates(model, weights, shard_of([own]), training, made=MADE, seed=0)[0]
        for own in (["first"], ["second text"], ["first", "second text"])
    )

    assert both == pytest.approx((one + two) / 2, rel=1e-3, abs=1e-5)


def test_users_texts_become_likelier(lora):
    shard = shard_of([["zq zq zq"] for _ in range(6)])
    settings = replace(lora, num_users=6, num_rounds=6, clip=1.0, server_lr=3.0)
    before = model_of(lora)

    learned = non_private(settings, TEXTS, shard, np.random.default_rng(0))

    prior = before.guesses(before.initial(np.random.default_rng(0)), shard.records)[0, 2]
    assert learned.guesses(shard.records)[0, 2] < 0.8 * prior


def test_a_release_writes_the_same_texts_after_it_was_saved(lora):
    budget = Budget(epsilon=8.0, delta=1e-3)
    dial = accounting.calibrate(lambda z: lora.event(TEXTS, z), budget)
    shard = made_up(TEXTS, [1] * 10, seed=0)
    learned = direct_run(lora, TEXTS, shard, dial, rng=np.random.default_rng(0))

    again = LanguageTexts.restore(TEXTS, learned.settings(), learned.tensors())

    texts = learned.sample(70, np.random.default_rng(1)).texts.tolist()
    assert texts == again.sample(70, np.random.default_rng(1)).texts.tolist()
    assert len({*texts}) > 60
    assert all(len(text.encode()) <= 60 for text in texts)


def test_a_control_code_says_which_text_is_likelier(lora):
    wide = replace(lora, rank=8, parts=("v_proj", "down_proj", "o_proj"))
    coded = replace(wide, codes=("low", "high"), num_users=4, num_rounds=20, server_lr=1.0)
    texts = [["aaaa"] if user % 2 else ["zzzz"] for user in range(4)]
    kinds = [user % 2 for user in range(4)]

    learned = non_private(coded, CODED, shard_of(texts, kinds), np.random.default_rng(0))

    own, other = (
        learned.guesses(shard_of(texts[:2], codes).records)[:, 2] for codes in ([0, 1], [1, 0])
    )
    assert (own < other).all()
    assert {*learned.sample(30, np.random.default_rng(0)).codes[:, 0].tolist()} == {0, 1}


def test_a_client_refuses_another_language_model(lora):
    query = next(lora.rounds(TEXTS, 1.0, np.random.default_rng(0)))
    other = dict(query.inputs) | {"base": query.inputs["base"][::-1].copy()}
    nobody = made_up(TEXTS, [], seed=0)

    with pytest.raises(ConfigError, match="another model than the one here"):
        lora.answer(replace(query, inputs=other), nobody, np.random.default_rng(0))


def test_a_release_refuses_other_weights_beneath(lora):
    model = model_of(lora)
    texts = LanguageTexts(TEXTS, model, model.initial(np.random.default_rng(0)), "00" * 32)

    with pytest.raises(ConfigError, match="is not the one that was tuned"):
        texts.sample(1, np.random.default_rng(0))


def test_weights_that_are_missing_are_missed_before_anything_is_spent(lora):
    with pytest.raises(ConfigError, match="cannot read the weights"):
        replace(lora, path="/nowhere/model.gguf").event(TEXTS, 1.0)


@pytest.mark.parametrize(
    ("schema", "codes"),
    [(Schema(CODED.columns), ()), (CODED, ()), (CODED, ("one",)), (TEXTS, ("low", "high"))],
)
def test_a_schema_that_does_not_fit_is_refused(lora, schema, codes):
    with pytest.raises(ConfigError, match="must hold a text column"):
        replace(lora, codes=codes).event(schema, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"about": " "},
        {"examples": ("",)},
        {"parts": ("lm_head",)},
        {"parts": ()},
        {"rank": 0},
        {"max_tokens": 0},
        {"num_layers": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        build_strategy("dp_lora", wrong)


def test_adapters_above_the_last_layer_are_refused(lora):
    with pytest.raises(ConfigError, match="the model has 3 layers"):
        replace(lora, first_layer=3).event(TEXTS, 1.0)


def test_a_client_takes_no_path_from_a_server(lora):
    assert names_files(lora)
    assert not names_files(replace(lora, path=""))


def test_slopes_of_many_texts_are_those_of_each(lora):
    model, training = model_of(lora), LocalTraining(1, 1.0)
    rng = np.random.default_rng(0)
    weights = (0.1 * rng.standard_normal(model.num_weights)).astype(np.float32)
    shard = shard_of([["ab", "c"], ["some longer text", "b"], ["x y z"], ["text " * 4]])

    together = updates(model, weights, shard, training, made=MADE, seed=1)
    one_by_one = replace(training, per_user="loop")
    each = updates(model, weights, shard, one_by_one, made=MADE, seed=1)

    assert np.abs(together - each).max() < 0.02 * np.abs(each).max()
    assert np.abs(together[::-1] - each).max() > 0.2 * np.abs(each).max()
