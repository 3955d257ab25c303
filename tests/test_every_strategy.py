# SPDX-License-Identifier: Apache-2.0
"""What every strategy owes, over all that are installed and the worked example."""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from fedsynth.client import respond
from fedsynth.core.errors import ConfigError
from fedsynth.core.mechanism import clipped_sum
from fedsynth.core.query import Choice, Contribution, Query, Strategy, check_reads
from fedsynth.simulation.check import (
    check_strategy,
    made_up,
    plain_texts,
    small_images,
    small_table,
    small_texts,
)
from fedsynth.simulation.direct import non_private
from fedsynth.strategies.independent import Columns, Independent
from fedsynth.strategies.registry import build_strategy, strategy_names

# settings that make a long method short; every installed strategy runs even when not named here
QUICK = {
    "aim": {"num_steps": 4},
    "mwem": {"num_steps": 3},
    "absyn": {"num_steps": 2, "batch": 3},
    "flaim": {"num_steps": 2, "augmented": True},
    "private_evolution": {"num_rounds": 3, "num_candidates": 40},
    "pre_text": {"num_rounds": 3, "num_candidates": 40, "num_expanded": 50},
    "tab_pe": {"num_rounds": 3, "num_candidates": 40},
    "dp_fedavg": {"num_rounds": 3, "num_users": 40, "sampling_prob": 0.5},
    "dp_fedavg_gan": {"num_rounds": 3, "num_users": 40, "sampling_prob": 0.5, "steps_per_round": 2},
    "dp_diffusion": {"start": "scratch", "num_rounds": 2, "num_users": 40, "width": 16},
    "dp_merf": {"num_steps": 20},
    "dp_wgan": {"num_rounds": 3, "steps_per_round": 2, "batch_size": 64},
    "rdp_gan": {"num_rounds": 3, "steps_per_round": 2, "batch_size": 64},
}
TABLES_ONLY = {
    "absyn",
    "aim",
    "dpdsyn",
    "flaim",
    "independent",
    "marginals",
    "mst",
    "mwem",
    "privmrf",
    "privsyn",
    "tab_pe",
    "relational",
}
IMAGES_ONLY = {"dp_fedavg_gan", "dp_diffusion"}
TEXTS_ONLY = {"popri", "pre_text", "topics", "dp_lora"}
CASES = [
    (name, schema)
    for name in strategy_names()
    for schema in ("table", "images")
    if name not in TEXTS_ONLY and not (name in IMAGES_ONLY and schema == "table")
]
WORDS = {"model": "words", "embedder": "word_hashes", "num_votes": 1}


@pytest.mark.parametrize(("name", "schema"), CASES)
def test_a_strategy_keeps_all_it_owes(name, schema):
    strategy = build_strategy(name, QUICK.get(name, {}))
    on = small_table() if schema == "table" else small_images()
    if name in (TABLES_ONLY if schema == "images" else IMAGES_ONLY):
        pytest.skip("refuses this schema, as its own tests show")

    findings = check_strategy(strategy, on)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize("name", ["private_evolution", "pre_text"])
@pytest.mark.parametrize("vote", ["l2_clip", "l2_normalize", "l1", "one_record"])
def test_a_strategy_of_texts_keeps_all_it_owes(name, vote):
    settings = QUICK[name] | WORDS | {"vote": vote}

    findings = check_strategy(build_strategy(name, settings), small_texts())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize("vote", ["l2_clip", "one_record"])
@pytest.mark.parametrize("schema", [small_table(), small_images(), small_texts()],
                         ids=["table", "images", "texts"])  # fmt: skip
def test_votes_beside_which_some_users_judge_keep_all_they_owe(schema, vote):
    words = WORDS if schema.text is not None else {}
    judged = {"vote": vote, "held_out": 0.4, "patience": 1}
    settings = QUICK["private_evolution"] | words | judged

    findings = check_strategy(build_strategy("private_evolution", settings), schema)

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


