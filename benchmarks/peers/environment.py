# SPDX-License-Identifier: Apache-2.0
"""Peers from the package index: an environment for each, made once, and a run of it beside ours.

Our code never imports a peer. Its driver in this folder runs under its own interpreter in
`build/peers`, with the versions that the text file beside it pins; codes go in, codes come out.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent / "build" / "peers"
_INSTALL_LIMIT_S = 1800
_LAST_WORDS_S = 60
_PATIENCE = 6  # times the CPU-seconds that a run may take, by the clock of a machine that is shared


@dataclass(frozen=True)
class Peer:
    """A method of somebody else's.

    Attributes:
      package: Its name and version.
      environment: Name of its pinned requirements and of its environment.
      driver: The script that runs it.
      method: Which of the package's methods.
      known: A fault of it that explains its figures; empty if none is known.
    """

    package: str
    environment: str
    driver: str
    method: str = ""
    known: str = ""


PEERS: Mapping[str, Peer] = {
    "privsyn_core": Peer("privsyn-core 0.1.1", "privsyn", "privsyn_core.py"),
    "dpmm_mst": Peer("dpmm 0.1.9", "dpmm", "dpmm_graphical.py", "mst"),
    "mbi_mst": Peer("mbi 2.0.0, driver ours", "mbi", "mbi_mst.py"),
    "smartnoise_mst": Peer(
        "smartnoise-synth 1.0.8",
        "smartnoise",
        "smartnoise_mst.py",
        known="it pins mbi 1.1.0, whose sampler correlates columns that share a parent",
    ),
    "dpmm_aim": Peer("dpmm 0.1.9, model of 2 MB", "dpmm", "dpmm_graphical.py", "aim"),
}


class Unavailable(Exception):
    """A peer that cannot be installed here, or whose run failed or took too long.

    Attributes:
      worked_s: CPU-seconds that it had worked when it was ended for it; 0 if it ended otherwise.
    """

    def __init__(self, why: str, *, worked_s: float = 0.0) -> None:
        super().__init__(why)
        self.worked_s = worked_s


def run_peer(
    name: str,
    codes: NDArray[np.int32],
    domain: Mapping[str, int],
    *,
    epsilon: float,
    delta: float,
    seed: int,
    limit_s: int,
) -> tuple[NDArray[np.int32], dict[str, float]]:
    """What a peer makes of the codes, and what that cost.

    Args:
      name: One of `PEERS`.
      codes: Records, `(num_records, num_columns)`.
      domain: Cells of each column, by name.
      epsilon: Budget of the run; what the peer's accountant makes of it is its own affair.
      delta: Of the budget.
      seed: For the peer's noise and sampling.
      limit_s: CPU-seconds after which the run is ended; or six times as many by the clock.

    Returns:
      Synthetic codes and `cpu_s`, `import_cpu_s`, `wall_s`, `peak_bytes`.

    Raises:
      Unavailable: There is no result; the message says why.
    """
    peer = PEERS[name]
    python = python_of(peer.environment)
    with tempfile.TemporaryDirectory() as folder:
        given, cells, out = (Path(folder) / n for n in ("codes.npy", "domain.json", "out.json"))
        np.save(given, codes)
        cells.write_text(json.dumps(dict(domain)), encoding="utf-8")
        options = {"method": peer.method, "epsilon": epsilon, "delta": delta, "seed": seed}
        options["cpu-limit"] = limit_s
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [python, _HERE / peer.driver, given, cells, out, *flags]
        try:
            done = _finished(command, _PATIENCE * limit_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"no result in {_PATIENCE * limit_s:g} s") from None
        if done.returncode or not out.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise Unavailable(f"it ended with code {done.returncode}: {last[0][:200]}")
        figures = json.loads(out.read_text(encoding="utf-8"))
        if worked_s := figures.get("over_cpu_s"):
            raise Unavailable(f"no result in {worked_s} CPU-s", worked_s=worked_s)
        return np.load(out.with_suffix(".npy")), figures


def run_command(command: Sequence[Any], limit_s: float) -> None:
    """Run a peer's driver to its end.

    Raises:
      Unavailable: It failed, or did not end within so many seconds.
    """
    try:
        done = _finished(command, limit_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"no result in {limit_s:g} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"it ended with code {done.returncode}: {last[0][:200]}")


def python_of(environment: str) -> Path:
    """The interpreter of an environment, made and filled if it is not there yet.

    Raises:
      Unavailable: It cannot be made here.
    """
    folder = _ROOT / environment
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = (_HERE / f"{environment}.txt").read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    steps: list[Sequence[Any]] = [
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "-r", _HERE / f"{environment}.txt"],
    ]
    for step in steps:
        try:
            done = _finished(step, _INSTALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"not installed within {_INSTALL_LIMIT_S} s") from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise Unavailable(f"cannot be installed here: {last[0][:200]}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _finished(command: Sequence[Any], limit_s: float) -> "subprocess.CompletedProcess[str]":
    """A command that has ended, with what it printed; one that takes too long is told, then ended.

    Raises:
      subprocess.TimeoutExpired: It did not end when told.
    """
    words = [str(word) for word in command]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=own) as process:
        try:
            try:
                printed = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGXCPU)  # a driver then says how long it has worked
                printed = process.communicate(timeout=_LAST_WORDS_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, *printed)
