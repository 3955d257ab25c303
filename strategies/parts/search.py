# SPDX-License-Identifier: Apache-2.0
"""Choose tables, measure them, fit the model again, step by step: what AIM's family shares."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core.errors import ConfigError
from ...core.query import NoisySum, Query, Rounds
from ...core.schema import Schema
from .cliques import Clique, table_cells, tree_cells
from .descent import fit
from .graph import Graph
from .graph_model import GraphModel
from .histograms import Grid, Histograms, Measured, total_of
from .possible import possible_groups, that_fit
from .settings import check_model, check_range
from .worst import Contest, Workload, expected_error

_CELL_BYTES = 8
_CONSTRAINED = 0.5  # most of a model that the schema's constraints may take up
_FIT_STEPS = 15  # of a fit that the next step begins from; the last one goes to the end
_MOST_STEPS, _MOST_TABLES = 1000, 1000


@dataclass(frozen=True)
class Step:
    """One round of choosing and measuring.

    Attributes:
      choice_noise: Noise multiplier that the choice costs as much as.
      table_noise: Noise multiplier of what is then measured.
      max_cells: Most cells of the model once it holds what was chosen.
      count: How many tables are chosen.
    """

    choice_noise: float
    table_noise: float
    max_cells: float
    count: int = 1


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search stands when it has to choose.

    Attributes:
      step: The round.
      model: Fitted to all that was measured.
      total: Estimated number of records.
      contest: What may be chosen.
      stddevs: Noise of each table that was measured, its measurements taken together, in counts.
    """

    step: Step
    model: GraphModel
    total: float
    contest: Contest
    stddevs: Mapping[Clique, float]


Chooser = Callable[[Found], Generator[Query, NoisySum, list[Clique]]]
"""Says which tables are measured next; may ask a query for it. With nothing chosen, the step
measures what weighs most."""


def search(
    schema: Schema,
    measured: Sequence[Measured],
    steps: Sequence[Step],
    choose: Chooser,
    *,
    workload: Workload,
    max_norm: float,
    is_penalized: bool = True,
    always: Sequence[Clique] = (),
    coarse: Sequence[Measured] = (),
) -> Rounds:
    """Choose, measure and fit, step by step; then fit once more, to the end.

    The schema's constraints are part of the model as far as they fit into half of it; a step's
    limit counts what is measured beside them, within the limit of the last step. What does not
    fit is kept by the sampler alone (`core.enforce`).

    Args:
      schema: Public schema.
      measured: What was measured before.
      steps: The rounds.
      choose: Says what is measured.
      workload: What may be measured.
      max_norm: L2 bound of a user, in units of one record's norm.
      is_penalized: Take the error that measuring would bring off each score.
      always: Tables that are measured again in every step.
      coarse: Tables measured before that join the model once their columns are chosen.

    Returns:
      A `Graph`.
    """
    shape, known = schema.shape, list(measured)
    hints = {scope_of(table): table for table in coarse}
    grids = Grid.each(shape)
    cells = np.array([table_cells(clique, shape) for clique in workload.cliques])
    most = steps[-1].max_cells if steps else math.inf
    zeros = that_fit(possible_groups(schema, grids), shape, _CONSTRAINED * most)
    ruled = [clique for clique, _ in zeros]
    free = tree_cells(ruled, shape) if ruled else 0
    model = fit(shape, known, zeros=zeros, max_steps=_FIT_STEPS)
    for step in steps:
        max_cells = min(step.max_cells + free, most)
        within = workload.within([*scopes_of(known), *ruled], max_cells) or [int(cells.argmin())]
        stddev = step.table_noise * max_norm * math.sqrt(step.count + len(always))
        contest = Contest(
            grids,
            [workload.cliques[i] for i in within],
            workload.weights[within],
            expected_error(cells[within], stddev if is_penalized else 0.0),
        )
        found = Found(step, model, total_of(known), contest, _stddevs(known))
        picked = yield from choose(found)
        picked = _that_fit(picked, [*scopes_of(known), *ruled], shape, max_cells)
        if not picked:
            picked = [contest.cliques[int(contest.weights.argmax())]]
        tables = measuring(grids, [*picked, *(c for c in always if c not in picked)])
        noisy = yield tables.query("table", noise_multiplier=step.table_noise, max_norm=max_norm)
        known += [hints.pop(clique) for clique in picked if clique in hints]
        known += tables.measured(noisy)
        if not noisy.is_void:
            model = fit(shape, known, start=model, max_steps=_FIT_STEPS)
    return Graph.whole(schema, fit(shape, known, start=model))


