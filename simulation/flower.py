# SPDX-License-Identifier: Apache-2.0
"""Drive a run through Flower: its Ray simulation on this machine, or a SuperLink that exists."""

import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import tomli_w

from ..core import errors
from ..core.errors import ConfigError, FedsynthError, Interrupted
from ..server.app import OUTCOME
from ..server.conduct import RoundEvent
from ..server.planned import UNFINISHED, Plan, start
from .processes import Processes, free_ports, last_words, search_path

if TYPE_CHECKING:
    from subprocess import Popen

_log = logging.getLogger(__name__)
_POLL_S = 0.1
_READY_S = 90.0  # a SuperLink answers within two seconds on an idle machine
_GRACE_S = 5.0  # between the end of Flower's log stream and the last word of the run

Listener = Callable[[RoundEvent], None]


def run_ray(plan: Plan, *, on_event: Listener, app_dir: Path | None = None) -> Path:
    """Do a planned run in Flower's simulation with Ray, on this machine.

    Args:
      plan: The run; `engine.clients` nodes are simulated.
      on_event: Told of every round.
      app_dir: Flower app to run; `None`: this package's own. Tests bring one of theirs.

    Returns:
      The release folder.

    Raises:
      FedsynthError: As the run itself raised it, or what Flower said if that failed.
    """
    start(plan)
    with _ray_folder() as ray_folder, engine(plan, {"RAY_TMPDIR": ray_folder}) as (folder, ours):
        (port,) = free_ports(1)
        _log.info("starting Flower's simulation of %d nodes with Ray", plan.config.engine.clients)
        ours.serve(
            "superlink",
            [
                *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
                *("--host", "127.0.0.1", "--port", str(port)),
                "--disable-runtime-dependency-installation",
            ],
        )
        until_listening(ours, port)
        connection = write_connection(folder, {"address": f"127.0.0.1:{port}", "insecure": True})
        nodes = f"num-supernodes={plan.config.engine.clients} client-resources-num-cpus=1"
        return drive(
            plan,
            ours,
            folder=folder,
            connection=connection,
            app_dir=app_dir,
            options=["--federation-config", nodes],
            on_event=on_event,
        )


def run_superlink(plan: Plan, *, on_event: Listener, app_dir: Path | None = None) -> Path:
    """Do a planned run on a SuperLink that is named in Flower's own configuration.

    The SuperLink's ServerApp reads the run, the schema and the ledger at the paths that this
    process sees, so this belongs on the SuperLink's machine.

    Args:
      plan: The run; `engine.connection` names the SuperLink.
      on_event: Told of every round.
      app_dir: Flower app to run; `None`: this package's own.

    Raises:
      FedsynthError: As the run itself raised it, or what Flower said if that failed.
    """
    start(plan)
    home = os.environ.get("FLWR_HOME", str(Path.home() / ".flwr"))
    with engine(plan, {"FLWR_HOME": home}) as (folder, ours):
        connection = plan.config.engine.connection
        _log.info("handing the run to the SuperLink %r", connection)
        return drive(
            plan,
            ours,
            folder=folder,
            connection=connection,
            app_dir=app_dir,
            on_event=on_event,
            stops_run=True,
        )


def drive(
    plan: Plan,
    ours: Processes,
    *,
    folder: Path,
    connection: str,
    app_dir: Path | None,
    on_event: Listener,
    options: list[str] | None = None,
    stops_run: bool = False,
) -> Path:
    """Start a started run with `flwr run`, follow its files, and return its release.

    Args:
      plan: The run, written down by `start`.
      ours: Starts processes; those it serves must live as long as the run.
      folder: Working folder of the engine.
      connection: Name of the SuperLink in Flower's configuration.
      app_dir: Flower app; `None`: this package's own.
      on_event: Told of every round.
      options: More options of `flwr run`.
      stops_run: The SuperLink outlives this process: tell it to stop the run on Ctrl-C.
    """
    started = start(plan)
    (started / OUTCOME).unlink(missing_ok=True)
    run_config = folder / "run-config.toml"  # a file, because a path may hold quotes and spaces
    run_config.write_text(tomli_w.dumps({"run": str(started / "run.json")}), encoding="utf-8")
    app = app_dir or _write_app(folder / "fedsynth-run")
    command = ["flwr", "run", str(app), connection, "--stream", "--run-config", str(run_config)]
    progress = started / "progress.jsonl"
    progress.touch()
    with progress.open(encoding="utf-8") as lines:
        lines.seek(0, os.SEEK_END)
        flower = ours.start("flwr-run", [*command, *(options or [])])
        try:
            return _followed(plan, ours, flower, lines, on_event)
        except KeyboardInterrupt:
            if stops_run:
                _stop(ours, connection)
            raise


@contextmanager
def engine(plan: Plan, env: Mapping[str, str] | None = None) -> Iterator[tuple[Path, Processes]]:
    """A working folder beside the release, and processes that end with the block.

    Nothing stays of the folder but, when the run fails, the processes' logs.

    Args:
      plan: The run.
      env: More of the processes' environment; Flower's own home is the folder otherwise.

    Raises:
      Interrupted: A person stopped the run.
    """
    folder = plan.config.path(plan.config.release.path) / f"{plan.run}.engine"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    whole_env = {**environment(folder), "FLWR_HOME": str(folder), **(env or {})}
    keep_logs = False
    try:
        with Processes(folder / "logs", whole_env) as ours:
            yield folder, ours
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "stopped. What was spent is on the ledger and nothing is lost. Resume:"
            f" fedsynth run --resume {start(plan)}"
        ) from stop
    except FedsynthError:
        keep_logs = True
        _log.info("logs of the engine: %s", folder / "logs")
        raise
    finally:
        _clear(folder, keep_logs=keep_logs)


