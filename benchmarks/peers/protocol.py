# SPDX-License-Identifier: Apache-2.0
"""What a peer's driver is given and hands back: codes in, synthetic codes and their cost out.

Runs inside the peer's own environment, so it needs numpy alone and nothing of fedsynth.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def drive(learn: Callable[[np.ndarray, dict[str, int], argparse.Namespace], Any]) -> None:
    """Read the codes, let the peer learn and sample, write what it made and what it cost.

    Args:
      learn: Takes codes `(num_records, num_columns)`, cells by column name, and the options
        `method`, `epsilon`, `delta`, `seed`; gives synthetic codes of as many records. Imports of
        the peer's own belong at the top of its driver: they are not counted as learning.
    """
    options = argparse.ArgumentParser()
    for name in ("codes", "domain", "out"):
        options.add_argument(name, type=Path)
    options.add_argument("--method", default="")
    options.add_argument("--epsilon", type=float, required=True)
    options.add_argument("--delta", type=float, required=True)
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--cpu-limit", type=int, required=True, help="CPU-seconds, then it ends")
    args = options.parse_args()
    codes = np.load(args.codes)
    domain = json.loads(args.domain.read_text(encoding="utf-8"))
    imported_s = _cpu_s()
    begun = time.perf_counter()
    _limit(args.cpu_limit, args.out)
    made = np.asarray(learn(codes, domain, args))
    figures = {
        "cpu_s": _cpu_s() - imported_s,
        "import_cpu_s": imported_s,
        "wall_s": time.perf_counter() - begun,
        "peak_bytes": _peak_bytes(),
    }
    np.save(args.out.with_suffix(".npy"), made.astype(np.int32))
    args.out.write_text(json.dumps(figures), encoding="utf-8")


def _limit(cpu_s: int, out: Path) -> None:
    """End this process, and say how long it worked, after so many CPU-seconds or when told."""

    def end(*_: Any) -> None:
        worked_s = round(_cpu_s(), 1)
        out.write_text(json.dumps({"over_cpu_s": worked_s}), encoding="utf-8")
        os._exit(0)

    signal.signal(signal.SIGXCPU, end)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 60))


def rho_of(epsilon: float, delta: float) -> float:
    """The largest zCDP parameter that gives (epsilon, delta), as the authors of MST convert it.

    Reference:
      Canonne, Kamath, Steinke (2020), "The Discrete Gaussian", Proposition 7: for any order a,
      delta <= exp((a - 1)(a rho - epsilon)) / (a - 1) * (1 - 1/a)^a.
    """
    orders = 1 + np.logspace(-3, 5, 20_000)

    def log_delta(rho: float) -> float:
        bounds = (orders - 1) * (orders * rho - epsilon) - np.log(orders - 1)
        return float((bounds + orders * np.log1p(-1 / orders)).min())

    low, high = 0.0, epsilon + 1.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) <= np.log(delta) else (low, middle)
    return low


def _peak_bytes() -> int:
    """The most memory this process has held; Linux's ru_maxrss would count the parent's too."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cpu_s() -> float:
    """CPU-seconds of this process and of those that it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
