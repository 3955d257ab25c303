# SPDX-License-Identifier: Apache-2.0
"""Fit a graphical model to noisy tables: least squares by accelerated mirror descent."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cliques import Clique, junction_tree
from .graph_model import GraphModel, Table
from .histograms import Measured, total_of
from .propagation import Propagation, expanded, merged

_STEPS = 300
_CLOSE = 1e-4  # a relative fall of the loss over a stretch of steps that counts as none
_STRETCH = 10
_HALVINGS = 60
_GROWTH = 1.2
_ROUNDING = 1e-12  # of the loss; what its floating-point sum may be off by


@dataclass(frozen=True, eq=False)
class _Target:
    """A measured table over sorted columns, in shares of all records."""

    scope: Clique
    groups: tuple[NDArray[np.int64] | None, ...]
    shares: Table
    weight: float


def fit(
    shape: Sequence[int],
    measured: Sequence[Measured],
    *,
    cliques: Iterable[Clique] = (),
    total: float | None = None,
    start: GraphModel | None = None,
    zeros: Sequence[tuple[Clique, NDArray[np.bool_]]] = (),
    max_steps: int = _STEPS,
    tolerance: float = _CLOSE,
) -> GraphModel:
    """The graphical model whose marginals are closest to noisy tables, weighted by their noise.

    Of all distributions that are as close it is the one of greatest entropy: a product of one
    table for each set of columns measured, and for each constraint.

    Args:
      shape: Cells of each column.
      measured: Noisy tables over any columns; grids may merge cells.
      cliques: Sets of columns that a clique of the model shall hold though none is measured.
      total: Number of records, if it is known; `None`: estimated from the tables.
      start: An earlier fit over the same columns to begin from; the model keeps its scopes.
      zeros: What is possible (true) over some columns, from public constraints.
      max_steps: Most steps.
      tolerance: Stop when a stretch of steps lowers the loss by less than this share of it.

    Returns:
      The model; uniform where nothing was measured.

    Reference:
      McKenna, Sheldon, Miklau (2019), "Graphical-model based estimation and inference for
      differential privacy", algorithm 1, https://arxiv.org/abs/1901.09136. A step is as long as
      the descent lemma of Bauschke, Bolte, Teboulle (2017), https://doi.org/10.1287/moor.2016.0817,
      allows; it is taken from a point ahead, and momentum is dropped when the loss rises:
      O'Donoghue, Candes (2015), section 3.2, https://doi.org/10.1007/s10208-013-9150-3.
    """
    shape = tuple(shape)
    total = total_of(measured) if total is None else total
    targets = _targets(measured, total) if total > 0 else []
    scopes = {target.scope for target in targets} | {tuple(sorted(scope)) for scope, _ in zeros}
    scopes |= {(column,) for column in range(len(shape))}
    known = {} if start is None else start.potentials
    scopes |= set(known)
    tree = junction_tree([*scopes, *(tuple(sorted(c)) for c in cliques)], shape)
    work = Propagation(shape, tree, tuple(sorted(scopes)))
    potentials = {scope: np.zeros([shape[c] for c in scope]) for scope in work.scopes}
    for clique, possible in zeros:
        order = tuple(np.argsort(clique))
        potentials[tuple(sorted(clique))] += np.where(possible.transpose(order), 0.0, -np.inf)
    for scope, table in known.items():
        potentials[scope] = potentials[scope] + table
    if not targets:
        return work.calibrated(potentials)[0]
    return _descend(work, targets, potentials, max_steps, tolerance)


def _descend(
    work: Propagation,
    targets: Sequence[_Target],
    potentials: dict[Clique, Table],
    max_steps: int,
    tolerance: float,
) -> GraphModel:
    """Accelerated mirror descent from given potentials."""
    scale = 1.0 / max(target.weight for target in targets)

    def point(at: dict[Clique, Table]) -> _Point:
        model, log_total = work.calibrated(at)
        sums = work.sums(model)
        return _Point(model, log_total, sums, *_loss(targets, sums, scale))

    step, momentum = 1.0, 1.0
    reached, best = potentials, point(potentials)
    ahead, losses = best, [best.loss]
    for _ in range(max_steps):
        origin = ahead.model.potentials
        for _ in range(_HALVINGS):
            tried = {
                scope: table - step * ahead.slopes[scope] if scope in ahead.slopes else table
                for scope, table in origin.items()
            }
            found = point(tried)
            if _is_short(step, ahead, found):
                break
            step /= 2
        else:
            break
        step *= _GROWTH
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        if found.loss > losses[-1]:  # overshot: forget the way here
            momentum, following = 1.0, 1.0
        push = (momentum - 1) / following
        momentum = following
        losses.append(found.loss)
        best = found if found.loss <= best.loss else best
        if _is_flat(losses, tolerance):
            break
        ahead = found
        if push > 0:
            ahead = point(
                {s: table + push * _moved(table, reached[s]) for s, table in tried.items()}
            )
        reached = tried
    return best.model


@dataclass(frozen=True, eq=False)
class _Point:
    """A model on the way, and how it stands to the targets."""

    model: GraphModel
    log_total: float
    sums: dict[Clique, Table]
    loss: float
    slopes: dict[Clique, Table]


def _is_short(step: float, origin: _Point, found: _Point) -> bool:
    """Whether the loss lies above its tangent by no more than the divergence over the step."""
    along = moved = 0.0
    for scope, slope in origin.slopes.items():
        after = float(np.vdot(slope, found.sums[scope]))
        along += after - float(np.vdot(slope, origin.sums[scope]))
        moved -= step * after
    divergence = moved - (found.log_total - origin.log_total)
    return found.loss <= origin.loss + along + divergence / step + _ROUNDING * origin.loss


def _is_flat(losses: Sequence[float], tolerance: float) -> bool:
    """Whether the last stretch of steps lowered the loss by next to nothing."""
    if len(losses) <= _STRETCH:
        return False
    before, after = min(losses[:-_STRETCH]), min(losses[-_STRETCH:])
    return before - after <= tolerance * before


def _moved(after: Table, before: Table) -> Table:
    """`after - before`, zero where a constraint forbids both."""
    gone: Table = np.subtract(after, before, out=np.zeros_like(after), where=after > -np.inf)
    return gone


def _loss(
    targets: Sequence[_Target], sums: dict[Clique, Table], scale: float
) -> tuple[float, dict[Clique, Table]]:
    """Half the weighted squared distance from all targets, and its slope on each scope."""
    loss, slopes = 0.0, dict[Clique, Table]()
    for target in targets:
        gap = merged(sums[target.scope], target.groups) - target.shares
        weight = target.weight * scale
        loss += 0.5 * weight * float(np.vdot(gap, gap))
        slope = expanded(weight * gap, target.groups)
        known = slopes.get(target.scope)
        slopes[target.scope] = slope if known is None else known + slope
    return loss, slopes


def _targets(measured: Sequence[Measured], total: float) -> list[_Target]:
    """Tables over sorted columns in shares, those over the same grids averaged by their noise."""
    pooled: dict[tuple[object, ...], tuple[_Target, Table, float]] = {}
    for table in measured:
        columns = [grid.column for grid in table.grids]
        order = np.argsort(columns)
        groups = tuple(
            None if table.grids[i].is_whole else table.grids[i].groups for i in order.tolist()
        )
        scope = tuple(columns[i] for i in order.tolist())
        shares = table.counts.transpose(order) / total
        weight = (total / table.stddev) ** 2
        key = (scope, tuple(None if g is None else g.tobytes() for g in groups))
        _, sums, weights = pooled.get(key, (None, 0.0, 0.0))
        pooled[key] = (
            _Target(scope, groups, shares, weight),
            sums + weight * shares,
            weights + weight,
        )
    return [
        _Target(target.scope, target.groups, sums / weight, weight)
        for target, sums, weight in pooled.values()
    ]
