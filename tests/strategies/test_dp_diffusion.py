# SPDX-License-Identifier: Apache-2.0
"""Classes' moments are read from one sum, and users train what a class has beyond its Gaussian."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import clipped_sum
from fedsynth.core.query import NoisySum, Query
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.check import check_strategy, made_up, small_images, small_table
from fedsynth.simulation.direct import direct_run, non_private, prior
from fedsynth.strategies.dp_diffusion import DpDiffusion, _without_noise
from fedsynth.strategies.parts.class_moments import ClassMoments, Measuring, seen_by_class
from fedsynth.strategies.parts.codec import Cosines, Handwriting
from fedsynth.strategies.parts.denoiser import Denoiser, Layout, directions_of, guessed
from fedsynth.strategies.parts.diffusion import Diffusion
from fedsynth.strategies.parts.trainable import RecordShape

torch = pytest.importorskip("torch")

ORIGIN = "public: made up for this test"
LABEL = Column("label", "category", ORIGIN, categories=("0", "1", "2"))
LARGE = Schema((LABEL,), ImageColumn("image", (28, 28, 1), ORIGIN), target="label")
TINY = {"num_rounds": 2, "num_users": 30, "width": 16}
SCRATCH = DpDiffusion(start="scratch", **TINY)


def rng(seed=0):
    return np.random.default_rng(seed)


def drawers(num_users=30, side=8, each=4, seed=1):
    """Users whose records are a bright bar, its place told by the label."""
    source = rng(seed)
    labels = source.integers(0, 3, num_users * each)
    images = source.integers(0, 40, (len(labels), side, side, 1))
    for image, label in zip(images, labels, strict=True):
        start = label * side // 4
        image[:, start : start + side // 4] += 200
    records = Records(labels[:, None].astype(np.int32), images.astype(np.uint8))
    return BoundedShard(records, np.repeat(np.arange(num_users), each), num_users, each)


def denoiser(multiplicity=4, scope="all", seed=0):
    """A denoiser of three classes of small images, with weights that are not zero."""
    codec, layout = Cosines((8, 8, 1)), Layout(64, 3, 16)
    unknown = ClassMoments.unknown(codec, 3)
    told = unknown.inputs()
    source = rng(seed)
    start = {
        name: source.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in layout.shapes.items()
    }
    directions = directions_of(start, unknown, 8, source)
    return Denoiser(
        layout,
        scope,
        multiplicity,
        0,
        codec,
        told["means"],
        told["backs"],
        unknown.roots(),
        start,
        directions,
    )


def gradient(model, records, seed):
    """Gradient of the mean loss of records, as one vector."""
    flat = torch.from_numpy(model.initial(rng())).requires_grad_()
    drawn = [torch.from_numpy(part) for part in model.chance(rng(seed), len(records))]
    losses = model.losses(torch, model.split(flat), model.read(torch, records), tuple(drawn))
    losses.mean().backward()
    return flat.grad.numpy()


@pytest.mark.parametrize("warm_share", [0.0, 1.0])
def test_it_keeps_all_it_owes_without_moments_and_with_them_alone(warm_share):
    findings = check_strategy(replace(SCRATCH, warm_share=warm_share), small_images())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.slow
def test_fine_tuning_keeps_all_it_owes():
    strategy = DpDiffusion(num_rounds=1, num_users=30, local_steps=1)

    findings = check_strategy(strategy, LARGE)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_shares_of_the_budget_add_up_to_what_updates_alone_would_cost():
    costs = [
        accounting.mu_of(replace(SCRATCH, warm_share=share).event(small_images(), 2.0))
        for share in (0.0, 0.3, 1.0)
    ]

    assert np.allclose(costs, np.sqrt(2) / 2.0)


def moments_of(shard, codec, noise=1e-9, source=None):
    """Moments of three classes by two sums of users' vectors, with noise if some is drawn."""
    codes = codec.encoded(shard.records.images)
    labels = shard.records.codes[:, 0].astype(np.int64)
    found = ClassMoments.unknown(codec, 3)
    for asked in (Measuring(3, codec.num_latents), Measuring(3, codec.num_latents, 0.3)):
        rows = asked.rows(shard, codes, labels, found.centers()).astype(np.float64)
        total = rows.sum(axis=0) + (0 if source is None else source.normal(0, noise, asked.dim))
        read = asked.covariances if asked.second_weight else asked.means
        found = read(NoisySum(total, noise, 1), found)
    return found


