# SPDX-License-Identifier: Apache-2.0
"""The command `fedsynth`: arguments in, facts out, one exit code for each kind of error.

What a command needs is imported when it runs, so that `fedsynth --help` answers at once.
"""

import functools
import json
import math
import re
import secrets
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

from ..core.errors import ConfigError, FedsynthError, Interrupted, SecurityRefusal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..server.ledger import Ledger

P = ParamSpec("P")
_BARS = 12  # columns that get a bar
_WIDE = 160  # columns of what is not shown on a terminal but read by other programs
_BUG = 70  # EX_SOFTWARE: not one of ours, so it is a bug
_EXTRAS = {
    "torch": "train",
    "opacus": "train",
    "ray": "simulation",
    "sklearn": "dev",
    "pandas": "dev",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

app = typer.Typer(
    name="fedsynth",
    help="Differentially private synthetic data from records that never leave their owners.",
    epilog="Exit codes: 0 ok, 1 failed run, 2 usage or configuration, 3 data, 4 privacy refusal,"
    " 5 security refusal, 6 network or quorum, 7 interrupted and resumable, 70 a bug.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
client = typer.Typer(
    name="client", help="A data owner's own look, before joining.", no_args_is_help=True
)
app.add_typer(client)


class Format(StrEnum):
    """How facts are printed."""

    TEXT = "text"
    JSON = "json"


class _State:
    """What holds for the whole process; set by `start`, read by `reported`."""

    debug = False


FormatOption = Annotated[Format, typer.Option("--format", help="Print for people or programs.")]


def main() -> None:
    """Run the command line; `--debug` may stand anywhere."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that 'module:Name' finds a person's own file
    app(arguments, prog_name="fedsynth")


def _print_version(wanted: bool) -> None:
    """Print the version and stop, whatever else was asked."""
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What comes before every command."""
    _State.debug = debug


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors become one message and the exit code of their kind."""

    @functools.wraps(command)
    def run_reported(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = kwargs.get("format") is Format.JSON
        try:
            command(*args, **kwargs)
        except FedsynthError as error:
            _fail(str(error), error.exit_code, error, as_json)
        except KeyboardInterrupt as stop:
            message = (
                "stopped. What a run had spent is on its ledger: see `fedsynth ledger`; an"
                " unfinished one goes on with `fedsynth run --resume FOLDER`"
            )
            _fail(message, Interrupted.exit_code, stop, as_json)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                _fail(_bug(error), _BUG, error, as_json)
            message = f"this needs {error.name}; install it with: pip install 'fedsynth[{extra}]'"
            _fail(message, ConfigError.exit_code, error, as_json)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  (the outermost boundary: say that it is a bug)
            _fail(_bug(error), _BUG, error, as_json)

    return run_reported


@app.command()
@reported
def init(
    file: Annotated[Path, typer.Argument(help="A .csv, .parquet, .jsonl or .npz file.")],
    user: Annotated[
        str | None, typer.Option(help="Column of user ids; without it each record is a user.")
    ] = None,
    num_users: Annotated[
        int | None, typer.Option(min=1, help="Public lower bound on the number of users.")
    ] = None,
    bounds: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=LOW,HIGH", help="Public bounds.")
    ] = None,
    categories: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=FILE|a,b,c", help="Public categories, one a line in a file."),
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Have the run find its bounds or categories, under its budget."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of free text, to be written anew.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep a column whose name looks identifying.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Column that a reader will want to predict.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="Budget of the run.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder for run.toml and schema.toml.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite them.")] = False,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Draft run.toml and schema.toml from a file's header and types."""
    from .init import draft

    made = draft(
        file,
        user=user,
        num_users=num_users,
        bounds={name: _low_high(name, text) for name, text in _pairs("bounds", bounds)},
        categories={name: _listed(text) for name, text in _pairs("categories", categories)},
        private=private or (),
        text=text,
        keep=keep or (),
        target=target,
        epsilon=epsilon,
        folder=out,
    )
    holes = made.holes  # read back from what is to be written, before any of it is
    paths = {out / "run.toml": made.run_toml, out / "schema.toml": made.schema_toml}
    for path in paths:
        if path.exists() and not force:
            raise ConfigError(f"{path} is there already; overwrite it with --force")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in paths.items():
        path.write_text(text, encoding="utf-8")
    if format is Format.JSON:
        from dataclasses import asdict

        _json({"columns": [asdict(c) for c in made.columns], "holes": holes})
        return
    console = _console()
    _say(console, "Read the header and the types only. Nothing from the rows is stored.")
    table = _table("column", "type", "role", "needs", "")
    for column in made.columns:
        facts = (column.name, column.type, column.role, column.needs, column.note)
        table.add_row(*map(_clean, facts))
    console.print(table)
    _say(console, f"Wrote {out / 'run.toml'} and {out / 'schema.toml'}.")
    if holes:
        _say(console, f"{len(holes)} places to fill in, marked FILL IN, before the next step.")
    _say(console, f"Next: fedsynth plan {out / 'run.toml'}")


@app.command()
@reported
def plan(
    file: Annotated[Path, typer.Argument(help="The run's TOML file.")] = Path("run.toml"),
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Say what a run will cost, before anything is read or spent."""
    from ..core.config import read_config
    from .init import check_filled
    from .plan import lines_of, outlook

    check_filled(file)
    seen = outlook(read_config(file))
    if format is Format.JSON:
        _json(seen.to_json())
        seen.check()
        return
    console = _console()
    _print_lines(console, lines_of(seen))
    _say(console, "Nothing has been read or spent.")
    seen.check()
    _say(console, f"Next: fedsynth run {file}")


@app.command()
@reported
def sweep(
    file: Annotated[Path, typer.Argument(help="The run's TOML file.")] = Path("run.toml"),
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Values to try, as strategy.clip=0.1,1."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="A file of records that anybody may see, to try them on.")
    ] = None,
    release: Annotated[
        Path | None, typer.Option(help="A release to try them on, instead: synthetic records.")
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Try them on the private records, and show the best alone."),
    ] = False,
    tries: Annotated[
        float | None, typer.Option(help="With --private: how many tries, on average.")
    ] = None,
    price: Annotated[
        bool, typer.Option("--price", help="With --private: say what it costs, and try nothing.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a private sweep that was stopped: its folder.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Tries of each setting.")] = 1,
    score: Annotated[
        str | None, typer.Option(metavar="accuracy|variation", help="What settings compare by.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where each try is kept as it ends.")
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Try settings, on public or synthetic records: free. Ctrl-C keeps what was tried."""
    from ..core.config import read_config
    from .init import check_filled
    from .stand_ins import Source
    from .sweep import Try, parse_grid, said
    from .sweep import sweep as do_sweep

    if private or resume is not None:
        if public or release or score or out or seeds != 1:
            raise ConfigError(
                "--private tries settings on the run's own records; it takes --grid, --tries and"
                " --price alone"
            )
        _sweep_private(file, grid or [], tries, resume, price=price, format=format)
        return
    if tries is not None or price:
        raise ConfigError("--tries and --price are for --private; a free sweep tries every setting")
    check_filled(file)
    config = read_config(file)
    source = Source.of(public, release)
    if score not in (None, "accuracy", "variation"):
        raise ConfigError(f"--score is accuracy or variation, not {score!r}")
    console = _console()
    quiet = format is Format.JSON
    if not quiet:
        _say(console, f"Trying on {source.said}. This is free: nobody's privacy is spent.")

    def on_try(done: int, total: int, tried: Try) -> None:
        if not quiet:
            _say(console, f"{done:>4}/{total}  {tried.score:.4f}  {said(tried.point)}")

    kept = out or file.with_name(f"{file.stem}.sweep.jsonl")
    found = do_sweep(
        *(config, parse_grid(grid or []), source),
        kept=kept,
        num_seeds=seeds,
        score="accuracy" if score == "accuracy" else "variation" if score else None,
        on_try=on_try,
    )
    if quiet:
        _json(found.to_json())
        return
    table = _table(found.score, "±", "noise", "CPU-s", *found.rows[0].point)
    for row in found.rows:
        values = [json.dumps(value) for value in row.point.values()]
        facts = ["refused"] if row.refused else [f"{row.mean:.4f}"]
        facts += [
            "" if math.isnan(x) else f"{x:.3g}"
            for x in (row.stddev, row.noise_multiplier, row.cpu_s)
        ]
        table.add_row(*map(_clean, (*facts, *values)))
    console.print(table)
    for row in found.rows:
        if row.refused:
            _say(console, f"refused: {said(row.point)}: {row.refused}", style="yellow")
    better = "higher" if found.score == "accuracy" else "lower"
    _say(console, f"{found.score.capitalize()}: {better} is better; the best settings come first.")
    _say(
        console,
        f"Free: these tries saw {found.source}, and no private record. Settings that are best"
        " there need not be best for the population.",
    )
    _say(console, f"Kept in {kept}; the same command goes on from there.")


def _sweep_private(
    file: Path,
    grid: list[str],
    tries: float | None,
    resume: Path | None,
    *,
    price: bool,
    format: Format,  # noqa: A002
) -> None:
    """Try settings on the private records, or go on with it, and print what is shown of it."""
    from ..core.config import read_config
    from ..core.randomness import OsKeyStream
    from .finished import finished
    from .init import check_filled
    from .private_sweep import planned, private_sweep, resumed
    from .sweep import parse_grid

    if resume is not None:
        asked = resumed(resume)
    else:
        check_filled(file)
        asked = planned(read_config(file), parse_grid(grid), mean=tries)
    console = _console()
    quiet = format is Format.JSON
    if not quiet:
        _print_lines(console, asked.lines)
    if price:
        if quiet:
            _json(asked.to_json())
        else:
            _say(console, "Nothing has been read or spent.")
        return
    if not quiet:
        _say(console, "Trying. How far this is, is secret. Ctrl-C saves.")
    folder = private_sweep(asked, stream=OsKeyStream())
    done = finished(_near(folder), asked.config)
    if quiet:
        _json(done.to_json() | {"settings": done.card.settings})
        return
    for key in asked.grid:
        name = key.split(".", 1)[1]
        value = done.card.settings.get(name, done.card.strategy)
        _say(console, f"Best: {key} = {json.dumps(value)}")
    _print_lines(console, done.lines)
    _say(console, f"Next: fedsynth verify {done.folder}")


@app.command()
@reported
def run(
    file: Annotated[Path | None, typer.Argument(help="The run's TOML file.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run that was stopped: its folder.")
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Do a run: simulate it, or drive a SuperLink. Ctrl-C saves."""
    from ..core.config import read_config
    from ..server.planned import unfinished
    from .finished import finished
    from .init import check_filled
    from .progress import shown
    from .run import run as do_run

    if (file is None) == (resume is None):
        raise ConfigError("give a run file or --resume FOLDER, one of the two")
    if file is not None:
        check_filled(file)
        config = read_config(file)
    elif resume is not None:
        config = unfinished(resume).config
    console = _console()
    with shown(console, quiet=format is Format.JSON) as on_event:
        folder = do_run(None if resume else config, resume=resume, on_event=on_event)
    done = finished(_near(folder), config)
    if format is Format.JSON:
        _json(done.to_json())
        return
    if done.quality is not None:
        from .quality import quality_table

        _say(
            console,
            "Site only: what follows compares with the real records exactly; it never leaves.",
            style="red",
        )
        console.print(quality_table(done.quality))
        console.print(_bars(done.by_column))
    for warning in (*done.unread, *filter(None, [done.too_few])):
        _say(console, f"Site only: {warning}.", style="red")
    _print_lines(console, done.lines)
    _say(console, f"Next: fedsynth verify {done.folder}")
    _say(console, f"      fedsynth sample {done.folder} -n 100000 -o more.parquet")


@app.command()
@reported
def sample(
    release: Annotated[Path, typer.Argument(help="A release folder.")],
    num_records: Annotated[
        int, typer.Option("--num-records", "-n", min=1, help="How many records.")
    ] = 10_000,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .parquet, .csv or .jsonl file to write.")
    ] = Path("sample.parquet"),
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed gives the same records.")
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Draw more synthetic records from a release; this costs no privacy."""
    from ..server.release import Release
    from .export import check_ending, write_table

    check_ending(out)
    chosen = secrets.randbits(32) if seed is None else seed
    tables = Release.open(release).sample_tables(num_records, chosen)
    files = [out] if len(tables) == 1 else [out.with_stem(f"{out.stem}_{t}") for t in tables]
    for file, table in zip(files, tables.values(), strict=True):
        write_table(table, file)
    shown = " and ".join(map(str, files))
    if format is Format.JSON:
        extra = {"files": [str(file) for file in files]} if len(files) > 1 else {}
        _json({"num_records": num_records, "seed": chosen, "file": str(files[-1]), **extra})
        return
    console = _console()
    _say(console, f"Wrote {num_records:,} synthetic records to {shown} (seed {chosen}).")
    _say(console, "Sampling costs no privacy: the promise on the release's card covers them.")


@app.command()
@reported
def verify(
    release: Annotated[Path, typer.Argument(help="A release folder.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Also learn the synthesizer again from the sums.")
    ] = False,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Check a release offline, with nothing but its folder."""
    from ..server.release import verify as verify_release

    checks = verify_release(release, replay=replay)
    failed = [check for check in checks if not check.ok]
    if format is Format.JSON:
        _json(
            {
                "ok": not failed,
                "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
            }
        )
    else:
        console = _console()
        for check in checks:
            _mark(console, check.ok, check.name, check.detail)
        _say(
            console,
            "Not covered: administrators of a site, data outside these files, and groups of people"
            " (two together have about twice the epsilon).",
        )
    if failed:
        raise SecurityRefusal(
            f"{len(failed)} of {len(checks)} checks failed; do not rely on this release, and ask"
            " whoever gave it to you for an unchanged copy"
        )


@app.command()
@reported
def ledger(
    source: Annotated[
        Path, typer.Argument(help="A ledger, or a run's TOML file that names one.")
    ] = Path("ledger.db"),
    population: Annotated[
        str | None, typer.Option(help="One population; without it, all of them.")
    ] = None,
    set_epsilon: Annotated[
        float | None, typer.Option(help="Change the most that --population may ever spend.")
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Show what has been spent, by population and by query."""
    from dataclasses import asdict

    from ..core.config import read_config
    from ..server.ledger import Ledger
    from ..server.statement import statement

    path = source
    if source.suffix == ".toml":
        config = read_config(source)
        path = config.path(config.ledger)
    if not path.exists():
        raise ConfigError(f"there is no ledger {path}; nothing was ever spent there")
    with Ledger(path) as book:
        book.verify()
        if set_epsilon is not None:
            _set_cap(book, population, set_epsilon)
        found = [p for p in book.populations() if population in (None, p.name)]
        if population is not None and not found:
            statement(book, population)  # says which ones there are
        accounts = [(p, statement(book, p.name)) for p in found]
    if format is Format.JSON:
        _json(
            {
                "ledger": str(path),
                "populations": [
                    {
                        "name": p.name,
                        "unit": p.unit,
                        "spent": p.epsilon,
                        "cap": p.cap.epsilon,
                        "delta": p.cap.delta,
                        "left": max(0.0, p.cap.epsilon - p.epsilon),
                        "rows": [asdict(row) for row in rows],
                    }
                    for p, rows in accounts
                ],
            }
        )
        return
    console = _console()
    for p, rows in accounts:
        _say(
            console,
            f"{p.name}: epsilon {p.epsilon:.2f} of {p.cap.epsilon:.2f} spent, for each {p.unit},"
            f" at delta {p.cap.delta:g}",
        )
        table = _table("when", "run", "what", "epsilon", "total", "state")
        for row in rows:
            table.add_row(
                row.when[:16].replace("T", " "),
                _clean(row.run.rsplit("-", 1)[-1]),
                _clean(row.what),
                f"{row.epsilon:.3f}",
                f"{row.total:.3f}",
                row.state,
            )
        console.print(table)
    _say(console, "The chain of entries is whole.")


def _set_cap(book: "Ledger", population: str | None, epsilon: float) -> None:
    """Change a population's budget; the change is an entry of the ledger like any other."""
    from ..core.privacy import Budget

    known = {p.name: p.cap for p in book.populations()}
    if population not in known:
        raise ConfigError(
            f"--set-epsilon needs --population, one of: {', '.join(known) or 'none yet'}"
        )
    book.set_cap(population, Budget(epsilon, known[population].delta))


@app.command()
@reported
def check(
    strategy: Annotated[str, typer.Argument(help="A strategy's name, or your own: module:Name.")],
    setting: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting, as in TOML.")
    ] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Try what every strategy owes on populations made to break it."""
    from ..strategies.registry import build_strategy
    from .check import check_strategy

    findings = check_strategy(build_strategy(strategy, _settings(setting)))
    failed = [finding for finding in findings if not finding.ok]
    if format is Format.JSON:
        _json(
            {
                "ok": not failed,
                "findings": [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in findings],
            }
        )
    else:
        console = _console()
        for finding in findings:
            _mark(console, finding.ok, finding.name, finding.detail)
    if failed:
        raise FedsynthError(f"{strategy} does not keep {len(failed)} of {len(findings)} promises")


@client.command("check")
@reported
def client_check(
    place: Annotated[
        Path, typer.Argument(help="Your data file, or a folder of it, schema.toml, policy.toml.")
    ],
    schema: Annotated[Path | None, typer.Option(help="The population's public schema.")] = None,
    policy: Annotated[Path | None, typer.Option(help="What you allow.")] = None,
    user: Annotated[str | None, typer.Option(help="Column of user ids.")] = None,
    format: FormatOption = Format.TEXT,  # noqa: A002
) -> None:
    """Look at a shard and a policy before joining. What it prints stays with you."""
    from ..client.look import look

    seen = look(place, schema=schema, policy=policy, user=user)
    if format is Format.JSON:
        _json(seen.to_json())
        return
    console = _console()
    _say(console, "Site only: exact facts of private records. They stay here.", style="red")
    _print_lines(console, seen.lines)


def _pairs(option: str, given: list[str] | None) -> list[tuple[str, str]]:
    """`NAME=VALUE` arguments, taken apart."""
    found = []
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--{option} takes COLUMN=VALUE, not {text!r}")
        found.append((name, value))
    return found


def _low_high(name: str, text: str) -> tuple[float, float]:
    """Bounds of a number, as `LOW,HIGH`."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--bounds {name} takes LOW,HIGH, not {text!r}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--bounds {name} must rise and be finite, not {text!r}")
    return low, high


def _listed(text: str) -> tuple[str, ...]:
    """Categories from a file, one a line, or as `a,b,c`."""
    path = Path(text)
    if path.suffix == ".txt" or path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the categories in {path}: {error}") from error
        return tuple(line.strip() for line in lines if line.strip())
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _settings(given: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` arguments as a strategy's settings; values read as in TOML, else as text."""
    import tomllib

    found: dict[str, Any] = {}
    for key, text in _pairs("setting", given):
        try:
            found[key.replace("-", "_")] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.replace("-", "_")] = text
    return found


def _near(path: Path) -> Path:
    """A path as it reads from here, where that is shorter."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _console(*, stderr: bool = False) -> "Console":
    """Where text for people goes."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE)


def _say(console: "Console", text: str, *, style: str = "") -> None:
    """A line as it is: no markup, no wrapping, no control codes."""
    from rich.text import Text

    console.print(Text(_clean(text), style=style), soft_wrap=True)


def _clean(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return _CONTROL.sub("", text)


def _print_lines(console: "Console", lines: list[tuple[str, str]]) -> None:
    """Labelled lines, the labels in a column of their own."""
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        _say(console, f"{label:<{width}}{text}")


def _mark(console: "Console", ok: bool, name: str, detail: str) -> None:
    """A check, with what was found."""
    mark, style = ("✓", "green") if ok else ("✗", "bold red")
    _say(console, f"{mark} {name}{f': {detail}' if detail else ''}", style=style)


def _table(*headings: str) -> "Table":
    """An empty table without lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading in ("epsilon", "total")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    return table


def _bars(by_column: dict[str, float]) -> "Table":
    """A bar for each column's distance, the worst columns first."""
    from rich.bar import Bar

    table = _table("column", "total variation distance", "")
    longest = max(*by_column.values(), 0.05)
    for name, distance in list(by_column.items())[:_BARS]:
        table.add_row(_clean(name), Bar(longest, 0, distance, width=30), f"{distance:.4f}")
    if len(by_column) > _BARS:
        table.add_row(f"and {len(by_column) - _BARS} more below", "", "")
    return table


def _json(data: Any) -> None:
    """Facts for programs, as one JSON object on standard output."""
    typer.echo(json.dumps(data, indent=1, default=str))


def _bug(error: BaseException) -> str:
    """What is said of an error that nobody foresaw."""
    return (
        f"a bug in fedsynth: {type(error).__name__}. What was spent is on the ledger; nothing else"
        " changed. Run it again as `fedsynth --debug ...` and report what that prints, once you"
        " have seen that it shows no record"
    )


def _fail(message: str, code: int, error: BaseException, as_json: bool) -> NoReturn:
    """Say what went wrong, once, and end with its exit code."""
    if as_json:
        _json({"error": message, "exit_code": code})
    else:
        first, *rest = message.replace("; ", "\n").splitlines()
        console = _console(stderr=True)
        _say(console, f"error: {first}", style="bold red")
        for line in rest:
            _say(console, f"  {line.strip()}")
    if _State.debug:
        traceback.print_exception(error)
    raise typer.Exit(code)
