# SPDX-License-Identifier: Apache-2.0
"""Built-in public models: what they change, what they keep, and that nothing else reaches them."""

import dataclasses

import numpy as np
import pytest
from fedsynth.core.answering import answered
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError, DataError, FedsynthError
from fedsynth.core.generation import PLACES, Generation, Subject
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models import live
from fedsynth.models.augment import ImageAugmenter
from fedsynth.models.registry import MODELS, build_embedder, build_model
from fedsynth.models.sketch import digit_sketches, rendered
from fedsynth.models.table import TableMutator
from fedsynth.models.variation import VariationModel
from fedsynth.models.words import WordHashes, Words

ORIGIN = "public: made up for this test"
TEN = Column("digit", "category", ORIGIN, categories=tuple("0123456789"))
SCHEMAS = {
    "table": Schema((TEN, Column("x", "real", ORIGIN, bounds=(0, 1), num_bins=9)), target="digit"),
    "image": Schema((TEN,), ImageColumn("image", (28, 28, 1), ORIGIN), target="digit"),
    "text": Schema((TEN,), target="digit", text=TextColumn("message")),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def blank(subject, num):
    codes = np.zeros((num, len(subject.schema.columns)), np.int32)
    codes[:, 0] = np.arange(num) % 10
    return Candidates(codes)


@pytest.mark.parametrize("name", sorted({*MODELS} - {"writer", "policy"}))
def test_what_a_model_makes_fits_the_schema_and_comes_again(name):
    model = build_model(name, {})
    makes = model.capabilities()
    if not makes.is_exact:
        pytest.skip("it needs packages of its own, and has tests of its own")
    subject = Subject(SCHEMAS[makes.modality], 0)
    model.check(subject)

    def made():
        draw = rng(3)
        first = model.random(blank(subject, 30), subject, draw)
        return first, model.vary(first, 0.4, subject, draw)

    for one, two in zip(made(), made(), strict=True):
        one.check(subject.schema)
        assert one.codes[:, 0].tolist() == [i % 10 for i in range(30)]
        for key, array in one.tensors().items():
            assert array.tobytes() == two.tensors()[key].tobytes()
        again = Candidates.restore(subject.schema, one.tensors())
        assert again.tensors().keys() == one.tensors().keys()


@pytest.mark.parametrize("name", sorted({*MODELS} - {"writer", "policy"}))
def test_a_model_refuses_a_schema_that_holds_none_of_its_kind(name):
    model = build_model(name, {})
    makes = model.capabilities().modality
    for kind, schema in SCHEMAS.items():
        if "table" not in (makes, kind) and kind != makes:
            with pytest.raises(ConfigError, match=f"makes {makes}s"):
                model.check(Subject(schema, 0))


def test_no_model_can_be_handed_a_shards_records():
    """A shard's records are of another type, which has no way into a request."""
    for method in (VariationModel.random, VariationModel.vary):
        assert Records not in method.__annotations__.values()
        assert Candidates in method.__annotations__.values()
    kinds = {field.name: field.type for field in dataclasses.fields(Generation)}
    assert kinds["candidates"] is Candidates
    assert not issubclass(Records, Candidates)


def test_a_mutated_number_moves_no_further_than_its_degree_and_a_label_never():
    number = Column("x", "real", ORIGIN, bounds=(0, 1), num_bins=100, missing=True)
    four = Column("y", "category", ORIGIN, categories=tuple("abcd"))
    subject = Subject(Schema((TEN, number, four)), 0)
    codes = np.column_stack([np.arange(2000) % 10, np.full(2000, 50), np.zeros(2000)])

    made = TableMutator().vary(Candidates(codes.astype(np.int32)), 0.1, subject, rng())

    assert (made.codes[:, 0] == codes[:, 0]).all()
    walked = made.codes[:, 1] != 100
    assert np.abs(made.codes[walked, 1] - 50).max() == 10
    assert 0 < (~walked).mean() < 0.01
    assert (made.codes[:, 2] != 0).mean() == pytest.approx(0.075, abs=0.02)


def test_an_image_warped_by_next_to_nothing_stays_as_it_was():
    subject = Subject(Schema((TEN,), ImageColumn("image", (12, 10, 3), ORIGIN)))
    augmenter = ImageAugmenter()
    start = augmenter.random(Candidates(np.zeros((20, 1), np.int32)), subject, rng())

    nearly, far = (augmenter.vary(start, degree, subject, rng(1)).images for degree in (1e-6, 0.8))

    assert np.abs(nearly.astype(int) - start.images).max() <= 1
    assert np.abs(far.astype(int) - start.images).mean() > 10


def test_drawn_digits_look_like_their_digit():
    from sklearn.neighbors import KNeighborsClassifier

    drawn, asked = (np.arange(num) % 10 for num in (2000, 300))
    train = rendered(digit_sketches(drawn, rng()), (16, 16, 1)).reshape(2000, -1)
    test = rendered(digit_sketches(asked, rng(1)), (16, 16, 1)).reshape(300, -1)

    assert KNeighborsClassifier(3).fit(train, drawn).score(test, asked) > 0.85


def test_words_vary_as_far_as_they_are_asked_to():
    model, subject = Words(), Subject(SCHEMAS["text"], 0)
    start = model.random(blank(subject, 200), subject, rng())

    def kept(degree):
        varied = model.vary(start, degree, subject, rng(1)).texts
        pairs = zip(start.texts, varied, strict=True)
        return float(
            np.mean([len({*a.split()} & {*b.split()}) / len({*a.split()}) for a, b in pairs])
        )

    assert kept(0.0) == 1.0
    assert 0.85 < kept(0.1) < 1.0
    assert kept(1.0) < 0.3


def test_hashed_words_place_like_spellings_near_and_an_empty_text_nowhere():
    a, b, c, none = WordHashes().embed(["a red fox ran", "the red foxes ran", "kernel panic", ""])

    assert np.linalg.norm([a, b, c], axis=1) == pytest.approx(1, abs=1e-6)
    assert not none.any()
    assert a @ b > 0.4 > 0.2 > a @ c


def request(**changes):
    subject = Subject(SCHEMAS["text"], 0)
    given = {
        "model": "words",
        "settings": "{}",
        "task": "random",
        "candidates": blank(subject, 12),
        "degree": 0.0,
        "subject": subject,
        "seed": 5,
    }
    return Generation(**given | changes)


def test_a_requests_digest_changes_with_all_it_depends_on():
    changes = [
        {"model": "word"},
        {"settings": "{ }"},
        {"task": "vary"},
        {"degree": 0.1},
        {"seed": 6},
        {"subject": Subject(SCHEMAS["text"], -1)},
        {"candidates": blank(request().subject, 11)},
        {"embedder": "word_hashes"},
        {"embedder_settings": "[]"},
        {"lookahead": 1},
        {"lookahead_degree": 0.5},
    ]

    digests = [request(**change).digest for change in [{}, *changes]]

    assert request().digest == digests[0]
    assert len(set(digests)) == len(digests)


def test_candidates_are_placed_by_themselves_or_by_their_variations():
    alone = live.make(request(embedder="word_hashes"))
    ahead = live.make(request(embedder="word_hashes", lookahead=4, lookahead_degree=0.2))

    own = WordHashes().embed(alone.texts.tolist())
    assert alone.extras[PLACES] == pytest.approx(own * 2048, abs=0.51)
    assert ahead.texts.tolist() == alone.texts.tolist()
    lengths = np.linalg.norm(ahead.extras[PLACES] / 2048, axis=1)
    assert (lengths < 0.99).any()
    assert ((ahead.extras[PLACES] / 2048 * own).sum(axis=1) / lengths).mean() > 0.7


class Faulty(Words):
    name = "faulty"

    def random(self, blank, subject, rng):
        made = super().random(blank, subject, rng)
        return made.take(np.arange(len(made) - 1))


def test_a_model_that_gives_too_few_is_named(monkeypatch):
    monkeypatch.setattr(live, "build_model", lambda name, settings: Faulty())

    with pytest.raises(FedsynthError, match="'words' gave 11 candidates where 12 were asked for"):
        live.make(request())


@pytest.mark.parametrize(
    "change",
    [
        {"codes": np.full((12, 1), 10, np.int32)},
        {"codes": np.zeros((12, 2), np.int32)},
        {"codes": np.zeros((12, 1), np.int64)},
        {"texts": None},
        {"texts": as_texts(["a"] * 11)},
        {"texts": as_texts([b"a"] * 12)},
        {"texts": as_texts(["\ud800"] * 12)},
        {"images": np.zeros((12, 8, 8, 1), np.uint8)},
        {"extras": {"x": np.zeros(3)}},
    ],
)
def test_candidates_that_do_not_fit_the_schema_are_refused(change):
    good = live.make(request())
    good.check(SCHEMAS["text"])

    with pytest.raises(DataError, match="do not fit the schema"):
        dataclasses.replace(good, **change).check(SCHEMAS["text"])


def test_generations_are_answered_on_the_way_and_queries_pass():
    def steps():
        made = yield request()
        noisy = yield Query("votes", len(made), 1.0, 1.0)
        varied = yield request(task="vary", candidates=made, degree=0.3)
        return made, noisy, varied

    rounds = answered(steps(), live.make)
    query = next(rounds)
    with pytest.raises(StopIteration) as end:
        rounds.send(NoisySum.void(query))

    made, noisy, varied = end.value.value
    assert query.name == "votes"
    assert noisy.is_void
    assert len(made) == len(varied) == 12


def test_plug_ins_are_built_from_plain_settings():
    assert build_model("words", {"words": ["a", "b"], "max_words": 3}).words == ("a", "b")
    assert build_embedder("word_hashes", {"size": 64}).dim == 64
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        build_model("word", {})
    with pytest.raises(ConfigError, match="model 'words': max_words = 'x'"):
        build_model("words", {"max_words": "x"})
    with pytest.raises(ConfigError, match="size must be"):
        build_embedder("word_hashes", {"size": 1})
