# SPDX-License-Identifier: Apache-2.0
"""Start an engine's processes so that none outlives the run, even if this one is killed."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ..core.errors import ConfigError, FedsynthError
from .keeper import VARIABLE

_log = logging.getLogger(__name__)
_KEEPER = Path(__file__).with_name("keeper.py")
_PATIENCE_S = 20.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class Processes:
    """What one engine runs on this machine; all of it ends with the `with` block.

    Each process has a session of its own, so that Ctrl-C in a terminal reaches this process
    alone, which then ends the others in good order.

    Args:
      folder: Where each process's output is kept, in `NAME.log`.
      env: Their environment, added to this process's own.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self._env = {**os.environ, **env, VARIABLE: secrets.token_hex(16)}
        self._started: list[subprocess.Popen[bytes]] = []
        self._services: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._keeper = subprocess.Popen(  # noqa: S603  (this interpreter, a file of this package)
            [sys.executable, "-I", "-S", str(_KEEPER), self._env[VARIABLE]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            _log.warning("some of the engine's processes did not end; see %s", self.folder)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # collects the dead

    def start(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command; what it says goes to `NAME.log`."""
        with self.log(name).open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  (Flower's commands, no shell)
                [program(command[0]), *command[1:]],
                env={**self._env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        if self._keeper.stdin is not None:
            self._keeper.stdin.write(f"{process.pid}\n".encode())
            self._keeper.stdin.flush()
        return process

    def serve(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> None:
        """Start a command that runs as long as the engine does; see `check`."""
        self._services[name] = self.start(name, command, env=env)

    def output_of(self, command: Sequence[str], *, timeout_s: float = 120.0) -> str:
        """What a command that ends by itself printed.

        Raises:
          FedsynthError: It failed or took too long.
        """
        shown = " ".join(command[:3])
        try:
            done = subprocess.run(  # noqa: S603  (Flower's commands, no shell)
                [program(command[0]), *command[1:]],
                env=self._env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise FedsynthError(f"`{shown}` did not end within {timeout_s:g} s") from None
        text = plain(done.stdout)
        if done.returncode:
            said = last_words(text + "\n" + plain(done.stderr))
            raise FedsynthError(f"`{shown}` failed: {said}")
        return text

    def check(self) -> None:
        """Refuse to go on without a process that should be running.

        Raises:
          FedsynthError: One has ended.
        """
        for name, process in self._services.items():
            code = process.poll()
            if code is not None:
                raise FedsynthError(
                    f"{name} ended by itself with code {code}: {last_words(self.said(name))}"
                    f"\nIts whole output: {self.log(name)}"
                )

    def log(self, name: str) -> Path:
        """The file with a process's output."""
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        """A process's output so far, as plain text."""
        return plain(self.log(name).read_bytes())


def program(name: str) -> str:
    """A command of the environment that this interpreter belongs to.

    Raises:
      ConfigError: It is not installed.
    """
    found = shutil.which(name, path=search_path())
    if found is None:
        raise ConfigError(f"the command {name!r} is missing; install flwr in this environment")
    return found


def search_path() -> str:
    """Where commands are looked for: beside this interpreter first."""
    here = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return os.pathsep.join([*here, os.environ.get("PATH", os.defpath)])


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback address that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def plain(output: bytes) -> str:
    """A process's output without colors and control characters."""
    return _CONTROL.sub("", output.decode("utf-8", errors="replace"))


def last_words(text: str) -> str:
    """The text of an error box in a log, else its last line that tells of an error, or its last."""
    boxed = re.findall(r"^│(.*)│\s*$", text, re.M)
    if boxed:
        return " ".join(line.strip() for line in boxed)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|exception|exit code|failed", line, re.I)]
    return (telling or lines or ["it said nothing"])[-1]
