# SPDX-License-Identifier: Apache-2.0
"""Diffusion models by diffusers: a small real network, trained here, saved, loaded and run."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from fedsynth.core.candidates import Candidates
from fedsynth.core.errors import ConfigError
from fedsynth.core.generation import Subject
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.models.diffuser import Diffuser

pytestmark = pytest.mark.skipif(
    find_spec("diffusers") is None or find_spec("torch") is None,
    reason="diffusers and torch are not installed",
)
ORIGIN = "public: made up for this test"
SHADE = Column("shade", "category", ORIGIN, categories=("dark", "light"))
LEVELS = (40, 215)  # of the two kinds of images


def subject(shape=(8, 8, 1), column=SHADE):
    return Subject(Schema((column,), ImageColumn("image", shape, ORIGIN), target="shade"), 0)


def blank(num=24):
    return Candidates((np.arange(num) % 2).astype(np.int32)[:, None])


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Diffusers logs to the error stream only what matters."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline that learned to make flat images, dark ones and light ones, by their class."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=2,
    )
    schedule = DDPMScheduler(num_train_timesteps=100, beta_end=0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    for _ in range(150):
        kind = torch.randint(2, (32,))
        images = (torch.tensor(LEVELS)[kind] / 127.5 - 1)[:, None, None, None].expand(32, 1, 8, 8)
        noise, times = torch.randn(32, 1, 8, 8), torch.randint(100, (32,))
        guess = network(schedule.add_noise(images, noise, times), times, class_labels=kind).sample
        loss = ((guess - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    where = tmp_path_factory.mktemp("pipeline")
    DDPMPipeline(network, schedule).save_pretrained(where)
    return where


def level(candidates):
    return candidates.images.reshape(len(candidates), -1).mean(axis=1)


def test_noise_becomes_what_the_network_learned_of_each_label(folder):
    made = Diffuser(str(folder)).random(blank(), subject(), rng())

    made.check(subject().schema)
    dark, light = (level(made)[made.codes[:, 0] == code] for code in (0, 1))
    assert light.mean() - dark.mean() > 60  # of 175; without the labels, nothing


def test_an_image_varies_as_far_as_it_is_asked_to(folder):
    model, start = Diffuser(str(folder)), np.full((24, 8, 8, 1), 128, np.uint8)
    gray = Candidates(blank().codes, start)

    none, near, far = (model.vary(gray, degree, subject(), rng(1)) for degree in (0.0, 0.3, 1.0))

    assert none.images.tobytes() == start.tobytes()
    apart = [np.abs(varied.images.astype(int) - 128).mean() for varied in (near, far)]
    assert 3 < apart[0] < 0.7 * apart[1]


def test_one_seed_gives_one_image_on_one_machine(folder):
    first, again, other = (
        Diffuser(str(folder), num_steps=5).random(blank(), subject(), rng(seed)).images.tobytes()
        for seed in (0, 0, 1)
    )

    assert first == again != other
    assert not Diffuser(str(folder)).capabilities().is_exact


def test_the_fingerprint_is_of_files_and_settings(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    schedule = other / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.2}))

    prints = [
        model.fingerprint()
        for model in (Diffuser(str(folder)), Diffuser(str(folder), 5), Diffuser(str(other)))
    ]

    assert prints[0] == Diffuser(str(folder)).fingerprint()
    assert len(set(prints)) == 3


def test_other_images_and_other_labels_than_the_networks_are_refused(folder):
    three = Column("shade", "category", ORIGIN, categories=("dark", "light", "gray"))

    with pytest.raises(ConfigError, match=r"of shape \(8, 8, 1\), and the schema's are of"):
        Diffuser(str(folder)).random(blank(), subject((8, 9, 1)), rng())
    with pytest.raises(ConfigError, match="knows 2 classes, and the label has 3 cells"):
        Diffuser(str(folder)).random(blank(), subject(column=three), rng())


def test_weights_that_are_not_safetensors_are_not_read(folder, tmp_path):
    import torch

    other = shutil.copytree(folder, tmp_path / "other")
    (other / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, other / "unet" / "diffusion_pytorch_model.bin")

    with pytest.raises(ConfigError, match="Weights in other files are not read"):
        Diffuser(str(other)).random(blank(), subject(), rng())


@pytest.mark.parametrize("content", [b"", b"not safetensors", (2).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_cut_or_another_networks_are_refused(folder, tmp_path, content):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)

    with pytest.raises(ConfigError, match="cannot load"):
        Diffuser(str(other)).random(blank(), subject(), rng())


def test_a_model_that_is_not_there_is_missed_before_a_run(tmp_path):
    with pytest.raises(ConfigError, match="needs path"):
        Diffuser().check(subject())
    with pytest.raises(ConfigError, match="nowhere"):
        Diffuser(str(tmp_path / "nowhere")).check(subject())
    with pytest.raises(ConfigError, match="nowhere"):
        Diffuser(str(tmp_path / "nowhere")).random(blank(), subject(), rng())
    with pytest.raises(ConfigError, match="num_steps must be 1 to 1000"):
        Diffuser("x", num_steps=0)
