# SPDX-License-Identifier: Apache-2.0
"""Local steps of several users at once, whose weights differ by few outer products.

The slope of a matrix that records go through is a sum of outer products: of what went in and of
the slope of what came out. So the common matrix is multiplied once for all users, what a user's
own steps changed is added by products of the user's records with each other, and no user's weights
are written out before the end. That is several times less work than weights of each user's own.

Known are matrices that records go through as rows (`linear`, `addmm`, `@`) and biases added to
such rows. A model that does anything else with a weight cannot be trained so: `TypeError`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .trainable import Trainable

APART = 1e-4  # of the largest change, by which two ways of computing changes may differ


class FactoredSteps:
    """Gradient steps of a chunk of users from common weights."""

    def __init__(
        self, torch: Any, model: Trainable, weights: NDArray[np.float32], lr: float, device: Any
    ) -> None:
        self.torch, self.model, self.device = torch, model, device
        self.weights, self.lr = weights, lr
        self._start = model.split(torch.from_numpy(np.array(weights, dtype=np.float32)).to(device))

    def __call__(
        self,
        batches: Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]],
        share: Any,
        out: Mapping[str, Any],
    ) -> None:
        """Write each user's change of each weight into `out`, `(num_users, *shape)`.

        Args:
          batches: Records and chance of each step, `(num_users, num_records, ...)`.
          share: Weight of each record in the loss, `(num_users, num_records)`.
          out: Tensors by name; what is in them is not looked at.

        Raises:
          TypeError: The model does with a weight what is not known here.
        """
        anchor = self.torch.zeros((), device=self.device, requires_grad=True)
        weights = {
            name: Factored(self.torch, part, share.shape, self.lr, anchor)
            for name, part in self._start.items()
        }
        for seen, chance in batches:
            own, drawn = (tuple(part.flatten(0, 1) for part in parts) for parts in (seen, chance))
            losses = self.model.losses(self.torch, weights, own, drawn)
            (losses * share.flatten()).sum().backward()
            for weight in weights.values():
                weight.end_step()
        for name, weight in weights.items():
            weight.write(out[name])


class Factored:
    """A matrix or a bias of each user: the common one, and what the user's own records changed.

    It stands where a model expects a tensor; torch hands it what the model does with it.
    """

    def __init__(
        self, torch: Any, start: Any, records: tuple[int, int], lr: float, anchor: Any
    ) -> None:
        self.torch, self.start, self.records, self.lr = torch, start, records, lr
        self.anchor = anchor  # asks for gradients, so that each product is asked for its own
        self.is_turned: bool | None = None  # whether rows are outputs, as modules have them
        # what went in, `(num_users, n, inputs)`, and the slopes of what came out,
        # `(num_users, n, outputs)`; of a bias the sum of these, `(num_users, outputs)`
        self.past: tuple[Any, Any] | None = None
        self._new: list[tuple[Any, Any]] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        import torch

        known = _known(torch).get(function)
        return NotImplemented if known is None or kwargs else known(*args)

    def keep(self, inputs: Any, slopes: Any) -> None:
        """Note what a step says of the weight."""
        self._new.append((inputs, slopes))

    def end_step(self) -> None:
        """Go on with what was noted."""
        for inputs, slopes in self._new:
            if self.past is None:
                self.past = inputs, slopes
            elif inputs is None:
                self.past = None, self.past[1] + slopes
            else:
                known = zip(self.past, (inputs, slopes), strict=True)
                self.past = tuple(self.torch.cat(parts, 1) for parts in known)
        self._new.clear()

    def write(self, out: Any) -> None:
        """Put each user's change, by all steps, into `out`, `(num_users, *shape)`."""
        if self.past is None:
            out.zero_()
            return
        inputs, slopes = self.past
        if inputs is None:
            self.torch.mul(slopes, -self.lr, out=out)
            return
        first, second = (slopes, inputs) if self.is_turned else (inputs, slopes)
        out.baddbmm_(first.transpose(1, 2), second, beta=0, alpha=-self.lr)


