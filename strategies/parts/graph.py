# SPDX-License-Identifier: Apache-2.0
"""Sample records from a graphical model, and mend what it could not hold of other tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from .cliques import JunctionTree
from .graph_model import GraphModel
from .gum import Target
from .histograms import Grid
from .refine import refined
from .rounding import spread
from .targets import ARRAYS, arrays_of, targets_of

MAX_REFINEMENTS = 10_000
_ARRAYS = ("beliefs", "groups", "columns")
_SETTINGS = {"cliques", "parents", "refinements"}


@dataclass(frozen=True)
class Graph(Synthesizer):
    """A graphical model over groups of cells; inside a group each column stands alone.

    Tables that the model has no room for are fit by its records: those sampled are changed, no
    more than that takes, until they fit these too. It takes time in proportion to records x
    tables.

    Attributes:
      schema: Schema of the records.
      model: Distribution of the columns' groups; it also gives exact marginals.
      grids: Groups of each column's cells.
      columns: Probabilities of each column's cells; only their ratios inside a group count.
      targets: Tables that records are to fit besides the model's, and the model's own that this
        must not spoil.
      refinements: Passes of `refine.refined` over the records.
    """

    schema: Schema
    model: GraphModel
    grids: tuple[Grid, ...]
    columns: tuple[NDArray[np.float64], ...]
    targets: tuple[Target, ...] = ()
    refinements: int = 0
    kind: ClassVar[str] = "graph"

    @staticmethod
    def whole(schema: Schema, model: GraphModel) -> "Graph":
        """A model over the cells themselves."""
        grids = tuple(Grid.each(schema.shape))
        return Graph(schema, model, grids, tuple(np.full(c, 1.0 / c) for c in schema.shape))

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records by ancestral sampling, with the least variance at each step."""
        codes = self.model.sample(num_records, rng)
        for grid, probs in zip(self.grids, self.columns, strict=True):
            if not grid.is_whole:
                inside = np.zeros((grid.size, len(probs)))
                inside[grid.groups, np.arange(len(probs))] = probs
                codes[:, grid.column] = spread(codes[:, grid.column].astype(np.int64), inside, rng)
        if self.targets and self.refinements:
            allowed = self.schema.rules.zeros()
            codes = refined(codes, self.targets, rng, allowed=allowed, passes=self.refinements)
        return Records(codes)

    def settings(self) -> dict[str, Any]:
        """The cliques and the parent of each, and how much records are refined."""
        tree = self.model.tree
        return {
            "cliques": [list(c) for c in tree.cliques],
            "parents": list(tree.parents),
            "refinements": self.refinements,
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Beliefs, groups, columns' probabilities and targets, each laid end to end."""
        return {
            **arrays_of(self.targets),
            "beliefs": np.concatenate([belief.ravel() for belief in self.model.beliefs]),
            "groups": np.concatenate([grid.groups for grid in self.grids]).astype(np.int32),
            "columns": np.concatenate(self.columns),
        }

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: What was saved is not a `Graph` of this schema.
        """
        if set(tensors) != {*_ARRAYS, *ARRAYS} or set(settings) != _SETTINGS:
            raise ConfigError(
                f"a saved graph holds {', '.join([*_ARRAYS, *ARRAYS])} and the settings"
                f" {', '.join(sorted(_SETTINGS))}"
            )
        refinements = settings["refinements"]
        if not (isinstance(refinements, int) and 0 <= refinements <= MAX_REFINEMENTS):
            raise ConfigError("a saved graph whose refinements are not a small whole number")
        ends = schema.offsets[1:-1]
        if not len(tensors["groups"]) == len(tensors["columns"]) == schema.num_cells:
            raise ConfigError("a saved graph whose columns are not those of the schema")
        groups = np.split(tensors["groups"].astype(np.int64), ends)
        columns = np.split(tensors["columns"].astype(np.float64), ends)
        for group, probs in zip(groups, columns, strict=True):
            if not (
                np.array_equal(np.unique(group), np.arange(group.max() + 1))
                and np.isfinite(probs).all()
                and (probs >= 0).all()
                and (np.bincount(group, probs) > 0).all()
            ):
                raise ConfigError("a saved graph whose groups or probabilities are impossible")
        grids = tuple(Grid(i, group) for i, group in enumerate(groups))
        shape = tuple(grid.size for grid in grids)
        tree = _checked_tree(settings["cliques"], settings["parents"], len(shape))
        sizes = [math.prod(shape[c] for c in clique) for clique in tree.cliques]
        flat = tensors["beliefs"].astype(np.float64)
        if len(flat) != sum(sizes) or not (np.isfinite(flat).all() and (flat >= 0).all()):
            raise ConfigError("a saved graph whose beliefs are not those of its cliques")
        beliefs = tuple(
            part.reshape([shape[c] for c in clique])
            for part, clique in zip(
                np.split(flat, np.cumsum(sizes)[:-1]), tree.cliques, strict=True
            )
        )
        if any(abs(float(belief.sum()) - 1) > 1e-6 for belief in beliefs):
            raise ConfigError("a saved graph whose beliefs do not add up to one")
        targets = targets_of(schema, tensors)
        model = GraphModel(shape, tree, beliefs)
        return cls(schema, model, grids, tuple(columns), targets, refinements)


def _checked_tree(cliques: Any, parents: Any, num_columns: int) -> JunctionTree:
    """A junction tree over all columns from plain JSON data."""

    def whole(values: Any, low: int, high: int) -> bool:
        return isinstance(values, Sequence) and all(
            isinstance(v, int) and low <= v < high for v in values
        )

    if not (
        isinstance(cliques, Sequence)
        and cliques
        and all(whole(c, 0, num_columns) and list(c) == sorted(set(c)) for c in cliques)
        and whole(parents, -1, len(cliques))
        and len(parents) == len(cliques)
        and all((p < i) and (p >= 0 or i == 0) for i, p in enumerate(parents))
        and {c for clique in cliques for c in clique} == set(range(num_columns))
    ):
        raise ConfigError("a saved graph whose cliques are not a tree over the schema's columns")
    return JunctionTree(tuple(tuple(c) for c in cliques), tuple(parents))
