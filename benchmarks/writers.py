# SPDX-License-Identifier: Apache-2.0
"""MNIST by its writers, and what judges say of synthetic images of it."""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

from functools import lru_cache

import numpy as np
import tables
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import User
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.models.efficientnet import EfficientNetLite0
from fedsynth.models.frechet import frechet_distance, precision_recall
from fedsynth.simulation.quality import train_on_synthetic
from measure import Tally
from numpy.typing import NDArray

TABLE = "mnist_writers"
MOST_RECORDS = 150  # of a writer
DELTA = 1e-4
NUM_COMPARED = 1_000  # synthetic images, and as many real ones of other writers, on features
TSTR, FRECHET = "TSTR accuracy", "Fréchet distance"


def seen(case: tables.Case, figures: report.Report) -> NDArray[np.float32] | None:
    """Features of real images of other writers; `None` without the network, which is said."""
    try:
        return EfficientNetLite0().batched(pixels(some(case.test, NUM_COMPARED, 0)))
    except ConfigError as error:
        figures.note(f"no distances on features: {error}")
        return None


def judged(
    case: tables.Case, records: Records, seen: NDArray[np.float32] | None, *, seed: int
) -> dict[str, float]:
    """What judges say of synthetic records.

    Args:
      case: Whose other writers' records they are tested on.
      records: The synthetic ones.
      seen: Features of real images; `None`: no distances.
      seed: Of what part of the records is compared on features.
    """
    judges = train_on_synthetic(case.test, records, case.schema, target="label")
    found = {TSTR: judges["network"].synthetic, "TSTR, logistic": judges["logistic"].synthetic}
    if seen is not None:
        drawn = EfficientNetLite0().batched(pixels(some(records, NUM_COMPARED, seed)))
        among = precision_recall(seen, drawn)
        found[FRECHET] = frechet_distance(seen, drawn).distance
        found |= {"precision": among.precision, "recall": among.recall}
    return found


def cost_of(tally: Tally, cpu_s: float) -> dict[str, float]:
    """What a run took of a processor, and of the clients' network."""
    return {
        "CPU-s": cpu_s,
        "rounds": float(tally.rounds),
        "kB up": tally.bytes_up / 1e3,
        "kB down": tally.bytes_down / 1e3,
    }


@lru_cache(maxsize=1)
def case_of(quick: bool) -> tables.Case:
    """MNIST by writer; or scikit-learn's digits, enlarged, one user an image.

    Raises:
      Missing: MNIST by writer is not on this machine.
    """
    label = Column("label", "category", "public: ten digits", tuple("0123456789"))
    image = ImageColumn("image", (28, 28, 1), "public: the scanner's format")
    schema = Schema((label,), image, target="label")
    if quick:
        small = tables.load("digits")
        train = small.train
        shard = BoundedShard(
            enlarged(train.records), train.user_index, train.num_users, train.max_records
        )
        return tables.Case(TABLE, schema, shard, enlarged(small.test), DELTA)
    parts = []
    for name in ("train", "test"):
        path = tables.folder().parent / "image" / f"mnist_writers_{name}.npz"
        if not path.is_file():
            raise tables.Missing(f"{path.name} is not at {path.parent}: nothing was measured")
        with np.load(path, allow_pickle=False) as arrays:
            codes = arrays["labels"].astype(np.int32)[:, None]
            records = Records(codes, arrays["images"][..., None])
            parts.append((records, arrays["writer_id"].astype(np.str_)))
    (learned, writers), (test, _) = parts
    shard = bound(Shard(learned, writers), User("writer", max_records=MOST_RECORDS), seed=0)
    return tables.Case(TABLE, schema, shard, test, DELTA)


def enlarged(records: Records) -> Records:
    """Images of 8 x 8 with each pixel as nine, in a border of two."""
    large = np.kron(pixels(records)[..., 0], np.ones((1, 3, 3), dtype=np.uint8))
    return Records(records.codes, np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None])


def pixels(records: Records) -> NDArray[np.uint8]:
    """Images of records that have some."""
    if records.images is None:
        raise ConfigError("records without images")
    return records.images


def some(records: Records, num: int, seed: int) -> Records:
    """A part of records, by chance."""
    drawn = np.random.default_rng([seed, 5]).permutation(len(records))[:num]
    return records.take(np.sort(drawn))
