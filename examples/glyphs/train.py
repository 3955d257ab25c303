# SPDX-License-Identifier: Apache-2.0
"""Train the weights of model `glyphs` on public handwriting: a conditional VAE, five CPU-minutes.

    python examples/glyphs/train.py --data omniglot_small_28.npz --out models/glyphs.safetensors

The data: `images`, `(num_images, 28, 28)`, uint8, bright strokes on dark ground. The weights that
are shipped were trained on eight alphabets of Omniglot (Lake et al. 2015, MIT licence,
https://github.com/brendenlake/omniglot), with `--seed 0`. One seed gives the same weights on one
machine; on another the last bits of torch's sums may differ.

Each image that is learned from is a character cut by a line, turned, slanted, stretched and moved,
drawn by a pen of some width. The width is the condition: encoder and decoder are told it, so that
the latent vector says the shape alone.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

LATENT = 20  # numbers that say a shape
HIDDEN = 512
BATCH = 256
CLOSENESS = 0.6  # of the posterior to the prior, beside how well an image comes back
WEIGHT_STEPS, VALUE_STEPS = 1 << 12, 1 << 8  # of one, in the whole numbers that are stored


def main() -> None:
    """Train, round to whole numbers, and save."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="an npz file with `images`")
    options.add_argument("--out", type=Path, required=True, help="where the weights go")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=6000)
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    with np.load(args.data, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"].astype(np.float32) / 255)
    decoder = trained(images, args.steps)
    metadata = {
        "what": "decoder of a conditional VAE of handwritten characters, 28 x 28",
        "data": "Omniglot, Lake et al. (2015), MIT licence",
        "made_by": f"examples/glyphs/train.py --seed {args.seed} --steps {args.steps}",
    }
    save_file(rounded(decoder), args.out, metadata)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def trained(images: torch.Tensor, num_steps: int) -> nn.Sequential:
    """A decoder from shape and pen, `(num_images, LATENT + 1)`, to logits of pixels."""
    side = images.shape[1]
    encoder = _network([side**2 + 1, HIDDEN, HIDDEN, 2 * LATENT])
    decoder = _network([LATENT + 1, HIDDEN, HIDDEN, side**2])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for step in range(num_steps):
        chosen = torch.randint(len(images), (BATCH,))
        pen = torch.randn(BATCH, 1)
        drawn = augmented(images[chosen], pen).reshape(BATCH, -1)
        mean, log_variance = encoder(torch.cat([drawn, pen], dim=1)).chunk(2, dim=1)
        latent = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        logits = decoder(torch.cat([latent, pen], dim=1))
        unlike = functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
        far = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
        warmth = min(1.0, step / (0.2 * num_steps))
        loss = (unlike + CLOSENESS * warmth * far) / BATCH
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == num_steps - 1:
            print(f"step {step}: {unlike.item() / BATCH:.1f} + {far.item() / BATCH:.1f} nats")
    return decoder


def augmented(images: torch.Tensor, pen: torch.Tensor) -> torch.Tensor:
    """Characters cut, turned, slanted, stretched, moved, and drawn by pens of some width.

    Args:
      images: `(num_images, side, side)`, from 0 to 1.
      pen: Width of each pen as a standard normal number, `(num_images, 1)`.
    """
    num, side = images.shape[:2]
    images = _flipped(images)
    at = torch.linspace(-1, 1, side)
    normal = torch.nn.functional.normalize(torch.randn(num, 2), dim=1)
    place = normal[:, :1, None] * at[:, None] + normal[:, 1:, None] * at[None, :]
    cut = torch.rand(num, 1, 1) < 0.5  # half of the characters lose what lies behind a line
    images = images * (1 - (cut & (place > torch.rand(num, 1, 1) * 0.8 - 0.2)).float())
    center, spread = _moments(images, at)
    size = 0.36 * torch.exp(0.2 * torch.randn(num, 1) + 0.15 * torch.randn(num, 2))
    scale = (spread / size).clamp(0.4, 1.6)
    turn, slant = 0.25 * torch.randn(2, num)
    turning = torch.stack([turn.cos(), -turn.sin() + slant, turn.sin(), turn.cos()], dim=1)
    matrix = turning.reshape(num, 2, 2) * scale[:, None, :]
    moved = center + 0.06 * torch.randn(num, 2)
    grid = functional.affine_grid(
        torch.cat([matrix, moved[:, :, None]], dim=2), [num, 1, side, side], align_corners=True
    )
    drawn = functional.grid_sample(images[:, None], grid, align_corners=True)
    drawn = (1.3 * drawn).clamp(0, 1)
    wide = 2 * torch.special.ndtr(pen)[:, :, None, None]  # from 0 to 2 pixels more on each side
    for widened in (_cross, _square):
        drawn = drawn + wide.clamp(0, 1) * (widened(drawn) - drawn)
        wide = wide - 1
    return drawn[:, 0]


def _cross(images: torch.Tensor) -> torch.Tensor:
    """The brightest of each pixel and the four beside it."""
    across = functional.max_pool2d(images, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(across, functional.max_pool2d(images, (3, 1), stride=1, padding=(1, 0)))


def _square(images: torch.Tensor) -> torch.Tensor:
    """The brightest of each pixel and the eight around it."""
    return functional.max_pool2d(images, 3, stride=1, padding=1)


def _flipped(images: torch.Tensor) -> torch.Tensor:
    """Images turned by quarters and mirrored: other characters, of the same strokes."""
    kind = torch.randint(4, (len(images), 1, 1))
    images = torch.where(kind % 2 == 1, images.flip(1), images)
    return torch.where(kind // 2 == 1, images.flip(2), images)


def _moments(images: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Center of each image's ink, `(num_images, 2)`, and how far it spreads, `(num_images, 1)`."""
    ink = images.sum(dim=(1, 2)).clamp(min=1e-3)[:, None]
    shares = [images.sum(dim=1) / ink, images.sum(dim=2) / ink]  # of columns, of rows
    center = torch.stack([(share * at).sum(dim=1) for share in shares], dim=1)
    squared = [
        (share * (at - middle[:, None]) ** 2).sum(dim=1)
        for share, middle in zip(shares, center.T, strict=True)
    ]
    return center, (sum(squared) / 2).clamp(min=1e-3).sqrt()[:, None]  # type: ignore[union-attr]


def _network(sizes: Sequence[int]) -> nn.Sequential:
    """Dense layers with what is below zero cut off between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rounded(decoder: nn.Sequential) -> dict[str, Any]:
    """The decoder in whole numbers, by which it is the same on every machine."""
    arrays: dict[str, Any] = {}
    dense = [layer for layer in decoder if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(dense):
        weight = np.ascontiguousarray(layer.weight.detach().numpy().T)
        if np.abs(weight).max() * WEIGHT_STEPS > np.iinfo(np.int16).max:
            raise SystemExit(f"a weight of {np.abs(weight).max():.2f} is too large to be stored")
        arrays[f"weight{number}"] = np.rint(weight * WEIGHT_STEPS).astype(np.int16)
        bias = layer.bias.detach().numpy() * (WEIGHT_STEPS * VALUE_STEPS)
        arrays[f"bias{number}"] = np.rint(bias).astype(np.int32)
    return arrays


if __name__ == "__main__":
    main()
