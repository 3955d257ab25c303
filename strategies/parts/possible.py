# SPDX-License-Identifier: Apache-2.0
"""What a schema's constraints leave possible, over the groups of cells of a graphical model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...core.schema import Schema
from .cliques import Clique, tree_cells
from .histograms import Grid

Possible = tuple[Clique, NDArray[np.bool_]]
"""Some columns and which combinations of their groups can be, one axis a column, in their order."""


def possible_groups(schema: Schema, grids: Sequence[Grid]) -> list[Possible]:
    """The constraints over groups of cells, as `descent.fit` takes them.

    A combination of groups is possible if one of its cells' combinations is.

    Args:
      schema: Public schema.
      grids: Groups of each column's cells, in the order of the columns.
    """
    return [
        (clique, _merged(mask, [grids[column] for column in clique]))
        for clique, mask in schema.rules.zeros()
    ]


def that_fit(
    possible: Sequence[Possible], shape: Sequence[int], max_cells: float
) -> list[Possible]:
    """The constraints that forbid something and that a model can hold together, the first first.

    Args:
      possible: What is possible.
      shape: Groups of each column.
      max_cells: Most cells of a model of these constraints alone.
    """
    held: list[Possible] = []
    for clique, mask in possible:
        cliques = [*(known for known, _ in held), clique]
        if not mask.all() and tree_cells(cliques, shape) <= max_cells:
            held.append((clique, mask))
    return held


def _merged(mask: NDArray[np.bool_], grids: Sequence[Grid]) -> NDArray[np.bool_]:
    """Which groups of cells hold a combination that can be."""
    for axis, grid in enumerate(grids):
        if grid.is_whole:
            continue
        front = np.moveaxis(mask, axis, 0)
        merged = np.zeros((grid.size, *front.shape[1:]), dtype=np.bool_)
        np.logical_or.at(merged, grid.groups, front)
        mask = np.moveaxis(merged, 0, axis)
    return mask
