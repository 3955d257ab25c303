# SPDX-License-Identifier: Apache-2.0
"""The generator of characters: exact, smooth in its latent vectors, and of its own weights."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Subject
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.models import glyphs
from fedsynth.models.glyphs import Glyphs, decoded
from fedsynth.models.registry import build_model
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = "public: made up for this test"
TEN = Column("digit", "category", ORIGIN, categories=tuple("0123456789"))
SUBJECT = Subject(Schema((TEN,), ImageColumn("image", (28, 28, 1), ORIGIN), target="digit"), 0)


def rng(seed=0):
    return np.random.default_rng(seed)


def first(num=200, **settings):
    blank = Candidates(np.zeros((num, 1), np.int32))
    return Glyphs(**settings).random(blank, SUBJECT, rng())


def unlike(a, b):
    return np.abs(a.images.astype(int) - b.images).mean()


def test_characters_are_bright_lines_on_dark_ground():
    images = first().images / 255

    assert 0.05 < images.mean() < 0.35
    assert (images.max(axis=(1, 2, 3)) > 0.8).mean() > 0.95
    assert images[:, [0, -1]].mean() < 0.25 * images[:, 4:24, 4:24].mean()
    assert ((images > 0.2) & (images < 0.8)).mean() < 0.15


def test_a_character_varies_as_far_as_it_is_asked_to_and_stays_one():
    start = first()
    none, near, far, anew = (
        Glyphs().vary(start, degree, SUBJECT, rng(1)) for degree in (0.0, 0.15, 0.4, 1.0)
    )

    assert none.images.tobytes() == start.images.tobytes()
    apart = [unlike(start, varied) for varied in (near, far, anew)]
    assert 1 < apart[0] < 0.6 * apart[1] < 0.6 * apart[2]
    assert np.corrcoef(anew.extras["latent"].ravel(), start.extras["latent"].ravel())[0, 1] < 0.1
    assert far.extras["latent"].std() == pytest.approx(1, abs=0.05)


def test_the_last_number_is_the_pens_width():
    latent = np.repeat(first().extras["latent"], 2, axis=0)
    latent[::2, -1], latent[1::2, -1] = -1.5, 1.5

    ink = decoded(latent, 2.0).mean(axis=(1, 2, 3))

    assert (ink[1::2] > 1.2 * ink[::2]).mean() > 0.95


def test_an_image_is_the_same_in_any_company_and_order_of_sums():
    latent = first(40).extras["latent"]

    alone = np.concatenate([decoded(latent[i : i + 1], 2.0) for i in range(40)])

    assert np.array_equal(decoded(latent[::-1], 2.0)[::-1], alone)


def test_its_sums_are_whole_numbers_that_a_float_holds():
    weights = glyphs._weights()

    reach = np.full(len(weights["weight0"]), 8.0 * 2**8)
    for layer in range(len(weights) // 2):
        weight, bias = weights[f"weight{layer}"], weights[f"bias{layer}"]
        assert np.array_equal(weight, np.rint(weight))
        assert np.array_equal(bias, np.rint(bias))
        most = reach @ np.abs(weight) + np.abs(bias)
        assert most.max() < 2**53
        reach = most / 2**12


def test_less_truncation_shows_less_usual_characters():
    spread = [first(truncation=t).extras["latent"][:, :-1].std() for t in (0.5, 1.0)]

    assert spread == pytest.approx([0.5, 1.0], abs=0.03)


def test_contrast_leaves_fewer_pixels_between_black_and_white():
    gray = [((i > 50) & (i < 205)).mean() for i in (first(contrast=c).images for c in (1.0, 3.0))]

    assert gray[1] < 0.6 * gray[0]


def test_the_fingerprint_is_of_the_weights(monkeypatch):
    before = Glyphs().fingerprint()

    monkeypatch.setattr(glyphs, "_digest", lambda: "other weights")

    assert len(before) == 64
    assert Glyphs().fingerprint() != before != Glyphs(truncation=0.5).fingerprint()


@pytest.mark.parametrize("shape", [(28, 28, 3), (32, 32, 1)])
def test_images_of_another_size_are_refused(shape):
    other = Subject(Schema((TEN,), ImageColumn("image", shape, ORIGIN), target="digit"), 0)

    with pytest.raises(ConfigError, match=r"makes images of shape \(28, 28, 1\)"):
        Glyphs().check(other)


def test_candidates_of_another_model_are_refused():
    drawn = build_model("strokes", {}).random(
        Candidates(np.zeros((3, 1), np.int32)), SUBJECT, rng()
    )

    with pytest.raises(ConfigError, match="no latent vectors"):
        Glyphs().vary(drawn, 0.2, SUBJECT, rng())


def test_settings_out_of_range_are_refused():
    for key in ("truncation", "contrast"):
        with pytest.raises(ConfigError, match=f"{key} must lie in"):
            build_model("glyphs", {key: 0.0})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_script_that_trains_it_gives_the_same_weights_again(tmp_path):
    np.savez(tmp_path / "public.npz", images=first(60).images[..., 0])

    def trained(name, seed):
        script = [sys.executable, str(ROOT / "examples" / "glyphs" / "train.py"), "--steps", "20"]
        files = ["--data", str(tmp_path / "public.npz"), "--out", str(tmp_path / name)]
        subprocess.run(
            [*script, *files, "--seed", str(seed)], check=True, capture_output=True, timeout=300
        )
        return load_file(tmp_path / name)

    once, again, other = (trained(f"{i}.safetensors", i // 2) for i in range(3))

    shipped = glyphs._weights()
    assert {n: a.shape for n, a in once.items()} == {n: a.shape for n, a in shipped.items()}
    assert all(np.array_equal(array, again[name]) for name, array in once.items())
    assert not np.array_equal(once["weight0"], other["weight0"])
