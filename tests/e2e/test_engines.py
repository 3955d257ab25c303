# SPDX-License-Identifier: Apache-2.0
"""One run on three engines: in this process, in Flower's Ray simulation, on real SuperNodes.

All three get the noise of the same test stream, so their noised sums are compared bit by bit.
"""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from fedsynth.client.app import app as client_app
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.errors import BudgetExceeded, ClientCode
from fedsynth.core.query import Query
from fedsynth.core.wire import (
    MESSAGE_TYPE,
    Ask,
    ask_to_records,
    canonical,
    reply_from_records,
)
from fedsynth.server.conduct import RoundEvent
from fedsynth.server.ledger import Ledger
from fedsynth.server.planned import Plan, plan_of
from fedsynth.simulation.flower import run_ray
from fedsynth.simulation.local import LocalGrid
from fedsynth.simulation.loopback import deal, run_loopback
from fedsynth.simulation.run import run_local
from fedsynth.strategies.registry import settings_of
from flwr.app import Context, Message, RecordDict

pytestmark = pytest.mark.e2e

APP = Path(__file__).with_name("fixed_noise_app")
CLIENTS, USERS = 3, 300
SCHEMA = {
    "columns": {
        "color": {
            "type": "category",
            "categories": ["red", "green", "blue"],
            "origin": "public: made up",
        },
        "size": {"type": "integer", "bounds": [0, 4], "num_bins": 5, "origin": "public: made up"},
        "weight": {"type": "real", "bounds": [0, 1], "num_bins": 4, "origin": "public: made up"},
    }
}


@dataclass(frozen=True)
class Finished:
    """A run that an engine did."""

    plan: Plan
    release: Path
    events: list[RoundEvent]

    @property
    def card(self):
        return json.loads((self.release / "card.json").read_text(encoding="utf-8"))

    @property
    def ledger(self):
        return Ledger(self.plan.config.path(self.plan.config.ledger))

    @property
    def sums(self):
        rounds = range(1, len(self.events) + 1)
        return [self.ledger.sum_of(self.plan.run, number) for number in rounds]


