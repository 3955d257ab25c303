# SPDX-License-Identifier: Apache-2.0
"""Which device this process trains on: one setting of a process, never of a strategy."""

from typing import Literal, cast, get_args

from .errors import ConfigError

Device = Literal["cpu", "cuda", "auto"]

_chosen: list[Device] = ["cpu"]


def choose(device: str) -> None:
    """Train on this device from now on, in this process.

    Args:
      device: `cpu`; `cuda`: a GPU, or an error; `auto`: a GPU if there is one.

    Raises:
      ConfigError: It is none of them.
    """
    if device not in get_args(Device):
        raise ConfigError(f"device must be one of {', '.join(get_args(Device))}, not {device!r}")
    _chosen[0] = cast("Device", device)


def chosen() -> Device:
    """The device as it was set; `cpu` if nobody did."""
    return _chosen[0]
