# SPDX-License-Identifier: Apache-2.0
"""The code of handwriting: exact in any batch, of its own weights, and of use to a denoiser."""

import hashlib
from pathlib import Path

import numpy as np
from fedsynth.models import handwriting
from fedsynth.models.whole import through
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
# of the weights that examples/omniglot_diffusion/train.py made, with the command in its README
SHIPPED = "66e11c6f15845f1a1639da64901fac4391fa7c9b973d4052f93acc57b6bc6842"


def characters(num=40, seed=0):
    """Crosses and bars."""
    images = np.zeros((num, 28, 28, 1), np.uint8)
    rng = np.random.default_rng(seed)
    for image in images:
        row, column = rng.integers(8, 20, 2)
        image[row - 1 : row + 2, 6:22] = 230
        image[6:22, column - 1 : column + 2] = 230
    return images


def test_the_weights_are_the_ones_that_were_shipped():
    found = hashlib.sha256((ROOT / "models" / "handwriting.safetensors").read_bytes())

    assert found.hexdigest() == SHIPPED
    assert handwriting.digest() == found.digest()


def test_a_characters_numbers_do_not_depend_on_what_stands_beside_it():
    images = characters()

    together = handwriting.encoded(images)

    for part in (slice(0, 1), slice(5, 6), slice(3, 17)):
        assert np.array_equal(handwriting.encoded(images[part]), together[part])


def test_a_character_comes_back_from_its_numbers():
    images = characters()

    back = handwriting.decoded(handwriting.encoded(images) / 256, contrast=2.5)

    assert back.shape == images.shape
    assert np.corrcoef(back.ravel(), images.ravel())[0, 1] > 0.8
    other = handwriting.decoded(handwriting.encoded(images[::-1]) / 256, contrast=2.5)
    assert np.corrcoef(other.ravel(), images.ravel())[0, 1] < 0.8


def test_a_network_of_whole_numbers_is_what_it_was_rounded_from():
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(4, 6)), rng.normal(size=(6, 3))]
    weights = {f"weight{n}": np.rint(matrix * 4096) for n, matrix in enumerate(matrices)}
    weights |= {"bias0": np.zeros(6), "bias1": np.zeros(3)}
    values = rng.normal(size=(10, 4))

    found = through(np.rint(values * 256), weights) / 256

    assert np.abs(found - np.maximum(values @ matrices[0], 0) @ matrices[1]).max() < 0.05


def test_the_file_holds_three_networks_that_fit_each_other():
    arrays = load_file(ROOT / "models" / "handwriting.safetensors")
    size = handwriting.num_latents()

    assert arrays["encoder.weight0"].shape[0] == arrays["decoder.weight2"].shape[1] == 28 * 28
    assert arrays["encoder.weight2"].shape[1] == size
    assert handwriting.between().shape == (size, size)
    assert handwriting.denoiser()["leave.w"].shape[1] == size
