# SPDX-License-Identifier: Apache-2.0
"""Collect a benchmark's figures, print them as a table, and write them as JSON.

Import this before numpy or torch: it holds them to one thread, so that CPU-seconds mean work
done and not waiting, and it makes `fedsynth` importable from the checkout.

    import report  # first

    def main() -> int:
        args = report.parser(__doc__).parse_args()
        figures = report.Report("throughput", args)
        figures.add("mlp", "users per CPU-second", [900.0, 910.0], unit="users/s")
        figures.claim("mlp: at least 800 users per CPU-second", 905.0 >= 800)
        return figures.finish()
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

for _variable in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
):
    os.environ[_variable] = "1"
_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(1, _ROOT)

EXACT = "these figures compare with real records as they are: not private, for simulation only"
CLAIM = "claim"  # the metric under which a claim stands in the JSON: 1 if it holds, else 0


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
      benchmark: The benchmark's file, without its ending.
      case: What was measured: a method, a data set, an epsilon.
      metric: Name of the quantity.
      mean: Over `n` repetitions.
      std: Sample standard deviation over them; 0 for one.
      n: Repetitions.
      unit: Of `mean` and `std`; `""` for a bare ratio.
      peer: Whose figure it is, where it is not this package's own.
    """

    benchmark: str
    case: str
    metric: str
    mean: float
    std: float
    n: int
    unit: str
    peer: str | None = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark, `--quick` and `--json FILE`; add your own to it."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="a smoke run: small and imprecise")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return options


class Report:
    """The figures and claims of one run of a benchmark."""

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.benchmark = benchmark
        self.quick = bool(args.quick)
        self.figures: list[Figure] = []
        self._json: Path | None = args.json
        self._claims: list[tuple[str, bool]] = []
        self._notes: list[str] = []
        self._started = time.process_time()

    def add(
        self,
        case: str,
        metric: str,
        values: Sequence[float] | float,
        *,
        unit: str,
        peer: str | None = None,
    ) -> Figure:
        """Record a figure from its repetitions, one or more."""
        known = [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
        std = statistics.stdev(known) if len(known) > 1 else 0.0
        figure = Figure(
            self.benchmark, case, metric, statistics.fmean(known), std, len(known), unit, peer
        )
        self.figures.append(figure)
        return figure

    def note(self, line: str) -> None:
        """Say something beneath the table: a row that was left out, and why."""
        self._notes.append(line)

    def claim(self, sentence: str, holds: bool) -> None:
        """State what the figures must show; one that does not hold fails a full run."""
        self._claims.append((sentence, bool(holds)))

    def finish(self, *, by_case: bool = False) -> int:
        """Print everything, write the JSON, and give the command's exit code.

        Args:
          by_case: One line a case with a column a metric, rather than one line a figure.

        Returns:
          0; or 1 if a claim does not hold in a full run. `--quick` proves no figure.
        """
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 230 if by_case else 140)
        console.print(self._by_case() if by_case else self._by_figure())
        for line in self._notes:
            console.print(f"note: {line}", highlight=False)
        for sentence, holds in self._claims:
            console.print(f"{'holds ' if holds else 'MISSED'}  {sentence}", highlight=False)
        console.print(
            f"{machine()}; {time.process_time() - self._started:.0f} CPU-s in this process",
            highlight=False,
        )
        if self._json is not None:
            claims = [
                Figure(self.benchmark, sentence, CLAIM, float(holds), 0.0, 1, "")
                for sentence, holds in self._claims
            ]
            every = [asdict(f) for f in (*self.figures, *claims)]
            text = json.dumps(every, indent=1, allow_nan=False)
            self._json.write_text(text + "\n", encoding="utf-8")
        failed = not all(holds for _, holds in self._claims)
        return 1 if failed and not self.quick else 0

    def _table(self) -> "Table":
        """An empty table with its title."""
        from rich.table import Table

        return Table(title=f"{self.benchmark}{' --quick' if self.quick else ''}")

    def _by_figure(self) -> "Table":
        """One line a figure."""
        table = self._table()
        for heading in ("case", "metric", "mean", "± std", "n", "unit", "peer"):
            table.add_column(
                heading, justify="right" if heading in ("mean", "± std", "n") else "left"
            )
        for f in self.figures:
            spread = f"{f.std:.2g}" if f.n > 1 else ""
            table.add_row(f.case, f.metric, f"{f.mean:.4g}", spread, str(f.n), f.unit, f.peer or "")
        return table

    def _by_case(self) -> "Table":
        """One line a case."""
        metrics = list(dict.fromkeys(f.metric for f in self.figures))
        table = self._table()
        table.add_column("case", no_wrap=True)
        table.add_column("n", justify="right")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for case in dict.fromkeys(f.case for f in self.figures):
            mine = {f.metric: f for f in self.figures if f.case == case}
            cells = [
                f"{f.mean:.4g}" + (f" ±{f.std:.1g}" if f.n > 1 else "")
                if (f := mine.get(metric))
                else ""
                for metric in metrics
            ]
            peers = {f" ({f.peer})" for f in mine.values() if f.peer}
            table.add_row(case + "".join(peers), str(max(f.n for f in mine.values())), *cells)
        return table


@contextmanager
def cpu_timer() -> Iterator[list[float]]:
    """CPU-seconds of this process within the block: the one item of the list, once it ends."""
    spent: list[float] = []
    started = time.process_time()
    try:
        yield spent
    finally:
        spent.append(time.process_time() - started)


def peak_rss_bytes() -> int:
    """The most memory this process has held so far; it never falls, so measure in a child."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """The machine in a few words: processor and cores."""
    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
