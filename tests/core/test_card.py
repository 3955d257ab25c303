# SPDX-License-Identifier: Apache-2.0
"""The card: the same facts in and out, a promise that is never rounded down, nothing injected."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.core import accounting
from fedsynth.core.card import PACKAGES, Card, CardFile, CardRound, code_digest
from fedsynth.core.errors import DataError
from fedsynth.core.privacy import NoisePlacement, PrivacyUnit, User
from fedsynth.core.schema import Schema

SCHEMA = Schema.from_json(
    {
        "columns": {
            "age": {"type": "integer", "bounds": [0, 120], "origin": "public: declared"},
            "sex": {"type": "category", "categories": ["F", "M"], "origin": "policy"},
            "scan": {"type": "image", "shape": [2, 3, 1], "origin": "public: scanner"},
        },
        "target": "sex",
    }
)


def card(**changes: Any) -> Card:
    event = GaussianDpEvent(2.0)
    price = accounting.price(event, 1e-6)
    made = Card(
        run="run-1",
        population="cardio",
        created="2025-03-01T12:00:00+00:00",
        fedsynth="0.1.0",
        unit=User("patient_id", max_records=5),
        num_users=1000,
        budget=2.5,
        epsilon=price.epsilon,
        delta=1e-6,
        accountant=price.accountant,
        rdp_epsilon=price.rdp_epsilon,
        event=accounting.to_json(event),
        placement=NoisePlacement.CENTRAL,
        noise_is_secret=True,
        strategy="mst",
        settings={"shares": (0.5, 0.5)},
        noise_multiplier=2,
        aggregator="sum",
        aggregator_settings={},
        engine="local",
        num_clients=20,
        quorum=18,
        seed=7,
        num_records=10_000,
        schema=SCHEMA,
        code_digest="ab" * 32,
        config_digest="cd" * 32,
        rounds=(CardRound(1, 1, "histograms", 2.0, 1.0, "sealed", 20),),
        files=(CardFile("data/data.parquet", "ef" * 32, 1234),),
    )
    return dataclasses.replace(made, **changes)


def test_a_card_comes_back_from_its_text_unchanged():
    before = card()

    after = Card.from_json(json.loads(before.to_text()))

    assert after == before
    assert after.to_text() == before.to_text()
    assert after.to_markdown() == before.to_markdown()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("epsilon", "2"),
        ("epsilon", float("nan")),
        ("noise_is_secret", 1),
        ("num_clients", 2.5),
        ("placement", "nowhere"),
        ("rounds", [{"round": 1}]),
        ("files", [{"name": "a", "sha256": "b", "num_bytes": 1, "more": 1}]),
        ("schema", {"columns": {}}),
        ("unit", {"level": "record", "column": "patient_id"}),
        ("unit", {"level": "user", "column": "patient_id", "max_records": 0}),
        ("surprise", 1),
    ],
)
def test_a_card_with_a_value_that_cannot_be_is_refused(key: str, value: Any):
    data = card().to_json() | {key: value}

    with pytest.raises(DataError):
        Card.from_json(data)


@pytest.mark.parametrize("key", ["run", "epsilon", "unit", "schema", "noise_is_secret"])
def test_a_card_without_a_fact_is_refused(key: str):
    data = card().to_json()
    del data[key]

    with pytest.raises(DataError):
        Card.from_json(data)


def test_the_markdown_opens_with_what_it_is_and_says_every_promise_in_words():
    text = card().to_markdown()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = " ".join(text.split())

    assert headings == [
        "Synthetic data of cardio",
        "What is promised",
        "Who must be trusted",
        "What is not promised",
        "What was public",
        "What was asked",
        "How to verify",
        "How to cite",
    ]
    assert words.index("No row is a person") < words.index("What is promised")
    # epsilon of mu = 1/2 at 1e-6 is 2.2541; e^2.2541 / (1 + e^2.2541) = 0.905
    assert "someone who thinks it 50 % likely that a user is in the data" in words
    assert "could at the very worst move to 91 %" in words
    assert "The server adds the noise." in words
    assert "NOT PRIVATE" not in text


def test_the_epsilon_that_is_shown_is_never_below_the_epsilon_that_holds():
    for epsilon in (0.00001, 0.12341, 1.0, 2.25406, 9.99991):
        shown = re.search(r"\(([\d.e-]+), 1e-06\)", card(epsilon=epsilon).to_markdown())

        assert shown is not None
        assert epsilon <= float(shown[1]) <= epsilon + 1.1e-4


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 2.0, 4.2, 7.0, 20.0])
def test_the_worst_belief_that_is_shown_is_never_below_the_worst_that_holds(epsilon: float):
    text = " ".join(card(epsilon=epsilon).to_markdown().split())
    shown = re.search(r"at the very worst move to ([\d.]+) %", text)

    worst = 100 / (1 + math.exp(-epsilon))
    assert shown is not None
    assert worst <= float(shown[1]) <= worst + 1


def test_a_card_of_test_noise_says_in_capitals_that_nothing_is_private():
    text = card(noise_is_secret=False).to_markdown()

    assert "NOT PRIVATE: TEST NOISE" in text.split("## What is promised")[0]
    assert "the operating system" not in text


def test_a_record_level_card_says_that_a_person_with_several_records_is_not_covered():
    text = card(unit=PrivacyUnit()).to_markdown()

    assert "To each record on its own" in text
    assert "is **not** protected as a person" in text


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (NoisePlacement.CENTRAL, "that server was trusted"),
        (NoisePlacement.LOCAL, "nobody but the user's own client was trusted"),
        (NoisePlacement.DISTRIBUTED, "no single client's part can be seen"),
    ],
)
def test_every_noise_placement_says_who_is_trusted(placement: NoisePlacement, words: str):
    assert words in card(placement=placement).to_markdown()


def test_sampling_and_void_rounds_stand_on_the_card():
    event = accounting.event_of({(1.5, 0.1): 4, (3.0, 1.0): 1})
    rounds = (
        CardRound(1, 1, "update", 1.5, 0.1, "sealed", 20),
        CardRound(2, 1, "update", 1.5, 0.1, "void", 0),
    )

    text = card(event=accounting.to_json(event), rounds=rounds).to_markdown()

    assert "1 sum over all users; 4 sums that each user joined with probability 0.1" in text
    assert "charged and gave nothing: 2." in text


def test_the_markdown_is_bound_to_the_exact_card():
    one = card()

    assert hashlib.sha256(one.to_text().encode()).hexdigest() in one.to_markdown()
    assert card(quorum=17).to_markdown() != one.to_markdown()


def test_names_from_a_schema_cannot_write_markdown_of_their_own():
    schema = Schema.from_json(
        {
            "columns": {
                "a|b\n# Promise": {
                    "type": "category",
                    "categories": ["<script>alert(1)</script>", "`x`", "\x1b[31m"],
                    "origin": "public: [click](http://example.org)",
                }
            }
        }
    )

    text = card(schema=schema).to_markdown()

    row = next(line for line in text.splitlines() if "Promise" in line)
    assert row.startswith("| a\\|b \\# Promise |")
    assert "<script>" not in row.replace("\\<", "").replace("\\>", "")
    assert "\x1b" not in text
    assert "[click](" not in text.replace("\\[", "").replace("\\]", "")


def test_the_code_digest_covers_every_source_file_and_nothing_else(tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    copy = tmp_path / "fedsynth"
    copy.mkdir()
    shutil.copy(root / "__init__.py", copy)
    for package in PACKAGES:
        shutil.copytree(
            root / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )

    def digest() -> str:
        code = "from fedsynth.core.card import code_digest; print(code_digest())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert digest() == code_digest()  # a checkout and a copy of it agree
    (copy / "core" / "notes.txt").write_text("not code")
    assert digest() == code_digest()
    with (copy / "core" / "mechanism.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != code_digest()


SHARED = {"max_norm": 2.5, "norm_quantile": None, "norm_share": 0.02, "weight": "record"}


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, ["every record equally", "declared: 2.5 times"], ["every user", "measured"]),
        (
            {"max_norm": "auto"},
            ["measured in the first sum, with a share of 0.02 of the budget"],
            ["declared:"],
        ),
        (
            {"max_norm": 1.0, "norm_quantile": 0.9, "norm_share": 0.01},
            ["with a share of 0.01 of the budget", "share of 0.9 of all users"],
            ["declared:"],
        ),
        (
            {"max_norm": 1.0, "weight": "user"},
            ["every user equally", "Nothing was clipped"],
            ["every record", "max_norm) was"],
        ),
    ],
)
def test_a_card_says_whom_it_counts_and_where_the_clip_came_from(settings, said, unsaid):
    text = card(settings=SHARED | settings).to_markdown().replace("\\_", "_")

    section = text.split("## What it describes")[1].split("\n## ")[0]
    assert all(words in section for words in said)
    assert not any(words in section for words in unsaid)


def test_a_card_of_records_promises_no_user_and_speaks_of_none():
    text = card(settings=SHARED, unit=PrivacyUnit()).to_markdown()

    section = text.split("## What it describes")[1].split("\n## ")[0]
    assert "each record stands for itself" in section
    assert "many records" not in section


def test_a_card_of_a_method_without_tables_leaves_out_whom_they_count():
    assert "## What it describes" not in card().to_markdown()


def test_the_card_names_ids_and_what_every_record_keeps():
    schema = Schema.from_json(
        {
            "columns": {
                "patient": {"type": "id", "synthesize": "serial"},
                "visit": {"type": "id"},
                "ill": {"type": "boolean"},
                "born": {
                    "type": "date",
                    "bounds": ["1920-01-01", "2024-12-31"],
                    "origin": "policy",
                },
                "died": {
                    "type": "date",
                    "bounds": ["1920-01-01", "2024-12-31"],
                    "origin": "policy",
                },
            },
            "constraints": [{"order": ["born", "<=", "died"]}, {"forbid": {"ill": True}}],
        }
    )

    text = card(schema=schema).to_markdown()

    assert Card.from_json(card(schema=schema).to_json()) == card(schema=schema)
    assert "| patient | id | serial numbers" in text
    assert "| visit | id | not synthesized" in text
    assert "1920-01-01 to 2024-12-31 in 32 cells" in text
    assert "- born \\<= died" in text
    assert "- never ill is true" in text
    assert "declared facts" not in card().to_markdown()
