# SPDX-License-Identifier: Apache-2.0
"""Save tables that records are to fit as plain arrays, and read them back with checks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.schema import Schema
from .gum import Target, checked
from .histograms import Grid

ARRAYS = ("grid_columns", "grid_groups", "members", "tables")


def arrays_of(targets: Sequence[Target]) -> dict[str, NDArray[Any]]:
    """The grids, which of them make each table, and the tables, each laid end to end."""
    grids = list({id(g): g for target in targets for g in target.grids}.values())
    place = {id(g): i for i, g in enumerate(grids)}
    ways = max((len(target.grids) for target in targets), default=2)
    members = [[place[id(g)] for g in t.grids] + [-1] * (ways - len(t.grids)) for t in targets]
    none = np.zeros(0)
    return {
        "grid_columns": np.array([g.column for g in grids], dtype=np.int32),
        "grid_groups": np.concatenate([*(g.groups for g in grids), none]).astype(np.int32),
        "members": np.array(members, dtype=np.int32).reshape(-1, ways),
        "tables": np.concatenate([*(t.probs.ravel() for t in targets), none]),
    }


def targets_of(schema: Schema, tensors: Mapping[str, NDArray[Any]]) -> tuple[Target, ...]:
    """Saved targets, after checks.

    Raises:
      ConfigError: The arrays are not those of targets over this schema's columns.
    """
    columns = tensors["grid_columns"].astype(np.int64)
    groups = tensors["grid_groups"].astype(np.int64)
    members = tensors["members"].astype(np.int64)
    tables = tensors["tables"].astype(np.float64)
    if not (
        columns.ndim == groups.ndim == tables.ndim == 1
        and members.ndim == 2
        and ((columns >= 0) & (columns < len(schema.columns))).all()
        and ((members >= -1) & (members < len(columns))).all()
        and len(groups) == sum(schema.shape[i] for i in columns.tolist())
    ):
        raise ConfigError("a saved synthesizer whose arrays contradict each other")
    ends = np.cumsum([schema.shape[i] for i in columns.tolist()], dtype=np.int64)
    grids = []
    for column, own in zip(columns.tolist(), np.split(groups, ends)[:-1], strict=True):
        present = np.unique(own)
        if not np.array_equal(present, np.arange(len(present))):
            raise ConfigError("a saved synthesizer with a grid that leaves groups out")
        grids.append(Grid(column, own))
    targets, start = [], 0
    for member in members.tolist():
        own_grids = tuple(grids[i] for i in member if i >= 0)
        shape = [grid.size for grid in own_grids]
        end = start + math.prod(shape)
        if end > len(tables) or not own_grids:
            raise ConfigError("a saved synthesizer with fewer numbers than its tables need")
        targets.append(Target(own_grids, tables[start:end].reshape(shape)))
        start = end
    if start != len(tables):
        raise ConfigError("a saved synthesizer with more numbers than its tables need")
    checked(targets, len(schema.columns))
    return tuple(targets)
