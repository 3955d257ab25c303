# SPDX-License-Identifier: Apache-2.0
"""Refuse models that no promise holds for: those that mix records, remember, or draw by themselves.

A record's loss must hang on that record, the weights and public randomness. It is tried on made-up
records before anything is spent: what a model is called, or which layers it has, proves nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ...core.errors import ConfigError
from ...core.records import Records
from .local_training import one_thread, torch_for_training
from .module import ModuleTrainable
from .trainable import Made, RecordShape, Trainable
from .verdicts import Verdicts

_TRIALS, _RECORDS = 2, 4
_MIXES = (
    "the loss of one record changes with another record, so no clip bounds what one user moves."
    " Layers that mix records, as batch normalization, must go (torch.nn.GroupNorm and LayerNorm"
    " do not mix them), and so must losses over pairs of a batch or packed sequences"
)
_REPLACED = {
    "LSTM": "opacus.layers.DPLSTM",
    "GRU": "opacus.layers.DPGRU",
    "RNN": "opacus.layers.DPRNN",
    "MultiheadAttention": "opacus.layers.DPMultiheadAttention",
}
_fit: Verdicts[None] = Verdicts()


def refuse_unfit(
    model: Trainable, made: Made, *, level: Literal["user", "example"] = "user"
) -> None:
    """Refuse a model that training by clipped sums cannot bound.

    Args:
      model: The model.
      made: What it was made of.
      level: `example`: it must also be one whose records' gradients Opacus can tell apart.

    Raises:
      ConfigError: It is unfit; the text says why, and what to take instead.
    """
    _fit.of(made, (level,), lambda: _refuse(model, made.shape, level))


def _refuse(model: Trainable, shape: RecordShape, level: str) -> None:
    """`refuse_unfit`, by trying."""
    if isinstance(model, ModuleTrainable):
        _refuse_layers(model.module, level)
    torch = torch_for_training()
    with one_thread(torch):
        before = torch.random.get_rng_state()
        try:
            _try(torch, model, shape)
        finally:
            torch.random.set_rng_state(before)


def _refuse_layers(module: Any, level: str) -> None:
    """Refuse layers that are known to mix records, or that Opacus does not know."""
    torch = torch_for_training()
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        where = f"{kind} {name!r}" if name else kind
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{where}: batch normalization makes each record's loss depend on the others, and"
                " its running statistics would leave without a clip. Take torch.nn.GroupNorm"
            )
        if getattr(layer, "track_running_stats", False):
            raise ConfigError(
                f"{where} keeps running statistics of records; make it with"
                " track_running_stats=False"
            )
        if level == "example" and kind in _REPLACED and _is_torchs(layer):
            raise ConfigError(
                f"{where}: Opacus cannot tell records' gradients apart in it. Take"
                f" {_REPLACED[kind]}, or level = 'user'"
            )
    if level == "example":
        _ask_opacus(module)


def _ask_opacus(module: Any) -> None:
    """Refuse what Opacus' own validator refuses.

    Raises:
      ConfigError: It does, or Opacus is not installed.
    """
    try:
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ConfigError(
            "level = 'example' of a module needs Opacus: pip install 'fedsynth[train]'"
        ) from error
    modes = [(layer, layer.training) for layer in module.modules()]
    module.train()  # Opacus refuses any other, and it is no matter here
    try:
        errors = ModuleValidator.validate(module, strict=False)
    finally:
        for layer, mode in modes:
            layer.training = mode
    if errors:
        raise ConfigError(f"Opacus refuses the model: {'; '.join(map(str, errors))}")


def _is_torchs(layer: Any) -> bool:
    """Whether a layer is torch's own and not one of the same name."""
    return type(layer).__module__.startswith("torch.")


