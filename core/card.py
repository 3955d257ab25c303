# SPDX-License-Identifier: Apache-2.0
"""The card of a release: what was promised to whom, what it cost, and what was public.

Every figure on a card is a fact of the plan, the ledger or the public schema; none is computed
from private records but through the noisy sums that the plan paid for.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError

from . import accounting
from .errors import DataError, FedsynthError
from .leaf import Leaf
from .privacy import NoisePlacement, PrivacyUnit, Relation
from .schema import Column, ImageColumn, Schema, TextColumn

FORMAT = 1
PACKAGES = ("client", "core", "models", "server", "simulation", "strategies")
State = Literal["sealed", "void"]

_TRUST = {
    NoisePlacement.CENTRAL: (
        "The server adds the noise. Each client sent the exact, clipped sum over its users, so"
        " the promise holds against everyone who sees the release, and not against whoever runs"
        " the server: that server was trusted with every client's exact sums."
    ),
    NoisePlacement.LOCAL: (
        "Each client added enough noise of its own before anything left it. The promise holds"
        " against the server, the network and everyone who sees the release; nobody but the"
        " user's own client was trusted."
    ),
    NoisePlacement.DISTRIBUTED: (
        "Each client added a share of the noise, and only the sum of all clients was visible. The"
        " promise holds for that sum. It rests on the sum being formed where no single client's"
        " part can be seen, and on as many clients adding their share as the plan says."
    ),
}
_RELATION = {
    Relation.ADD_OR_REMOVE: "with all of one's records and without them",
    Relation.ZERO_OUT: "with one's records and with zeros in their place",
}
_MARKUP = re.compile(r"([\\`*_\[\]<>|#&~])")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class CardRound:
    """One round of the run.

    Attributes:
      round: Its position, from 1.
      attempt: Which attempt gave the sum.
      query: Name of the question.
      noise_multiplier: Of the noise that was charged.
      sampling_prob: Probability with which each user answered.
      state: `sealed`, or `void`: charged, and nothing came of it.
      num_clients: Clients whose sums are in it; 0 for a void round.
      chooses: Candidates that were chosen in private, instead of a sum; 0: it is a sum.
      records: Most vectors that a user had in the sum, each of which joined by a coin of its own.
      rounds: Rounds of the series that it belongs to, which is charged once.
      series: Name of that series, or "".
      position: Which of its rounds it is, from 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    round: int
    attempt: int
    query: str
    noise_multiplier: float
    sampling_prob: float
    state: State
    num_clients: int
    chooses: int = 0
    records: int = 1
    rounds: int = 1
    series: str = ""
    position: int = 0

    @property
    def leaf(self) -> Leaf:
        """The sum, or the series, that it belongs to."""
        return Leaf(self.noise_multiplier, self.sampling_prob, self.records, self.rounds)


