# SPDX-License-Identifier: Apache-2.0
"""Models that mix records, remember or draw by themselves are refused; sound ones are not."""

import numpy as np
import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.core.records import BoundedShard
from fedsynth.simulation.check import made_up, small_images
from fedsynth.strategies.parts.autoencoder import Net
from fedsynth.strategies.parts.example_training import downhill
from fedsynth.strategies.parts.local_training import LocalTraining, updates
from fedsynth.strategies.parts.module import ModuleTrainable
from fedsynth.strategies.parts.trainable import Made, RecordShape
from fedsynth.strategies.parts.unfit import refuse_unfit

torch = pytest.importorskip("torch")
nn, fn = torch.nn, torch.nn.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning"),
]
MADE = Made(RecordShape((3,), (8, 8, 1)))
HEAD = (nn.Flatten, lambda: nn.Linear(64, 3))
CONVOLUTION = (lambda: nn.Conv2d(1, 4, 3, padding=1), nn.Flatten, lambda: nn.Linear(256, 3))


def cross_entropy(module, pixels, codes):
    return fn.cross_entropy(module(pixels), codes[:, 0], reduction="none")


def model_of(*layers, loss=cross_entropy, **more):
    """A sequence of layers with a loss; it samples nothing."""
    return ModuleTrainable(
        lambda: nn.Sequential(*(make() for make in layers)), loss, synthesizer=None, **more
    )


