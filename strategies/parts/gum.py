# SPDX-License-Identifier: Apache-2.0
"""Edit a table of records until its marginals fit given tables: the gradually updating method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from .histograms import Grid
from .rounding import rounded_cells

_NARROW = 1 << 16  # cell numbers below this sort by radix, twenty times as fast


@dataclass(frozen=True, eq=False)
class Target:
    """A marginal that records are to have.

    Attributes:
      grids: One grid a column.
      probs: Share of the records in each cell, one axis a grid, in their order; none below
        zero, with a sum of one.
      weight: How much of a gap is closed at a time, relative to the heaviest target; > 0.
    """

    grids: tuple[Grid, ...]
    probs: NDArray[np.float64]
    weight: float = 1.0


def gum(
    codes: NDArray[np.int32],
    targets: Sequence[Target],
    rng: np.random.Generator,
    *,
    passes: int = 30,
    step_first: float = 1.0,
    step_last: float = 0.1,
    copy_share: float = 0.5,
) -> NDArray[np.int32]:
    """Records whose marginals come nearer to `targets` than those of `codes`.

    In each pass every target is visited once, in random order. Cells that hold too many records
    give up a part (the step) of the excess; each record given up becomes one of a cell that holds
    too few: either a copy of a whole record of that cell, which keeps what is known of other
    columns, or itself with the target's columns changed, which keeps records varied. The step
    shrinks by a constant factor from pass to pass, so that targets which contradict each other
    end in a compromise.

    Takes time in proportion to records x targets x passes: about 0.5 ms for 50,000 records and
    one target of up to 65,536 cells.

    Args:
      codes: Records to start from, `(num_records, num_columns)`; not changed.
      targets: Marginals to fit, of one column or more each.
      rng: Public randomness; the same gives the same records.
      passes: How often each target is visited; 0 returns the start.
      step_first: Share of an excess that the first pass moves, in (0, 1].
      step_last: The same for the last pass, in (0, 1].
      copy_share: Chance that a record given up becomes a copy, in [0, 1]. With 1 records are
        only ever copied, so that whatever held of every single record still does.

    Returns:
      As `codes`; a new array.

    Raises:
      ConfigError: A setting is out of range, or a target does not fit the records' columns.

    Reference:
      Zhang et al. (2021), "PrivSyn: Differentially Private Data Synthesis", its method GUM,
      https://arxiv.org/abs/2012.15128. Here the records of a target are moved all at once, and
      their number in a cell is rounded without bias, so small gaps close too.
    """
    checked(targets, codes.shape[1])
    if passes < 0:
        raise ConfigError(f"passes must be 0 or more, not {passes!r}")
    if not (0 < step_first <= 1 and 0 < step_last <= 1):
        raise ConfigError(f"steps must lie in (0, 1], not {step_first!r} and {step_last!r}")
    if not 0 <= copy_share <= 1:
        raise ConfigError(f"copy_share must lie in [0, 1], not {copy_share!r}")
    num_records = len(codes)
    columns = np.array(codes.T, dtype=np.int32, order="C")  # a target reads whole columns
    if not num_records or not targets:
        return np.ascontiguousarray(columns.T)
    heaviest = max(target.weight for target in targets)
    for number in range(passes):
        step = step_first * (step_last / step_first) ** (number / max(1, passes - 1))
        for at in rng.permutation(len(targets)).tolist():
            target = targets[at]
            _visit(columns, target, step * target.weight / heaviest, copy_share, rng)
    return np.ascontiguousarray(columns.T)


def cells_in(columns: NDArray[np.int32], grids: Sequence[Grid]) -> NDArray[np.int64]:
    """Cell of each record in the table of `grids`, `(num_records,)`.

    Args:
      columns: Codes column by column, `(num_columns, num_records)`.
      grids: One grid a column of the table.
    """
    cells = np.zeros(columns.shape[1], dtype=np.int64)
    for grid in grids:
        cells *= grid.size
        cells += columns[grid.column] if _is_whole(grid) else grid.groups[columns[grid.column]]
    return cells


def _visit(
    columns: NDArray[np.int32],
    target: Target,
    step: float,
    copy_share: float,
    rng: np.random.Generator,
) -> None:
    """Move part of what is too much in a target's cells to where there is too little, in place."""
    num_records, num_cells = columns.shape[1], target.probs.size
    cells = cells_in(columns, target.grids)
    counts = np.bincount(cells, minlength=num_cells)
    gaps = target.probs.ravel() * num_records - counts
    given = np.floor(step * np.maximum(-gaps, 0.0) + rng.random(num_cells)).astype(np.int64)
    missing = np.maximum(gaps, 0.0)
    num_moved = int(np.minimum(given, counts, out=given).sum())
    if not num_moved or not missing.any():
        return
    # records in order of their cells: a cell's own stand from `starts` on
    order = np.argsort(cells.astype(np.uint16) if num_cells <= _NARROW else cells, kind="stable")
    starts = np.cumsum(counts) - counts
    # a run of each cell's records, from a random one on and around
    shift = np.floor(rng.random(num_cells) * counts).astype(np.int64)
    origin = np.repeat(np.arange(num_cells), given)
    rank = np.arange(num_moved) - np.repeat(np.cumsum(given) - given, given) + shift[origin]
    moved = order[starts[origin] + rank % counts[origin]]
    goal = rng.permutation(rounded_cells(missing, num_moved, rng))

    copied = (counts[goal] > 0) & (rng.random(num_moved) < copy_share)
    there = goal[copied]
    source = order[starts[there] + (rng.random(len(there)) * counts[there]).astype(np.int64)]
    # sources are read before anything is written: one may itself be given up
    columns[:, moved[copied]] = columns[:, source]
    if copy_share < 1:
        _enter(columns, moved[~copied], goal[~copied], target, rng)


