# SPDX-License-Identifier: Apache-2.0
"""The task that training is timed by, and who does it: ours, pfl, Flower's simulation, bare torch.

50 users of 20 images each train a classifier: two local steps of 10 images, update clipped at 0.03,
summed, noised once at the server, 50 users a round. Peers train the very module of
`peers/classifier.py`; ours is the same losses as a `Trainable`, and starts at the same weights.
"""

import report  # noqa: F401  # isort: skip  (first: it holds numpy and torch to one thread)

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fedsynth.core.column import Column, ImageColumn
from fedsynth.core.electorate import Electorate
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.strategies.parts.trainable import RecordShape, Trainable
from fedsynth.strategies.parts.training import Training
from numpy.typing import NDArray

_HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(_HERE / "peers"))

USERS, IMAGES, BATCH, STEPS = 50, 20, 10, 2
CLIP, LOCAL_LR, SERVER_LR = 0.03, 0.1, 1.0
SHAPES = {
    "cnn": {
        "conv1.weight": (16, 1, 5, 5),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 5, 5),
        "conv2.bias": (32,),
        "enter.weight": (128, 1568),
        "enter.bias": (128,),
        "leave.weight": (10, 128),
        "leave.bias": (10,),
    },
    "mlp": {
        "enter.weight": (125, 784),
        "enter.bias": (125,),
        "leave.weight": (10, 125),
        "leave.bias": (10,),
    },
}


@dataclass(frozen=True)
class Classifier(Trainable):
    """The module of `peers/classifier.py`, its weights in the order of its parameters."""

    form: str

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the module's parameters."""
        return SHAPES[self.form]

    @property
    def channels_last(self) -> bool:
        """Faster for convolutions."""
        return self.form == "cnn"

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The start of everybody."""
        return start_of(self.form)

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Images in [0, 1], `(num_records, 1, 28, 28)`, and labels."""
        images = torch.from_numpy(np.array(records.images)).permute(0, 3, 1, 2)
        return images.float().div_(255), torch.from_numpy(records.codes[:, 0].astype(np.int64))

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Cross-entropy."""
        fn, w, (grid, labels) = torch.nn.functional, weights, seen
        if self.form == "cnn":
            for conv in ("conv1", "conv2"):
                grid = fn.conv2d(grid, w[f"{conv}.weight"], w[f"{conv}.bias"], padding=2)
                grid = fn.max_pool2d(torch.relu(grid), 2)
        code = torch.relu(fn.linear(grid.flatten(1), w["enter.weight"], w["enter.bias"]))
        logits = fn.linear(code, w["leave.weight"], w["leave.bias"])
        return fn.cross_entropy(logits, labels, reduction="none")

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> Synthesizer:
        """Samples nothing of use: a classifier makes no records."""
        return Blank(schema)


@dataclass(frozen=True)
class Blank(Synthesizer):
    """Black images, all with the first label."""

    kind: ClassVar[str] = "blank"
    schema: Schema

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Nothing of use."""
        images = np.zeros((num_records, 28, 28, 1), dtype=np.uint8)
        return Records(np.zeros((num_records, 1), dtype=np.int32), images)

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """None."""
        return {"none": np.zeros(1)}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> "Blank":
        """It, again."""
        return cls(schema)


@dataclass(frozen=True)
class Train(Training):
    """Trains the classifier."""

    name: ClassVar[str] = "train"
    form: str = "cnn"

    def check(self) -> None:
        """Anything goes."""

    def check_signal(self, schema: Schema, noise_multiplier: float, users: Electorate) -> None:
        """Let it be: what is measured is time, and nothing is learned."""

    def model_for(self, shape: RecordShape) -> Classifier:
        """The classifier."""
        return Classifier(self.form)


def settings(form: str, rounds: int, *, pace: float = 1.0) -> dict[str, Any]:
    """Of our strategy; `pace` times the usual local steps and clip."""
    return {
        "form": form,
        "num_users": USERS,
        "num_rounds": rounds,
        "sampling_prob": 1.0,
        "clip": pace * CLIP,
        "local_steps": STEPS,
        "local_batch": BATCH,
        "local_lr": pace * LOCAL_LR,
        "server_optimizer": "fedavg",
    }


