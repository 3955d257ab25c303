# SPDX-License-Identifier: Apache-2.0
"""A release: whole or not there, verified from the folder alone, every changed byte noticed."""

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fedsynth.core.card import Card
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ConfigError, FedsynthError, SecurityRefusal
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import NoisySum
from fedsynth.core.records import Records
from fedsynth.core.schema import Schema
from fedsynth.core.seeds import rounds_rng, sample_rng
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.core.wire import canonical
from fedsynth.server.chain import Entry
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import Plan, plan_of
from fedsynth.server.release import Release, card_of, replay, save, verify, write_release
from fedsynth.server.transcript import Transcript, rounds_of
from fedsynth.strategies.independent import Independent
from numpy.typing import NDArray

SCHEMA = {
    "columns": {
        "sex": {"type": "category", "categories": ["F", "M"], "origin": "public: test"},
        "age": {"type": "integer", "bounds": [0, 9], "origin": "public: test", "missing": True},
    }
}


def planned(base: Path, **changes: Any) -> Plan:
    """The plan of a small run."""
    (base / "schema.json").write_text(json.dumps(SCHEMA))
    config = {
        "population": {"name": "people", "num_users": 100, "epsilon": 4.0, "delta": 1e-4},
        "data": {"schema": "schema.json"},
        "unit": {"column": "id", "max_records": 3},
        "budget": {"epsilon": 2.0},
        "strategy": {"name": "independent"},
        "engine": {"clients": 3},
        "release": {"num_records": 50},
        "seed": 5,
    }
    run = changes.pop("run", "run-1")
    return plan_of(parse_config(config | changes, base=base), run=run)


def opened(plan: Plan, ledger: Ledger) -> None:
    """Commit a run."""
    ledger.open_run(
        plan.run,
        plan.config.population.name,
        cap=plan.config.population.cap,
        event=plan.event,
        facts=plan.facts,
    )


def learnt(plan: Plan, ledger: Ledger, *, void: bool = False) -> Synthesizer:
    """Do the rounds of a committed run with made-up sums."""
    rounds = plan.strategy.rounds(plan.schema, plan.noise_multiplier, plan.rng)
    noisy: NoisySum | None = None
    number = 0
    while True:
        try:
            query = next(rounds) if noisy is None else rounds.send(noisy)
        except StopIteration as end:
            return end.value
        number += 1
        ledger.reserve(
            plan.run,
            number,
            1,
            query=query.name,
            noise_multiplier=query.noise_multiplier,
            sampling_prob=query.sampling_prob,
        )
        ledger.draw(plan.run, number, 1)
        if void:
            ledger.void(plan.run, number, 1, "lost-in-crash")
            noisy = NoisySum.void(query)
            continue
        unit = Lattice.of(query).unit
        counts = 60 + 5 * np.random.default_rng(number).standard_normal(query.dim)
        total = np.rint(counts / unit).astype(np.int64)
        stddev = query.noise_multiplier * query.clip
        ledger.seal(plan.run, number, 1, total, unit=unit, stddev=stddev, num_clients=3)
        ledger.release(plan.run, number, 1)
        noisy = NoisySum(total * unit, stddev, 3)