def test_moments_without_noise_are_those_of_the_records():
    shard, codec = drawers(num_users=200, each=20), Cosines((8, 8, 1))
    codes = codec.encoded(shard.records.images)
    labels = shard.records.codes[:, 0].astype(np.int64)

    found = moments_of(shard, codec)

    mine = codes[labels == 1] / 256
    assert np.allclose(found.means[1], mine.mean(axis=0), atol=1e-3)
    held = np.clip(np.linalg.eigvalsh(np.cov(mine.T, bias=True)), 0.15, 20)
    assert np.allclose(np.linalg.eigvalsh(found.covariances[1]), held, atol=0.01)


def test_a_sum_that_is_but_noise_leaves_what_was_thought_before():
    before = ClassMoments.unknown(Cosines((8, 8, 1)), 3)
    first, second = Measuring(3, 64), Measuring(3, 64, 0.3)

    found = first.means(NoisySum(rng().normal(0, 5.0, first.dim), 5.0, 1), before)
    found = second.covariances(NoisySum(rng(1).normal(0, 5.0, second.dim), 5.0, 1), found)

    assert np.array_equal(found.means, before.means)
    assert np.array_equal(found.covariances, before.covariances)


def test_a_second_look_corrects_a_mean_by_as_much_as_its_noise_allows():
    shard, codec = drawers(num_users=200, each=20), Cosines((8, 8, 1))
    exact, first = moments_of(shard, codec), Measuring(3, 64)
    codes = codec.encoded(shard.records.images)
    labels = shard.records.codes[:, 0].astype(np.int64)
    total = first.rows(shard, codes, labels, 0 * exact.centers()).sum(axis=0)

    def off(moments):
        return np.linalg.norm(moments.means - exact.means)

    once, twice = [], []
    for seed in range(8):
        noisy = NoisySum(total + rng(seed).normal(0, 20.0, first.dim), 20.0, 1)
        once.append(off(first.means(noisy, ClassMoments.unknown(codec, 3))))
        twice.append(off(moments_of(shard, codec, 20.0, rng(seed))))

    assert np.mean(twice) < 0.85 * np.mean(once)


def test_a_class_nobody_has_does_no_harm():
    shard = drawers()
    alone = shard.records.codes[:, 0] != 2
    labels = np.where(alone, shard.records.codes[:, 0], 0)[:, None].astype(np.int32)
    shard = replace(shard, records=replace(shard.records, codes=labels))

    made = direct_run(SCRATCH, small_images(), shard, 0.05, rng=rng()).sample(300, rng())

    assert (made.codes[:, 0] == 2).mean() < 0.05


def test_records_seen_by_their_class_vary_by_one_in_every_direction():
    shard, codec = drawers(num_users=300, each=10), Cosines((8, 8, 1))
    codes, labels = codec.encoded(shard.records.images), shard.records.codes[:, 0].astype(np.int64)
    told = moments_of(shard, codec).inputs()

    unit = seen_by_class(codes, labels, told["means"], told["backs"])

    assert np.abs(unit[labels == 0].mean(axis=0)).max() < 0.1
    assert unit.var(axis=0).max() < 1.1


def test_the_network_that_trains_is_the_network_that_samples():
    model = denoiser()
    source = rng(3)
    labels = np.sort(source.integers(0, 3, 20))
    noisy, level = source.normal(size=(20, 64)).astype(np.float32), 0.7
    means = model.means.astype(np.float32) / 256
    weights = {name: torch.from_numpy(part) for name, part in model.start.items()}

    guess = guessed(model.start, noisy, level, labels, means, model.roots)
    seen = torch.from_numpy(guess), torch.from_numpy(labels)
    noise = ((noisy - guess) / level)[:, None, :]
    drawn = torch.full((20, 1), level), torch.from_numpy(noise)
    losses = model.losses(torch, weights, seen, drawn)

    assert losses.max() < 1e-8  # the guess is its own best record