class Centered(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        return x


class LastOfSequence(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


def normed(kind):
    return model_of(CONVOLUTION[0], kind, *CONVOLUTION[1:])


def over_pairs(module, pixels, codes):
    out = module(pixels)
    return (out[:, None] - out[None]).square().sum((1, 2))


def packed(torch_, records):
    half = len(records) // 2
    return torch_.zeros((half, 64)), torch_.zeros((half, 1), dtype=torch_.int64)


def padded_to_longest(torch_, records):
    width = int(records.codes.max()) + 1
    return torch_.ones((len(records), width)), torch_.from_numpy(records.codes.astype(np.int64))


def of_width(module, rows, codes):
    return module(rows[:, :1].expand(-1, 64)).sum(1)


SOUND = {
    "linear": lambda: model_of(*HEAD),
    "convolution": lambda: model_of(*CONVOLUTION),
    "group norm": lambda: normed(lambda: nn.GroupNorm(2, 4)),
    "instance norm": lambda: normed(lambda: nn.InstanceNorm2d(4)),
    "dropout that is off": lambda: model_of(HEAD[0], lambda: nn.Dropout(0.0), HEAD[1]),
    "autoencoder": lambda: Net("mlp", (3,), (8, 8, 1), 8, 2),
}
UNFIT = {
    "batch norm": (lambda: normed(lambda: nn.BatchNorm2d(4)), "GroupNorm"),
    "frozen batch norm": (lambda: normed(lambda: nn.BatchNorm2d(4).eval()), "GroupNorm"),
    "running statistics": (
        lambda: normed(lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
        "track_running_stats=False",
    ),
    "batch mean of its own": (lambda: model_of(HEAD[0], Centered, HEAD[1]), "another record"),
    "loss over pairs": (lambda: model_of(*HEAD, loss=over_pairs), "another record"),
    "one loss for all": (
        lambda: model_of(*HEAD, loss=lambda m, x, c: cross_entropy(m, x, c).mean()),
        "one a record",
    ),
    "buffer that changes": (lambda: model_of(Counting, *HEAD), "buffers change"),
    "spectral norm": (
        lambda: model_of(
            HEAD[0], lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(64, 3))
        ),
        "buffers change",
    ),
    "dropout": (lambda: model_of(HEAD[0], nn.Dropout, HEAD[1]), "dropout off"),
    "packed records": (lambda: model_of(*HEAD, read=packed), "Packed"),
    "padding to the longest": (
        lambda: model_of(HEAD[1], loss=of_width, read=padded_to_longest),
        "fixed length",
    ),
    "double precision": (
        lambda: model_of(HEAD[0], lambda: nn.Linear(64, 3).double()),
        "float32",
    ),
}


@pytest.mark.parametrize("level", ["user", "example"])
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_passes(name, level):
    refuse_unfit(SOUND[name](), MADE, level=level)


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_model_is_refused_and_told_what_to_do(name):
    build, advice = UNFIT[name]

    with pytest.raises(ConfigError, match=advice):
        refuse_unfit(build(), MADE)


def test_a_recurrent_layer_is_fit_for_users_and_refused_for_examples_with_its_replacement():
    rows = (lambda: nn.Flatten(1, 2), lambda: nn.LSTM(8, 3, batch_first=True), LastOfSequence)
    model = model_of(*rows)

    refuse_unfit(model, MADE, level="user")
    with pytest.raises(ConfigError, match=r"opacus\.layers\.DPLSTM"):
        refuse_unfit(model, MADE, level="example")


def test_building_a_module_leaves_torchs_generator_alone_and_draws_by_the_seed():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = model_of(*HEAD)

    one, same, other = (model.initial(np.random.default_rng(seed)) for seed in (0, 0, 1))

    assert (one == same).all()
    assert (one != other).any()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_saved_vector_is_the_modules_weights_again():
    model = model_of(*CONVOLUTION)
    weights = np.random.default_rng(0).normal(size=model.num_weights).astype(np.float32)

    assert (model.weights_of(model.with_weights(weights)) == weights).all()


@pytest.fixture
def records():
    schema = small_images()
    return BoundedShard(made_up(schema, [1] * 70, 1).records, np.arange(70), 70, 1)


@pytest.mark.parametrize("name", ["linear", "convolution", "group norm"])
def test_a_records_gradient_is_that_of_plain_differentiation_and_the_same_bits_anywhere(
    name, records
):
    model = SOUND[name]()
    weights = model.initial(np.random.default_rng(0))
    order = np.random.default_rng(3).permutation(70)
    mixed = BoundedShard(records.records.take(order), np.arange(70), 70, 1)

    rows = downhill(model, weights, records, made=MADE, seed=5)

    plain = updates(model, weights, records, LocalTraining(1, 1.0, None, "loop"), made=MADE, seed=5)
    alone = [
        downhill(model, weights, records.only(np.arange(70) == one), made=MADE, seed=5)[0]
        for one in (0, 41)
    ]
    assert np.abs(rows).max() > 0.01
    np.testing.assert_allclose(rows, plain, atol=1e-5)
    assert (downhill(model, weights, mixed, made=MADE, seed=5) == rows[order]).all()
    assert (np.array(alone) == rows[[0, 41]]).all()


def test_clipped_gradients_are_those_of_opacus_own_optimizer(records):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, clip = SOUND["convolution"](), 0.7
    weights = model.initial(np.random.default_rng(0))
    hooked = GradSampleModule(model.with_weights(weights), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=clip,
        expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    pixels, codes = model.read(torch, records.records)
    cross_entropy(hooked, pixels, codes).sum().backward()
    optimizer.clip_and_accumulate()
    theirs = torch.cat([part.summed_grad.flatten() for part in hooked.parameters()]).numpy()

    rows = -downhill(model, weights, records, made=MADE, seed=5).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    ours = (rows * np.minimum(1, clip / norms)[:, None]).sum(axis=0)

    assert (norms > clip).any()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_record_without_a_loss_leaves_the_others_as_they_were(records):
    def bad(module, pixels, codes):
        lost = cross_entropy(module, pixels, codes)
        return torch.where(pixels.mean((1, 2, 3)) > 0.999, torch.nan, lost)

    records.records.images[7] = 255
    model = model_of(*HEAD, loss=bad)
    weights = model.initial(np.random.default_rng(0))
    others = np.arange(70) != 7

    rows = downhill(model, weights, records, made=MADE, seed=5)

    sound = downhill(model, weights, records.only(others), made=MADE, seed=5)
    assert (rows[others] == sound).all()