@contextmanager
def _ray_folder() -> Iterator[str]:
    """A folder for Ray's sockets and logs that nobody else reads and that goes with the run.

    A client's log may tell its owner of records. The path is short, as those of sockets must be.
    """
    short = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108  (a private folder within it)
    with tempfile.TemporaryDirectory(
        prefix="fedsynth-", dir=short, ignore_cleanup_errors=True
    ) as folder:
        yield folder


def _clear(folder: Path, *, keep_logs: bool) -> None:
    """Remove an engine's working folder, or all of it but the logs."""
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name != "logs":
                shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def environment(folder: Path) -> dict[str, str]:
    """Environment of Flower's processes: what can be imported here can be imported there.

    This package goes first, under a link that makes it a package from the start. A checkout's
    `fedsynth.py` becomes one only while it is imported, and Flower's simulation imports server
    and client in two threads at once.
    """
    link = folder / "importable" / "fedsynth"
    link.parent.mkdir()
    link.symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
    importable = [str(link.parent), *(str(Path(entry).absolute()) for entry in sys.path)]
    return {
        "PATH": search_path(),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(importable)),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its default changes; saves a warning
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def write_connection(home: Path, settings: Mapping[str, Any]) -> str:
    """Name a SuperLink in the Flower configuration of our own folder; the name."""
    name = "fedsynth"
    text = tomli_w.dumps({"superlink": {"default": name, name: dict(settings)}})
    (home / "config.toml").write_text(text, encoding="utf-8")
    return name


def until_listening(ours: Processes, port: int) -> None:
    """Wait until a SuperLink of ours answers on the loopback address."""
    import socket

    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        ours.check()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(_POLL_S)
    raise FedsynthError(
        f"the SuperLink did not listen within {_READY_S:g} s; see {ours.log('superlink')}"
    )


def _write_app(folder: Path) -> Path:
    """A Flower app that holds configuration only, so that installed code runs everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    app = {
        "project": {
            "name": folder.name,
            "version": "0.1.0",
            "description": "Runs the fedsynth that each site installed",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsynth",
                    "fab-include": ["/README.md"],
                    "components": {
                        "serverapp": "fedsynth.server.app:app",
                        "clientapp": "fedsynth.client.app:app",
                    },
                    "config": {"run": ""},
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(app), encoding="utf-8")
    (folder / "README.md").write_text("Configuration of one fedsynth run.\n", encoding="utf-8")
    return folder


def _followed(
    plan: Plan, ours: Processes, flower: "Popen[bytes]", lines: TextIO, on_event: Listener
) -> Path:
    """The release of a run that goes on in other processes, once it is there."""
    release = plan.config.path(plan.config.release.path) / plan.run
    started = release.with_name(f"{plan.run}{UNFINISHED}")
    ended_at: float | None = None
    while True:
        over = not started.exists() and release.exists()  # before the last lines are read
        outcome = started / OUTCOME
        failed = outcome.exists()
        for event in _events(lines):
            on_event(event)
        if over:
            return release
        if failed:
            raise _error_of(outcome)
        ours.check()
        if flower.poll() is not None:
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > _GRACE_S:
                raise _abandoned(ours, started)
        time.sleep(_POLL_S)


def _abandoned(ours: Processes, started: Path) -> FedsynthError:
    """Why there is neither a release nor an outcome, as far as Flower's own command tells."""
    said, resume = ours.said("flwr-run"), f"Resume: fedsynth run --resume {started}"
    if "started run" not in said:
        return ConfigError(
            f"Flower did not start the run: {last_words(said)}\nNothing was asked. {resume}"
        )
    return FedsynthError(
        f"Flower ended the run without a release: {last_words(said)}\nIts whole output:"
        f" {ours.log('flwr-run')}\nWhat was spent is on the ledger. {resume}"
    )


def _events(lines: TextIO) -> Iterator[RoundEvent]:
    """Rounds that were written down since the last look; an unfinished line waits."""
    while True:
        here = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(here)
            return
        fields: dict[str, Any] = json.loads(line)
        fields |= {key: math.inf for key, value in fields.items() if value is None}
        yield RoundEvent(**fields)


def _error_of(outcome: Path) -> FedsynthError:
    """The error that ended a run in Flower's process, as it would have been raised here."""
    said = json.loads(outcome.read_text(encoding="utf-8"))
    kind = getattr(errors, str(said["error"]), FedsynthError)
    if not (isinstance(kind, type) and issubclass(kind, FedsynthError)):
        kind = FedsynthError
    error = kind(str(said["message"]))
    error.exit_code = int(said["exit_code"])
    return error


def _stop(ours: Processes, connection: str) -> None:
    """Ask a SuperLink that outlives us to stop the run that we started there."""
    found = re.search(r"started run (\d+)", ours.said("flwr-run"))
    if found is None:
        return
    try:
        ours.output_of(["flwr", "stop", found.group(1), connection], timeout_s=30)
    except (FedsynthError, ConfigError) as error:
        _log.warning("the run may go on: %s", error)
