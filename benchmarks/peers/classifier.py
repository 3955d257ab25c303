# SPDX-License-Identifier: Apache-2.0
"""The classifiers of writers' digits that training is timed with, as plain torch modules.

Needs torch alone and nothing of fedsynth: every peer trains this very module.
"""

import torch
from torch import nn

SIDE, LABELS = 28, 10


class Cnn(nn.Module):
    """Two convolutions and two dense layers; 215,370 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.enter = nn.Linear(32 * (SIDE // 4) ** 2, 128)
        self.leave = nn.Linear(128, LABELS)

    def forward(self, images):
        """Logits of images `(num_records, 1, 28, 28)`."""
        grid = nn.functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        grid = nn.functional.max_pool2d(torch.relu(self.conv2(grid)), 2)
        return self.leave(torch.relu(self.enter(grid.flatten(1))))


class Mlp(nn.Module):
    """Two dense layers; 99,385 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(SIDE * SIDE, 125)
        self.leave = nn.Linear(125, LABELS)

    def forward(self, images):
        """Logits of images `(num_records, 1, 28, 28)`."""
        return self.leave(torch.relu(self.enter(images.flatten(1))))


def module(form, flat):
    """A module by its name, with weights in the order of its parameters.

    Args:
      form: `cnn` or `mlp`.
      flat: All weights one after the other, float32.
    """
    made = Cnn() if form == "cnn" else Mlp()
    nn.utils.vector_to_parameters(torch.as_tensor(flat), made.parameters())
    return made


def loss(made, images, labels):
    """Cross-entropy, a mean over records."""
    return nn.functional.cross_entropy(made(images), labels)
