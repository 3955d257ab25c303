# SPDX-License-Identifier: Apache-2.0
"""Where this process trains: on its processor, or on a GPU; one setting for all strategies."""

from typing import Any

from ...core.devices import choose, chosen
from ...core.errors import ConfigError


def device_for(torch: Any) -> Any:
    """The torch device that this process was told to train on.

    Raises:
      ConfigError: It was told to take a GPU, and there is none.
    """
    wanted = chosen()
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise ConfigError(
            "device = 'cuda', but torch sees no GPU in this process. Install a torch that does,"
            " or set device = 'auto' or 'cpu'"
        )
    return torch.device("cpu")


def take_device(device: str) -> None:
    """Train on this device from now on, in this process.

    Raises:
      ConfigError: It is none, or it is a GPU and there is none.
    """
    choose(device)
    if device != "cuda":
        return
    try:
        import torch
    except ImportError as error:
        raise ConfigError("device = 'cuda' needs torch: pip install 'fedsynth[train]'") from error
    device_for(torch)