def fixed_stream():
    spec = spec_from_file_location("fixed_noise", APP / "fixed_noise.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FixedKeyStream()


def plan_in(folder: Path, kind: str, **budget: float) -> Plan:
    """A plan whose files all lie in `folder`; the same for every engine but for its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    rng = np.random.default_rng(5)
    with (folder / "people.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["person", "color", "size", "weight"])
        for person in range(USERS):
            for _ in range(rng.integers(1, 4)):  # 1 to 3 records, of which 2 are used
                size = int(rng.integers(5))
                color = SCHEMA["columns"]["color"]["categories"][size % 3]
                rows.writerow([f"p{person:03d}", color, size, f"{rng.random():.3f}"])
    config = {
        "population": {"name": "people", "num_users": USERS, "epsilon": 4.0, "delta": 1e-4},
        "data": {"path": "people.csv", "schema": "schema.json"},
        "unit": {"column": "person", "max_records": 2},
        "budget": {"epsilon": 3.0} | budget,
        "strategy": {"name": "mst"},
        "engine": {"kind": kind, "clients": CLIENTS, "timeout_s": 240},
        "release": {"num_records": 200},
        "seed": 11,
    }
    return plan_of(parse_config(config, base=folder))


def finished(plan: Plan, engine, **options) -> Finished:
    events: list[RoundEvent] = []
    return Finished(plan, engine(plan, on_event=events.append, **options), events)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    plan = plan_in(tmp_path_factory.mktemp("local"), "local")
    return finished(plan, run_local, stream=fixed_stream())


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    pytest.importorskip("ray")
    plan = plan_in(tmp_path_factory.mktemp("ray"), "ray")
    return finished(plan, run_ray, app_dir=APP)


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    plan = plan_in(tmp_path_factory.mktemp("loopback"), "loopback")
    return finished(plan, run_loopback, app_dir=APP)


@pytest.fixture(params=["ray", "loopback"])
def other(request):
    return request.getfixturevalue(request.param)


def test_every_engine_commits_and_charges_the_same_events(local, other):
    (mine,), (theirs,) = local.ledger.runs(), other.ledger.runs()

    assert accounting.leaves(mine.event) == accounting.leaves(theirs.event)
    assert [e.kind for e in local.ledger.entries(local.plan.run)] == [
        e.kind for e in other.ledger.entries(other.plan.run)
    ]
    assert accounting.leaves(other.ledger.spent("people")) == accounting.leaves(theirs.event)


def test_noised_sums_are_bit_equal_on_every_engine(local, other):
    assert len(local.sums) == len(other.sums) == 3
    for mine, theirs in zip(local.sums, other.sums, strict=True):
        np.testing.assert_array_equal(mine.total, theirs.total, strict=True)
        assert (mine.unit, mine.stddev) == (theirs.unit, theirs.stddev)
        assert mine.num_clients == theirs.num_clients == CLIENTS


def test_the_same_records_are_released_on_every_engine(local, other):
    table = "data/synthetic.parquet"

    assert (local.release / table).read_bytes() == (other.release / table).read_bytes()


def test_the_cards_differ_in_run_time_engine_and_what_follows_from_them_only(local, other):
    differ = {"run", "created", "engine", "config_digest", "files"}

    mine, theirs = local.card, other.card

    assert {key for key in mine if mine[key] != theirs[key]} <= differ
    assert theirs["epsilon"] == mine["epsilon"] <= 3.0
    assert theirs["num_clients"] == CLIENTS


def test_a_person_is_shown_the_same_rounds_whatever_the_engine(local, other):
    def shown(run: Finished):
        return [asdict(replace(event, seconds=0.0)) for event in run.events]

    assert [event.round for event in other.events] == [1, 2, 3]
    assert shown(local) == shown(other)


def test_a_card_of_a_test_stream_says_that_it_is_not_private(local, other):
    for run in (local, other):
        assert run.card["noise_is_secret"] is False
        page = (run.release / "card.md").read_text(encoding="utf-8")
        assert "NOT PRIVATE: TEST NOISE" in page


def test_nothing_of_the_engine_is_left(other):
    leftovers = [p.name for p in other.release.parent.iterdir() if p != other.release]

    assert leftovers == []
    assert processes_that_name(str(other.release)) == []


def test_an_error_in_flowers_process_is_raised_here_as_it_was_there(ray):
    again = plan_in(ray.plan.config.base, "ray")  # 3 + 3 is more than the population's 4

    with pytest.raises(BudgetExceeded, match="people"):
        run_ray(again, on_event=lambda event: None, app_dir=APP)

    assert ray.ledger.runs() == [run for run in ray.ledger.runs() if run.run == ray.plan.run]


def test_each_owner_of_a_rehearsal_has_only_its_own_users_and_a_folder_nobody_else_reads(loopback):
    import pyarrow.parquet as pq

    folders = sorted((loopback.plan.config.base / "ledger.clients" / "loopback-3").iterdir())

    people = [set(pq.read_table(f / "shard.parquet")["person"].to_pylist()) for f in folders]

    assert len(folders) == CLIENTS
    assert sum(len(p) for p in people) == len(set.union(*people)) == USERS
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    assert all((folder / "state" / "odometer.db").is_file() for folder in folders)


def test_an_engine_whose_owner_is_killed_leaves_no_process(tmp_path):
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fedsynth.simulation.processes import Processes\n"
        "with Processes(Path(sys.argv[1]), {}) as ours:\n"
        "    child = 'import subprocess, sys; subprocess.run([\"sleep\", sys.argv[1]],'\n"
        "    child += ' start_new_session=True)'\n"
        "    ours.serve('child', [sys.executable, '-c', child, sys.argv[2]])\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n",
        encoding="utf-8",
    )
    mark = f"86400.{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, str(owner), str(tmp_path / "logs"), mark],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    until(lambda: len(processes_that_name(mark)) == 3)  # the owner, the child, its grandchild

    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    until(lambda: processes_that_name(mark) == [])


def test_a_client_answers_what_its_owner_allows_and_refuses_another_strategy(tmp_path):
    plan = plan_in(tmp_path, "loopback")
    owners = deal(plan)
    allowed = node_config(owners[0])
    policy = Path(node_config(owners[1])["policy"])
    text = policy.read_text(encoding="utf-8")
    policy.write_text(text.replace('"mst"', '"independent"'), encoding="utf-8")

    codes = [code_of(plan, config) for config in (allowed, node_config(owners[1]))]

    assert codes == [ClientCode.OK, ClientCode.POLICY_REFUSED]


def test_a_device_without_a_node_configuration_reads_no_file_that_a_server_names(tmp_path):
    plan = plan_in(tmp_path, "loopback")
    complete = node_config(deal(plan)[0])
    partly = {key: value for key, value in complete.items() if key != "policy"}
    simulated = {"partition-id": 0, "num-partitions": 1}
    named = tmp_path / "run.toml"
    named.write_text("not even read", encoding="utf-8")

    codes = [code_of(plan, c, run=str(named)) for c in ({}, partly, simulated)]

    assert codes == [ClientCode.NO_SHARD] * 3


def node_config(owner) -> dict[str, str]:
    return tomllib.loads(owner.node_config.read_text(encoding="utf-8"))


def code_of(plan: Plan, node_config: dict[str, object], *, run: str = "") -> ClientCode:
    """What the client's app answers to a query of `plan`, as a SuperNode would call it."""
    LocalGrid(client_app, 1)  # gives messages their sender
    query = next(plan.strategy.rounds(plan.schema, plan.noise_multiplier, np.random.default_rng(0)))
    message = Message(ask_to_records(ask_of(plan, query)), 2, MESSAGE_TYPE)
    context = Context(
        run_id=1,
        node_id=2,
        node_config=node_config,
        state=RecordDict(),
        run_config={"run": run},
    )
    reply = client_app(message, context)
    return reply_from_records(reply.content, query).code


def ask_of(plan: Plan, query: Query) -> Ask:
    config = plan.config
    return Ask(
        run=plan.run,
        population="people",
        round=1,
        attempt=1,
        strategy="mst",
        settings=settings_of(plan.strategy),
        schema_digest=plan.schema.digest,
        unit=canonical(asdict(config.privacy_unit)),
        placement=config.noise.placement,
        num_shares=CLIENTS,
        plan=canonical(accounting.to_json(plan.event)),
        delta=1e-4,
        public_seed=config.seed,
        head=(0, "0" * 64),
        query=query,
    )


def processes_that_name(text: str) -> list[str]:
    """Command lines of live processes in which `text` stands."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def until(holds, *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)
