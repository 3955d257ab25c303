# SPDX-License-Identifier: Apache-2.0
"""Texts are read from a noisy sum of hashed cells, and only frequent ones."""

import numpy as np
import pytest
from fedsynth.core.open_codes import bytes_of, text_words
from fedsynth.strategies.parts.heavy_texts import TextSketch, bucket_of, text_keys
from scipy.stats import binomtest, norm

WORDS = ["Lagos", "New York", "Zürich", "428", "São Paulo", "Orthopedics-Reconstructive", "x"]


def as_bytes(texts, max_bytes=32):
    return bytes_of(text_words(texts, max_bytes))[:, :max_bytes]


def summed(sketch, counts):
    """The exact sum over users of one text each."""
    total = np.zeros(sketch.dim)
    cells, loud, _ = sketch.cells(as_bytes(list(counts), sketch.max_bytes))
    weights = np.array(list(counts.values()))[:, None] * loud * sketch.heights
    np.add.at(total, cells, weights)
    return total


def read(sketch, noisy, stddev, threshold=5.0, max_texts=100):
    found = sketch.texts(noisy, stddev=stddev, threshold=threshold * stddev, max_texts=max_texts)
    return dict(found)


def test_a_record_lights_cells_of_norm_one():
    sketch = TextSketch(32)
    cells, loud, known = sketch.cells(as_bytes(WORDS))

    assert cells.shape == loud.shape == (len(WORDS), 33)
    assert np.linalg.norm(loud * sketch.heights, axis=1) == pytest.approx(1)
    assert np.linalg.norm(sketch.heights) == pytest.approx(1)
    assert known.all()
    assert cells.min() >= 0
    assert cells.max() < sketch.dim


def test_exact_sums_give_back_all_texts_and_counts():
    sketch = TextSketch(32)
    counts = {word: 100.0 * (i + 1) for i, word in enumerate(WORDS)}

    found = read(sketch, summed(sketch, counts), 0.01)

    assert found == pytest.approx(counts, abs=0.1)
    assert list(found) == list(counts)[::-1]  # the most frequent first


def test_texts_of_many_users_are_read_and_those_of_few_are_not():
    sketch, rng = TextSketch(24), np.random.default_rng(0)
    many = {f"many {i}": 40.0 for i in range(30)}
    few = {f"few {i}": 1.0 for i in range(300)}
    noisy = summed(sketch, many | few) + rng.normal(0, 1.0, sketch.dim)

    found = read(sketch, noisy, 1.0)

    assert len(set(found) & set(many)) >= 29
    assert not set(found) & set(few)
    assert len(set(found) - set(many)) <= 1


def test_counts_of_what_is_found_are_right_to_the_noise():
    sketch, rng = TextSketch(16), np.random.default_rng(1)
    truth = {f"value {i}": 60.0 for i in range(60)}
    noisy = summed(sketch, truth) + rng.normal(0, 1.0, sketch.dim)

    found = read(sketch, noisy, 1.0)
    errors = np.array([found[text] - truth[text] for text in found if text in truth])

    assert len(errors) >= 55
    assert np.sqrt((errors**2).mean()) < 2.0  # one over the height of the slots together is 1.15


def test_a_heavy_text_does_not_garble_lighter_ones():
    sketch, rng = TextSketch(24), np.random.default_rng(2)
    truth = {"everybody": 1e6, **{f"town {i}": 50.0 for i in range(40)}}
    noisy = summed(sketch, truth) + rng.normal(0, 1.0, sketch.dim)

    found = read(sketch, noisy, 1.0)

    assert len(set(found) & set(truth)) >= 39


def test_noise_alone_gives_no_text():
    sketch, rng = TextSketch(8), np.random.default_rng(3)

    found = [read(sketch, rng.normal(0, 1.0, sketch.dim), 1.0, threshold=3.0) for _ in range(5)]

    # 44 buckets of 32,768 pass three deviations, and one reading in 256 fits its bucket by chance
    assert sum(map(len, found)) <= 6


def test_no_more_texts_are_read_than_are_wanted():
    sketch = TextSketch(16)
    exact = summed(sketch, {f"value {i}": 100.0 + i for i in range(50)})

    assert list(read(sketch, exact, 0.01, max_texts=3)) == ["value 49", "value 48", "value 47"]


def test_a_users_own_bucket_passes_no_more_often_than_the_threshold_says():
    sketch, rng = TextSketch(8), np.random.default_rng(4)
    surprise, clip, draws = 0.02, 1.0, 20_000
    bucket = int(bucket_of(as_bytes(["mine"], 8))[0])
    alone = sketch.heights[0]  # what one record adds; whatever the user does, at most the clip

    honest = alone + rng.normal(0, 2.0, draws) >= norm.isf(surprise) * 2.0 + clip
    worst = clip + rng.normal(0, 2.0, draws) >= norm.isf(surprise) * 2.0 + clip
    twin = clip + rng.normal(0, 2.0, draws) >= norm.isf(surprise) * 2.0  # forgets the user's part

    assert summed(sketch, {"mine": 1.0})[bucket] == pytest.approx(alone)
    assert binomtest(int(honest.sum()), draws, surprise, "greater").pvalue > 1e-3
    assert binomtest(int(worst.sum()), draws, surprise, "greater").pvalue > 1e-3
    assert binomtest(int(twin.sum()), draws, surprise, "greater").pvalue < 1e-9


def test_keys_do_not_depend_on_how_far_a_text_is_filled_up():
    short, long = as_bytes(WORDS, 32), np.zeros((len(WORDS), 64), np.uint8)
    long[:, :32] = short

    assert (text_keys(short) == text_keys(long)).all()
    assert len(set(text_keys(short).tolist())) == len(WORDS)


def test_bytes_that_are_no_text_light_cells_all_the_same():
    wild = np.random.default_rng(5).integers(0, 256, (50, 32)).astype(np.uint8)
    wild[0] = 0
    cells, loud, known = TextSketch(32).cells(wild)

    assert cells.shape == (50, 33)
    assert np.isfinite(loud).all()
    assert known.tolist() == [False] + [True] * 49


def test_texts_of_all_lengths_are_equally_loud():
    """What a text needs to be read grows with the root of its length, and no faster."""
    sketch, rng = TextSketch(32), np.random.default_rng(6)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    for length, users in ((3, 14.0), (8, 18.0), (16, 28.0), (24, 36.0)):
        truth = {"".join(rng.choice(letters, length)): users for _ in range(40)}
        found = read(sketch, summed(sketch, truth) + rng.normal(0, 1.0, sketch.dim), 1.0)

        assert len(set(found) & set(truth)) >= 36, length
