# SPDX-License-Identifier: Apache-2.0
"""Whole runs over images: what is exact is drawn anew by a replay, what is not was recorded."""

import json

import numpy as np
import pytest
from fedsynth.client.shard import Shard
from fedsynth.core.config import parse_config
from fedsynth.core.errors import ConfigError
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.models.library import Library
from fedsynth.server.planned import plan_of
from fedsynth.server.release import verify
from fedsynth.simulation.run import run_local

ORIGIN = "public: made up for this test"
SIDE = Column("side", "category", ORIGIN, categories=("left", "right"))
SCHEMA = Schema((SIDE,), ImageColumn("image", (28, 28, 1), ORIGIN), target="side")


def bars(num, seed):
    """Upright bars in the left or the right half, and which."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(2, size=num)
    at = 14 * sides + rng.integers(3, 10, size=num)
    images = np.zeros((num, 28, 28), np.uint8)
    images[np.arange(num)[:, None], 4:24, at[:, None]] = 255
    return sides, images


def population(num_users=300):
    sides, images = bars(2 * num_users, seed=1)
    records = Records(sides[:, None].astype(np.int32), images[..., None])
    return Shard(records, np.array([f"u{i}" for i in np.arange(num_users).repeat(2)]))


def planned(base, **strategy):
    (base / "schema.json").write_text(json.dumps(SCHEMA.to_json()))
    config = {
        "population": {"name": "bars", "num_users": 300, "epsilon": 50.0, "delta": 1e-4,
                       "accept_weak": True},
        "data": {"schema": "schema.json"},
        "unit": {"column": "user", "max_records": 2},
        "budget": {"epsilon": 20.0, "accept_weak": True},
        "strategy": {"name": "private_evolution", "num_rounds": 3, "num_candidates": 60,
                     "num_votes": 1} | strategy,
        "engine": {"clients": 2},
        "release": {"num_records": 40},
    }  # fmt: skip
    return plan_of(parse_config(config, base=base), run="run-1")


def right_share(folder, label):
    """Share of the ink on the right, of the release's candidates of a label."""
    from safetensors.numpy import load_file

    (file,) = (folder / "synthesizer").rglob("*.safetensors")
    pool = load_file(file)
    members = pool["codes"][:, 0] == label
    ink = pool["images"][members].astype(float) * pool["weights"][members, None, None, None]
    return ink[:, :, 14:].sum() / ink.sum()


def test_a_release_of_written_characters_is_made_again_without_a_record_of_them(tmp_path):
    folder = run_local(planned(tmp_path, model="glyphs"), stream=OsKeyStream(), data=population())

    assert not (folder / "generations").exists()
    assert [check for check in verify(folder, replay=True) if not check.ok] == []
    assert right_share(folder, 1) - right_share(folder, 0) > 0.12  # about 0, where nobody votes


def test_a_release_of_a_librarys_images_replays_without_the_library(tmp_path):
    library, (_, images) = tmp_path / "public.npz", bars(400, seed=2)
    np.savez(library, images=images)
    plan = planned(tmp_path, model="library", model_settings={"path": str(library)})

    folder = run_local(plan, stream=OsKeyStream(), data=population())

    library.unlink()
    assert len(list((folder / "generations").iterdir())) == 3
    assert [check for check in verify(folder, replay=True) if not check.ok] == []
    assert right_share(folder, 0) < 0.1 < 0.9 < right_share(folder, 1)


def test_no_client_opens_a_library(tmp_path, monkeypatch):
    library = tmp_path / "public.npz"
    np.savez(library, images=bars(400, seed=2)[1])
    plan = planned(tmp_path, model="library", model_settings={"path": str(library)})
    opened = []
    real = Library._shelf

    def watched(self, subject):
        import inspect

        names = [frame.filename for frame in inspect.stack()]
        opened.append([n for n in names if "/client/" in n])
        return real(self, subject)

    monkeypatch.setattr(Library, "_shelf", watched)

    run_local(plan, stream=OsKeyStream(), data=population())

    assert len(opened) >= 3
    assert not any(opened)


def test_a_library_that_is_not_there_is_missed_before_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot open .*none\.npz"):
        planned(tmp_path, model="library", model_settings={"path": str(tmp_path / "none.npz")})
