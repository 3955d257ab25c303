# SPDX-License-Identifier: Apache-2.0
"""Where to clip: a user's update, or each of the user's records, at equal promises to users.

Both ways train the same model for the same rounds, each record joining as often (a user by one
coin, or each record by its own), and both are priced for users: sums over records by how many of a
user's records may join at once. What differs is what one clip has to hold, and how dear it is.

    python benchmarks/levels.py --quick
    python benchmarks/levels.py --json build/bench/levels.json

Runs are kept in FILE.runs.jsonl as soon as they end, and a run that is there is not done again.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard
from fedsynth.core import accounting
from fedsynth.core.privacy import Budget, User
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.core.synthesizer import Synthesizer
from fedsynth.simulation.direct import direct_run
from fedsynth.strategies.parts.module import ModuleTrainable
from fedsynth.strategies.parts.trainable import RecordShape
from fedsynth.strategies.parts.training import Training
from numpy.typing import NDArray

EPSILONS = (1.0, 4.0, 10.0)
DELTA = 1e-4  # below one over the users of either set
ROUNDS, SAMPLING_PROB = 40, 0.2
WAYS = ("user", "example")
PUBLIC = "public: the scanner's format"


@dataclass(frozen=True)
class Weights(Synthesizer):
    """Trained weights, to be judged; they sample nothing."""

    schema: Schema
    weights: NDArray[np.float32]
    kind: ClassVar[str] = "levels_weights"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Nothing."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights."""
        return {"weights": self.weights}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """From saved weights."""
        return cls(schema, tensors["weights"])


@dataclass(frozen=True)
class Classifier(Training):
    """Tells digits apart by one hidden layer."""

    name: ClassVar[str] = "levels_classifier"
    hidden: int = 32

    def check(self) -> None:
        """Nothing."""

    def model_for(self, shape: RecordShape) -> ModuleTrainable:
        """A perceptron over pixels."""
        import torch

        height, width, _ = shape.image or (0, 0, 0)

        def build() -> Any:
            return torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(height * width, self.hidden),
                torch.nn.ReLU(),
                torch.nn.Linear(self.hidden, shape.cells[0]),
            )

        def loss(module: Any, pixels: Any, codes: Any) -> Any:
            return torch.nn.functional.cross_entropy(module(pixels), codes[:, 0], reduction="none")

        return ModuleTrainable(build, loss, synthesizer=Weights)


@dataclass(frozen=True)
class Chain(Training):
    """Tells each column of a table from those before it; a generator of records."""

    name: ClassVar[str] = "levels_chain"

    def check(self) -> None:
        """Nothing."""

    def model_for(self, shape: RecordShape) -> ModuleTrainable:
        """A linear layer a column, over the columns before."""
        import torch

        fn, cells = torch.nn.functional, shape.cells

        def build() -> Any:
            firsts = [sum(cells[:column]) for column in range(len(cells))]
            return torch.nn.ModuleList(
                torch.nn.Linear(1 + first, size) for first, size in zip(firsts, cells, strict=True)
            )

        def loss(module: Any, codes: Any) -> Any:
            known, total = torch.ones((len(codes), 1)), torch.zeros(len(codes))
            for column, layer in enumerate(module):
                cell = codes[:, column]
                total = total + fn.cross_entropy(layer(known), cell, reduction="none")
                known = torch.cat([known, fn.one_hot(cell, cells[column]).float()], dim=1)
            return total

        return ModuleTrainable(build, loss, synthesizer=Weights)


