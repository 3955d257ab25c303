# SPDX-License-Identifier: Apache-2.0
"""A process of its own that ends others as soon as whoever started them is gone.

Its standard input is a pipe whose other end only its owner holds. The operating system closes
that end however the owner dies, `kill -9` included; then this process ends what the owner
started: every process that carries the owner's mark in its environment or is in the group of
one that does, and every group that the owner named, one number a line. It uses nothing but the
standard library.
"""

import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "FEDSYNTH_ENGINE"  # an engine's processes inherit it, whatever session they are in
_PATIENCE_S = 4.0
_POLL_S = 0.05


def main() -> None:
    """Wait for the owner to go, then end its processes: asked first, forced after."""
    mark = f"{VARIABLE}={sys.argv[1]}".encode()
    groups = {int(line) for line in sys.stdin if line.strip().isdigit()}
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _PATIENCE_S
        send = True
        while left := _alive(mark, groups):
            if send or signum is signal.SIGKILL:
                for process in left:
                    _signal(process, signum)
                send = False
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)


def _alive(mark: bytes, groups: set[int]) -> set[int]:
    """Processes that carry the mark or are in one of the groups; zombies do not count."""
    entries = list(Path("/proc").glob("[0-9]*")) if Path("/proc/self").exists() else []
    if not entries:
        return {-group for group in groups if _signal(-group, 0)}
    found = set()
    for entry in entries:
        process = int(entry.name)
        if process != os.getpid() and _is_ours(entry, mark, groups):
            found.add(process)
    return found


def _is_ours(entry: Path, mark: bytes, groups: set[int]) -> bool:
    """Whether a folder of /proc describes a live process of the owner's."""
    try:
        state, _, group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
        if state == "Z":
            return False
        if int(group) in groups:
            return True
        if mark not in entry.joinpath("environ").read_bytes().split(b"\0"):
            return False
    except (OSError, ValueError):
        return False  # gone meanwhile, or somebody else's
    groups.add(int(group))  # its children may overwrite their environment, as Ray's workers do
    return True


def _signal(process: int, signum: int) -> bool:
    """Send a signal to a process, or by a negative number to a group; whether there was one."""
    try:
        os.kill(process, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
