# SPDX-License-Identifier: Apache-2.0
"""Diffusion models of images in a local folder, run by Hugging Face diffusers: noise, and back."""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Subject
from .one_core import one_core
from .variation import Capabilities, VariationModel, image_shape

_PACKAGES = ("diffusers", "torch")
_NEEDED = (
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)
_BATCH = 16


@dataclass(frozen=True)
class Diffuser(VariationModel):
    """A denoising diffusion model of pixels: what `DDPMPipeline.save_pretrained` writes.

    A first candidate is denoised from noise alone. Varying by a degree d adds noise up to the
    d-th part of the way there, and denoises from then on: 1 forgets the image, 0 leaves it. Steps
    are those of DDIM, without noise of their own. A network with classes is told each candidate's
    label, of which it must know as many.

    Nothing is fetched from a network, no code of the folder is run, and weights are taken from
    safetensors alone. Tried on small networks of this kind that tests build and train, with and
    without classes, on the processor. Not tried on published weights, for none comes as a
    package; latent diffusion, which has an autoencoder, and prompts are not supported.

    Attributes:
      path: A folder with `unet/`, a `UNet2DModel`, and `scheduler/`, its noise schedule. Read at
        the server only: a client or a replay opens no file that settings name.
      num_steps: Of denoising, from noise alone; a variation takes its degree's part of them.

    Reference:
      Song, Meng and Ermon (2021), "Denoising Diffusion Implicit Models",
      https://arxiv.org/abs/2010.02502; Meng et al. (2022), "SDEdit: Guided Image Synthesis and
      Editing with Stochastic Differential Equations", https://arxiv.org/abs/2108.01073, for
      variations.
    """

    path: str = ""
    num_steps: int = 25
    name: ClassVar[str] = "diffuser"

    def __post_init__(self) -> None:
        """Refuse numbers of steps that no schedule has."""
        if not 1 <= self.num_steps <= 1000:
            raise ConfigError(f"num_steps must be 1 to 1000, not {self.num_steps!r}")

    def check(self, subject: Subject) -> None:
        """Refuse a schema without images and a folder without a model; reads none of it.

        Raises:
          ConfigError: There is no image column, or a file of the model is missing.
        """
        super().check(subject)
        if not self.path:
            raise ConfigError("model 'diffuser' needs path, the folder of a diffusion model")
        for name in _NEEDED:
            _file(self.path, name)

    def capabilities(self) -> Capabilities:
        """Images, in this process; another processor may round in another way."""
        return Capabilities("image", is_exact=False)

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """An image each, from noise alone.

        Raises:
          ConfigError: A package or the folder is missing, or makes no such images.
        """
        start = np.zeros((len(blank), *image_shape(subject.schema)), dtype=np.uint8)
        return self._denoised(replace(blank, images=start), 1.0, subject, rng)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """The images with noise added to them, and taken off again.

        Raises:
          ConfigError: A package or the folder is missing, or makes no such images.
        """
        return self._denoised(candidates, degree, subject, rng)

    def fingerprint(self) -> str:
        """SHA-256 of the files, the settings and the versions of what runs them.

        Raises:
          ConfigError: The folder is missing.
        """
        files = [hashlib.sha256(_file(self.path, f).read_bytes()).hexdigest() for f in _NEEDED]
        packages = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
        facts = json.dumps([self.name, self.num_steps, files, packages])
        return hashlib.sha256(facts.encode()).hexdigest()

    def _denoised(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Candidates taken part of the way to noise, and back."""
        self.check(subject)
        with one_core(self.name) as torch:
            network, schedule = _loaded(self.path)
            _check_fits(network.config, subject, self.path)
            is_labelled = bool(network.config.num_class_embeds)
            schedule.set_timesteps(min(self.num_steps, schedule.config.num_train_timesteps))
            times = schedule.timesteps[round(len(schedule.timesteps) * (1 - degree)) :]
            images = np.empty_like(_images(candidates))
            for start in range(0, len(candidates), _BATCH):
                part = candidates.take(slice(start, start + _BATCH))
                pixels = torch.from_numpy(_images(part)).permute(0, 3, 1, 2).float() / 127.5 - 1
                noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
                if len(times):
                    pixels = noise if degree == 1 else schedule.add_noise(pixels, noise, times[:1])
                codes = torch.from_numpy(part.codes[:, subject.label].astype(np.int64))
                for time in times:
                    told = {"class_labels": codes} if is_labelled else {}
                    guess = network(pixels, time, **told).sample
                    pixels = schedule.step(guess, time, pixels).prev_sample
                levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                images[start : start + _BATCH] = levels.permute(0, 2, 3, 1).numpy()
        return replace(candidates, images=images)


def _images(candidates: Candidates) -> NDArray[np.uint8]:
    """The candidates' images."""
    if candidates.images is None:
        raise ConfigError("these candidates have no images, so that none can be varied")
    return candidates.images


def _check_fits(config: Any, subject: Subject, path: str) -> None:
    """Refuse a network of other images or classes than the schema's.

    Raises:
      ConfigError: It is one.
    """
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    made = (height, width, config.in_channels)
    if (shape := image_shape(subject.schema)) != made or config.out_channels != config.in_channels:
        raise ConfigError(
            f"the diffusion model in {path} makes images of shape {made}, and the schema's are of"
            f" {shape}; take one that was trained on such images"
        )
    column = None if subject.label < 0 else subject.schema.columns[subject.label]
    num_labels = 0 if column is None else column.num_cells
    if config.num_class_embeds and config.num_class_embeds != num_labels:
        raise ConfigError(
            f"the diffusion model in {path} knows {config.num_class_embeds} classes, and the"
            f" label has {num_labels} cells; they must be the same, in the same order"
        )


@lru_cache(maxsize=1)
def _loaded(path: str) -> tuple[Any, Any]:
    """Network and noise schedule; the last ones are kept.

    Raises:
      ConfigError: A package is missing, or the folder holds no such model.
    """
    try:
        import diffusers
        from safetensors import SafetensorError
    except ImportError as error:
        raise ConfigError(
            "model 'diffuser' needs diffusers and torch: pip install 'fedsynth[diffusers]'"
        ) from error
    for name in _NEEDED:
        _file(path, name)
    kinds: Any = diffusers
    here = {"local_files_only": True}
    try:
        network, found = kinds.UNet2DModel.from_pretrained(
            path,
            subfolder="unet",
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            **here,
        )
        schedule = kinds.DDIMScheduler.from_pretrained(path, subfolder="scheduler", **here)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model 'diffuser' cannot load {path} as a diffusion model of pixels:"
            f" {type(error).__name__}: {error}"
        ) from error
    if lost := found["missing_keys"]:  # diffusers fills them with noise, and goes on
        raise ConfigError(
            f"model 'diffuser' cannot load {path}: its weights lack {len(lost)} tensors of its"
            f" network, {lost[0]} among them"
        )
    return network.eval(), schedule


def _file(path: str, name: str) -> Path:
    """A file of the folder.

    Raises:
      ConfigError: It is not there.
    """
    file = Path(path) / name
    if not file.is_file():
        raise ConfigError(
            f"model 'diffuser' needs {file}: a folder as DDPMPipeline.save_pretrained writes it,"
            " with safetensors. Weights in other files are not read, for reading them can run code"
        )
    return file