@pytest.mark.parametrize("scores", ["direction", "prompt", "pool"])
def test_popri_keeps_all_it_owes(scores):
    short = {"num_rounds": 2, "num_prompts": 4, "num_responses": 5, "num_candidates": 20}
    settings = short | {"model": "words", "embedder": "word_hashes", "scores": scores}

    findings = check_strategy(build_strategy("popri", settings), plain_texts())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_dp_lora_keeps_all_it_owes(tiny_llama):
    pytest.importorskip("transformers")
    settings = {"first_layer": 1, "num_layers": 1, "path": str(tiny_llama()), "max_tokens": 6}

    strategy = build_strategy("dp_lora", settings | {"num_users": 40, "num_rounds": 1})
    findings = check_strategy(strategy, plain_texts())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


READERS = {"private_evolution"} | TEXTS_ONLY


@pytest.mark.parametrize("name", sorted({*strategy_names()} - READERS))
def test_a_strategy_that_reads_no_texts_refuses_them(name):
    with pytest.raises(ConfigError, match="does not read texts"):
        check_reads(build_strategy(name, {}), small_texts())


@pytest.mark.parametrize("settings", [{"max_norm": "auto"}, {"norm_quantile": 0.9}])
def test_a_clip_that_is_measured_keeps_all_it_owes(settings):
    findings = check_strategy(build_strategy("mst", settings), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_the_worked_example_keeps_all_it_owes(monkeypatch):
    folder = Path(__file__).parents[1] / "examples" / "own_strategy"
    monkeypatch.syspath_prepend(str(folder))
    module = next(p.stem for p in folder.glob("*.py") if not p.stem.startswith("test_"))
    kind = next(
        value
        for value in vars(__import__(module)).values()
        if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
    )
    strategy = build_strategy(f"{module}:{kind.__name__}", {})
    sys.modules.pop(module)

    assert [f"{f.name}: {f.detail}" for f in check_strategy(strategy) if not f.ok] == []


@dataclass(frozen=True)
class Twin(Strategy):
    """`independent`, broken in one way at a time, to show that the checks can fail."""

    name: ClassVar[str] = "twin"
    fault: str = ""

    def event(self, schema, noise_multiplier):
        claimed = 2 * noise_multiplier if self.fault == "event" else noise_multiplier
        return GaussianDpEvent(claimed)

    def rounds(self, schema, noise_multiplier, rng):
        counts = yield Query(
            "histograms",
            dim=schema.num_cells,
            clip=len(schema.columns) ** 0.5,
            noise_multiplier=noise_multiplier,
            inputs={"offsets": schema.offsets[:-1]},
        )
        if self.fault == "void" and counts.is_void:
            raise ZeroDivisionError
        noise = random.gauss() if self.fault == "global" else rng.normal()
        probs = [np.full(c, 1 / c) for c in schema.shape]
        probs[0] = np.abs(counts.vector[: schema.shape[0]]) + abs(noise) + 1e-3
        probs[0] = probs[0] / probs[0].sum()
        return Columns(schema, tuple(probs))

    def answer(self, query, shard, rng):
        cells = shard.records.codes + query.inputs["offsets"]
        users, num_users = shard.user_index, shard.num_users
        if self.fault == "split":  # each record passes for a user of its own
            rows = np.zeros((len(cells), query.dim))
            np.put_along_axis(rows, np.clip(cells, 0, query.dim - 1), 1, axis=1)
            return Contribution.rows(rows)
        rows = np.zeros((num_users, query.dim))
        np.add.at(rows, (users[:, None], np.clip(cells, 0, query.dim - 1)), 1)
        if self.fault == "mean":  # a user's row leans on the whole block
            rows -= rows.mean(axis=0) if len(rows) else 0
        if self.fault == "empty" and num_users == 0:
            raise IndexError
        return Contribution.rows(rows)


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        ("event", "its queries add up to its event"),
        ("void", "a void round does not stop it"),
        ("global", "it leaves global random state alone"),
        ("mean", "no user's answer depends on another user's records"),
        ("mean", "one user moves each sum by at most the clip"),
        ("empty", "an empty shard and a single user are answered"),
    ],
)
def test_a_broken_twin_is_found_out(fault, claim):
    findings = {f.name: f.ok for f in check_strategy(Twin(fault), small_table())}

    assert not findings[claim]