def start_of(form: str) -> NDArray[np.float32]:
    """Weights that all start from, in the order of the module's parameters."""
    rng = np.random.default_rng(7)
    size = sum(int(np.prod(shape)) for shape in SHAPES[form].values())
    return (0.03 * rng.standard_normal(size)).astype(np.float32)


def people() -> Records:
    """The users' records, those of one user next to each other."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (USERS * IMAGES, 28, 28, 1), dtype=np.uint8)
    return Records(rng.integers(0, 10, (USERS * IMAGES, 1)).astype(np.int32), images)


def schema() -> Schema:
    """Of the records."""
    origin = "public: made up for this benchmark"
    label = Column("label", "category", origin, categories=tuple("0123456789"))
    return Schema((label,), image=ImageColumn("image", (28, 28, 1), origin))


def bare_loop(
    form: str, shard: BoundedShard, order: NDArray[np.int64]
) -> Callable[[], NDArray[np.float64]]:
    """The sum of users' clipped updates as a practitioner would write it.

    Args:
      form: `cnn` or `mlp`.
      shard: The users.
      order: In which each takes their images, `(20,)`.
    """
    import torch
    from classifier import loss, module

    net, start = module(form, start_of(form)), torch.from_numpy(start_of(form))
    optimizer = torch.optim.SGD(net.parameters(), lr=LOCAL_LR)
    taken = (np.arange(shard.num_users)[:, None] * IMAGES + order).ravel()
    records = shard.records.take(taken)
    images = torch.from_numpy(np.array(records.images)).permute(0, 3, 1, 2)
    images = images.float().div_(255).contiguous()
    labels = torch.from_numpy(records.codes[:, 0].astype(np.int64))
    starting = {key: value.clone() for key, value in net.state_dict().items()}

    def summed() -> NDArray[np.float64]:
        total = torch.zeros_like(start)
        for user in range(shard.num_users):
            net.load_state_dict(starting)
            for first in range(user * IMAGES, (user + 1) * IMAGES, BATCH):
                optimizer.zero_grad()
                loss(net, images[first : first + BATCH], labels[first : first + BATCH]).backward()
                optimizer.step()
            after = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
            update = after - start
            total += update * (CLIP / update.norm().clamp(min=CLIP))
        return np.asarray(total.numpy(), dtype=np.float64)

    return summed


@dataclass(frozen=True)
class Spent:
    """What a run of training cost.

    Attributes:
      ends: CPU-seconds of all its processes at the end of each round, the start's first.
      whole: CPU-seconds from start to end, imports and all.
      weights: Where it ended; empty where nobody asks.
    """

    ends: NDArray[np.float64]
    whole: float
    weights: NDArray[np.float32]

    def marginal(self) -> float:
        """Users a CPU-second over the second half of the rounds."""
        half = len(self.ends) // 2
        return USERS * (len(self.ends) - 1 - half) / float(self.ends[-1] - self.ends[half])

    def included(self) -> float:
        """Users a CPU-second, everything counted."""
        return USERS * (len(self.ends) - 1) / self.whole


def child(who: str, form: str, rounds: int, *, limit_s: float = 1800.0) -> Spent:
    """A run of `ours` or `flower` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [sys.executable, "-W", "ignore", __file__, who, form, str(rounds), str(out)]
        paths = os.pathsep.join([str(_HERE), str(_HERE / "peers"), str(_HERE.parent)])
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{who} failed: {done.stderr[-2000:]}")
        return spent_of(out)


def spent_of(out: Path) -> Spent:
    """What a run wrote."""
    with np.load(out, allow_pickle=False) as data:
        weights = data["weights"] if "weights" in data else np.zeros(0, np.float32)
        whole = float(data["whole"]) if "whole" in data else float(data["cpu_s"][-1])
        return Spent(data["cpu_s"], whole, weights)


