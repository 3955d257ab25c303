# SPDX-License-Identifier: Apache-2.0
"""Write a release folder in one step, open it, and verify it with nothing else at hand.

::

    RUN/
    ├── data/                     synthetic records: parquet, and npz where there are images
    ├── synthesizer/              synthesizer.json, tensors.safetensors; no pickle
    ├── transcript.jsonl          the run's entries of the ledger
    ├── transcript.safetensors    the noised integer sums, one a round
    ├── generations/              what language models and the like made, where the run used one
    ├── card.json, card.md        what was promised, for programs and for people
    └── SHA256SUMS                every file above; `sha256sum -c SHA256SUMS` checks it

A folder that is there is whole: it is written beside its place, synced, and renamed. What its
hashes cannot show is that somebody wrote the whole of it anew, with other figures. For that,
hold the last entry's hash against the ledger it came from.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..core import accounting
from ..core.answering import answered
from ..core.card import Card, CardFile, code_digest
from ..core.decode import SINGLE, decode, joined_table, save_records, split_tables
from ..core.errors import ConfigError, FedsynthError, SchemaError, SecurityRefusal
from ..core.files import sync
from ..core.leaf import num_rounds_of
from ..core.query import Strategy, caution_of, describes_of
from ..core.records import Family, Records
from ..core.schema import Schema
from ..core.seeds import rounds_rng, sample_rng
from ..core.synthesizer import Synthesizer
from ..core.wire import canonical
from ..strategies.registry import build_strategy, synthesizer_class
from .folder import SUMS, digest, files_in, is_name, list_text, listed, read, write
from .generations import recorded
from .ledger import Ledger
from .transcript import ENTRIES, NOISY_SUMS, Transcript, tensors_in

if TYPE_CHECKING:
    import pyarrow as pa
    from dp_accounting.dp_event import DpEvent

    from .planned import Plan

CARD, PAGE = "card.json", "card.md"
SETTINGS, TENSORS = "synthesizer/synthesizer.json", "synthesizer/tensors.safetensors"
TABLE, IMAGES = "data/synthetic.parquet", "data/images.npz"  # as `save_records` names them
PARTIAL = ".partial"


@dataclass(frozen=True)
class Check:
    """One thing that was verified; `detail` says what was found, and in which file."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All that was verified of a release."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in self.checks)

    def require(self) -> None:
        """Go on only if everything holds.

        Raises:
          SecurityRefusal: Something does not; the message says what, and in which file.
        """
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.ok]
        if failed:
            raise SecurityRefusal("the release is not what it claims to be\n" + "\n".join(failed))