def test_an_untrained_network_samples_each_class_gaussian():
    layout = Layout(64, 3, 16)
    weights = layout.initial(None, rng())
    roots = np.repeat(0.5 * np.eye(64, dtype=np.float32)[None], 3, axis=0)
    means = np.zeros((3, 64), np.float32)
    means[1] = 2.0
    shares = np.array([0.5, 0.5, 0.0])
    made = Diffusion(small_images(), 0, "scratch", shares, means, roots, 20, weights)

    drawn = made.drawn(np.repeat([0, 1], 2000), rng())

    assert abs(drawn[2000:].mean() - 2.0) < 0.01
    assert abs(drawn[:2000].std() - 0.5) < 0.02  # and a third more would be 0.67


@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_gradient_goes_to_what_is_trained_and_to_nothing_else(scope):
    model = denoiser(scope=scope)

    slope = gradient(model, drawers().records, 0)

    assert model.num_weights == len(slope)
    assert ("enter.w" in model.shapes) == (scope == "all")
    assert ("head" in model.shapes) == (scope == "head")
    assert all(np.abs(part).max() > 0 for part in model.split(slope).values())


def test_multiplicity_lets_gradients_vary_less():
    records = drawers(num_users=2).records
    spread = {}
    for multiplicity in (1, 8):
        model = denoiser(multiplicity=multiplicity)
        slopes = np.stack([gradient(model, records, seed) for seed in range(60)])
        spread[multiplicity] = slopes.var(axis=0).sum()

    assert spread[8] < spread[1] / 5  # eight independent draws would be 8


def test_multiplicity_leaves_the_sensitivity_unchanged():
    schema, shard = small_images(), made_up(small_images(), [3, 1, 2, 5, 1], seed=1)
    bounds = []
    for multiplicity in (1, 8):
        strategy = replace(SCRATCH, multiplicity=multiplicity, warm_share=0.0, clip=1e-3)
        query = next(strategy.rounds(schema, 1.0, rng()))
        one = shard.only(np.arange(5) == 0)
        vector = clipped_sum(strategy.answer(query, one, rng()), query, num_users=1)
        bounds.append((query.clip, query.noise_multiplier, query.dim))
        unit = 2.0 ** (np.frexp(query.clip)[1] - 23)
        assert np.linalg.norm(vector * unit) <= query.clip

    assert bounds[0] == bounds[1]


def test_a_users_row_is_the_same_to_the_last_bit_whoever_stands_beside():
    schema, shard = small_images(), made_up(small_images(), [1, 4, 2, 7, 1, 3, 2], seed=2)
    for number, strategy in enumerate((SCRATCH, replace(SCRATCH, warm_share=0.0))):
        query = next(strategy.rounds(schema, 1.0, rng()))
        together = strategy.answer(query, shard, rng(number)).dense

        for user in range(shard.num_users):
            one = shard.only(np.arange(shard.num_users) == user)
            alone = strategy.answer(query, one, rng(number)).dense
            assert np.array_equal(alone[0], together[user])


def test_it_learns_what_it_was_shown():
    shard = drawers(num_users=200, each=8)
    strategy = replace(SCRATCH, num_users=200)

    made = non_private(strategy, small_images(), shard, rng()).sample(300, rng())

    where = made.images[..., 0].astype(float).sum(axis=1).reshape(300, 4, 2).sum(axis=2)
    assert (where[:, :3].argmax(axis=1) == made.codes[:, 0]).mean() > 0.9
    unknown = prior(strategy, small_images(), 1.0, rng()).sample(300, rng())
    blind = unknown.images[..., 0].astype(float).sum(axis=1).reshape(300, 4, 2).sum(axis=2)
    assert (blind[:, :3].argmax(axis=1) == unknown.codes[:, 0]).mean() < 0.6


def test_a_saved_diffusion_samples_the_same_records_without_torch():
    shard = drawers()
    made = non_private(SCRATCH, small_images(), shard, rng())

    again = Diffusion.restore(small_images(), made.settings(), made.tensors())

    first, second = made.sample(40, rng(5)), again.sample(40, rng(5))
    assert np.array_equal(first.images, second.images)
    code = "import sys, fedsynth.strategies.parts.diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"means": np.zeros((3, 63), np.float32)},
        {"denoiser.enter.w": np.full((144, 16), np.nan, np.float32)},
        {"shares": np.array([0.5, 0.6, 0.2])},
    ],
    ids=["shape", "nan", "shares"],
)
def test_a_saved_diffusion_that_was_tampered_with_is_refused(change):
    made = non_private(SCRATCH, small_images(), drawers(), rng())

    with pytest.raises(ConfigError, match=r"saved (diffusion|generator)"):
        Diffusion.restore(small_images(), made.settings(), made.tensors() | change)