def released(base: Path, *, noise_is_secret: bool = True, **changes: Any) -> Path:
    """A release, made from a small run on a ledger of its own."""
    base.mkdir(exist_ok=True)
    void = changes.pop("void", False)
    plan = planned(base, **changes)
    with Ledger(base / "ledger.db") as ledger:
        opened(plan, ledger)
        synthesizer = learnt(plan, ledger, void=void)
        return write_release(plan, synthesizer, ledger=ledger, noise_is_secret=noise_is_secret)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that no test changes."""
    return released(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def failures(folder: Path, *, replay: bool = False) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder, replay=replay) if not check.ok}


def resealed(folder: Path) -> None:
    """Make the hashes fit whatever the files now hold, as a forger would."""
    data = json.loads((folder / "card.json").read_text())
    for file in data["files"]:
        content = (folder / file["name"]).read_bytes()
        file |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    card = Card.from_json(data)
    (folder / "card.json").write_text(card.to_text())
    (folder / "card.md").write_text(card.to_markdown())
    names = sorted([file["name"] for file in data["files"]] + ["card.json", "card.md"])
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def forged(folder: Path, **facts: Any) -> None:
    """Claim something else on the card, with all hashes made to fit."""
    data = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(data | facts))
    resealed(folder)


# ---- what a release is -----------------------------------------------------------------------


def test_a_release_holds_what_its_layout_says_and_verifies(whole: Path):
    names = sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())

    assert names == [
        "SHA256SUMS",
        "card.json",
        "card.md",
        "data/synthetic.parquet",
        "synthesizer/synthesizer.json",
        "synthesizer/tensors.safetensors",
        "transcript.jsonl",
        "transcript.safetensors",
    ]
    assert [check.name for check in verify(whole, replay=True)] == [
        "files match their hashes",
        "card and page agree",
        "chain of ledger entries is whole",
        "plan is the one committed",
        "epsilon recomputed from the events",
        "sums match their hashes",
        "synthesizer and data can be read",
        "noise is secret",
        "synthesizer follows from the sums",
        "data follows from the synthesizer",
    ]
    assert failures(whole, replay=True) == {}


def test_verifying_a_small_release_takes_far_less_than_ten_seconds(whole: Path):
    begun = time.process_time()

    assert Release.open(whole).verify(replay=True).ok

    assert time.process_time() - begun < 2


def test_the_list_of_hashes_is_one_that_other_programs_check(whole: Path):
    if not (program := shutil.which("sha256sum")):
        pytest.skip("there is no sha256sum here")

    done = subprocess.run(
        [program, "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=whole, capture_output=True
    )

    assert done.returncode == 0


def test_the_card_names_the_facts_of_the_plan(whole: Path):
    card = Release.open(whole).card

    assert (card.run, card.population, card.strategy) == ("run-1", "people", "independent")
    assert (card.budget, card.delta, card.num_users) == (2.0, 1e-4, 100)
    assert 1.99 < card.epsilon <= 2.0 <= card.rdp_epsilon
    assert [(r.query, r.state, r.num_clients) for r in card.rounds] == [("histograms", "sealed", 3)]
    assert card.schema == Schema.from_json(SCHEMA)


def test_the_data_has_readable_values_and_comes_from_the_seed(whole: Path):
    release = Release.open(whole)

    table = release.data

    assert table.num_rows == 50
    assert set(table["sex"].to_pylist()) <= {"F", "M"}
    assert all(age is None or 0 <= age <= 9 for age in table["age"].to_pylist())
    assert table.equals(pq.read_table(whole / "data" / "synthetic.parquet"))


def test_sampling_gives_as_many_records_as_asked_and_the_same_for_the_same_seed(whole: Path):
    release = Release.open(whole)

    table = release.sample(7, seed=1)

    assert table.num_rows == len(release.records(7, seed=1)) == 7
    assert table.equals(release.sample(7, seed=1))
    assert not release.sample(40, seed=1).equals(release.sample(40, seed=2))
    assert release.sample(0, seed=1).num_rows == 0


def test_a_run_uses_the_public_streams_that_a_replay_draws_from(tmp_path: Path):
    plan = planned(tmp_path)

    assert plan.rng.random() == rounds_rng(5).random()
    assert plan.sample_rng.random() == sample_rng(5).random()
    assert rounds_rng(5).random() != sample_rng(5).random()


def test_a_run_whose_round_was_lost_is_charged_and_verifies(tmp_path: Path):
    folder = released(tmp_path, void=True)

    assert failures(folder, replay=True) == {}
    release = Release.open(folder)
    assert [(r.state, r.num_clients) for r in release.card.rounds] == [("void", 0)]
    assert release.transcript.sums == {}


def test_entries_of_other_runs_may_lie_between(tmp_path: Path):
    one, other = planned(tmp_path), planned(tmp_path, run="run-2")
    with Ledger(tmp_path / "ledger.db") as ledger:
        opened(one, ledger)
        opened(other, ledger)
        synthesizer = learnt(one, ledger)
        folder = write_release(one, synthesizer, ledger=ledger, noise_is_secret=True)

    chain = next(check for check in verify(folder) if check.name.startswith("chain"))
    assert failures(folder) == {}
    assert "entries of other runs lie between" in chain.detail
    assert "run-2" not in (folder / "transcript.jsonl").read_text()


def test_a_release_of_test_noise_does_not_verify(tmp_path: Path):
    folder = released(tmp_path, noise_is_secret=False)

    assert "NOT PRIVATE" in failures(folder)["noise is secret"]
    assert len(failures(folder)) == 1


class Stripes(Synthesizer):
    """Makes images."""

    kind: ClassVar[str] = "stripes"

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        codes = rng.integers(0, 2, (num_records, 1)).astype(np.int32)
        return Records(codes, np.broadcast_to(codes[:, :, None, None], (num_records, 2, 3, 1)) + 7)

    def settings(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"nothing": np.zeros(())}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        return cls(schema)


def test_images_stand_beside_their_labels(tmp_path: Path):
    plan = planned(tmp_path)
    image = {"type": "image", "shape": [2, 3, 1], "origin": "public: test"}
    columns = {"sex": SCHEMA["columns"]["sex"], "scan": image}
    schema = Schema.from_json({"columns": columns})
    made = Stripes(schema)
    records = made.sample(6, np.random.default_rng(0))
    records = Records(records.codes, records.images.astype(np.uint8))
    with Ledger(tmp_path / "ledger.db") as ledger:
        opened(plan, ledger)
        learnt(plan, ledger)
        entries = tuple(ledger.entries(plan.run))
        sums = {1: ledger.sum_of(plan.run, 1).total}

    folder = save(
        tmp_path / "images",
        card=dataclasses.replace(card_of(plan, num_records=6, noise_is_secret=True), schema=schema),
        synthesizer=made,
        records=records,
        rng=np.random.default_rng(1),
        transcript=Transcript(entries, sums),
    )

    table = Release.open(folder).data
    assert table.column_names == ["sex", "scan"]
    assert table["scan"].type == pa.list_(pa.uint8(), 6)
    assert table["scan"].to_pylist() == [[7 + int(code)] * 6 for code in records.codes[:, 0]]
    assert table["sex"].to_pylist() == ["FM"[code] for code in records.codes[:, 0]]


# ---- writing ---------------------------------------------------------------------------------


def test_writing_a_release_again_changes_nothing(tmp_path: Path):
    plan = planned(tmp_path)
    with Ledger(tmp_path / "ledger.db") as ledger:
        opened(plan, ledger)
        synthesizer = learnt(plan, ledger)
        folder = write_release(plan, synthesizer, ledger=ledger, noise_is_secret=True)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        again = write_release(plan, synthesizer, ledger=ledger, noise_is_secret=True)

    assert again == folder
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_damaged_release_is_not_taken_for_a_written_one(tmp_path: Path):
    folder = released(tmp_path)
    (folder / "transcript.jsonl").write_bytes(b"")
    plan = planned(tmp_path)

    with (
        Ledger(tmp_path / "ledger.db") as ledger,
        pytest.raises(SecurityRefusal, match=r"transcript\.jsonl"),
    ):
        write_release(plan, Release.open(folder).synthesizer, ledger=ledger, noise_is_secret=True)


def test_what_a_killed_process_left_half_written_is_replaced(tmp_path: Path):
    left = tmp_path / "releases" / "run-1.partial" / "data"
    left.mkdir(parents=True)
    (left / "synthetic.parquet").write_bytes(b"half")

    folder = released(tmp_path)

    assert failures(folder) == {}
    assert not left.parent.exists()


@pytest.mark.parametrize("limit", [0, 100, 700, 2000, 4000])
def test_a_full_disk_leaves_no_release_and_says_what_to_do(tmp_path: Path, limit: int):
    plan = planned(tmp_path)
    with Ledger(tmp_path / "ledger.db") as ledger:
        opened(plan, ledger)
        synthesizer = learnt(plan, ledger)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(FedsynthError, match="Nothing is lost"):
                write_release(plan, synthesizer, ledger=ledger, noise_is_secret=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "releases").iterdir()) == []

        folder = write_release(plan, synthesizer, ledger=ledger, noise_is_secret=True)

    assert failures(folder) == {}


# ---- damage ----------------------------------------------------------------------------------


def damages(folder: Path, count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Random flips and truncations of random files, each with the file's name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    draw = random.Random(1)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray((folder / name).read_bytes())
        at = draw.randrange(len(content))
        if draw.random() < 0.3:
            damaged = bytes(content[:at])
        else:
            content[at] ^= 1 << draw.randrange(8)
            damaged = bytes(content)
        yield name, lambda name=name, damaged=damaged: (folder / name).write_bytes(damaged)


def read_whole(folder: Path) -> None:
    """Load all that a release holds."""
    release = Release.open(folder)
    _ = release.synthesizer, release.data, release.transcript


def test_every_flipped_bit_and_every_truncation_is_noticed_and_the_file_is_named(folder: Path):
    missed = []
    for name, damage in damages(folder, 200):
        before = (folder / name).read_bytes()
        damage()
        told = " ".join(failures(folder).values())
        with pytest.raises(SecurityRefusal) as refusal:
            read_whole(folder)
        if name not in told or not str(refusal.value):
            missed.append(name)
        (folder / name).write_bytes(before)

    assert missed == []
    assert failures(folder) == {}


@pytest.mark.parametrize("name", ["transcript.jsonl", "data/synthetic.parquet", "card.md"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()

    assert name in failures(folder)["files match their hashes"]
    with pytest.raises(SecurityRefusal, match=name):
        read_whole(folder)


def test_a_file_that_nobody_listed_is_named_but_a_file_browsers_traces_are_not(folder: Path):
    (folder / ".DS_Store").write_bytes(b"")
    assert failures(folder) == {}

    (folder / "data" / "more.parquet").write_bytes(b"")
    assert "data/more.parquet" in failures(folder)["files match their hashes"]


def test_a_folder_without_a_release_is_said_to_be_none(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a release"):
        Release.open(tmp_path)
    with pytest.raises(ConfigError, match="is not a release"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("what", ["file", "folder", "pipe"])
def test_links_and_devices_are_not_followed(folder: Path, tmp_path: Path, what: str):
    target = folder / "data" / "synthetic.parquet"
    if what == "folder":
        (folder / "data").rename(tmp_path / "elsewhere")
        (folder / "data").symlink_to(tmp_path / "elsewhere")
    else:
        target.rename(tmp_path / "elsewhere")
        if what == "file":
            target.symlink_to(tmp_path / "elsewhere")
        else:
            os.mkfifo(target)

    assert "data/synthetic.parquet" in failures(folder)["files match their hashes"]
    with pytest.raises(SecurityRefusal, match=r"data/synthetic\.parquet"):
        _ = Release.open(folder).data


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "data/../../secret", ".hidden", "data//x", "a/b/c/d/e"]
)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str):
    (folder.parent / "secret").write_text("mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    data = json.loads((folder / "card.json").read_text())
    data["files"].append({"name": name, "sha256": digest, "num_bytes": 4})
    card = Card.from_json(data)
    (folder / "card.json").write_text(card.to_text())
    (folder / "card.md").write_text(card.to_markdown())
    listed = {
        line.split("  ")[1]: line.split("  ")[0]
        for line in (folder / "SHA256SUMS").read_text().splitlines()
    }
    listed[name] = digest
    for made in ("card.json", "card.md"):
        listed[made] = hashlib.sha256((folder / made).read_bytes()).hexdigest()
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(listed.items())]
    (folder / "SHA256SUMS").write_text("".join(lines))

    with pytest.raises(SecurityRefusal, match="not allowed"):
        Release.open(folder)
    assert "not allowed" in failures(folder)["files match their hashes"]


# ---- forgeries whose hashes all fit ----------------------------------------------------------


def test_resealing_an_unchanged_release_keeps_it_whole(folder: Path):
    resealed(folder)

    assert failures(folder, replay=True) == {}


@pytest.mark.parametrize("epsilon", [0.5, 1.9])
def test_a_claim_below_the_price_of_the_plan_is_noticed(folder: Path, epsilon: float):
    forged(folder, epsilon=epsilon)

    assert "claims epsilon" in failures(folder)["epsilon recomputed from the events"]


def test_a_cheaper_plan_on_the_card_is_noticed(folder: Path):
    forged(folder, event=[{"noise_multiplier": 50.0, "sampling_prob": 1.0, "count": 1}])

    assert "another plan" in failures(folder)["plan is the one committed"]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("delta", 1e-6),
        ("num_users", 10**6),
        ("budget", 1.0),
        ("placement", "local"),
        ("noise_multiplier", 9.0),
        ("seed", 6),
        ("settings", {"max_norm": 0.5}),
        ("unit", {"level": "user", "column": "id", "max_records": 9}),
    ],
)
def test_a_fact_that_was_not_committed_is_named(folder: Path, fact: str, value: Any):
    forged(folder, **{fact: value})

    name = "epsilon" if fact == "budget" else fact
    assert f"differ in: {name}" in failures(folder)["plan is the one committed"]


def test_a_void_round_told_as_sealed_is_noticed(tmp_path: Path):
    folder = released(tmp_path, void=True)
    rounds = json.loads((folder / "card.json").read_text())["rounds"]

    forged(folder, rounds=[rounds[0] | {"state": "sealed", "num_clients": 3}])

    assert "the same rounds" in failures(folder)["chain of ledger entries is whole"]


@pytest.mark.parametrize("dropped", range(5))
def test_an_entry_left_out_of_the_transcript_is_noticed(folder: Path, dropped: int):
    lines = (folder / "transcript.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 5  # open, reserve, draw, seal, release

    (folder / "transcript.jsonl").write_text("".join(lines[:dropped] + lines[dropped + 1 :]))
    resealed(folder)

    assert failures(folder)


def entry(number: int, kind: str, round_: int, attempt: int, **data: Any) -> Entry:
    """An entry of a run, hashed as the ledger hashes it."""
    body = canonical(data)
    bare = Entry(number, "2025-01-01", kind, "people", "run-1", round_, attempt, body, "0" * 64, "")
    return dataclasses.replace(bare, hash=bare.digest())


ASKED = {"query": "q", "noise_multiplier": 2.0, "sampling_prob": 1.0}


@pytest.mark.parametrize(
    "steps",
    [
        [("reserve", 2, 1), ("void", 2, 1)],  # round 1 is not there
        [("reserve", 1, 2), ("void", 1, 2)],  # its first attempt is not there
        [("reserve", 1, 1)],  # neither released nor void
        [("reserve", 1, 1), ("draw", 1, 1), ("seal", 1, 1)],
        [("seal", 1, 1), ("release", 1, 1)],  # never reserved
        [("draw", 1, 1), ("reserve", 1, 1), ("void", 1, 1)],
        [("reserve", 1, 1), ("seal", 1, 1), ("release", 1, 1), ("release", 1, 1)],
        [
            *[(kind, 1, 1) for kind in ("reserve", "seal", "release")],
            *[(kind, 1, 2) for kind in ("reserve", "seal", "release")],  # though it was not void
        ],
    ],
)
def test_rounds_that_no_ledger_would_allow_are_refused(steps: list[tuple[str, int, int]]):
    entries = [
        entry(number, *step, **ASKED, num_clients=3) for number, step in enumerate(steps, start=2)
    ]

    with pytest.raises(SecurityRefusal):
        rounds_of(entries)


def test_a_void_attempt_and_the_one_after_it_are_two_lines():
    steps = [
        ("reserve", 1, 1),
        ("void", 1, 1),
        ("reserve", 1, 2),
        ("seal", 1, 2),
        ("release", 1, 2),
    ]
    entries = [entry(number, *step, **ASKED, num_clients=3) for number, step in enumerate(steps)]

    assert [(r.round, r.attempt, r.state) for r in rounds_of(entries)] == [
        (1, 1, "void"),
        (1, 2, "sealed"),
    ]


def test_an_entry_that_was_edited_is_named(folder: Path):
    lines = [json.loads(x) for x in (folder / "transcript.jsonl").read_text().splitlines()]
    lines[1]["body"] = lines[1]["body"].replace("histograms", "nothing")
    (folder / "transcript.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    resealed(folder)

    told = failures(folder)["chain of ledger entries is whole"]
    assert f"entry {lines[1]['number']} is not what it hashes to" in told


def test_a_sum_that_was_not_sealed_is_noticed(folder: Path):
    from safetensors.numpy import load_file, save_file

    sums = load_file(folder / "transcript.safetensors")
    sums["round-000001"][0] += 1
    save_file(sums, folder / "transcript.safetensors")
    resealed(folder)

    assert "round 1" in failures(folder)["sums match their hashes"]


def test_a_synthesizer_that_the_sums_do_not_give_is_noticed_by_replay_only(folder: Path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "synthesizer" / "tensors.safetensors")
    tensors["probs"][:2] = (0.9, 0.1)
    save_file(tensors, folder / "synthesizer" / "tensors.safetensors")
    resealed(folder)

    assert failures(folder) == {}
    told = failures(folder, replay=True)
    assert "'probs' is not what the sums give" in told["synthesizer follows from the sums"]
    assert "data follows from the synthesizer" in told


def test_records_that_the_synthesizer_does_not_give_are_noticed_by_replay(folder: Path):
    path = folder / "data" / "synthetic.parquet"
    pq.write_table(pq.read_table(path).slice(0, 50).take(list(range(49, -1, -1))), path)
    resealed(folder)

    assert failures(folder) == {}
    assert list(failures(folder, replay=True)) == ["data follows from the synthesizer"]


# ---- replay ----------------------------------------------------------------------------------


def test_replay_gives_the_released_synthesizer_bit_for_bit(whole: Path):
    again = replay(whole)

    saved = Release.open(whole).synthesizer
    assert again.tensors()["probs"].tobytes() == saved.tensors()["probs"].tobytes()


def test_replay_with_another_method_than_was_charged_is_refused(whole: Path):
    with pytest.raises(SecurityRefusal, match="noise of"):
        replay(whole, strategy=Independent(max_norm=1.2))


def test_replay_never_imports_a_module_because_a_card_names_it(folder: Path, tmp_path: Path):
    forged(folder, strategy="fedsynth.strategies.independent:Independent")

    with pytest.raises(ConfigError, match="is not built in"):
        replay(folder)
    assert replay(folder, strategy=Independent()).kind == "columns"


def test_a_page_of_another_version_is_checked_by_its_hash_alone(folder: Path):
    forged(folder, fedsynth="99.0.0")
    page = (folder / "card.md").read_text()
    (folder / "card.md").write_text(page + "Written with other words.\n")
    listed = (folder / "SHA256SUMS").read_text()
    before, after = (
        hashlib.sha256(p.encode()).hexdigest() for p in (page, page + "Written with other words.\n")
    )
    (folder / "SHA256SUMS").write_text(listed.replace(before, after))

    assert failures(folder) == {}
    (folder / "card.md").write_text(page)
    assert "card.md" in failures(folder)["files match their hashes"]
