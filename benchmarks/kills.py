# SPDX-License-Identifier: Apache-2.0
"""Kill runs with SIGKILL, 200 at random instants and one at each fail point; count what breaks."""

import random
import sys
import tempfile
from pathlib import Path

import report  # first: it sets up threads and paths
from fedsynth.core.failpoints import NAMES
from fedsynth.simulation.faults import (
    small_run,
    survive,
    survive_at_random,
    typical_seconds,
)


def main() -> int:
    """Run the benchmark."""
    args = report.parser(__doc__).parse_args()
    figures = report.Report("kills", args)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        typical = typical_seconds(small_run(root / "typical"))
        survivals = [
            survive(small_run(root / f"{placement}-{name}", placement=placement), failpoint=name)
            for placement in ("central", "local")
            for name in (NAMES[:3] if args.quick else NAMES)
            if placement == "central" or "draw" not in name
        ]
        survivals += [
            survive_at_random(root / f"random-{number}", typical, rng, placement=placement)
            for number in range(3 if args.quick else 200)
            for placement in [rng.choice(["central", "local"])]
        ]
    figures.add("all", "runs killed", sum(s.kills > 0 for s in survivals), unit="runs")
    figures.add("all", "kills", sum(s.kills for s in survivals), unit="kills")
    figures.add("all", "runs that finished", sum(s.finished for s in survivals), unit="runs")
    figures.add(
        "all", "rounds lost and charged", sum(s.void_rounds for s in survivals), unit="rounds"
    )
    figures.add("all", "broken promises", sum(len(s.violations) for s in survivals), unit="")
    for survival in survivals:
        if not survival.ok:
            figures.note(str(survival))
    figures.claim("every run was killed at least once", all(s.kills for s in survivals))
    figures.claim("every run finishes", all(s.finished for s in survivals))
    figures.claim(
        "no spending is under-reported and no noise is drawn twice",
        not any(s.violations for s in survivals),
    )
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