@dataclass(frozen=True)
class Release:
    """A release folder whose card was found to be whole; made by `open`.

    Whatever is read from it later is held against the card's hashes first.
    """

    folder: Path
    card: Card

    @staticmethod
    def open(folder: Path | str) -> "Release":
        """The release in a folder.

        Raises:
          ConfigError: There is no release.
          SecurityRefusal: Its card, page or list of hashes was changed; names the file.
        """
        folder = Path(folder)
        if not (folder / CARD).exists() and not (folder / SUMS).exists():
            raise ConfigError(f"{folder} is not a release: it holds no {CARD}{_go_on(folder)}")
        hashes = listed(folder)
        text = read(folder, CARD, sha256=hashes.get(CARD, ""))
        page = read(folder, PAGE, sha256=hashes.get(PAGE, ""))
        try:
            card = Card.from_json(json.loads(text))
        except (FedsynthError, ValueError, AttributeError, RecursionError) as error:
            raise SecurityRefusal(f"{CARD} is not a card: {error}") from error
        known = {file.name: file.sha256 for file in card.files}
        if len(known) < len(card.files) or not all(is_name(name) for name in known):
            raise SecurityRefusal(f"{CARD} lists a file name that is not allowed")
        if known | {name: hashes[name] for name in (CARD, PAGE)} != hashes:
            raise SecurityRefusal(f"{SUMS} and {CARD} do not list the same files and hashes")
        if card.fedsynth == __version__ and card.to_markdown().encode() != page:
            raise SecurityRefusal(f"{PAGE} does not say what {CARD} says")
        return Release(folder, card)

    @cached_property
    def synthesizer(self) -> Synthesizer:
        """What the run learnt."""
        tensors = tensors_in(TENSORS, self._bytes(TENSORS))
        content, schema = self._bytes(SETTINGS), self.card.schema
        try:
            data = json.loads(content)
            found = _found(schema, data["schema"]) if schema.is_open else schema
            if data["format"] != 1 or data["schema"] != found.to_json() or not schema.allows(found):
                raise SecurityRefusal(f"{SETTINGS} is of another format or schema than {CARD}")
            return synthesizer_class(data["kind"]).restore(found, data["settings"], tensors)
        except (SchemaError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise SecurityRefusal(f"{SETTINGS} does not hold a synthesizer: {error}") from error

    @cached_property
    def data(self) -> "pa.Table":
        """The released records; an image is one flat list of pixels.

        Where users were synthesized with their records, each record stands beside its user's key
        and columns; `tables` holds the two apart.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, images, schema = pa.table({}), None, self.card.schema
        if self._family is not None:
            return joined_table(self.tables, self._family)
        try:
            if schema.columns or schema.text:
                table = pq.read_table(pa.BufferReader(self._bytes(TABLE)))
            if schema.image:
                content = io.BytesIO(self._bytes(IMAGES))
                with np.load(content, allow_pickle=False) as arrays:
                    images = arrays[schema.image.name]
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            raise SecurityRefusal(f"data/ does not hold what {CARD} says: {error}") from error
        return _with_images(table, schema, images)

    @cached_property
    def tables(self) -> "dict[str, pa.Table]":
        """The released tables by name: one, or that of users and that of their records."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        family = self._family
        if family is None:
            return {SINGLE: self.data}
        names = (family.parent, family.child)
        try:
            found = {
                name: pq.read_table(pa.BufferReader(self._bytes(f"data/{name}.parquet")))
                for name in names
            }
            users, records = (found[name].column(family.key).to_numpy() for name in names)
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            raise SecurityRefusal(f"data/ does not hold what {CARD} says: {error}") from error
        if not np.array_equal(np.unique(records), users):
            raise SecurityRefusal(f"data/: {family.key} does not join the two tables")
        return found

    @cached_property
    def transcript(self) -> Transcript:
        """The run's ledger entries and noisy sums."""
        return Transcript.unpack(self._bytes(ENTRIES), self._bytes(NOISY_SUMS))

    @cached_property
    def generations(self) -> Mapping[str, bytes]:
        """What public models made for the run, by file name; nothing for most."""
        names = (file.name for file in self.card.files if file.name.startswith("generations/"))
        return {name: self._bytes(name) for name in names}

    def records(self, num_records: int, seed: int) -> Records:
        """So many new records as codes and images; costs no privacy."""
        return self.synthesizer.sample(num_records, np.random.default_rng(seed))

    def sample(self, num_records: int, seed: int) -> "pa.Table":
        """So many new records; costs no privacy.

        Args:
          num_records: How many; >= 0.
          seed: The same seed gives the same records.
        """
        return _sampled(self.synthesizer, num_records, np.random.default_rng(seed))

    def sample_tables(self, num_records: int, seed: int) -> "dict[str, pa.Table]":
        """The same records as `sample`, as the tables of a release, by name."""
        synthesizer, rng = self.synthesizer, np.random.default_rng(seed)
        return _sampled_tables(synthesizer, num_records, rng)

    def verify(self, *, replay: bool = False) -> Verification:
        """Everything that the folder alone can show; see `verify`."""
        return Verification(tuple(verify(self.folder, replay=replay)))

    @property
    def _family(self) -> Family | None:
        """How the records lie in two tables; `None`: in one."""
        names = {file.name for file in self.card.files}
        return None if names & {TABLE, IMAGES} else self.synthesizer.family

    def _bytes(self, name: str) -> bytes:
        """A file of the card's list, whole and unchanged."""
        for file in self.card.files:
            if file.name == name:
                return read(self.folder, name, sha256=file.sha256, num_bytes=file.num_bytes)
        raise SecurityRefusal(f"{CARD} does not list {name}, which this release must hold")


def write_release(
    plan: "Plan",
    synthesizer: Synthesizer,
    *,
    ledger: Ledger,
    noise_is_secret: bool,
    generations: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Sample, and write the release of a run whose rounds are all on the ledger.

    Writing the same run's release again changes nothing.

    Args:
      plan: The run.
      synthesizer: What it learnt.
      ledger: Where its rounds stand.
      noise_is_secret: Whether the noise came from a source that nobody can predict.
      generations: What public models made for the run, by file name.

    Returns:
      The release folder, named after the run.

    Raises:
      SecurityRefusal: Something else stands in its place.
      FedsynthError: It could not be written; nothing is lost, and the run can be resumed.

    Privacy:
      None is spent. Sampling and saving are post-processing of released sums.
    """
    config = plan.config
    folder = config.path(config.release.path) / plan.run
    if folder.exists():
        return _already(folder, plan.run)
    entries = tuple(ledger.entries(plan.run))
    sealed = {n: ledger.sum_of(plan.run, n) for n in {entry.round for entry in entries} - {0}}
    sums = {number: found.total for number, found in sealed.items() if found is not None}
    rng = sample_rng(config.seed)
    records = synthesizer.sample(config.release.num_records, rng)
    return save(
        folder,
        card=replace(
            card_of(plan, num_records=len(records), noise_is_secret=noise_is_secret),
            findings=synthesizer.findings,
        ),
        synthesizer=synthesizer,
        records=records,
        rng=rng,
        transcript=Transcript(entries, sums),
        generations=generations,
    )


def card_of(plan: "Plan", *, num_records: int, noise_is_secret: bool) -> Card:
    """The card of a planned run, but for what `save` fills in: its rounds and files."""
    config, delta = plan.config, plan.config.run_budget.delta
    price = accounting.price(plan.event if plan.won is None else plan.won.event, delta)
    described = canonical(config.model_dump(mode="json", by_alias=True))
    return Card(
        run=plan.run,
        population=config.population.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fedsynth=__version__,
        unit=config.privacy_unit,
        num_users=config.population.num_users,
        budget=config.run_budget.epsilon,
        epsilon=price.epsilon,
        delta=delta,
        accountant=price.accountant,
        rdp_epsilon=price.rdp_epsilon,
        event=accounting.to_json(plan.event),
        placement=config.noise.placement,
        noise_is_secret=noise_is_secret,
        strategy=config.strategy.name,
        settings=plan.facts["settings"],
        caution=caution_of(plan.strategy),
        selection={} if plan.won is None else plan.won.to_json(),
        describes=describes_of(plan.strategy),
        noise_multiplier=plan.noise_multiplier,
        aggregator=config.noise.aggregator,
        aggregator_settings=config.noise.aggregator_settings,
        engine=config.engine.kind,
        num_clients=config.engine.clients,
        quorum=config.engine.quorum,
        seed=config.seed,
        num_records=num_records,
        schema=plan.schema,
        code_digest=code_digest(),
        config_digest=hashlib.sha256(described.encode()).hexdigest(),
    )


def save(
    folder: Path,
    *,
    card: Card,
    synthesizer: Synthesizer,
    records: Records,
    rng: np.random.Generator,
    transcript: Transcript,
    generations: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write a release folder: whole, or not at all.

    Args:
      folder: Where; must not exist.
      card: All facts but `rounds` and `files`, which are filled in here.
      synthesizer: What the run learnt.
      records: The synthetic records.
      rng: Where within its cell a number lies.
      transcript: All that the run asked and got.
      generations: What public models made for it, by file name.

    Returns:
      `folder`.

    Raises:
      FedsynthError: It could not be written; nothing stands at `folder`.
    """
    from safetensors.numpy import save as packed

    described = {
        "format": 1,
        "kind": synthesizer.kind,
        "settings": synthesizer.settings(),
        "schema": synthesizer.schema.to_json(),
    }
    files = {
        SETTINGS: _json_text(described).encode(),
        TENSORS: packed(_contiguous(synthesizer.tensors())),
        **transcript.pack(),
        **generations,
    }
    beside = folder.with_name(folder.name + PARTIAL)
    try:
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        save_records(synthesizer.schema, records, rng, beside, family=synthesizer.family)
        for name, content in files.items():
            write(beside, name, content)
        names = sorted(path.relative_to(beside).as_posix() for path in files_in(beside))
        hashes = {name: digest(beside, name) for name in names}
        sizes = {name: (beside / name).stat().st_size for name in names}
        card = replace(
            card,
            rounds=transcript.rounds,
            files=tuple(CardFile(name, hashes[name], sizes[name]) for name in names),
        )
        for name, text in ((CARD, card.to_text()), (PAGE, card.to_markdown())):
            write(beside, name, text.encode())
            hashes[name] = digest(beside, name)
        write(beside, SUMS, list_text(hashes))
        for path in (*beside.rglob("*"), beside):
            sync(path)
        beside.rename(folder)
        sync(folder.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(beside)
        raise FedsynthError(
            f"the release {folder} could not be written: {error.strerror or error}. Nothing is"
            " lost: every round is on the ledger. Make room, then resume the run"
        ) from error
    return folder


def verify(folder: Path | str, *, replay: bool = False) -> list[Check]:
    """What a release folder alone can show, offline.

    Args:
      folder: The release.
      replay: Also learn the synthesizer again from the noisy sums, and sample the data again.

    Returns:
      One check a claim. What cannot be checked, since a file is damaged, has failed.

    Raises:
      ConfigError: There is no release.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a release: there is no such folder{_go_on(folder)}")
    checks = [_checked("files match their hashes", partial(_check_files, folder))]
    try:
        release = Release.open(folder)
    except SecurityRefusal as error:
        return [*checks, Check("card and page agree", False, str(error))]
    claims: dict[str, Callable[[Release], str]] = {
        "card and page agree": _check_page,
        "chain of ledger entries is whole": _check_chain,
        "plan is the one committed": _check_plan,
        "epsilon recomputed from the events": _check_epsilon,
        "sums match their hashes": _check_sums,
        "synthesizer and data can be read": _check_content,
        "noise is secret": _check_noise,
    }
    if replay:
        claims["synthesizer follows from the sums"] = _check_replay
        claims["data follows from the synthesizer"] = _check_sample
    return checks + [_checked(name, partial(check, release)) for name, check in claims.items()]


def replay(folder: Path | str, *, strategy: Strategy | None = None) -> Synthesizer:
    """Learn the synthesizer again from the transcript's noisy sums.

    Args:
      folder: The release.
      strategy: The method, for one that the card names as `module:Name`; `None`: the installed
        one of the card's name, with the card's settings.

    Raises:
      ConfigError: The method is not installed.
      SecurityRefusal: The sums do not answer what the method asks.
    """
    return _replayed(Release.open(folder), strategy)


def _replayed(release: Release, strategy: Strategy | None) -> Synthesizer:
    """`replay` of an open release."""
    card = release.card
    if strategy is None:
        if ":" in card.strategy:  # never import a module because a file names it
            raise ConfigError(
                f"the method {card.strategy!r} is not built in: replay it in Python, with"
                " replay(folder, strategy=...), or install it under an entry point"
            )
        strategy = build_strategy(card.strategy, card.settings, is_open=card.schema.is_open)
    steps = strategy.rounds(card.schema, card.noise_multiplier, rounds_rng(card.seed))
    return release.transcript.replay(
        answered(steps, recorded(release.generations)),
        max_clients=card.unit.max_clients if card.aggregator == "sum" else 0,
    )


def _checked(name: str, work: Callable[[], str]) -> Check:
    """One check; a refusal is its failure."""
    try:
        return Check(name, True, work())
    except (FedsynthError, AttributeError, LookupError, TypeError, ValueError) as error:
        return Check(name, False, str(error) or type(error).__name__)


def _check_files(folder: Path) -> str:
    """Every listed file is there and unchanged, and nothing else is."""
    hashes = listed(folder)
    wrong = []
    for name, sha256 in hashes.items():
        try:
            if digest(folder, name) != sha256:
                wrong.append(f"{name} does not match its hash in {SUMS}")
        except SecurityRefusal as error:
            wrong.append(str(error))
    present = {path.relative_to(folder).as_posix() for path in files_in(folder)}
    wrong += [f"{name} is not part of the release" for name in sorted(present - {*hashes, SUMS})]
    if wrong:
        raise SecurityRefusal("; ".join(wrong))
    return f"{len(hashes)} files"


def _check_page(release: Release) -> str:
    """How far the page was held against the card; `open` did it."""
    card = release.card
    if card.fedsynth == __version__:
        return f"{PAGE} was made again from {CARD} and is the same"
    return f"{PAGE} was written by fedsynth {card.fedsynth}: its hash was checked, not its words"


def _check_chain(release: Release) -> str:
    """Every entry hashes to what it says; entries that follow each other are linked."""
    transcript, card = release.transcript, release.card
    gaps = transcript.check_chain()
    last = transcript.entries[-1]
    if {(e.run, e.population) for e in transcript.entries} != {(card.run, card.population)}:
        raise SecurityRefusal(f"{ENTRIES} holds entries of another run than {CARD}")
    if transcript.rounds != card.rounds:
        raise SecurityRefusal(f"{ENTRIES} and {CARD} do not tell the same rounds")
    between = f"; entries of other runs lie between {gaps} of them" if gaps else ""
    return f"{len(transcript.entries)} entries, the last is {last.number}: {last.hash}{between}"


def _check_plan(release: Release) -> str:
    """The card's plan and facts are those that were committed before anybody was asked."""
    card, committed = release.card, release.transcript.committed
    if committed["plan"] != card.event:
        raise SecurityRefusal(f"{CARD} holds another plan than was committed in {ENTRIES}")
    facts = {
        "strategy": card.strategy,
        "settings": card.settings,
        "schema": card.schema.digest,
        "unit": asdict(card.unit),
        "epsilon": card.budget,
        "delta": card.delta,
        "num_users": card.num_users,
        "placement": card.placement.value,
        "aggregator": card.aggregator,
        "aggregator_settings": card.aggregator_settings,
        "noise_multiplier": card.noise_multiplier,
        "quorum": card.quorum,
        "seed": card.seed,
    }
    told = committed["facts"]
    if told.get("selection", {}) != card.selection or ("within" in told) != bool(card.selection):
        raise SecurityRefusal(f"{CARD} and {ENTRIES} differ in the sweep that the run is from")
    wrong = [key for key, value in facts.items() if key not in told or told[key] != value]
    if wrong:
        raise SecurityRefusal(
            f"{CARD} and the entry that opens {ENTRIES} differ in: {', '.join(wrong)}"
        )
    count = num_rounds_of(accounting.leaves(accounting.from_json(card.event)))
    return f"{count} {'sum' if count == 1 else 'sums'}, committed before anybody was asked"


def _check_epsilon(release: Release) -> str:
    """The claim is the price of the plan, and no less than the price of what was reserved."""
    card, transcript = release.card, release.transcript
    plan = accounting.from_json(transcript.committed["plan"])
    paid = _paid(card, plan)
    planned = accounting.epsilon_of(paid, card.delta)
    for number, asked in enumerate(transcript.rounds):
        before = [
            r for r in transcript.rounds[:number] if asked.series and r.series == asked.series
        ]
        if [r.position for r in before] != list(range(asked.position)) or any(
            r.leaf != asked.leaf for r in before
        ):
            raise SecurityRefusal(f"{ENTRIES} holds a round that goes on with no series")
    charged = Counter(r.leaf for r in transcript.rounds if not r.position)
    if charged - accounting.leaves(plan):
        raise SecurityRefusal(f"{ENTRIES} holds sums that the committed plan did not hold")
    reserved = accounting.epsilon_of(accounting.event_of(charged), card.delta)
    if not math.isclose(card.epsilon, planned, rel_tol=1e-6):
        raise SecurityRefusal(
            f"{CARD} claims epsilon {card.epsilon!r}, but what was committed costs {planned!r}"
        )
    if not reserved <= card.epsilon * (1 + 1e-6):
        raise SecurityRefusal(
            f"{CARD} claims epsilon {card.epsilon!r}, but what was asked costs {reserved!r}"
        )
    if not planned <= card.budget * (1 + 1e-6):
        raise SecurityRefusal(f"the plan costs {planned!r}, above the budget of {card.budget!r}")
    whole = "the plan" if paid is plan else "the whole sweep"
    return (
        f"{planned:.4f} for {whole}, {reserved:.4f} for what was asked (claimed"
        f" {card.epsilon:.4f}, delta {card.delta:g})"
    )


def _paid(card: Card, plan: "DpEvent") -> "DpEvent":
    """What a run's budget paid for: its plan, or the sweep that the run is the best try of."""
    if not card.selection:
        return plan
    paid = accounting.from_json(card.selection["event"])
    sums, chosen = accounting.parts(paid)
    own = accounting.leaves(plan)
    if sums or list(chosen.values()) != [1] or not all(best.holds(own) for best in chosen):
        raise SecurityRefusal(f"{ENTRIES} holds a plan that is none of the tries on {CARD}")
    return paid


def _check_sums(release: Release) -> str:
    """Each sealed round has the sum that was sealed, and no other sum is there."""
    release.transcript.check_sums()
    return f"{len(release.transcript.sums)} of {len(release.card.rounds)} rounds have a noisy sum"


def _check_content(release: Release) -> str:
    """The synthesizer is restored, and the data has as many records as the card says."""
    kind, num_records = release.synthesizer.kind, release.data.num_rows
    if release.synthesizer.findings != release.card.findings:
        raise SecurityRefusal(f"{CARD} tells other findings than the synthesizer holds")
    if num_records != release.card.num_records:
        raise SecurityRefusal(
            f"data/ holds {num_records} records where {CARD} says {release.card.num_records}"
        )
    return f"synthesizer {kind!r}, {num_records:,} records"


def _check_noise(release: Release) -> str:
    """Noise that can be predicted protects nobody."""
    if not release.card.noise_is_secret:
        raise SecurityRefusal("NOT PRIVATE: the noise came from a test stream that can be repeated")
    return "from the operating system, says the card; no file can prove it"


def _check_replay(release: Release) -> str:
    """The released synthesizer is the one that the noisy sums give, bit for bit."""
    again, saved = _replayed(release, None), release.synthesizer
    if (again.kind, _json_text(again.settings())) != (saved.kind, _json_text(saved.settings())):
        raise SecurityRefusal("the synthesizer that the sums give has another kind or settings")
    if again.schema != saved.schema:
        raise SecurityRefusal("the domains that the sums give are others")
    ours, theirs = _contiguous(again.tensors()), _contiguous(saved.tensors())
    shapes = [{k: (v.dtype, v.shape) for k, v in tensors.items()} for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise SecurityRefusal("the synthesizer that the sums give has tensors of other shapes")
    for name, values in ours.items():
        if values.tobytes() != theirs[name].tobytes():
            gap = np.abs(values.astype(np.float64) - theirs[name].astype(np.float64)).max()
            raise SecurityRefusal(
                f"tensor {name!r} is not what the sums give; largest difference {gap:.3g}."
                " Versions of numpy and torch other than the run's may differ in the last digits"
            )
    return f"{len(ours)} tensors are bit-equal"


def _check_sample(release: Release) -> str:
    """The released records are those that the synthesizer gives with the card's seed."""
    card = release.card
    again = _sampled(release.synthesizer, card.num_records, sample_rng(card.seed))
    if not again.equals(release.data):
        raise SecurityRefusal("data/ is not what the synthesizer gives with the card's seed")
    return f"{card.num_records:,} records are equal"


def _found(schema: Schema, data: Mapping[str, Any]) -> Schema:
    """The schema of a run that found domains, its columns in the order of the public one's."""
    entries = data["columns"]
    ordered = {name: entries[name] for name in schema.to_json()["columns"]}
    return Schema.from_json({**data, "columns": ordered | entries})


def _go_on(folder: Path) -> str:
    """How to come to the release of a run that was stopped; nothing where there is no such run."""
    from .planned import UNFINISHED

    for path in (folder, Path(f"{folder}{UNFINISHED}")):
        if (path / "run.json").is_file():
            return f". Its run was not finished; go on with: fedsynth run --resume {path}"
    return ""


def _already(folder: Path, run: str) -> Path:
    """A release that was written before the process was stopped."""
    release = Release.open(folder)
    if release.card.run != run:
        raise SecurityRefusal(f"{folder} is the release of another run, {release.card.run!r}")
    _check_files(folder)
    return folder


def _sampled(synthesizer: Synthesizer, num_records: int, rng: np.random.Generator) -> "pa.Table":
    """New records as values."""
    records = synthesizer.sample(num_records, rng)
    return _decoded(synthesizer, records, rng)


def _decoded(synthesizer: Synthesizer, records: Records, rng: np.random.Generator) -> "pa.Table":
    """Records as values, beside their users' key and columns where they have users."""
    table, family = decode(synthesizer.schema, records, rng), synthesizer.family
    if family is not None and records.owners is not None:
        return joined_table(split_tables(table, family, records.owners), family)
    return _with_images(table, synthesizer.schema, records.images)


def _sampled_tables(
    synthesizer: Synthesizer, num_records: int, rng: np.random.Generator
) -> "dict[str, pa.Table]":
    """New records as values, in the tables of a release."""
    records, family = synthesizer.sample(num_records, rng), synthesizer.family
    if family is None or records.owners is None:
        return {SINGLE: _decoded(synthesizer, records, rng)}
    return split_tables(decode(synthesizer.schema, records, rng), family, records.owners)


def _with_images(table: "pa.Table", schema: Schema, images: NDArray[np.uint8] | None) -> "pa.Table":
    """A table with an image column beside its other columns: a flat list of pixels a record."""
    import pyarrow as pa

    if schema.image is None or images is None:
        return table
    pixels = pa.array(np.ascontiguousarray(images).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(pixels, schema.image.num_pixels)
    if not schema.columns:
        return pa.table({schema.image.name: column})
    return table.append_column(schema.image.name, column)


def _contiguous(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays as safetensors takes them."""
    return {name: np.array(values, order="C") for name, values in tensors.items()}


def _json_text(data: Any) -> str:
    """JSON text of plain data."""
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