def test_a_whole_twin_passes():
    assert all(f.ok for f in check_strategy(Twin(), small_table()))


def test_records_that_pass_for_users_count_as_zeros():
    twin, schema = Twin("split"), small_table()
    findings = {f.name: f for f in check_strategy(twin, schema)}

    assert findings["one user moves each sum by at most the clip"].ok


class Dropping(Twin):
    """Leaves out the row of a user who holds the first color, so that no shape fits any more."""

    def answer(self, query, shard, rng):
        rows = super().answer(query, shard, rng).dense
        return Contribution(num_users=shard.num_users, dense=rows[rows[:, 0] == 0])


def test_a_user_who_makes_a_contribution_misshapen_takes_nobody_else_away():
    schema = small_table()
    shard = made_up(schema, [1] * 30, seed=3)
    query = next(Twin().rounds(schema, 1.0, np.random.default_rng(0)))
    others = shard.only(shard.records.codes[:, 0] != 0)

    found = respond.block_sum(Dropping(), query, shard, seed=(0, 1))

    assert others.num_users < 30
    assert np.array_equal(found, clipped_sum(Twin().answer(query, others, None), query))


@dataclass(frozen=True)
class ChoosingTwin(Strategy):
    """One choice among the columns' histograms, of what lies farthest from nothing at all."""

    name: ClassVar[str] = "choosing-twin"
    declares: bool = True
    is_split: bool = False

    @property
    def trusts_server(self):
        return self.declares

    def event(self, schema, noise_multiplier):
        return GaussianDpEvent(noise_multiplier)

    def rounds(self, schema, noise_multiplier, rng):
        weights = 1.0 + np.arange(len(schema.columns))
        chosen = yield Query(
            "worst",
            dim=schema.num_cells,
            clip=1.0,
            noise_multiplier=noise_multiplier,
            inputs={"offsets": schema.offsets[:-1]},
            choice=Choice.among(schema.shape, np.zeros(schema.num_cells), weights=weights),
        )
        probs = [np.full(c, 1 / c) for c in schema.shape]
        for column in np.flatnonzero(chosen.vector):
            probs[column] = np.eye(schema.shape[column])[0]
        return Columns(schema, tuple(probs))

    def answer(self, query, shard, rng):
        cells = shard.records.codes + query.inputs["offsets"]
        if self.is_split:  # a cell of each record in every block but the first is lit twice
            cells = np.concatenate([cells, cells[:, 1:]], axis=1)
        return Contribution.cells(cells, shard.user_index, num_users=shard.num_users)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_strategy_that_chooses_keeps_all_it_owes(is_split):
    findings = check_strategy(ChoosingTwin(is_split=is_split), small_table())

    assert [f"{f.name}: {f.detail}" for f in findings if not f.ok] == []


def test_a_choice_that_is_not_declared_is_found_out():
    findings = {f.name: f.ok for f in check_strategy(ChoosingTwin(declares=False), small_table())}

    assert [name for name, ok in findings.items() if not ok] == [
        "it says beforehand that the server is to choose"
    ]


def test_an_l1_bound_that_is_not_kept_is_found_out(monkeypatch):
    # the framework clips, so it is the framework that is broken here: in L2, not by block
    def in_l2(contribution, query, **more):
        return clipped_sum(contribution, replace(query, choice=None, clip=query.clip * 5), **more)

    monkeypatch.setattr(respond, "clipped_sum", in_l2)
    findings = {f.name: f.ok for f in check_strategy(ChoosingTwin(), small_table())}

    assert not findings["one user moves each sum by at most the clip"]


def test_without_noise_the_best_candidate_is_chosen():
    schema = small_table()

    learned = non_private(
        ChoosingTwin(), schema, made_up(schema, [1] * 50, seed=0), np.random.default_rng(0)
    )

    # every block holds fifty records, so the greatest weight decides
    assert [probs.max() == 1 for probs in learned.probs] == [False, False, False, False, True]


def test_independent_refuses_images():
    with pytest.raises(Exception, match="image"):
        Independent().event(small_images(), 1.0)