def ours(form: str, rounds: int, out: Path) -> None:
    """A whole run on the local engine, one client: ledger, odometer, noise and release."""
    from fedsynth.client.shard import Shard
    from fedsynth.core.config import parse_config
    from fedsynth.core.randomness import OsKeyStream
    from fedsynth.server.planned import plan_of
    from fedsynth.simulation.run import run_local

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "schema.json").write_text(json.dumps(schema().to_json()), encoding="utf-8")
        config = parse_config(
            {
                "population": {"name": "t", "num_users": USERS, "epsilon": 10.0, "delta": 1e-5},
                "data": {"schema": "schema.json"},
                "unit": {"column": "id", "max_records": IMAGES},
                "budget": {"epsilon": 10.0},
                "strategy": {"name": "training_task:Train", **settings(form, rounds)},
                "engine": {"clients": 1},
                "release": {"num_records": 10},
            },
            base=base,
        )
        ids = np.array([f"user-{number // IMAGES}" for number in range(USERS * IMAGES)])
        ends = [time.process_time()]

        def heard(event: Any) -> None:
            ends.append(time.process_time())

        run_local(plan_of(config), stream=OsKeyStream(), data=Shard(people(), ids), on_event=heard)
    np.savez(out, cpu_s=np.array(ends), whole=time.process_time())


def pfl(
    form: str,
    rounds: int,
    *,
    noise_multiplier: float,
    orders: NDArray[np.int64],
    pace: float = 1.0,
) -> Spent:
    """What pfl's simulation takes, in its own environment.

    Raises:
      Unavailable: It cannot be installed here, or did not end.
    """
    import torch
    from environment import python_of, run_command

    python = python_of("pfl")
    records = people()
    images = np.asarray(records.images).reshape(USERS, IMAGES, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        task, out = Path(folder) / "task.npz", Path(folder) / "out.npz"
        given = {
            "form": form,
            "clip": pace * CLIP,
            "noise_multiplier": noise_multiplier,
            "server_lr": SERVER_LR,
            "local_lr": pace * LOCAL_LR,
            "local_batch": BATCH,
            "local_epochs": 1,
        }
        np.savez(
            task,
            weights=start_of(form),
            images=images,
            labels=records.codes.reshape(USERS, IMAGES),
            cohorts=np.tile(np.arange(USERS), (rounds, 1)),
            orders=orders,
            settings=json.dumps(given),
        )
        packages = Path(torch.__file__).parent.parent
        driver = _HERE / "peers" / "pfl_training.py"
        run_command([python, "-W", "ignore", driver, task, out, f"--torch={packages}"], 1800)
        return spent_of(out)


def flower(form: str, rounds: int, out: Path) -> None:
    """Flower's simulation with one user a client, two actors; without clip and without noise."""
    import torch
    from classifier import loss, module
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    ends: list[float] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """A user's two steps."""
        torch.set_num_threads(1)
        user = int(context.node_config["partition-id"])
        records = people().take(slice(user * IMAGES, (user + 1) * IMAGES))
        images = torch.from_numpy(np.array(records.images)).permute(0, 3, 1, 2).float().div_(255)
        labels = torch.from_numpy(records.codes[:, 0].astype(np.int64))
        net = module(form, start_of(form))
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=LOCAL_LR)
        for first in range(0, IMAGES, BATCH):
            optimizer.zero_grad()
            loss(net, images[first : first + BATCH], labels[first : first + BATCH]).backward()
            optimizer.step()
        arrays, count = ArrayRecord(net.state_dict()), MetricRecord({"num-examples": IMAGES})
        return Message(RecordDict({"arrays": arrays, "metrics": count}), reply_to=message)

    class Timed(FedAvg):
        """Notes the time at the end of each round."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            """As Flower's."""
            made = super().aggregate_train(server_round, replies)
            ends.append(_cpu_of_descendants(os.getpid()))
            return made

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """All rounds."""
        net = module(form, start_of(form))
        ends.append(_cpu_of_descendants(os.getpid()))
        Timed(fraction_evaluate=0.0).start(
            grid=grid,
            initial_arrays=ArrayRecord(net.state_dict()),
            num_rounds=rounds,
            train_config=ConfigRecord(),
        )

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, USERS, backend_config=resources)  # type: ignore[arg-type]
    np.savez(out, cpu_s=np.array(ends), whole=ends[-1])


def _cpu_of_descendants(root: int) -> float:
    """CPU-seconds of a process and of all that descend from it and live."""
    parents, spent, ticks = {}, {}, os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(fields[1])
            spent[int(entry.name)] = sum(map(int, fields[11:15])) / ticks
    family, before = {root}, 0
    while before < len(family):
        before = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(spent.get(pid, 0.0) for pid in family)


if __name__ == "__main__":
    {"ours": ours, "flower": flower}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
