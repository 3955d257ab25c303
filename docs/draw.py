# SPDX-License-Identifier: Apache-2.0
"""Draw docs/tables.svg from the JSON of a full run: python docs/draw.py build/bench/tabular.json."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "fedsynth", "svg.fonttype": "none", "font.size": 8}
)  # the same file from the same figures

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

OURS = {
    "marginals": ("tab:blue", 2.4),
    "aim": ("tab:orange", 1.6),
    "privsyn": ("tab:green", 1.2),
    "privmrf": ("tab:purple", 1.2),
    "mst": ("tab:brown", 1.2),
    "independent": ("tab:gray", 1.2),
}  # that are drawn by epsilon: colour and width
EPSILONS = (0.1, 1.0, 4.0, 10.0)
TABLE, LEVEL = "adult_coded", "epsilon=1"
SWIFT = (115.0, 0.0384)  # CPU-seconds and error on coded Adult at epsilon 1, by its measurement


def main() -> int:
    """Read the file named, write the picture beside this file."""
    figures: dict[tuple[str, str], Mapping[str, Any]] = {
        (f["case"], f["metric"]): f
        for name in sys.argv[1:]
        for f in json.loads(Path(name).read_text(encoding="utf-8"))
        if f["benchmark"] == "tabular"
    }
    if not figures:
        sys.stderr.write("give the JSON file of a full run of benchmarks/tabular.py\n")
        return 2
    picture, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _by_epsilon(left, figures)
    _by_cost(right, figures)
    path = Path(__file__).with_name("tables.svg")
    picture.savefig(path, metadata={"Date": None})
    return 0


def _by_epsilon(axes: Any, figures: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """The error of each method, the mean of all tables, by epsilon."""
    known = [case.partition(" ")[0] for case, _ in figures if case.startswith("mean-of-")]
    heading = known[0] if known else ""
    for method, (color, width) in OURS.items():
        cases = [(e, f"{heading} {method} epsilon={e:g}") for e in EPSILONS]
        points = [
            (e, figures[case, "2-way TVD"]["mean"])
            for e, case in cases
            if (case, "2-way TVD") in figures
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, lw=width, label=method)
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="2-way total variation distance")
    axes.set_title(f"{heading.replace('-', ' ')}, five seeds".capitalize())
    axes.set_xticks(EPSILONS, [f"{e:g}" for e in EPSILONS], minor=False)
    axes.xaxis.minorticks_off()
    _plain(axes)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(frameon=False)


def _by_cost(axes: Any, figures: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """The error of every method, ours and others', by what it costs."""
    points = [("SWIFT (its figures)", *SWIFT, True)]
    for (case, metric), error in figures.items():
        table, _, rest = case.partition(" ")
        method, _, level = rest.partition(" ")
        cost = figures.get((case, "CPU-s"))
        if (table, level, metric) == (TABLE, LEVEL, "2-way TVD") and cost is not None:
            points.append((method, cost["mean"], error["mean"], error["peer"] is not None))
    for name, cost_s, error_mean, is_peer in points:
        color = "tab:red" if is_peer else OURS.get(name, ("black", 0))[0]
        axes.plot(cost_s, error_mean, "s" if is_peer else "o", color=color, ms=4)
        bold = "bold" if name == "marginals" else "normal"
        axes.annotate(
            name, (cost_s, error_mean), xytext=(4, 3), textcoords="offset points",
            color=color, fontsize=7, fontweight=bold,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="CPU-seconds, learning and sampling")
    axes.set_title("Coded Adult, epsilon 1: ours (dots), others' (squares)")
    _plain(axes)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.margins(x=0.2)


def _plain(axes: Any) -> None:
    """Errors as numbers that people say."""
    ticks = (0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.15)
    low, high = axes.get_ylim()
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_ylim(low, high)


if __name__ == "__main__":
    sys.exit(main())
