# SPDX-License-Identifier: Apache-2.0
"""The Flower ServerApp: find the run that its configuration names, and conduct it."""

import json
import logging
import sys
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..core.config import RunConfig, read_config, run_file
from ..core.errors import FedsynthError
from ..core.randomness import KeyStream, OsKeyStream
from .conduct import Plan, conduct, plan_of, unfinished

OUTCOME = "outcome.json"
_log = logging.getLogger(__name__)
_SETTLED_S = 0.5

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that the run configuration's `run` names."""
    conduct_named(grid, context, OsKeyStream())


def conduct_named(grid: Grid, context: Context, stream: KeyStream) -> Path:
    """Conduct the run at `run`: a `run.toml`, or the `run.json` of a run already started.

    An error that ends a started run is written beside its `run.json`, as `outcome.json`: whoever
    started it follows those files, and nobody else can tell what happened in Flower's process.

    Args:
      grid: Carries messages to clients.
      context: Flower's; `run_config["run"]` is a path on the server.
      stream: Secret randomness.
    """
    _be_heard()
    path = run_file(str(context.run_config.get("run", "")))
    try:
        return conduct(_plan(path, grid), grid, stream=stream)
    except FedsynthError as error:
        if path.suffix != ".toml" and path.parent.is_dir():
            _write_outcome(path.parent / OUTCOME, error)
        raise


def _plan(path: Path, grid: Grid) -> Plan:
    """The plan of the run that a file describes."""
    if path.suffix == ".toml":
        return plan_of(_fitted(read_config(path), grid))
    (path.parent / OUTCOME).unlink(missing_ok=True)
    return unfinished(path)


def _fitted(config: RunConfig, grid: Grid) -> RunConfig:
    """A configuration that asks as many clients as Flower's simulation has.

    `flwr run` gives the number of simulated nodes, so a run that begins there takes its number;
    everywhere else the configuration's own number stands.
    """
    if type(grid).__name__ != "InMemoryGrid":  # by name: its module has moved before
        return config
    nodes = 0
    while nodes < 1 or nodes != len(list(grid.get_node_ids())):
        nodes = len(list(grid.get_node_ids()))
        time.sleep(_SETTLED_S)  # nodes are registered one after another
    engine = config.engine
    if nodes == engine.clients:
        return config
    _log.warning("Flower simulates %d nodes; engine.clients = %d is left", nodes, engine.clients)
    update = {"clients": nodes, "min_clients": min(engine.quorum, nodes)}
    return config.model_copy(update={"engine": engine.model_copy(update=update)})


def _write_outcome(path: Path, error: FedsynthError) -> None:
    """Say how a run ended, for whoever follows its files."""
    outcome = {
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(path)


def _be_heard() -> None:
    """Print this package's log, so that `flwr log` shows the rounds; the owner's own stays."""
    logger = logging.getLogger(__name__.partition(".")[0])
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)