@pytest.mark.parametrize(
    ("settings", "schema", "why"),
    [
        ({}, small_table(), "no image column"),
        ({}, small_images(), "images of shape"),
        ({"label": ""}, LARGE, "leave them out"),
    ],
    ids=["table", "size", "columns"],
)
def test_a_schema_it_cannot_make_is_refused_before_anybody_is_asked(settings, schema, why):
    with pytest.raises(ConfigError, match=why):
        DpDiffusion(**settings).event(schema, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"warm_share": 1.1},
        {"warm_share": -0.1},
        {"multiplicity": 0},
        {"width": 0},
        {"num_sampling_steps": 1},
        {"start": "nowhere"},
        {"scope": "tail"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DpDiffusion(**settings)


@pytest.mark.parametrize("gone", ["label", "digest", "means", "backs", "roots", "weights"])
def test_a_request_that_lacks_a_part_is_refused(gone):
    strategy = replace(SCRATCH, warm_share=0.0)
    query = next(strategy.rounds(small_images(), 1.0, rng()))
    inputs = {name: part for name, part in query.inputs.items() if name != gone}

    with pytest.raises(ConfigError, match=r"request|server|weights"):
        strategy.answer(replace(query, inputs=inputs), drawers(), rng())


@pytest.mark.parametrize(("name", "value"), [("means", 1 << 30), ("backs", -(1 << 30))])
def test_moments_by_which_sums_would_be_rounded_are_refused(name, value):
    """Else a record's last bits would hang on how many stand beside it."""
    strategy = replace(SCRATCH, warm_share=0.0)
    query = next(strategy.rounds(small_images(), 1.0, rng()))
    inputs = {**query.inputs, name: np.full_like(query.inputs[name], value)}

    with pytest.raises(ConfigError, match=f"request's {name} are beyond"):
        strategy.answer(replace(query, inputs=inputs), drawers(), rng())


def test_a_request_with_more_classes_than_a_denoiser_holds_is_refused_before_one_is_made():
    shape = RecordShape((1 << 26,), (1, 1, 1))

    with pytest.raises(ConfigError, match="more classes"):
        SCRATCH._layout(Cosines((1, 1, 1)), shape, 0)


def test_other_public_weights_at_the_server_are_refused():
    strategy = DpDiffusion(num_users=30)
    query = next(strategy.rounds(LARGE, 1.0, rng()))
    other = {**query.inputs, "digest": np.zeros(32, np.uint8)}

    with pytest.raises(ConfigError, match="same version"):
        strategy.answer(replace(query, inputs=other), drawers(side=28), rng())


def test_an_image_has_the_same_numbers_whatever_stands_beside_it():
    images = rng().integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)
    for codec in (Handwriting(), Cosines((28, 28, 1))):
        together = codec.encoded(images)

        assert np.array_equal(together[7:8], codec.encoded(images[7:8]))
        assert np.array_equal(together[3:20], codec.encoded(images[3:20]))


def test_an_image_comes_back_from_its_numbers():
    bars = drawers(side=28).records.images
    for codec, most in ((Handwriting(), 0.4), (Cosines((28, 28, 1)), 0.5)):
        back = codec.decoded((codec.encoded(bars) / 256).astype(np.float32))
        gap = (back.astype(float) - bars).var() / bars.var()

        assert gap < most


def test_an_update_is_drawn_towards_nothing_by_what_noise_explains():
    noise = rng().normal(0, 2.0, 4000)

    clear = _without_noise(NoisySum(noise + 20.0, 2.0, 1), 4000)
    lost = _without_noise(NoisySum(noise + 0.02, 2.0, 1), 4000)

    assert abs(clear.vector.mean() - 20.0) < 0.5
    assert np.abs(lost.vector).max() < 0.2 * np.abs(noise).max()


def test_a_query_names_its_rounds():
    steps = SCRATCH.rounds(small_images(), 1.0, rng())
    asked = [next(steps)]
    try:
        while True:
            asked.append(steps.send(NoisySum.void(asked[-1])))
    except StopIteration as end:
        made = end.value

    assert [query.name for query in asked] == ["means", "covariances", "update", "update"]
    assert isinstance(asked[0], Query)
    assert len(made.sample(5, rng())) == 5