@dataclass(frozen=True)
class Population:
    """Users to learn from, and how well weights do on records of others.

    Attributes:
      name: Of the data.
      schema: Public schema.
      users: Given the most records of a user, the users.
      judged: Score of a strategy's model with weights, on others' records.
      metric: What the score is.
      rising: Whether more of it is better.
      strategy: Class of the method.
      most_records: Bounds of a user's records to try.
      clips: For each way, the clip; chosen on seed 99.
      server_lr: Step of the server; as well.
    """

    name: str
    schema: Schema
    users: Callable[[int], BoundedShard]
    judged: Callable[[ModuleTrainable, NDArray[np.float32]], float]
    metric: str
    rising: bool
    strategy: type[Training]
    most_records: tuple[int, int]
    clips: Mapping[str, float]
    server_lr: float


def main() -> int:
    """Both ways on both populations."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="repetitions (default 5)")
    options.add_argument("--only", help="one population")
    args = options.parse_args()
    figures = report.Report("levels", args)
    kept = _Kept(args.json.with_suffix(".runs.jsonl") if args.json else None)
    seeds = 1 if args.quick else args.seeds
    won: list[tuple[str, float]] = []
    for population in _populations(figures, quick=args.quick):
        if args.only in (None, population.name):
            won += _compare(figures, population, kept, seeds, quick=args.quick)
    if won:
        gains = np.array([gain for _, gain in won])
        figures.note(
            f"clipping users is ahead in {int((gains > 0).sum())} of {len(gains)} cases: "
            + ", ".join(f"{case} {gain:+.3f}" for case, gain in won)
        )
        figures.claim("each way is ahead somewhere, or users everywhere", bool(gains.max() > 0))
    return figures.finish()


def _compare(
    figures: report.Report, population: Population, kept: "_Kept", seeds: int, *, quick: bool
) -> Iterator[tuple[str, float]]:
    """Both ways at every bound of records and level; by how much clipping users is ahead."""
    for most in population.most_records[: 1 if quick else 2]:
        for epsilon in EPSILONS[1:2] if quick else EPSILONS:
            scores: dict[str, list[float]] = {}
            for way in WAYS:
                case = f"{population.name}, {most} records, epsilon={epsilon:g}, {way}"
                dial = _dial(population, way, most, epsilon, rounds=6 if quick else ROUNDS)
                runs = [
                    kept.or_else(
                        f"{case}, seed {seed}{', quick' if quick else ''}",
                        lambda w=way, s=seed, m=most, z=dial: _run(
                            population, w, m, z, s, rounds=6 if quick else ROUNDS
                        ),
                    )
                    for seed in range(seeds)
                ]
                scores[way] = [run["score"] for run in runs]
                figures.add(case, population.metric, scores[way], unit="")
                figures.add(case, "noise multiplier", dial, unit="clips")
                figures.add(case, "CPU-s", [run["cpu"] for run in runs], unit="CPU-s")
            gain = np.mean(scores["user"]) - np.mean(scores["example"])
            sign = 1 if population.rising else -1
            yield f"{population.name} {most} epsilon={epsilon:g}", float(sign * gain)


def _strategy(population: Population, way: str, most: int, *, rounds: int) -> Training:
    """The method at one level."""
    shard = population.users(most)
    settings: dict[str, Any] = {
        "num_users": shard.num_users,
        "num_rounds": rounds,
        "sampling_prob": SAMPLING_PROB,
        "clip": population.clips[way],
        "local_lr": 1.0,
        "server_lr": population.server_lr,
    }
    if way == "example":
        mean = round(len(shard.records) / shard.num_users, 1)  # declared, as num_users is
        settings |= {"level": "example", "records_per_user": most, "mean_records": mean}
    return population.strategy(**settings)


def _dial(population: Population, way: str, most: int, epsilon: float, *, rounds: int) -> float:
    """The noise multiplier that the promise to users calls for."""
    strategy = _strategy(population, way, most, rounds=rounds)
    return accounting.calibrate(
        lambda z: strategy.event(population.schema, z), Budget(epsilon, DELTA)
    )


def _run(
    population: Population, way: str, most: int, dial: float, seed: int, *, rounds: int
) -> dict[str, float]:
    """One run and its score."""
    strategy = _strategy(population, way, most, rounds=rounds)
    rng = np.random.default_rng([seed, 3])
    with report.cpu_timer() as cpu:
        learned = direct_run(strategy, population.schema, population.users(most), dial, rng=rng)
    assert isinstance(learned, Weights)
    model = strategy.model_for(RecordShape.of(population.schema))
    assert isinstance(model, ModuleTrainable)
    return {"score": population.judged(model, learned.weights), "cpu": cpu[0]}


def _populations(figures: report.Report, *, quick: bool) -> Iterator[Population]:
    """What is at hand."""
    for load in (_writers, _customers):
        try:
            yield load(quick=quick)
        except tables.Missing as missing:
            figures.note(str(missing))


def _writers(*, quick: bool) -> Population:
    """Writers of digits, at half the scanner's resolution."""
    schema = Schema(
        (Column("digit", "category", PUBLIC, categories=tuple("0123456789")),),
        image=ImageColumn("image", (14, 14, 1), PUBLIC),
        target="digit",
    )
    (learned, writers), (test, _) = (_digits(part) for part in ("train", "test"))
    shard = Shard(learned, writers)

    @lru_cache
    def users(most: int) -> BoundedShard:
        bounded = bound(shard, User("writer", max_records=most), seed=0)
        return bounded.only(np.arange(bounded.num_users) < 60) if quick else bounded

    def judged(model: ModuleTrainable, weights: NDArray[np.float32]) -> float:
        import torch

        pixels, codes = model.read(torch, test)
        with torch.no_grad():
            guessed = model.with_weights(weights)(pixels).argmax(1)
        return float((guessed == codes[:, 0]).double().mean())

    return Population(
        "mnist_writers", schema, users, judged, "accuracy", True, Classifier,
        (16, 64), {"user": 0.5, "example": 1.0}, 0.05,
    )  # fmt: skip


