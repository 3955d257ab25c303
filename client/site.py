# SPDX-License-Identifier: Apache-2.0
"""What one data owner has set up beside the records: schema, policy, odometer, shard."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.config import RunConfig, read_config, read_started, run_file
from ..core.devices import choose
from ..core.errors import ConfigError
from ..core.privacy import PrivacyUnit
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.texts import packed, unpacked
from .bounding import bound
from .odometer import Odometer
from .policy import Policy
from .shard import read_shard

if TYPE_CHECKING:
    from flwr.app import Context

_KEYS = ("shard", "schema", "policy", "state")
_MOST_KEPT = 4  # bounded shards of a client beside its odometer: one for each run under way


@dataclass(frozen=True)
class Site:
    """One client's side of every agreement.

    Attributes:
      client: Name of the client, for the owner's own log.
      schema: Schema that the shard is read by; must be the server's.
      policy: What the owner allows.
      odometer: What has been answered and spent, durably.
      load: The bounded shard under a privacy unit and a public seed.
      state: The owner's folder, for what is computed from records once; `None`: in memory only.
      sum_is_secure: Nobody sees this client's answer by itself, only the sum of all clients'.
        True within the local engine, which adds clients up in one process.
    """

    client: str
    schema: Schema
    policy: Policy
    odometer: Odometer
    load: Callable[[PrivacyUnit, int], BoundedShard]
    state: Path | None = None
    sum_is_secure: bool = False


Sites = Callable[["Context"], Site]
_in_process: list[Sites] = []


@contextmanager
def simulated(sites: Sites) -> Iterator[None]:
    """While it lasts, clients in this process find their site by `sites`."""
    _in_process.append(sites)
    try:
        yield
    finally:
        _in_process.remove(sites)


def site_of(context: "Context") -> Site | None:
    """The site of the client that a Flower context describes, or `None`: deny.

    The owner's node configuration names four paths: `shard`, `schema`, `policy` and `state`.
    Nothing that the server sends can name a file here. Only in a simulation, where the server's
    machine holds the records anyway, does the run's own configuration say where they are: in
    this process under `simulated`, or in a worker of Flower's Ray simulation.
    """
    if _in_process:
        return _in_process[-1](context)
    given = {key: context.node_config.get(key) for key in _KEYS}
    if all(isinstance(value, str) for value in given.values()):
        return _owned_site(context, {key: Path(str(value)) for key, value in given.items()})
    if any(value is not None for value in given.values()):
        return None
    return _ray_site(context) if _in_ray_simulation(context) else None


def _owned_site(context: "Context", paths: dict[str, Path]) -> Site:
    """The site that an owner configured."""
    name = str(context.node_config.get("client", "client"))
    choose(str(context.node_config.get("device", "cpu")))
    schema = Schema.read(paths["schema"])
    state = paths["state"]
    state.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(unit: PrivacyUnit, seed: int) -> BoundedShard:
        return _cached(state, paths["shard"], schema, unit, seed, partition=None)

    return Site(
        client=name,
        schema=schema,
        policy=Policy.read(paths["policy"]),
        odometer=Odometer(state / "odometer.db", name),
        load=load,
        state=state,
    )


def simulated_site(
    policy: Policy,
    schema: Schema,
    partition: int,
    of: int,
    state: Path,
    load: Callable[[PrivacyUnit, int], BoundedShard],
    *,
    secure: bool,
) -> Site:
    """The site of one simulated client: its owner is whoever runs the simulation.

    Its policy is `Policy.for_simulation` of the run's configuration: that, and nothing else.
    """
    name = f"client-{partition}-of-{of}"
    return Site(
        client=name,
        schema=schema,
        policy=policy,
        odometer=Odometer(state, name, synced=False),
        load=load,
        state=state.parent / name,
        sum_is_secure=secure,
    )


def _ray_site(context: "Context") -> Site:
    """The site of a node of Flower's Ray simulation; `run` names a run.toml or a run.json."""
    path = run_file(str(context.run_config["run"]))
    config = read_started(path)[1] if path.suffix == ".json" else read_config(path)
    choose(config.engine.device)
    schema = Schema.read(config.path(config.data.schema_path))
    partition = int(context.node_config["partition-id"])
    of = int(context.node_config["num-partitions"])
    state = simulation_state(config)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(unit: PrivacyUnit, seed: int) -> BoundedShard:
        if config.data.path is None:
            raise ConfigError("a simulation needs data.path")
        return _cached(
            state, config.path(config.data.path), schema, unit, seed, partition=(partition, of)
        )

    return simulated_site(
        Policy.for_simulation(config),
        schema,
        partition,
        of,
        state / f"odometer-{partition}.db",
        load,
        secure=False,
    )


def simulation_state(config: RunConfig) -> Path:
    """Where simulated clients of a population keep their state: beside the ledger."""
    ledger = config.path(config.ledger)
    return ledger.parent / f"{ledger.stem}.clients"


def _in_ray_simulation(context: "Context") -> bool:
    """Whether this is a node of Flower's simulation, in a Ray worker that it started.

    A device's process never is: its SuperNode starts it without Ray, and Flower gives the two
    numbers of a simulated node to simulated nodes alone.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    if set(context.node_config) != {"partition-id", "num-partitions"}:
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def _cached(
    state: Path,
    path: Path,
    schema: Schema,
    unit: PrivacyUnit,
    seed: int,
    *,
    partition: tuple[int, int] | None,
) -> BoundedShard:
    """The bounded shard, kept on the owner's disk between messages.

    Each message may be answered by a fresh process, so that what was read, encoded and bounded
    once is stored beside the odometer, under a name that changes with all it depends on. A few
    are kept at a time: a server may name any seed, and must not fill the owner's disk.
    """
    try:
        stat = path.stat()
        facts = [stat.st_mtime_ns, stat.st_size]
    except OSError:
        facts = []
    key = json.dumps([str(path), facts, schema.digest, repr(unit), seed, partition])
    whose = "shard" if partition is None else f"shard-{partition[0]}-of-{partition[1]}"
    kept = state / f"{whose}.{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if not kept.exists():
        shard = bound(read_shard(path, schema, unit, partition=partition), unit, seed=seed)
        _keep(kept, shard)
        with suppress(FileNotFoundError):  # another process of this client tidies up as well
            others = [other for other in state.glob(f"{whose}.*.npz") if other != kept]
            others.sort(key=lambda other: other.stat().st_mtime_ns, reverse=True)
            for other in others[_MOST_KEPT - 1 :]:
                other.unlink()
    with np.load(kept, allow_pickle=False) as stored:
        texts = unpacked(stored["texts"], stored["text_starts"]) if "texts" in stored else None
        return BoundedShard(
            Records(stored["codes"], stored.get("images"), texts=texts),
            stored["user_index"],
            int(stored["bounds"][0]),
            int(stored["bounds"][1]),
            stored.get("words"),
        )


def _keep(path: Path, shard: BoundedShard) -> None:
    """Store a bounded shard: whole or not at all, and for nobody but its owner to read."""
    records = shard.records
    others: dict[str, Any] = {} if records.images is None else {"images": records.images}
    if records.texts is not None:
        others["texts"], others["text_starts"] = packed(records.texts)
    if shard.words is not None:
        others["words"] = shard.words
    descriptor, partial = mkstemp(dir=path.parent, prefix=f"{path.name}.")  # 0600 from the start
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(
                file,
                codes=records.codes,
                user_index=shard.user_index,
                bounds=np.array([shard.num_users, shard.max_records]),
                **others,
            )
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
