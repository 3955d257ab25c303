# SPDX-License-Identifier: Apache-2.0
"""Write docs/results.md from the JSON of full benchmark runs: python docs/record.py build/bench/*.json."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEAD = """# Results

Figures of the last full run of every benchmark. Each prints a table, takes `--quick` (run by `make test`) and
`--json FILE`: one object a figure with `benchmark`, `case`, `metric`, `mean`, `std`, `n`, `unit`, and `peer` where the
figure is a peer's. This page is made from those files:

```sh
make bench                            # every benchmark in full, into build/bench/*.json
python docs/record.py build/bench/*.json
```

Machine: {cores} shared and noisy, one thread a process; compare CPU-seconds and ratios, not clocks. ± is the
standard deviation over seeds or repetitions; a figure without it was measured once. `epsilon=0` is what a method makes of pure noise and
`no noise` what it makes of exact sums: no figure of a method means much without the two beside it.
"""

QUALITY = """## Quality

`python benchmarks/quality.py --json FILE`. Users are records where a table has no user ids, patients in diabetes130
and images in digits. TVD: mean total variation distance of all k-way marginals of synthetic and real records (lower
is better). Accuracy: trained on synthetic records, tested on real ones of other people. The settings of
`dp_merf`, `dp_fedavg` and `private_evolution` were chosen on digits and Adult, so their figures there flatter a little. The figures below were run in parts, by `--only`,
on the same code of each method.
"""

THROUGHPUT = """## Throughput

`python benchmarks/throughput.py --json FILE`
"""

KILLS = """## Kills

`python benchmarks/kills.py --json FILE`: runs killed with SIGKILL at random instants and at every fail point, and resumed.
"""

_ORDER = ("epsilon=0", "epsilon=1", "epsilon=4", "epsilon=10", "no noise")


def main() -> int:
    """Read the files named, write the page beside this one."""
    figures: list[dict[str, Any]] = []
    for name in sys.argv[1:]:
        figures += json.loads(Path(name).read_text(encoding="utf-8"))
    # parts of one benchmark, run apart with --only, repeat the figures of the real records
    figures = list({(f["benchmark"], f["case"], f["metric"]): f for f in figures}.values())
    if not figures:
        sys.stderr.write("give the JSON files of full runs\n")
        return 2
    parts = [HEAD.format(cores=f"{os.cpu_count()} cores")]
    quality = [f for f in figures if f["benchmark"] == "quality"]
    if quality:
        parts += [QUALITY, *_quality(quality)]
    for benchmark, heading in (("throughput", THROUGHPUT), ("kills", KILLS)):
        found = [f for f in figures if f["benchmark"] == benchmark]
        if found:
            parts += [heading, _plain(found)]
    page = Path(__file__).with_name("results.md")
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return 0


def _quality(figures: list[dict[str, Any]]) -> Iterable[str]:
    """A table for each data set: a row for each method and epsilon, a column for each metric."""
    cells: dict[str, dict[tuple[str, str], dict[str, Mapping[str, Any]]]] = {}
    others = []
    for figure in figures:
        words = figure["case"].split(" ", 2)
        if len(words) == 3 and words[2] in _ORDER:
            row = cells.setdefault(words[0], {}).setdefault((words[1], words[2]), {})
            row[figure["metric"]] = figure
        else:
            others.append(figure)
    for table, rows in cells.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        lines = [f"### {table}", "", f"| method | | {' | '.join(metrics)} |"]
        lines.append("|---|---|" + "---|" * len(metrics))
        for (method, level), row in sorted(
            rows.items(), key=lambda item: (item[0][0], _ORDER.index(item[0][1]))
        ):
            shown = [_shown(row[m]) if m in row else "" for m in metrics]
            lines.append(f"| `{method}` | {level} | {' | '.join(shown)} |")
        yield "\n".join([*lines, ""])
    if others:
        yield "### Other lines of the same run\n\n" + _plain(others)


def _plain(figures: list[dict[str, Any]]) -> str:
    """One row a figure."""
    lines = ["| case | metric | figure | n |", "|---|---|---|---|"]
    for f in figures:
        peer = f" ({f['peer']})" if f.get("peer") else ""
        lines.append(f"| {f['case']}{peer} | {f['metric']} | {_shown(f)} {f['unit']} | {f['n']} |")
    return "\n".join([*lines, ""])


def _shown(figure: Mapping[str, Any]) -> str:
    """A mean and its spread."""
    mean = f"{figure['mean']:.3g}" if abs(figure["mean"]) < 1000 else f"{figure['mean']:,.0f}"
    return f"{mean} ± {figure['std']:.2g}" if figure["n"] > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