def growing_steps(
    noise_multiplier: float,
    *,
    num_steps: int,
    growth: float,
    spent: float,
    choice_share: float,
    max_model_mb: float,
    count: int = 1,
) -> list[Step]:
    """Steps that share what is left of a budget, each with `growth` times the one before.

    Args:
      noise_multiplier: Of one Gaussian that costs as much as the whole budget.
      num_steps: How many.
      growth: Budget of a step over that of the step before.
      spent: Share of the budget (of mu^2) that is spent before them.
      choice_share: Share of each step's budget for choosing; 0: nothing is asked to choose.
      max_model_mb: Of the model at the end; before, the same share of it as of the budget.
      count: Tables that each step chooses.
    """
    shares = float(growth) ** np.arange(num_steps)
    shares *= (1 - spent) / shares.sum()
    used = np.minimum(spent + np.cumsum(shares), 1.0)
    return [
        Step(
            choice_noise=noise_multiplier / math.sqrt(share * (choice_share or 1.0)),
            table_noise=noise_multiplier / math.sqrt(share * (1 - choice_share)),
            max_cells=max_cells_of(max_model_mb) * part,
            count=count,
        )
        for share, part in zip(shares.tolist(), used.tolist(), strict=True)
    ]


def check_settings(
    *,
    ways: int,
    num_steps: int,
    max_model_mb: float,
    shares: Mapping[str, float],
    growth: float = 1.0,
    batch: int = 1,
) -> None:
    """Refuse settings of a search that cannot mean anything.

    Args:
      ways: Columns of each table of the workload.
      num_steps: Steps.
      max_model_mb: Limit of the model.
      shares: Shares of the budget, by the names of their settings.
      growth: Budget of a step over that of the step before.
      batch: Tables a step.

    Raises:
      ConfigError: One is out of range.
    """
    check_range(1, 3, ways=ways)
    check_range(1, _MOST_STEPS, num_steps=num_steps)
    check_range(1, _MOST_TABLES, batch=batch)
    if not 0.1 <= growth <= 10:
        raise ConfigError(f"growth must lie between 0.1 and 10, not {growth!r}")
    check_model(max_model_mb)
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"{name} must lie between 0 and 1, not {share!r}")


def by_exponential_mechanism(
    max_norm: float, where: Literal["server", "client"] = "server"
) -> Chooser:
    """A chooser that asks the exponential mechanism.

    Args:
      max_norm: L1 bound of a user's part in each table, in records.
      where: Who draws.
    """

    def choose(found: Found) -> Generator[Query, NoisySum, list[Clique]]:
        noisy = yield found.contest.query(
            "worst",
            found.model,
            found.total,
            noise_multiplier=found.step.choice_noise,
            max_norm=max_norm,
            count=found.step.count,
            where=where,
        )
        return found.contest.chosen(noisy)

    return choose


def measuring(grids: Sequence[Grid], cliques: Sequence[Clique]) -> Histograms:
    """The tables over some sets of columns."""
    return Histograms.balanced([tuple(grids[c] for c in clique) for clique in cliques])


def scopes_of(measured: Sequence[Measured]) -> list[Clique]:
    """Columns of each table measured, each set once."""
    return sorted({scope_of(table) for table in measured})


def scope_of(table: Measured) -> Clique:
    """Columns of a table, sorted."""
    return tuple(sorted(grid.column for grid in table.grids))


def _stddevs(measured: Sequence[Measured]) -> dict[Clique, float]:
    """Noise of each table measured whole, its measurements weighted by their precision."""
    precisions: dict[Clique, float] = {}
    for table in measured:
        if all(grid.is_whole for grid in table.grids):
            scope = scope_of(table)
            precisions[scope] = precisions.get(scope, 0.0) + table.stddev**-2
    return {scope: precision**-0.5 for scope, precision in precisions.items()}


def max_cells_of(max_model_mb: float) -> float:
    """Cells of a model of so many megabytes."""
    return max_model_mb * 1e6 / _CELL_BYTES


def _that_fit(
    picked: Sequence[Clique], measured: Sequence[Clique], shape: Sequence[int], max_cells: float
) -> list[Clique]:
    """Those of several tables that the model can hold together, in the order given."""
    kept = list(picked[:1])
    for clique in picked[1:]:
        if tree_cells([*measured, *kept, clique], shape) <= max_cells:
            kept.append(clique)
    return kept