@dataclass(frozen=True)
class CardFile:
    """One file of the release, by its path inside the folder."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    sha256: str
    num_bytes: int


def _schema(value: Any) -> Schema:
    """A schema from its plain data, or as it is."""
    return value if isinstance(value, Schema) else Schema.from_json(value)


@dataclass(frozen=True)
class Card:
    """Everything that stands on a card; `card.json` is this, field by field.

    Attributes:
      run: Identity of the run.
      population: Whose budget paid.
      created: Date and time, ISO 8601, given by the caller.
      fedsynth: Version of this package.
      unit: What one change of the data is protected.
      num_users: Declared, public lower bound on the users.
      budget: The epsilon that the run was allowed.
      epsilon: Price of the committed plan at `delta`; at most `budget`.
      delta: At which everything is priced.
      accountant: What gave `epsilon`.
      rdp_epsilon: The looser figure it was checked against.
      event: The committed plan, `accounting.to_json`.
      placement: Where noise was added.
      noise_is_secret: Whether nobody can predict the noise; false means NOT PRIVATE.
      strategy: Name of the method.
      settings: Its settings.
      noise_multiplier: The run's one noise dial.
      aggregator: How clients' sums became one.
      aggregator_settings: Its settings.
      engine: What carried the messages.
      num_clients: Clients of the run.
      quorum: Fewest clients whose sums made a round.
      seed: Of public randomness.
      num_records: Synthetic records in `data/`.
      schema: Public schema, with the origin of each column.
      code_digest: SHA-256 of this package's code.
      config_digest: SHA-256 of the run's configuration.
      parents: Runs whose releases this one was built on.
      caution: What the method warns the users of its records of; empty for most methods.
      describes: Whom its records describe, where the method says so itself.
      findings: What the run found out about its records under its budget; empty for most.
      selection: Where the run is the try of a private sweep that is shown: what was tried, `grid`,
        and what the whole sweep costs, `event`, of which `epsilon` is the price. Else empty.
      rounds: What was asked, in order.
      files: Every other file of the release but `card.md`.
      format: Version of this layout.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    run: str
    population: str
    created: str
    fedsynth: str
    unit: PrivacyUnit
    num_users: int
    budget: float
    epsilon: float
    delta: float
    accountant: str
    rdp_epsilon: float
    event: list[dict[str, Any]]
    placement: NoisePlacement
    noise_is_secret: bool
    strategy: str
    settings: dict[str, Any]
    noise_multiplier: float
    aggregator: str
    aggregator_settings: dict[str, Any]
    engine: str
    num_clients: int
    quorum: int
    seed: int
    num_records: int
    schema: Annotated[Schema, PlainValidator(_schema)]
    code_digest: str
    config_digest: str
    parents: tuple[str, ...] = ()
    caution: str = ""
    describes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    selection: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[CardRound, ...] = ()
    files: tuple[CardFile, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("budget", "epsilon", "delta", "rdp_epsilon", "noise_multiplier"):
            value = float(getattr(self, name))
            if not math.isfinite(value):
                raise DataError(f"a card's {name} must be a finite number, not {value}")
            object.__setattr__(self, name, value)
        for name in ("event", "settings", "aggregator_settings", "selection"):  # as JSON has them
            object.__setattr__(self, name, json.loads(_text(getattr(self, name))))
        _check_selection(self.selection)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        data = asdict(self) | {"schema": self.schema.to_json()}
        data["unit"] = {"level": self.unit.level} | data["unit"]
        return {"format": data.pop("format")} | data

    def to_text(self) -> str:
        """The content of `card.json`."""
        return _text(self.to_json(), indent=1) + "\n"

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Card":
        """The card that plain data describes.

        Raises:
          DataError: A key is unknown or missing, or a value cannot be.
        """
        if data.get("format") != FORMAT:
            raise DataError(
                f"this version reads cards of format {FORMAT}, not {data.get('format')!r}"
            )
        unit = data.get("unit")
        if isinstance(unit, Mapping):
            data = {**data, "unit": {k: v for k, v in unit.items() if k != "level"}}
        try:
            card = _adapter().validate_json(_text(data), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise DataError(f"not a card: {key}: {problem['msg']}") from error
        except (FedsynthError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a card: {error}") from error
        if isinstance(unit, Mapping) and unit.get("level") != card.unit.level:
            raise DataError("not a card: unit.level contradicts unit.column")
        return card

    def to_markdown(self) -> str:
        """The content of `card.md`: the same facts for a reader, bound to `card.json` by hash."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701  (`finalize` escapes every value for Markdown)
            finalize=_plain,
        )
        template = environment.from_string(
            Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
        )
        return template.render(
            card=self,
            columns=[*self.schema.columns, *filter(None, (self.schema.image, self.schema.text))],
            aggregator=self.aggregator
            + (f" {_text(self.aggregator_settings)}" if self.aggregator_settings else ""),
            counted=[*self.describes, *_counted(self)],
            domain=_domain,
            epsilon=_up(self.epsilon),
            twice=_up(2 * self.epsilon),
            json_sha256=hashlib.sha256(self.to_text().encode()).hexdigest(),
            kinds="; ".join(_sampling(self)),
            packages=", ".join(PACKAGES),
            prior=0.5,
            selection=_selection(self),
            settings=[(key, _text(value)) for key, value in sorted(self.settings.items())],
            relation=_RELATION[self.unit.relation],
            single=self.unit.level == "record",
            trust=_TRUST[self.placement],
            choices=[r.round for r in self.rounds if r.chooses],
            void=[r.round for r in self.rounds if r.state == "void"],
            worst=_percent(accounting.largest_odds(self.epsilon)),
            year=self.created[:4],
        )


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the names and contents of this package's own `.py` files.

    The same for a checkout and for what was installed from it.
    """
    root = Path(__file__).resolve().parent.parent
    found = [root / "__init__.py"]
    for package in PACKAGES:
        found += (root / package).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Card]:
    """Checks plain data against the fields of a card."""
    return TypeAdapter(Card)


def _text(data: Any, *, indent: int | None = None) -> str:
    """JSON text; refuses what JSON cannot hold."""
    return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """A value of the card as Markdown shows it literally, on one line, without control codes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return value
    visible = "".join(c if c.isprintable() else " " for c in value)
    return _MARKUP.sub(r"\\\1", visible)


def _up(epsilon: float) -> str:
    """An epsilon to four places, rounded up so that it never promises too much."""
    return f"{math.ceil(epsilon * 1e4 - 1e-9) / 1e4:.10g}"


def _percent(share: float) -> str:
    """A probability in words, rounded up so that it never promises too much."""
    digits = 0 if share < 0.985 else 1 if share < 0.9985 else 3
    step = 10.0**digits
    return f"{min(100.0, math.ceil(share * 100 * step - 1e-9) / step):.{digits}f} %"


def _domain(column: Column | ImageColumn | TextColumn) -> str:
    """The public cells of a column, shortened."""
    if isinstance(column, TextColumn):
        return f"free text, of which {column.max_bytes:,} bytes count"
    if isinstance(column, ImageColumn):
        return "uint8 pixels, " + " x ".join(str(side) for side in column.shape)
    if column.is_open:
        cells = "found by the run: see the schema in synthesizer/synthesizer.json"
    elif column.bounds is not None:
        low, high = (column.spelled(bound) for bound in column.bounds)
        cells = f"{low} to {high} in {column.num_bins} cells"
    else:
        shown = ", ".join(column.categories[:4])
        more = len(column.categories) - 4
        cells = shown if more <= 0 else f"{shown} and {more} more"
        cells += ", in this order" if column.is_ordered else ""
    return cells + ("; missing" if column.missing else "")


def _counted(card: Card) -> list[str]:
    """Whom the method's tables count, and how a user's part was bounded; nothing if it is unsaid.

    Read from the settings that strategies of marginals share (`strategies/parts/measuring.py`).
    """
    settings, weight = card.settings, card.settings.get("weight")
    if weight == "user":
        return [
            "It counts every user equally: a user's records were averaged, so each of many records"
            " weighs less than an only one. It describes a record drawn at random from a user"
            " drawn at random, not the table of records.",
            "Nothing was clipped: a mean of records is never longer than one record.",
        ]
    if weight != "record":
        return []
    if card.unit.level == "record":
        lines = ["It counts every record equally; each record stands for itself."]
    else:
        lines = [
            "It counts every record equally, but for what the clip takes: a user whose records"
            " together are longer than the bound counts with all of them, scaled down. Users with"
            " many records are therefore somewhat underrepresented."
        ]
    quantile, bound = settings.get("norm_quantile"), settings.get("max_norm")
    measured = f"was measured in the first sum, with a share of {settings.get('norm_share')} of the"
    if quantile is not None:
        source = f"{measured} budget: what a share of {quantile} of all users stays below"
    elif bound == "auto":
        source = f"{measured} budget: what clip and noise together were expected to err least at"
    else:
        source = f"was declared: {bound} times the length of one record"
    return [*lines, f"The bound of a user's part (max_norm) {source}."]


def _check_selection(selection: Mapping[str, Any]) -> None:
    """Refuse what tells of no sweep."""
    if not selection:
        return
    try:
        _, chosen = accounting.parts(accounting.from_json(selection["event"]))
        if not chosen or not all(isinstance(values, list) for values in selection["grid"].values()):
            raise DataError("a card's selection holds no tries, or a grid without values")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("a card's selection has a grid of lists and an event") from error


def _selection(card: Card) -> list[str]:
    """What a reader must know of a release whose settings were chosen on the private records."""
    if not card.selection:
        return []
    _, chosen = accounting.parts(accounting.from_json(card.selection["event"]))
    alone = accounting.epsilon_of(accounting.from_json(card.event), card.delta)
    grid = {key: _text(values) for key, values in card.selection["grid"].items()}
    tried = "; ".join(f"{key} out of {values}" for key, values in sorted(grid.items()))
    return [
        f"The method's settings were chosen on the private records themselves: {tried}.",
        *(
            "A random number of tries was made, which nobody is shown,"
            f" {best.mean:g} on average ({best.law.name.lower()}), each with settings drawn afresh;"
            " this is the one with the highest noisy score."
            for best in chosen
        ),
        f"The epsilon above is the price of the whole sweep; of this try alone it is {_up(alone)},"
        " which is not what is promised.",
        "Its own score, the sum named score, is too high on average, for it was chosen by it. What"
        " the other settings gave, and how many tries there were, cannot be told from this folder.",
        "The price holds against readers of this folder. Whoever saw the run itself saw all tries,"
        " and to them it cost as much as all of these together.",
    ]


def _sampling(card: Card) -> list[str]:
    """How users took part, a sentence for each kind of sum in the plan."""
    counts: dict[tuple[float, int, int], int] = {}
    for entry in card.event:
        kind = (
            float(entry["sampling_prob"]),
            int(entry.get("records", 1)),
            int(entry.get("rounds", 1)),
        )
        counts[kind] = counts.get(kind, 0) + int(entry["count"])
    lines = []
    for (prob, records, rounds), count in sorted(counts.items(), reverse=True):
        sums = f"{count} {'sum' if count == 1 else 'sums'}"
        whom = "each user" if records == 1 else f"each record, at most {records:,} of a user,"
        if rounds > 1:
            lines.append(
                f"{count} series of {rounds:,} sums each, in which users took turns and noise was"
                " correlated: the whole of a series costs what one sum does"
            )
        elif prob < 1:
            lines.append(
                f"{sums} that {whom} joined with probability {prob:g}, by a coin that only the"
                " user's client saw"
            )
        else:
            lines.append(f"{sums} over all users" + ("" if records == 1 else ", record by record"))
    return lines
