# SPDX-License-Identifier: Apache-2.0
"""Pooled pixels: whole numbers, the same as votes are counted by without an embedder."""

import numpy as np
import pytest
from fedsynth.core.embedding import MOST_SQUARED, STEPS, whole
from fedsynth.core.errors import ConfigError
from fedsynth.models.pixels import Pixels
from fedsynth.models.registry import build_embedder
from fedsynth.strategies.parts.nearest import Finder, TableMetric, pooled

SHAPES = [(28, 28, 1), (32, 32, 3), (8, 8, 1), (5, 40, 3), (64, 64, 3), (1, 1, 1)]


def images_of(shape, num_images=40, seed=0):
    """Random images with a flat one of each shade at the front."""
    images = np.random.default_rng(seed).integers(0, 256, (num_images, *shape), dtype=np.uint8)
    images[:3] = np.array([0, 128, 255])[:, None, None, None]
    return images


def blobs(num_images, seed):
    """Bright blobs at random places of small images."""
    rng = np.random.default_rng(seed)
    center, width = rng.uniform(4, 24, (num_images, 2)), rng.uniform(2, 6, num_images)
    row, column = np.mgrid[:28, :28]
    squared = (row - center[:, :1, None]) ** 2 + (column - center[:, 1:, None]) ** 2
    return np.rint(255 * np.exp(-squared / width[:, None, None] ** 2)).astype(np.uint8)[..., None]


@pytest.mark.parametrize("shape", SHAPES)
def test_embeddings_are_whole_steps_of_length_one_at_most(shape):
    embedder, images = Pixels(shape), images_of(shape)

    places = embedder.embed(images)

    steps = whole(places)
    assert places.shape == (40, embedder.dim)
    assert np.array_equal(places * STEPS, np.rint(places * STEPS))
    assert np.array_equal(steps, places * STEPS)
    assert (steps.astype(np.int64) ** 2).sum(axis=1).max() <= STEPS**2 < MOST_SQUARED


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_the_pooled_pixels_of_the_votes_in_coarser_steps(shape):
    images = images_of(shape)
    sums, white = pooled(images)

    places = Pixels(shape).embed(images)

    levels = Pixels(shape)._levels
    exact = (2 * sums.reshape(40, -1) / white - 1) * levels
    assert np.abs(places * STEPS - exact).max() <= 1.0001  # half of two steps


def test_no_image_has_zeros_and_black_is_as_long_as_white():
    places = Pixels((28, 28, 1)).embed(images_of((28, 28, 1)))

    assert np.abs(places).min() > 0
    assert np.array_equal(places[0], np.full(196, places[0, 0]))
    # the border is blurred with black
    assert places[2].max() == -places[0, 0]


def test_the_nearest_image_is_nearly_always_that_of_the_votes():
    records, candidates = blobs(500, seed=1), blobs(200, seed=2)
    metric = TableMetric(np.zeros(0, np.int64), np.zeros(0, np.int64), -1, 0.3)
    none = [np.zeros((n, 0), np.int32) for n in (500, 200)]
    groups = [np.zeros(n, np.int64) for n in (500, 200)]
    finder = Finder(none[1], candidates, groups[1], metric=metric)

    found = finder.nearest(none[0], records, groups[0])[0][:, 0]

    own, others = (
        whole(Pixels((28, 28, 1)).embed(x)).astype(np.int64) for x in (records, candidates)
    )
    nearest = (2 * own @ others.T - (others**2).sum(axis=1)).argmax(axis=1)
    assert (nearest == found).mean() > 0.98


def test_an_image_has_the_same_embedding_in_any_company():
    images, embedder = images_of((32, 32, 3)), Pixels((32, 32, 3))

    alone = np.concatenate([embedder.embed(images[i : i + 1]) for i in range(40)])

    assert np.array_equal(embedder.embed(images[::-1])[::-1], alone)


def test_the_fingerprint_says_the_shape_however_it_is_written():
    square = Pixels((28, 28, 1))

    assert square.fingerprint() == Pixels([28, 28, 1]).fingerprint()
    assert square == Pixels([28, 28, 1])
    assert square.fingerprint() != Pixels((28, 28, 3)).fingerprint()
    assert len(square.fingerprint()) == 64


def test_a_run_file_can_build_it():
    built = build_embedder("pixels", {"shape": [28, 28, 1]})

    assert built == Pixels((28, 28, 1))


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 1), (28, 28, 1, 1), "abc", (2.5, 2, 1)])
def test_shapes_that_no_image_has_are_refused(shape):
    with pytest.raises(ConfigError, match=r"shape must be \(height, width, channels\)"):
        Pixels(shape)


def test_other_records_are_refused():
    embedder = Pixels((8, 8, 1))

    with pytest.raises(ConfigError, match=r"of shape \(8, 8, 1\), not \(9, 8, 1\)"):
        embedder.embed(np.zeros((1, 9, 8, 1), np.uint8))
    with pytest.raises(ConfigError, match="uint8 images"):
        embedder.embed(["a"])
