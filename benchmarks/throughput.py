# SPDX-License-Identifier: Apache-2.0
"""What users and messages cost: `dp_fedavg` beside bare torch, the local engine, a million users.

The bare loop is what a practitioner would write for the same model: a plain `nn.Module`, and for
each user one SGD step, the update flattened, its norm clipped, and added to a sum. It gets its
records as ready tensors; the client path gets codes and bytes, as a shard holds them.
"""

import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import report  # first: it sets up threads and paths
from dp_accounting.dp_event import DpEvent
from fedsynth.client.respond import block_sum
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.mechanism import Lattice
from fedsynth.core.query import Contribution, Query, Rounds, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, Schema
from fedsynth.server.planned import plan_of
from fedsynth.simulation.run import run_local
from fedsynth.strategies.dp_fedavg import DpFedAvg
from fedsynth.strategies.independent import Columns, Independent
from fedsynth.strategies.parts.autoencoder import Net
from numpy.typing import NDArray

RECORDS_PER_USER = 20
CLIP, LOCAL_LR, KL_WEIGHT = 1.0, 0.1, 1.0
BLOCK_BYTES = 1 << 26  # as in client/respond.py: dense rows held at a time
SEED = (1, 1)
NETS = {
    "cnn": Net("cnn", (10,), (28, 28, 1), 63, 8),
    "mlp": Net("mlp", (10,), (28, 28, 1), 61, 8),
}
COLUMNS = 15
_CHILD_LIMIT_S = 900.0


def main() -> int:
    """Run the benchmark."""
    args = report.parser(__doc__).parse_args()
    figures = report.Report("throughput", args)
    many_users(figures, users=20_000 if args.quick else 1_000_000)
    messages(figures, clients=(10, 60) if args.quick else (100, 1000))
    for case, net in NETS.items():
        training(figures, case, net, users=32 if args.quick else 160)
    return figures.finish()


def training(figures: report.Report, case: str, net: Net, *, users: int) -> None:
    """Users per CPU-second of the client path and of the bare loop, in turn."""
    rng = np.random.default_rng(0)
    shard = image_users(net, users, rng)
    weights = net.initial(rng)
    ours = client_path(net, weights, shard)
    theirs = bare_loop(net, weights, shard)
    expected = theirs()  # the first call of each: warms caches as well
    apart = np.linalg.norm(ours() - expected) / np.linalg.norm(expected)
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 if figures.quick else 7):
        for path, rate in zip((ours, theirs), rates, strict=True):
            with report.cpu_timer() as spent:
                path()
            rate.append(users / spent[0])
    named = f"{case}, {net.num_weights:,} weights"
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    figures.add(named, "client path", rates[0], unit="users/CPU-s")
    figures.add(named, "bare torch loop", rates[1], unit="users/CPU-s", peer="torch")
    ratio = figures.add(named, "client path / bare loop", ratios, unit="")
    figures.add(named, "difference of the two sums, relative", float(apart), unit="")
    figures.claim(f"{case}: at least 80 % of the bare loop ({ratio.mean:.2f})", ratio.mean >= 0.8)
    figures.claim(f"{case}: both compute the same sum to 1e-4", bool(apart <= 1e-4))


def image_users(net: Net, users: int, rng: np.random.Generator) -> BoundedShard:
    """Users of 20 random images each, with a label."""
    count = users * RECORDS_PER_USER
    images = rng.integers(0, 256, (count, *(net.image or ())), dtype=np.uint8)
    codes = rng.integers(0, net.cells[0], (count, 1)).astype(np.int32)
    index = np.repeat(np.arange(users), RECORDS_PER_USER)
    return BoundedShard(Records(codes, images), index, users, RECORDS_PER_USER)


def client_path(
    net: Net, weights: NDArray[np.float32], shard: BoundedShard
) -> Callable[[], NDArray[np.float64]]:
    """The sum of all users' clipped updates as a client forms it, in blocks, on the lattice."""
    strategy = DpFedAvg(
        clip=CLIP,
        local_lr=LOCAL_LR,
        kl_weight=KL_WEIGHT,
        model=net.form,
        hidden=net.hidden,
        latent=net.latent,
    )
    query = Query(
        "update",
        dim=net.num_weights,
        clip=CLIP,
        noise_multiplier=1.0,
        inputs={
            "weights": weights,
            "shape": np.array([net.num_pixels, *net.cells], dtype=np.int64),
            "image": np.array(net.image, dtype=np.int64),
        },
    )
    block_users = max(1, BLOCK_BYTES // (8 * query.dim))

    def summed() -> NDArray[np.float64]:
        total = np.zeros(query.dim, dtype=np.int64)
        for block in shard.blocks(block_users):
            total += block_sum(strategy, query, block, seed=SEED)
        return total * Lattice.of(query).unit

    return summed


def bare_loop(
    net: Net, weights: NDArray[np.float32], shard: BoundedShard
) -> Callable[[], NDArray[np.float64]]:
    """The same sum by a plain torch loop over users."""
    import torch

    model = bare_model(net)
    load(model, net, weights)
    starting = {key: value.clone() for key, value in model.state_dict().items()}
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=LOCAL_LR)
    noise = code_noise(net)
    assert shard.records.images is not None
    images = torch.from_numpy(shard.records.images.astype(np.float32) / 255).permute(0, 3, 1, 2)
    images = images.contiguous()
    labels = torch.from_numpy(shard.records.codes[:, 0].astype(np.int64))
    bounds = shard.starts

    def summed() -> NDArray[np.float64]:
        total = torch.zeros_like(start)
        for first, last in pairwise(bounds):
            model.load_state_dict(starting)
            optimizer.zero_grad()
            loss = bare_loss(*model(images[first:last], labels[first:last], noise))
            loss.backward()
            optimizer.step()
            after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            update = after - start
            update = update * (CLIP / update.norm().clamp(min=CLIP))
            total += update
        return in_our_order(model, net, total)

    return summed