def _try(torch: Any, model: Trainable, shape: RecordShape) -> None:
    """Refuse a model by what it does with made-up records."""
    rng = np.random.default_rng(0)
    for trial in range(_TRIALS):
        records = shape.made_up(rng, _RECORDS)
        other = _with(records, 1, shape.made_up(rng, _RECORDS))
        flat = model.initial(rng) + rng.normal(0, 0.02, model.num_weights).astype(np.float32)
        if not trial:
            _refuse_reading(torch, model, records)
        seen, else_seen = model.read(torch, records), model.read(torch, other)
        drawn = tuple(
            torch.from_numpy(np.ascontiguousarray(part))
            for part in model.chance(np.random.default_rng(trial), len(records))
        )
        weights = _weights(torch, model, flat)
        constants = _constants(model)
        losses = _losses(torch, model, weights, seen, drawn)
        again = _losses(torch, model, weights, seen, drawn)
        if any(not torch.equal(part, constants[name]) for name, part in _buffers(model)):
            raise ConfigError(
                "the model's buffers change when it is run: they would carry records from user to"
                " user, or leave without a clip. Compute them from the weights, or leave them as"
                " they are"
            )
        if not torch.equal(losses, again):
            raise ConfigError(
                "the model's losses differ when they are asked for again: it draws or remembers by"
                " itself. Turn dropout off (p = 0, or build() returning module.eval()), and take"
                " randomness from `chance` alone"
            )
        moved = _losses(torch, model, weights, else_seen, drawn)
        still = torch.arange(len(records)) != 1
        if not torch.equal(losses[still], moved[still]):
            raise ConfigError(_MIXES)
        _refuse_flow(torch, model, weights, seen, drawn)
        single = _losses(torch, model, weights, _first(seen), _first(drawn))
        if not torch.allclose(losses[:1], single, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ConfigError(_MIXES)


def _refuse_reading(torch: Any, model: Trainable, records: Records) -> None:
    """Refuse a model that reads records by what others stand beside, or several as one row."""
    together = model.read(torch, records)
    if any(len(part) != len(records) for part in together):
        raise ConfigError(
            f"the model reads {len(records)} records as {[len(part) for part in together]} rows: a"
            " row must be one record. Packed sequences hold several records, which no clip would"
            " bound one by one; pad each to a fixed length instead"
        )
    for number in range(len(records)):
        alone = model.read(torch, records.take(slice(number, number + 1)))
        for part, whole in zip(alone, together, strict=True):
            if part.dtype != whole.dtype or not torch.equal(part[0], whole[number]):
                raise ConfigError(
                    "the model reads a record otherwise when others stand beside it, as padding to"
                    " the longest of a batch does; pad to a fixed length"
                )


def _refuse_flow(
    torch: Any,
    model: Trainable,
    weights: Mapping[str, Any],
    seen: tuple[Any, ...],
    drawn: tuple[Any, ...],
) -> None:
    """Refuse a model in which a record's loss has a gradient in another record's numbers."""
    leaves = [
        part.detach().clone().requires_grad_() if part.is_floating_point() else part
        for part in seen
    ]
    floats = [part for part in leaves if part.is_floating_point()]
    if not floats:
        return
    losses = model.losses(torch, weights, tuple(leaves), drawn)
    for number in range(len(losses)):
        slopes = torch.autograd.grad(
            losses[number], floats, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        others = torch.arange(len(losses)) != number
        if any(bool((slope[others] != 0).any()) for slope in slopes):
            raise ConfigError(_MIXES)


def _losses(
    torch: Any,
    model: Trainable,
    weights: Mapping[str, Any],
    seen: tuple[Any, ...],
    drawn: tuple[Any, ...],
) -> Any:
    """Losses that are what they should be in shape and kind."""
    num_records = len(seen[0])
    losses = model.losses(torch, weights, seen, drawn)
    if tuple(losses.shape) != (num_records,) or not losses.is_floating_point():
        raise ConfigError(
            f"losses of {num_records} records must be {num_records} numbers, one a record, not"
            f" {losses.dtype} of shape {tuple(losses.shape)}; take reduction='none', and a mean"
            " over each record's own values"
        )
    if losses.grad_fn is None:
        raise ConfigError("the model's losses do not hang on its weights: nothing can be learned")
    return losses.detach()


def _weights(torch: Any, model: Trainable, flat: Any) -> dict[str, Any]:
    """Weights that ask for gradients."""
    return {
        name: torch.from_numpy(np.array(part)).requires_grad_()
        for name, part in model.split(flat).items()
    }


def _buffers(model: Trainable) -> list[tuple[str, Any]]:
    """A module's constants."""
    if not isinstance(model, ModuleTrainable):
        return []
    frozen = [(n, p) for n, p in model.module.named_parameters() if not p.requires_grad]
    return [*frozen, *model.module.named_buffers()]


def _constants(model: Trainable) -> dict[str, Any]:
    """Copies of a module's constants."""
    return {name: part.detach().clone() for name, part in _buffers(model)}


def _first(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first record's part of each tensor."""
    return tuple(part[:1] for part in parts)


def _with(records: Records, place: int, others: Records) -> Records:
    """Records of which one is another's."""
    before, after = records.take(slice(0, place)), records.take(slice(place + 1, None))
    return Records.joined([before, others.take(slice(place, place + 1)), after])
