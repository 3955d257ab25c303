# SPDX-License-Identifier: Apache-2.0
"""Named places at which a test may kill the process; they can do nothing else.

`FEDSYNTH_FAILPOINT=before-seal` kills the process the first time it comes by, `before-seal:3`
the third time. A fail point can only end the process, with SIGKILL, which nothing can catch or
clean up after: it can never skip a step, change a value or raise an error. So whoever sets the
variable can stop a run, as `kill -9` can, and gains no way around a promise.
"""

import os
import signal
from collections import Counter

VARIABLE = "FEDSYNTH_FAILPOINT"

NAMES = (
    *("before-commit", "after-commit"),  # server/ledger.py: a run and its whole plan
    *("before-reserve", "after-reserve"),
    *("before-send", "after-send"),
    *("before-client-reserve", "after-client-reserve"),
    *("before-clip", "after-clip"),
    *("before-client-store", "after-client-store"),
    "after-collect",
    *("before-sum", "after-sum"),
    *("before-draw", "after-draw"),
    *("before-seal", "after-seal"),
    *("before-release", "after-release"),
    *("before-checkpoint", "after-checkpoint"),  # server/ledger.py: fold in the WAL file
    *("before-generation", "after-generation"),  # server/generations.py: a model's answer is kept
    *("before-export", "after-export"),
    *("before-finish", "after-finish"),
)
IN_SWEEPS = (  # simulation/private_sweep.py
    *("before-secret", "after-secret"),
    *("before-done", "after-done"),
    "after-choice",
    "before-clearing",
)

_passed: Counter[str] = Counter()


def at(name: str) -> None:
    """Die here, if the environment says so; otherwise do nothing.

    Args:
      name: One of `NAMES` or of `IN_SWEEPS`.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None or wanted.partition(":")[0] != name:
        return
    _passed[name] += 1
    if _passed[name] == int(wanted.partition(":")[2] or 1):
        os.kill(os.getpid(), signal.SIGKILL)