def _enter(
    columns: NDArray[np.int32],
    records: NDArray[np.int64],
    goal: NDArray[np.int64],
    target: Target,
    rng: np.random.Generator,
) -> None:
    """Change the target's columns of `records` so that each is in its cell of `goal`, in place."""
    for grid, groups in zip(target.grids, np.unravel_index(goal, target.probs.shape), strict=True):
        column = columns[grid.column]
        # a record that is in its group already stays where it is in there
        entering = grid.groups[column[records]] != groups
        column[records[entering]] = codes_within(grid, groups[entering], column, rng)


def codes_within(
    grid: Grid, groups: NDArray[np.int64], column: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.int32]:
    """A cell of each group, drawn by how often `column` holds the group's cells.

    Args:
      grid: What the column's cells are merged by.
      groups: Groups to draw from, `(num_drawn,)`.
      column: Codes that records have, `(num_records,)`.
      rng: Public randomness.
    """
    if _is_whole(grid):
        return np.asarray(groups, dtype=np.int32)
    common = np.bincount(column, minlength=len(grid.groups)) + 1e-3
    by_group = np.argsort(grid.groups, kind="stable")
    ends = np.concatenate([[0.0], np.cumsum(common[by_group])])
    edges = np.searchsorted(grid.groups[by_group], np.arange(grid.size + 1))
    low, high = ends[edges[groups]], ends[edges[groups + 1]]
    drawn = np.searchsorted(ends, low + (high - low) * rng.random(len(groups)), "right") - 1
    drawn = np.clip(drawn, edges[groups], edges[groups + 1] - 1)  # rounding stays in the group
    return np.asarray(by_group[drawn], dtype=np.int32)


def _is_whole(grid: Grid) -> bool:
    """Whether each cell is the group of its own number."""
    return grid.size == len(grid.groups) and bool((grid.groups == np.arange(grid.size)).all())


def checked(targets: Sequence[Target], num_columns: int) -> None:
    """Refuse targets that records of so many columns cannot have.

    Raises:
      ConfigError: A target is no distribution over cells of some of the columns.
    """
    for target in targets:
        names = [grid.column for grid in target.grids]
        if not (
            target.grids
            and len(set(names)) == len(names)
            and all(0 <= name < num_columns for name in names)
            and target.probs.shape == tuple(grid.size for grid in target.grids)
            and (target.probs >= 0).all()
            and math.isclose(float(target.probs.sum()), 1.0, rel_tol=1e-6)
            and 0 < target.weight < math.inf
        ):
            raise ConfigError(
                f"a target over the columns {names} must hold one probability for each cell of"
                f" its grids, {[grid.size for grid in target.grids]}, none below zero, adding up"
                " to one, and have a weight above zero"
            )