def bare_model(net: Net) -> Any:
    """The autoencoder as a practitioner's module."""
    import torch
    from torch import nn

    height, width, channels = net.image or (0, 0, 0)
    (cells,) = net.cells

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(net.num_pixels + cells, net.hidden)
            self.code = nn.Linear(net.hidden, 2 * net.latent)
            self.open = nn.Linear(net.latent, net.hidden)
            self.leave = nn.Linear(net.hidden, net.num_pixels + cells)

        def forward(self, images: Any, labels: Any, noise: Any) -> tuple[Any, ...]:
            pixels = images.flatten(1)
            seen = torch.cat([pixels, nn.functional.one_hot(labels, cells).float()], dim=1)
            code = self.code(torch.relu(self.enter(seen)))
            mean, log_var = code.chunk(2, dim=1)
            drawn = mean + torch.exp(0.5 * log_var) * noise
            out = self.leave(torch.relu(self.open(drawn)))
            return out[:, :-cells], out[:, -cells:], pixels, labels, mean, log_var

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid = (32, height // 4, width // 4)
            flat = 32 * (height // 4) * (width // 4)
            self.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
            self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.enter = nn.Linear(flat + cells, net.hidden)
            self.code = nn.Linear(net.hidden, 2 * net.latent)
            self.open = nn.Linear(net.latent, net.hidden)
            self.columns = nn.Linear(net.hidden, cells)
            self.spread = nn.Linear(net.hidden, flat)
            self.up1 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
            self.up2 = nn.ConvTranspose2d(16, channels, 4, stride=2, padding=1)

        def forward(self, images: Any, labels: Any, noise: Any) -> tuple[Any, ...]:
            grid = torch.relu(self.conv2(torch.relu(self.conv1(images))))
            seen = [grid.flatten(1), nn.functional.one_hot(labels, cells).float()]
            code = self.code(torch.relu(self.enter(torch.cat(seen, dim=1))))
            mean, log_var = code.chunk(2, dim=1)
            opened = torch.relu(self.open(mean + torch.exp(0.5 * log_var) * noise))
            grid = torch.relu(self.spread(opened)).unflatten(1, self.grid)
            drawn = self.up2(torch.relu(self.up1(grid)))
            return drawn, self.columns(opened), images, labels, mean, log_var

    return Dense() if net.form == "mlp" else Convolutional()


def bare_loss(drawn: Any, logits: Any, pixels: Any, labels: Any, mean: Any, log_var: Any) -> Any:
    """Negative evidence lower bound, a mean over records."""
    from torch.nn import functional as fn

    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()
    pixel_loss = fn.binary_cross_entropy_with_logits(drawn, pixels, reduction="sum")
    label_loss = fn.cross_entropy(logits, labels, reduction="sum")
    return (KL_WEIGHT * divergence + pixel_loss + label_loss) / len(labels)


def code_noise(net: Net) -> Any:
    """The noise of the code that the client path draws from `SEED`, for 20 records."""
    import torch

    seed = int(np.random.default_rng(SEED).integers(1 << 62))
    drawn = [
        np.random.default_rng([seed, place]).standard_normal(net.latent)
        for place in range(RECORDS_PER_USER)
    ]
    return torch.from_numpy(np.array(drawn, dtype=np.float32))


def load(model: Any, net: Net, weights: NDArray[np.float32]) -> None:
    """Give the module our flat vector; its dense layers are stored the other way round."""
    import torch

    modules = dict(model.named_children())
    for name, value in net.split(weights).items():
        layer, part = name.split(".")
        turned = value.T if part == "w" and value.ndim == 2 else value
        target = modules[layer].weight if part == "w" else modules[layer].bias
        target.data.copy_(torch.from_numpy(np.ascontiguousarray(turned)))


def in_our_order(model: Any, net: Net, flat: Any) -> NDArray[np.float64]:
    """A flat vector in the module's order, in ours."""
    parts, start = {}, 0
    for name, parameter in model.named_parameters():
        values = flat[start : start + parameter.numel()].reshape(parameter.shape).numpy()
        start += parameter.numel()
        parts[name.replace(".weight", ".w").replace(".bias", ".b")] = (
            values.T if name.endswith("weight") and values.ndim == 2 else values
        )
    ordered: NDArray[np.float64] = np.concatenate([parts[name].ravel() for name in net.shapes])
    return ordered.astype(np.float64)


def messages(figures: report.Report, *, clients: tuple[int, int]) -> None:
    """CPU of one more message: what a whole run of many clients takes above that of a few."""
    users = 2 * max(clients)
    data = table_users(users, columns=5)
    for name, settings, rounds in (
        ("independent", {}, 1),
        ("throughput:Repeated", {"num_rounds": 5}, 5),
    ):
        slopes = []
        for _ in range(2 if figures.quick else 5):
            few, many = (
                cpu_seconds_of_run(data, users, name, settings, columns=5, clients=number)
                for number in clients
            )
            slopes.append(1000 * (many - few) / (rounds * (clients[1] - clients[0])))
        case = f"local engine, {rounds} rounds, {clients[0]} to {clients[1]:,} clients"
        figure = figures.add(case, "CPU of a message", slopes, unit="CPU-ms")
        if rounds > 1:
            figures.claim(f"a message under 1 CPU-ms ({figure.mean:.2f})", figure.mean < 1)
    figures.note(
        "a client is set up once a run: odometer, policy and plan; of one round its message bears"
        " all of that, of five a fifth"
    )


@dataclass(frozen=True)
class Repeated(Strategy):
    """`independent`, asked again and again: rounds whose own work is small."""

    name: ClassVar[str] = "repeated"
    num_rounds: int = 5

    def event(self, schema: Schema, noise_multiplier: float) -> DpEvent:
        """Equal parts of the budget."""
        (each, *_) = accounting.split(noise_multiplier, [1 / self.num_rounds] * self.num_rounds)
        return accounting.event_of({(each, 1.0): self.num_rounds})

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Rounds:
        """The same histograms each round; the last are kept."""
        (each, *_) = accounting.split(noise_multiplier, [1 / self.num_rounds] * self.num_rounds)
        once = Independent().rounds(schema, each, rng)
        query = next(once)
        for _ in range(self.num_rounds):
            noisy = yield query
        try:
            once.send(noisy)
        except StopIteration as end:
            learned: Columns = end.value
        return learned

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """As `independent`."""
        return Independent().answer(query, shard, rng)


def many_users(figures: report.Report, *, users: int) -> None:
    """One run over many users of one record each, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_many_users, args=(users, queue))
    child.start()
    cpu_s, rss = queue.get(timeout=_CHILD_LIMIT_S)
    child.join()
    case = f"{users:,} one-record users, {COLUMNS} columns, independent"
    figures.add(case, "CPU of the run", cpu_s, unit="CPU-s")
    figures.add(case, "peak memory of its process", rss / 1e9, unit="GB")
    figures.claim(f"{users:,} users under 60 CPU-s ({cpu_s:.1f})", cpu_s < 60)
    figures.claim(f"{users:,} users under 2 GB ({rss / 1e9:.2f})", rss < 2e9)


def _many_users(users: int, queue: Any) -> None:
    """What the child does."""
    data = table_users(users, columns=COLUMNS)
    spent = cpu_seconds_of_run(data, users, "independent", {}, columns=COLUMNS, clients=10)
    queue.put((spent, report.peak_rss_bytes()))


def cpu_seconds_of_run(
    data: Shard,
    users: int,
    strategy: str,
    settings: dict[str, Any],
    *,
    columns: int,
    clients: int,
) -> float:
    """CPU-seconds of one whole run on the local engine: ledger, odometers, release and all."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        schema = json.dumps(table_schema(columns).to_json())
        (base / "schema.json").write_text(schema, encoding="utf-8")
        config = parse_config(
            {
                "population": {
                    "name": "throughput",
                    "num_users": users,
                    "epsilon": 4.0,
                    "delta": 1e-7,
                },
                "data": {"schema": "schema.json"},
                "unit": {"column": "id", "max_records": 1},
                "budget": {"epsilon": 4.0},
                "strategy": {"name": strategy, **settings},
                "engine": {"clients": clients},
                "release": {"num_records": 1000},
            },
            base=base,
        )
        gc.collect()
        begun = time.process_time()
        run_local(plan_of(config), stream=OsKeyStream(), data=data)
        return time.process_time() - begun


def table_schema(columns: int) -> Schema:
    """Categories of 2 to 16 cells."""
    return Schema(
        tuple(
            Column(
                f"c{number}",
                "category",
                "public: made up for this benchmark",
                categories=tuple(str(cell) for cell in range(2 + number % COLUMNS)),
            )
            for number in range(columns)
        )
    )


def table_users(users: int, *, columns: int) -> Shard:
    """Users of one random record each."""
    rng = np.random.default_rng(0)
    codes = np.empty((users, columns), dtype=np.int32)
    for number, cells in enumerate(table_schema(columns).shape):
        codes[:, number] = rng.integers(0, cells, users)
    return Shard(Records(codes), np.array([f"user-{number}" for number in range(users)]))


if __name__ == "__main__":
    sys.exit(main())
