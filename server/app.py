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
from ..core.files import write_whole
from ..core.randomness import KeyStream, OsKeyStream
from .conduct import conduct
from .planned import Plan, plan_of, unfinished

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
    """A configuration that says what carries the messages of a run that `flwr run` began.

    `flwr run` also gives the number of simulated nodes, so in Flower's simulation that number is
    asked; on a SuperLink the configuration's own number stands.
    """
    engine = config.engine
    if type(grid).__name__ == "InMemoryGrid":  # by name: its module has moved before
        nodes = _simulated_nodes(grid)
        if nodes != engine.clients:
            _log.warning(
                "Flower simulates %d nodes, so as many clients are asked, not engine.clients = %d",
                nodes,
                engine.clients,
            )
        quorum = min(engine.quorum, nodes)
        update = {"kind": "ray", "clients": nodes, "min_clients": quorum}
    else:
        update = {"kind": "superlink"}
    return config.model_copy(update={"engine": engine.model_copy(update=update)})


def _simulated_nodes(grid: Grid) -> int:
    """How many nodes a simulation has; they are registered one after another as it begins."""
    nodes = 0
    while nodes < 1 or nodes != len(list(grid.get_node_ids())):
        nodes = len(list(grid.get_node_ids()))
        time.sleep(_SETTLED_S)
    return nodes


def _write_outcome(path: Path, error: FedsynthError) -> None:
    """Say how a run ended, for whoever follows its files."""
    outcome = {
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
    }
    write_whole(path, json.dumps(outcome).encode())


def _be_heard() -> None:
    """Print this package's log, so that `flwr log` shows the rounds; the owner's own stays."""
    logger = logging.getLogger(__name__.partition(".")[0])
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)
