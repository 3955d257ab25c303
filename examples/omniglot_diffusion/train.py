# SPDX-License-Identifier: Apache-2.0
"""Train the weights that `dp_diffusion` starts from, on public handwriting: ten CPU-minutes.

    python examples/omniglot_diffusion/train.py --data FILE --out models/handwriting.safetensors

The data: `images`, `(num_images, 28, 28)`, uint8, bright strokes on dark ground, and `char_class`,
which character each is. The weights that are shipped were trained on eight alphabets of Omniglot
(Lake et al. 2015, MIT licence, https://github.com/brendenlake/omniglot), with `--seed 0`. One seed
gives the same weights on one machine; on another the last bits of torch's sums may differ.

First an autoencoder, on characters cut, turned, stretched and drawn by pens of any width. Its
encoder and decoder are rounded to whole numbers. Then a denoiser of latent vectors, on characters
drawn much alike: it is told the mean and the covariance of a class of characters, which is all
that is measured of private ones, and learns in what classes differ from a Gaussian.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "glyphs"))
from train import _cross, _moments, _square, augmented

LATENT = 32  # numbers that say an image, before those that say nothing are left out
HIDDEN = 384  # units of the autoencoder's layers
WIDTH = 256  # units of the denoiser's layers
WAVES = 8  # of the noise level, each as a sine and a cosine
BATCH = 256
CLOSENESS = 0.15  # of the posterior to the prior, beside how well an image comes back
POOL = 150_000  # images that the autoencoder is trained on
LEAST_USED = 0.3  # standard deviation of a latent number that says something
WAYS, DRAWS = 24, 2  # distortions of a character, and draws of each of its images in each
HELD_OUT = 20  # one character in so many is kept to tell whether others are learned by heart
MOST_MERGED = 4  # characters that may count as one class
WEIGHT_STEPS, VALUE_STEPS = 1 << 12, 1 << 8  # of one, in the whole numbers that are stored


def main() -> None:
    """Train both networks and save them."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="images and their characters")
    options.add_argument("--out", type=Path, required=True, help="where the weights go")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=10_000, help="of the autoencoder")
    options.add_argument("--denoiser-steps", type=int, default=8000)
    options.add_argument("--autoencoder", type=Path, help="take both its networks from this file")
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    with np.load(args.data, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"].astype(np.float32) / 255)
        _, character = np.unique(arrays["char_class"], return_inverse=True)
    if args.autoencoder is None:
        encoder, decoder = autoencoder(images, args.steps)
        rescale(encoder, decoder, *alike(images, torch.from_numpy(character)))
        networks = {**rounded("encoder", encoder), **rounded("decoder", decoder)}
    else:
        kept = load_file(args.autoencoder).items()
        networks = {n: array for n, array in kept if n.startswith(("encoder.", "decoder."))}
        encoder = restored(networks, "encoder")
    torch.manual_seed(args.seed + 1)
    drawn, classes = alike(images, torch.from_numpy(character), num_ways=WAYS)
    groups = Groups.of(_latents(encoder, drawn), classes.numpy(), np.random.default_rng(args.seed))
    denoiser = trained(groups, args.denoiser_steps)
    arrays = {
        **networks,
        "between": groups.between.astype(np.float32),
        **{f"denoiser.{n}": w.detach().numpy().astype(np.float16) for n, w in denoiser.items()},
    }
    metadata = {
        "what": "autoencoder and denoiser of handwritten characters, 28 x 28",
        "data": "Omniglot, Lake et al. (2015), MIT licence",
        "made_by": f"examples/omniglot_diffusion/train.py --seed {args.seed} --steps {args.steps}",
    }
    save_file(arrays, args.out, metadata)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def autoencoder(images: torch.Tensor, num_steps: int) -> tuple[nn.Sequential, nn.Sequential]:
    """An encoder to means and log variances of latent numbers, and a decoder to logits."""
    pool = torch.cat([_any_character(images) for _ in range(-(-POOL // BATCH))])
    side = images.shape[1] * images.shape[2]
    encoder = _network([side, HIDDEN, HIDDEN, 2 * LATENT])
    decoder = _network([LATENT, HIDDEN, HIDDEN, side])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for step in range(num_steps):
        drawn = pool[torch.randint(len(pool), (BATCH,))].float() / 255
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_variance = encoder(drawn).float().chunk(2, dim=1)
            latent = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
            logits = decoder(latent)
        unlike = functional.binary_cross_entropy_with_logits(logits.float(), drawn, reduction="sum")
        far = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
        loss = (unlike + CLOSENESS * min(1.0, step / (0.2 * num_steps)) * far) / BATCH
        _down(loss, optimizer, schedule)
        if step % 1000 == 0 or step == num_steps - 1:
            print(
                f"step {step}: {unlike.item() / BATCH:.1f} + {far.item() / BATCH:.1f}", flush=True
            )
    return encoder, decoder


def _any_character(images: torch.Tensor) -> torch.Tensor:
    """Characters by chance, varied widely, `(BATCH, pixels)`, in whole shades."""
    chosen = images[torch.randint(len(images), (BATCH,))]
    drawn = augmented(chosen, torch.randn(BATCH, 1))
    return (255 * drawn).round().to(torch.uint8).flatten(1)


def alike(
    images: torch.Tensor, character: torch.Tensor, num_ways: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Characters varied as one writer's hand varies, `(num_drawn, pixels)`, and their classes.

    Each way of turning, mirroring and distorting a character makes another class of it.
    """
    drawn, classes = [], []
    num_classes = int(character.max()) + 1
    for way in range(num_ways):
        turned = images.flip(1) if way & 1 else images
        turned = turned.flip(2) if way & 2 else turned
        turned = turned.transpose(1, 2) if way & 4 else turned
        shape = torch.randn(num_classes, 5) * (way >= 8)  # the same for a whole class
        for _ in range(DRAWS):
            for part, kind in zip(turned.split(BATCH), character.split(BATCH), strict=True):
                drawn.append(_by_hand(part, shape[kind]))
            classes.append(character + way * num_classes)
    return torch.cat(drawn), torch.cat(classes)


def _by_hand(images: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Characters of about one size, a little turned, slanted and moved, by pens of some width.

    Args:
      images: `(num_images, side, side)`, from 0 to 1.
      shape: How each one's class is distorted, standard normal numbers, `(num_images, 5)`.
    """
    num, side = images.shape[:2]
    center, spread = _moments(images, torch.linspace(-1, 1, side))
    size = 0.36 * torch.exp(
        0.08 * torch.randn(num, 1) + 0.06 * torch.randn(num, 2) + 0.2 * shape[:, :2]
    )
    scale = (spread / size).clamp(0.4, 1.6)
    turn = 0.12 * torch.randn(num) + 0.5 * shape[:, 2]
    slant = 0.15 * torch.randn(num) + 0.25 * shape[:, 3]
    turning = torch.stack([turn.cos(), -turn.sin() + slant, turn.sin(), turn.cos()], dim=1)
    matrix = turning.reshape(num, 2, 2) * scale[:, None, :]
    moved = center + 0.03 * torch.randn(num, 2)
    grid = functional.affine_grid(
        torch.cat([matrix, moved[:, :, None]], dim=2), [num, 1, side, side], align_corners=True
    )
    drawn = (1.3 * functional.grid_sample(images[:, None], grid, align_corners=True)).clamp(0, 1)
    wide = 2 * torch.special.ndtr(0.7 * torch.randn(num) + 0.4 * shape[:, 4])[:, None, None, None]
    for widened in (_cross, _square):
        drawn = drawn + wide.clamp(0, 1) * (widened(drawn) - drawn)
        wide = wide - 1
    return ((255 * drawn[:, 0]).round() / 255).flatten(1)


def rescale(
    encoder: nn.Sequential, decoder: nn.Sequential, drawn: torch.Tensor, classes: torch.Tensor
) -> None:
    """Change both networks' latent numbers to ones that vary by one within a character.

    Numbers that the autoencoder makes no use of are left out; the others have mean zero over all
    characters, and within one they are uncorrelated, of variance one.
    """
    last, first = encoder[-1], decoder[0]
    if not (isinstance(last, nn.Linear) and isinstance(first, nn.Linear)):
        raise SystemExit("an autoencoder whose latent numbers are not made by dense layers")
    latent = _latents(encoder, drawn)[:, :LATENT]
    used = latent.std(axis=0) > LEAST_USED
    means, within = _moments_of(latent, classes.numpy())
    center = torch.from_numpy(means.mean(axis=0)).float()
    values, vectors = np.linalg.eigh(within[np.ix_(used, used)])
    into = torch.from_numpy(vectors / np.sqrt(values) @ vectors.T).float()
    back = torch.from_numpy(vectors * np.sqrt(values) @ vectors.T).float()
    kept = torch.from_numpy(used)
    with torch.no_grad():
        first.bias += first.weight @ center
        first.weight = nn.Parameter(first.weight[:, kept] @ back)
        last.bias = nn.Parameter(into @ (last.bias[:LATENT] - center)[kept])
        last.weight = nn.Parameter(into @ last.weight[:LATENT][kept])


def _latents(encoder: nn.Sequential, drawn: torch.Tensor) -> Any:
    """What the encoder says of images, `(num_images, any)`, in numpy's float64."""
    with torch.no_grad():
        return torch.cat([encoder(part) for part in drawn.split(4096)]).double().numpy()


def _moments_of(latent: Any, classes: Any) -> tuple[Any, Any]:
    """Mean of each class, `(num_classes, num_latents)`, and the covariance within them."""
    counts = np.bincount(classes)
    means = np.zeros((len(counts), latent.shape[1]))
    np.add.at(means, classes, latent)
    means /= counts[:, None]
    off = latent - means[classes]
    return means, off.T @ off / len(off)


class Groups:
    """Classes of latent vectors: one character, or a few that are near each other.

    Attributes:
      members: Latent vectors of each class.
      means: Of each class, `(num_classes, num_latents)`.
      covariances: Of each class, drawn a little to that of all.
      trained: Classes that are learned from; of the characters of the others none is.
      held_out: The others.
      between: Covariance of the characters' means.
    """

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)

    @classmethod
    def of(cls, latent: Any, classes: Any, rng: np.random.Generator) -> "Groups":
        """The classes of labeled latent vectors."""
        places, _ = _moments_of(latent, classes)
        order = np.argsort(classes, kind="stable")
        own = np.split(latent[order], np.cumsum(np.bincount(classes))[:-1])
        character = np.arange(len(places)) % (len(places) // WAYS)
        apart = character % HELD_OUT == 0
        members = []
        for place, alone in zip(places, apart, strict=True):
            far = 1e9 * (apart != alone)  # what is held out is merged with what is held out
            near = np.argsort(((places - place) ** 2).sum(axis=1) + far)
            merged = rng.permutation(near[1 : 2 * MOST_MERGED])[: rng.integers(MOST_MERGED)]
            members.append(np.concatenate([own[near[0]], *(own[m] for m in merged)]))
        covariances = [0.9 * np.cov(m.T) + 0.1 * np.eye(latent.shape[1]) for m in members]
        return cls(
            members=[torch.from_numpy(m).float() for m in members],
            means=torch.from_numpy(np.stack([m.mean(axis=0) for m in members])).float(),
            covariances=torch.from_numpy(np.stack(covariances)).float(),
            trained=torch.from_numpy(np.flatnonzero(~apart)),
            held_out=torch.from_numpy(np.flatnonzero(apart)),
            between=np.cov(places.T),
        )

    def batch(
        self, each: int, classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Members of some classes, as each class' means and covariances make them look.

        What is told of a class is a little wrong, as what is measured of private records is.

        Returns:
          Members less their mean and by their root covariance, the mean, that root, and the class.
        """
        num, size = BATCH * 2 // each, self.means.shape[1]
        chosen = classes[torch.randint(len(classes), (num,))]
        picked = torch.stack(
            [self.members[c][torch.randint(len(self.members[c]), (each,))] for c in chosen]
        )
        means = self.means[chosen] + 0.3 * torch.rand(num, 1) * torch.randn(num, size)
        kept = torch.rand(num, 1, 1)
        mixed = kept * self.covariances[chosen]
        wide = 1 + 0.4 * torch.randn(num, 1, 1).clamp(-1, 2)
        mixed = mixed + (1 - kept) * wide * torch.eye(size)
        values, vectors = torch.linalg.eigh(mixed)
        root = vectors * values.sqrt()[:, None, :] @ vectors.transpose(1, 2)
        back = vectors / values.sqrt()[:, None, :] @ vectors.transpose(1, 2)
        unit = torch.bmm(picked - means[:, None, :], back)
        index = torch.arange(num).repeat_interleave(each)
        return unit.flatten(0, 1), means, root, index


def trained(groups: Groups, num_steps: int) -> dict[str, torch.Tensor]:
    """Weights of a denoiser, by their names in `strategies/parts/denoiser.py`."""
    size = groups.means.shape[1]
    shapes = {
        "enter.w": (2 * size + 2 * WAVES, WIDTH),
        "enter.b": (WIDTH,),
        "inner.w": (WIDTH, WIDTH),
        "inner.b": (WIDTH,),
        "leave.w": (WIDTH, size),
        "leave.b": (size,),
    }
    weights = {
        name: torch.randn(shape) / shape[0] ** 0.5
        if name in ("enter.w", "inner.w")
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    total = 0.0
    for step in range(num_steps):
        loss, _ = _lost(weights, groups, groups.trained)
        _down(loss, optimizer, schedule)
        total += loss.item()
        if step % 1000 == 999:
            with torch.no_grad():
                tried = [_lost(weights, groups, groups.held_out) for _ in range(50)]
            lost, gauss = (np.mean([float(t[i]) for t in tried]) for i in (0, 1))
            print(
                f"step {step}: {total / 1000:.4f}; of characters held out {lost:.4f}, their"
                f" Gaussians {gauss:.4f}",
                flush=True,
            )
            total = 0.0
    return weights


def _lost(
    weights: dict[str, torch.Tensor], groups: Groups, classes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on members of classes, and what it would be without a network."""
    unit, means, root, index = groups.batch(16, classes)
    level = torch.exp(1.2 * torch.randn(len(unit), 1) - 0.4)
    noisy = unit + level * torch.randn_like(unit)
    guess = residual(weights, noisy, level, means[index], root[index])
    aim = (unit - noisy / (1 + level**2)) * (1 + level**2).sqrt() / level
    return ((guess - aim) ** 2).mean(), (aim**2).mean()


def residual(
    w: dict[str, torch.Tensor],
    noisy: torch.Tensor,
    level: torch.Tensor,
    means: torch.Tensor,
    root: torch.Tensor,
) -> torch.Tensor:
    """What a class has beyond its Gaussian, as `strategies/parts/denoiser.py` computes it."""
    keep = 1 / (1 + level**2)
    place = means + torch.bmm(root, (keep * noisy)[:, :, None])[:, :, 0]
    angle = torch.log(level) * (np.pi / 8) * torch.arange(1, WAVES + 1)
    seen = torch.cat([noisy * keep.sqrt(), place, torch.sin(angle), torch.cos(angle)], dim=1)
    hidden = functional.silu(seen @ w["enter.w"] + w["enter.b"])
    hidden = hidden + functional.silu(hidden @ w["inner.w"] + w["inner.b"])
    return hidden @ w["leave.w"] + w["leave.b"]


def restored(arrays: dict[str, Any], name: str) -> nn.Sequential:
    """A network from the whole numbers that it was rounded to."""
    weights = [arrays[f"{name}.weight{layer}"] / WEIGHT_STEPS for layer in range(3)]
    biases = [arrays[f"{name}.bias{layer}"] / (WEIGHT_STEPS * VALUE_STEPS) for layer in range(3)]
    network = _network([len(weights[0]), *(len(bias) for bias in biases)])
    dense = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer, weight, bias in zip(dense, weights, biases, strict=True):
        layer.weight = nn.Parameter(torch.from_numpy(weight.T.astype(np.float32)))
        layer.bias = nn.Parameter(torch.from_numpy(bias.astype(np.float32)))
    return network


def _network(sizes: list[int]) -> nn.Sequential:
    """Dense layers with what is below zero cut off between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _down(loss: torch.Tensor, optimizer: Any, schedule: Any) -> None:
    """One step down a loss."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    schedule.step()


def rounded(name: str, network: nn.Sequential) -> dict[str, Any]:
    """A network in whole numbers, by which it is the same on every machine and in any batch."""
    arrays: dict[str, Any] = {}
    dense = [layer for layer in network if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(dense):
        weight = np.ascontiguousarray(layer.weight.detach().numpy().T)
        if np.abs(weight).max() * WEIGHT_STEPS > np.iinfo(np.int16).max:
            raise SystemExit(f"a weight of {np.abs(weight).max():.2f} is too large to be stored")
        arrays[f"{name}.weight{number}"] = np.rint(weight * WEIGHT_STEPS).astype(np.int16)
        bias = layer.bias.detach().numpy() * (WEIGHT_STEPS * VALUE_STEPS)
        arrays[f"{name}.bias{number}"] = np.rint(bias).astype(np.int32)
    return arrays


if __name__ == "__main__":
    main()