@lru_cache(maxsize=1)
def _known(torch: Any) -> Mapping[Any, Callable[..., Any]]:
    """What a model may do with a weight, by torch's functions."""

    class Product(torch.autograd.Function):  # type: ignore[misc]
        """Rows of each user through the user's own matrix."""

        @staticmethod
        def forward(context: Any, rows: Any, weight: Factored, matrix: Any, _: Any) -> Any:
            context.rows, context.weight, context.matrix = rows, weight, matrix
            through = rows @ matrix
            if weight.past is not None:
                inputs, slopes = weight.past
                own = _by_user(rows, weight)
                like = torch.bmm(own, inputs.transpose(1, 2))
                _by_user(through, weight).baddbmm_(like, slopes, alpha=-weight.lr)
            return through

        @staticmethod
        def backward(context: Any, slope: Any) -> tuple[Any, ...]:
            rows, weight, matrix = context.rows, context.weight, context.matrix
            slope = slope.contiguous()
            own = _by_user(slope, weight)
            weight.keep(_by_user(rows.detach(), weight), own)
            if not context.needs_input_grad[0]:
                return None, None, None, None
            back = slope @ matrix.t()
            if weight.past is not None:
                inputs, slopes = weight.past
                like = torch.bmm(own, slopes.transpose(1, 2))
                _by_user(back, weight).baddbmm_(like, inputs, alpha=-weight.lr)
            return back, None, None, None

    class Shift(torch.autograd.Function):  # type: ignore[misc]
        """Rows of each user with the user's own bias."""

        @staticmethod
        def forward(context: Any, rows: Any, weight: Factored, _: Any) -> Any:
            context.weight = weight
            if weight.past is None:
                return rows + weight.start
            own = weight.start - weight.lr * weight.past[1]
            return (_by_user(rows, weight) + own[:, None]).view_as(rows)

        @staticmethod
        def backward(context: Any, slope: Any) -> tuple[Any, ...]:
            weight = context.weight
            weight.keep(None, _by_user(slope.contiguous(), weight).sum(1))
            return slope, None, None

    def product(rows: Any, weight: Any, *, is_turned: bool = False) -> Any:
        if (
            not isinstance(weight, Factored)
            or isinstance(rows, Factored)
            or weight.start.dim() != 2
        ):
            raise TypeError("a weight that is no matrix which records go through")
        if weight.is_turned not in (None, is_turned):
            raise TypeError("a matrix that records go through both ways")
        weight.is_turned = is_turned
        matrix = weight.start.t() if is_turned else weight.start
        return Product.apply(_rows(rows, weight), weight, matrix, weight.anchor)

    def shifted(rows: Any, bias: Any) -> Any:
        if isinstance(rows, Factored):
            rows, bias = bias, rows
        if not isinstance(bias, Factored):
            return rows + bias
        if isinstance(rows, Factored) or bias.start.shape != rows.shape[1:]:
            raise TypeError("a weight that is no bias of records")
        return Shift.apply(_rows(rows, bias), bias, bias.anchor)

    def linear(rows: Any, weight: Any, bias: Any = None) -> Any:
        through = product(rows, weight, is_turned=True)
        return through if bias is None else shifted(through, bias)

    return {
        torch.nn.functional.linear: linear,
        torch.addmm: lambda bias, rows, weight: shifted(product(rows, weight), bias),
        torch.mm: product,
        torch.matmul: product,
        torch.Tensor.mm: product,
        torch.Tensor.matmul: product,
        torch.Tensor.__matmul__: product,
        torch.add: shifted,
        torch.Tensor.add: shifted,
        torch.Tensor.__add__: shifted,
        torch.Tensor.__radd__: shifted,
    }


def _rows(rows: Any, weight: Factored) -> Any:
    """One row a record, in memory of their own order."""
    if rows.dim() != 2 or len(rows) != weight.records[0] * weight.records[1]:
        raise TypeError("a weight that is used otherwise than on one row of each record")
    return rows.contiguous()


def _by_user(rows: Any, weight: Factored) -> Any:
    """Rows as `(num_users, num_records, size)`."""
    return rows.view(*weight.records, rows.shape[1])
