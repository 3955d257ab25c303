# SPDX-License-Identifier: Apache-2.0
"""The Flower ServerApp: find the run that its configuration names, and conduct it."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..core.config import read_config
from ..core.randomness import KeyStream, OsKeyStream
from .conduct import conduct, plan_of, unfinished

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that the run configuration's `run` names."""
    conduct_named(grid, context, OsKeyStream())


def conduct_named(grid: Grid, context: Context, stream: KeyStream) -> Path:
    """Conduct the run at `run`: a `run.toml`, or the `run.json` of a run already started.

    Args:
      grid: Carries messages to clients.
      context: Flower's; `run_config["run"]` is a path on the server.
      stream: Secret randomness.
    """
    path = Path(str(context.run_config["run"]))
    plan = unfinished(path) if path.suffix != ".toml" else plan_of(read_config(path))
    return conduct(plan, grid, stream=stream)
