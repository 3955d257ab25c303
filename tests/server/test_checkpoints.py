# SPDX-License-Identifier: Apache-2.0
"""A run goes on from its checkpoint to the end it would have had; a foreign one changes nothing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
from fedsynth.core.answering import without_checkpoints
from fedsynth.core.checkpoint import Checkpoint
from fedsynth.core.config import parse_config
from fedsynth.core.errors import Interrupted
from fedsynth.core.query import Contribution, Query, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.server import checkpoints
from fedsynth.server.planned import plan_of, unfinished
from fedsynth.simulation.run import run_local
from fedsynth.strategies.independent import Columns

import fedsynth as fs

ROUNDS = 6
begun_at: list[int] = []


@dataclass(frozen=True)
class Walk(Strategy):
    """Adds up noisy counts and public random numbers, and says after each round where it is."""

    name: ClassVar[str] = "walk"
    width: int = 2

    def event(self, schema: Any, noise_multiplier: float) -> Any:
        return SelfComposedDpEvent(GaussianDpEvent(noise_multiplier * ROUNDS**0.5), ROUNDS)

    def rounds(self, schema: Any, noise_multiplier: float, rng: Any) -> Iterator[Query]:
        return without_checkpoints(self.rounds_from(schema, noise_multiplier, rng, None))

    def rounds_from(
        self, schema: Any, noise_multiplier: float, rng: Any, state: Any
    ) -> Iterator[Query]:
        state = state or {"round": np.array(0), "total": np.zeros(self.width)}
        begun_at.append(int(state["round"]))
        total = state["total"]
        for number in range(int(state["round"]), ROUNDS):
            each = noise_multiplier * ROUNDS**0.5
            noisy = yield Query("counts", self.width, 1.0, each)
            (child,) = rng.spawn(1)
            total = total + noisy.vector * rng.random() + child.random()
            yield Checkpoint(lambda n=number, t=total: {"round": np.array(n + 1), "total": t})
        share = 1 / (1 + np.exp(-total / 1000))
        return Columns(schema, [share / share.sum()])

    def answer(self, query: Query, shard: Any, rng: Any) -> Contribution:
        return Contribution.rows(np.tile([1.0, 0.0], (shard.num_users, 1)))


class FixedStream:
    """Zeros that stand for secret bits, so that two runs can be compared."""

    is_secret = False

    def read(self, num_bytes: int) -> bytes:
        return bytes([7]) * num_bytes


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    begun_at.clear()

    def of(name: str, **changes: Any) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "p.csv").write_text("\n".join(["who,color", *(f"u{i},red" for i in range(60))]))
        color = {"type": "category", "categories": ["red", "green"], "origin": "public: made up"}
        (folder / "schema.json").write_text(json.dumps({"columns": {"color": color}}))
        described = {
            "population": {"name": "town", "num_users": 60, "epsilon": 8.0, "delta": 1e-3},
            "data": {"path": "p.csv", "schema": "schema.json"},
            "unit": {"column": "who"},
            "budget": {"epsilon": 4.0},
            "strategy": {"name": f"{__name__}:Walk"},
            "engine": {"clients": 2},
            "release": {"num_records": 50},
            **changes,
        }
        return plan_of(parse_config(described, base=folder), run="walk-1")

    return of


def stopped_after(plan: Any, rounds: int) -> Any:
    """The folder of a run that a person stops after so many rounds."""

    def stop(event: Any) -> None:
        if event.round == rounds + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_local(plan, stream=FixedStream(), on_event=stop)
    return next(plan.config.base.rglob("run.json")).parent


def learned(folder: Any) -> Any:
    """What a release's synthesizer holds."""
    return fs.Release.open(folder).synthesizer.tensors()


def test_a_resumed_run_begins_at_its_checkpoint_and_ends_where_it_would_have(plan):
    whole = run_local(plan("whole"), stream=FixedStream())
    folder = stopped_after(plan("cut"), 4)

    resumed = run_local(unfinished(folder), stream=FixedStream())

    assert begun_at == [0, 0, 4]
    ours, theirs = learned(resumed), learned(whole)
    assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}
    assert not folder.exists()


@pytest.mark.parametrize(
    "harm",
    {
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "of another run": lambda path: path.write_bytes(
            path.read_bytes().replace(b"walk-1", b"walk-2")
        ),
        "of other sums": lambda path: path.write_bytes(
            path.read_bytes().replace(b'"rounds": 4', b'"rounds": 3')
        ),
        "of another version": lambda path: path.write_bytes(
            path.read_bytes().replace(b'"fedsynth": "0.', b'"fedsynth": "9.')
        ),
        "not there": lambda path: path.unlink(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_checkpoint_that_is_not_this_runs_is_not_used_and_nothing_is_lost(plan, harm):
    whole = run_local(plan("whole"), stream=FixedStream())
    folder = stopped_after(plan("cut"), 4)
    harm[1](folder / checkpoints.CHECKPOINT)

    resumed = run_local(unfinished(folder), stream=FixedStream())

    assert begun_at == [0, 0, 0]
    ours, theirs = learned(resumed), learned(whole)
    assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}


def test_no_checkpoint_is_written_more_often_than_every_so_many_seconds(plan, monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY_S", 3600.0)

    folder = stopped_after(plan("cut"), 4)

    assert not (folder / checkpoints.CHECKPOINT).exists()


def test_a_run_that_goes_on_from_a_checkpoint_counts_all_that_it_spent(plan):
    folder = stopped_after(plan("cut"), 4)
    told = []

    run_local(unfinished(folder), stream=OsKeyStream(), on_event=told.append)

    assert [event.round for event in told] == [5, 6]
    assert told[-1].epsilon_spent == pytest.approx(4.0, rel=1e-3)