def _digits(part: str) -> tuple[Records, NDArray[np.str_]]:
    """Digits and their writers."""
    path = tables.folder().parent / "image" / f"mnist_writers_{part}.npz"
    if not path.is_file():
        raise tables.Missing(f"{path.name} is not at {path.parent}: no digits were measured")
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int32)
        small = images.reshape(len(images), 14, 2, 14, 2).mean(axis=(2, 4)).astype(np.uint8)
        return Records(labels[:, None], small[..., None]), arrays["writer_id"].astype(np.str_)


def _customers(*, quick: bool) -> Population:
    """Customers of an online shop, by the lines of their invoices."""
    case = tables.load("online_retail", quick=quick)

    @lru_cache
    def users(most: int) -> BoundedShard:
        ids = case.train.user_index.astype(np.str_)
        bounded = bound(Shard(case.train.records, ids), User("id", max_records=most), seed=0)
        return bounded.only(np.arange(bounded.num_users) < 100) if quick else bounded

    def judged(model: ModuleTrainable, weights: NDArray[np.float32]) -> float:
        import torch

        given = {n: torch.from_numpy(np.array(p)) for n, p in model.split(weights).items()}
        with torch.no_grad():
            losses = model.losses(torch, given, model.read(torch, case.test), ())
        return float(losses.double().mean())

    return Population(
        "online_retail", case.schema, users, judged, "held-out loss", False, Chain,
        (5, 20), {"user": 0.5, "example": 1.0}, 0.05,
    )  # fmt: skip


class _Kept:
    """Runs that were done, in a file of lines."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, float]] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                known = json.loads(line)
                self._known[known.pop("run")] = known

    def or_else(self, name: str, do: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A run that was kept, or that is done now and kept."""
        if name not in self._known:
            found = do()
            if not all(map(math.isfinite, found.values())):
                raise RuntimeError(f"{name}: {found}")
            self._known[name] = found
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"run": name, **found}) + "\n")
        return self._known[name]


if __name__ == "__main__":
    raise SystemExit(main())
