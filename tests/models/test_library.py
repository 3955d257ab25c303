# SPDX-License-Identifier: Apache-2.0
"""A library of public images: drawn by label, varied to neighbors, and read with care."""

import numpy as np
import pytest
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Generation, Subject
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.models import live
from fedsynth.models.library import Library
from fedsynth.strategies.parts.pool import Pool

ORIGIN = "public: made up for this test"
SHADE = Column("shade", "category", ORIGIN, categories=("dark", "light"))
SUBJECT = Subject(Schema((SHADE,), ImageColumn("image", (8, 8, 1), ORIGIN), target="shade"), 0)
LEVELS = np.arange(100)


def saved(path, **changes):
    """A hundred flat images, each a little brighter, the first half dark and the other light."""
    flat = np.broadcast_to(LEVELS[:, None, None] * 2, (100, 8, 8)).astype(np.uint8)
    arrays = {"images": flat, "labels": np.repeat(["dark", "light"], 50)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "flat.npz")


def blank(num=400):
    return Candidates((np.arange(num) % 2).astype(np.int32)[:, None])


def rng(seed=0):
    return np.random.default_rng(seed)


def level(candidates):
    return candidates.images[:, 0, 0, 0] // 2


def test_candidates_are_images_of_their_label(path):
    made = Library(path).random(blank(), SUBJECT, rng())

    made.check(SUBJECT.schema)
    assert ((level(made) >= 50) == (made.codes[:, 0] == 1)).all()
    assert len(np.unique(level(made))) > 80
    assert (level(made) == made.extras["position"]).all()


@pytest.mark.parametrize("labels", [None, np.full(100, 7)])
def test_a_label_that_the_library_does_not_have_is_given_all_images(tmp_path, labels):
    made = Library(saved(tmp_path / "x.npz", labels=labels)).random(blank(), SUBJECT, rng())

    for code in (0, 1):
        assert (level(made)[made.codes[:, 0] == code] < 50).mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("degree", "furthest"), [(0.0, (0, 0)), (0.5, (3, 7)), (1.0, (40, 49))])
def test_an_image_varies_to_its_nearest_of_the_same_label(path, degree, furthest):
    start = Library(path).random(blank(), SUBJECT, rng())

    varied = Library(path).vary(start, degree, SUBJECT, rng(1))

    moved = np.abs(level(varied).astype(int) - level(start))
    assert furthest[0] <= moved.max() <= furthest[1]
    assert ((level(varied) >= 50) == (varied.codes[:, 0] == 1)).all()


def test_what_was_drawn_is_recorded_for_others_have_no_such_file(path):
    assert not Library(path).capabilities().is_exact


def test_it_answers_a_request_by_its_name(path):
    request = Generation(
        "library", f'{{"path":"{path}"}}', "random", blank(6), 0.0, SUBJECT, seed=1
    )

    assert live.make(request).images.shape == (6, 8, 8, 1)


def test_the_fingerprint_is_of_the_bytes(path, tmp_path):
    other = saved(tmp_path / "other.npz", labels=None)

    assert Library(path).fingerprint() == Library(path).fingerprint()
    assert Library(path).fingerprint() != Library(other).fingerprint()


def test_a_library_without_a_path_is_refused():
    with pytest.raises(ConfigError, match="needs path"):
        Library().check(SUBJECT)


def test_a_missing_file_is_named(tmp_path):
    missing = Library(str(tmp_path / "nowhere.npz"))

    for call in (
        lambda: missing.check(SUBJECT),
        lambda: missing.random(blank(), SUBJECT, rng()),
        missing.fingerprint,
    ):
        with pytest.raises(ConfigError, match=r"cannot open .*nowhere\.npz"):
            call()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": np.zeros((100, 9, 8), np.uint8)}, r"of shape \(9, 8, 1\), and the schema's"),
        ({"images": np.zeros((100, 8, 8), np.float32)}, "must hold `images`, uint8"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, "must hold `images`, uint8"),
        ({"images": None}, "must hold `images`, uint8"),
        ({"labels": np.zeros(99, np.int64)}, "one label an image"),
        ({"labels": np.zeros(100)}, "one label an image"),
        ({"labels": np.array([object()] * 100, dtype=object)}, "plain arrays"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        Library(saved(tmp_path / "x.npz", **changes)).random(blank(), SUBJECT, rng())


@pytest.mark.parametrize("content", [b"", b"not an npz file", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_file_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)

    with pytest.raises(ConfigError, match="plain arrays"):
        Library(str(tmp_path / "x.npz")).random(blank(), SUBJECT, rng())


def test_a_plain_array_file_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 8, 8), np.uint8))

    with pytest.raises(ConfigError, match="npz files of plain arrays"):
        Library(str(tmp_path / "x.npy")).random(blank(), SUBJECT, rng())


@pytest.mark.parametrize("position", [np.full(400, 100), np.full(400, -1), np.zeros(400)])
def test_candidates_of_another_library_are_refused(path, position):
    start = Library(path).random(blank(), SUBJECT, rng())
    other = Candidates(start.codes, start.images, extras={"position": position})

    with pytest.raises(ConfigError, match="no images of the library"):
        Library(path).vary(other, 0.5, SUBJECT, rng())


def test_a_file_that_is_exchanged_is_read_again(path):
    before = Library(path).random(blank(), SUBJECT, rng())
    saved(path, images=np.full((120, 8, 8), 9, np.uint8), labels=None)

    after = Library(path).random(blank(), SUBJECT, rng())

    assert level(before).max() > 50
    assert (after.images == 9).all()


def test_a_saved_pool_that_names_a_library_does_not_have_the_file_read(path):
    tensors = {
        "codes": np.zeros((2, 1), dtype=np.int32),
        "images": np.zeros((2, 8, 8, 1), dtype=np.uint8),
        "weights": np.full(2, 0.5),
        "lineage": np.zeros((0, 2), dtype=np.int32),
        "extra.position": np.arange(2),
    }
    told = {"label": 0, "model": "library", "model_settings": {"path": path}}
    still, moving = (
        Pool.restore(SUBJECT.schema, told | {"sample_degree": degree}, tensors)
        for degree in (0.0, 0.5)
    )

    assert not still.sample(5, rng()).images.any()
    with pytest.raises(ConfigError, match="nothing was sampled"):
        moving.sample(5, rng())
