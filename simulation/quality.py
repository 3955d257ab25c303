# SPDX-License-Identifier: Apache-2.0
"""Compare synthetic records with the real ones, exactly: numbers that never leave the owner.

Every figure made here is an exact statistic of private records, unpriced and unnoised. It is for
an owner's own eyes, for simulations and for benchmarks on public data; it never goes into a
release, a card or a log of a deployment.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, SchemaError
from ..core.records import Records
from ..core.schema import Schema

if TYPE_CHECKING:
    from rich.table import Table
    from scipy.sparse import csr_matrix

MAX_TRIPLES = 400
_DENSE_CELLS = 1 << 22  # a marginal with more cells is counted by its occupied cells only
_MAX_TRAIN = 30_000  # records that a judge is trained on; more change an accuracy by less than 0.01


@dataclass(frozen=True)
class Accuracy:
    """How well a judge, trained on some records, predicts the target of real ones.

    Attributes:
      synthetic: Accuracy of the judge that saw synthetic records only.
      real: Accuracy of the same judge trained on real records; NaN where none were given.
      majority: Accuracy of always saying the commonest class of the real test records.
    """

    synthetic: float
    real: float
    majority: float


@dataclass(frozen=True)
class Quality:
    """Exact distance between synthetic and real records. Site-only: see the module's docstring.

    Attributes:
      total_variation: Mean total variation distance of all k-way marginals, by k.
      accuracy: Train-on-synthetic, test-on-real, by judge; empty without a target.
      target: The column that was predicted, if any.
      num_real: Real records compared with.
      num_synthetic: Synthetic records compared.
    """

    total_variation: dict[int, float]
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    target: str | None = None
    num_real: int = 0
    num_synthetic: int = 0


def quality_of(
    real: Records,
    synthetic: Records,
    schema: Schema,
    *,
    test: Records | None = None,
    orders: Sequence[int] = (1, 2, 3),
    max_marginals: int = MAX_TRIPLES,
) -> Quality:
    """All figures of one synthetic data set.

    Args:
      real: The real records that it stands for.
      synthetic: The synthetic records.
      schema: Public schema of both; its target, if any, is predicted.
      test: Real records that no run has seen, to test judges on; `None`: no accuracy.
      orders: Which k-way marginals to compare; those above the number of columns are left out.
      max_marginals: Most marginals of three and more columns that are compared.

    Privacy:
      None. The result is an exact function of private records and stays with their owner.
    """
    orders = [k for k in orders if k <= len(schema.columns)]
    accuracy: dict[str, Accuracy] = {}
    if test is not None and schema.target is not None:
        accuracy = train_on_synthetic(
            test, synthetic, schema, target=schema.target, real_train=real
        )
    return Quality(
        {
            k: total_variation(
                real, synthetic, schema, k, max_marginals=None if k < 3 else max_marginals
            )
            for k in orders
        },
        accuracy,
        schema.target,
        len(real),
        len(synthetic),
    )


def total_variation(
    real: Records,
    synthetic: Records,
    schema: Schema,
    order: int,
    *,
    max_marginals: int | None = None,
) -> float:
    """Mean total variation distance over the `order`-way marginals; 0 is equal, 1 disjoint.

    Half the L1 distance of the normalized tables of counts, averaged over all sets of `order`
    columns. An image column is not compared.

    Args:
      real: Real records; at least one.
      synthetic: Synthetic records; at least one.
      schema: Public schema of both.
      order: Columns in a marginal; 1 to the number of columns.
      max_marginals: Compare a fixed random choice of so many; `None`: all of them.

    Raises:
      DataError: There is nothing to compare.

    Privacy:
      None. The result is an exact function of private records and stays with their owner.

    Reference:
      The workload error of McKenna et al. (2022), "AIM", https://arxiv.org/abs/2201.12677,
      halved so that it lies in [0, 1].
    """
    num_columns = len(schema.columns)
    if not 1 <= order <= num_columns:
        raise DataError(f"order must be 1 to {num_columns} (the number of columns), not {order}")
    if not len(real) or not len(synthetic):
        raise DataError("comparing needs at least one real and one synthetic record")
    codes = [np.ascontiguousarray(r.codes.T) for r in (real, synthetic)]  # column by column
    distances = [
        _distance(codes[0], codes[1], columns, schema)
        for columns in _marginals(num_columns, order, max_marginals)
    ]
    return float(np.mean(distances))


def column_variation(real: Records, synthetic: Records, schema: Schema) -> dict[str, float]:
    """Total variation distance of each table column by its name, the largest first.

    Privacy:
      None. The result is an exact function of private records and stays with their owner.
    """
    codes = [np.ascontiguousarray(r.codes.T) for r in (real, synthetic)]
    found = {
        name: _distance(codes[0], codes[1], (index,), schema)
        for index, name in enumerate(schema.names)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def train_on_synthetic(
    real_test: Records,
    synthetic: Records,
    schema: Schema,
    *,
    target: str,
    real_train: Records | None = None,
) -> dict[str, Accuracy]:
    """Accuracy on real records of judges that saw synthetic ones only, by judge.

    Judges: logistic regression, and gradient boosting (tables) or a small neural network on
    pixels (images). Their settings are fixed and never tuned, so figures compare.

    Args:
      real_test: Real records to test on; at least one.
      synthetic: Records to train on.
      schema: Public schema of both.
      target: A category column; its cells are the classes.
      real_train: Real records to train the same judges on, for the bound to reach; `None`: none.

    Raises:
      DataError: There is nothing to train or test on.
      SchemaError: `target` is no table column.

    Privacy:
      None. The result is an exact function of private records and stays with their owner.
    """
    at = schema.index(target)
    if not schema.columns[at].is_categorical:
        raise SchemaError(f"target {target!r} must be a category to be predicted as a class")
    if len(schema.columns) == 1 and schema.image is None:
        raise SchemaError(f"target {target!r} is the only column, so nothing predicts it")
    if not len(real_test) or not len(synthetic):
        raise DataError("judging needs at least one real and one synthetic record")
    truth = real_test.codes[:, at]
    majority = float(np.bincount(truth).max() / len(truth))
    return {
        judge: Accuracy(
            _judged(judge, synthetic, real_test, schema, at),
            math.nan if real_train is None else _judged(judge, real_train, real_test, schema, at),
            majority,
        )
        for judge in ("logistic", "boosting" if schema.image is None else "network")
    }


def quality_table(
    quality: Quality,
    *,
    title: str = "Quality (exact, not private: simulation only, stays at this site)",
) -> "Table":
    """A table for the terminal; red, because its numbers are exact statistics of private data."""
    from rich.table import Table

    table = Table(title=title, title_style="red", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("read it as")
    for order, distance in quality.total_variation.items():
        columns = "a column" if order == 1 else f"{order} columns together"
        table.add_row(
            f"{order}-way total variation",
            f"{distance:.4f}",
            f"{distance:.1%} of records would have to change for {columns} to fit",
        )
    for judge, accuracy in quality.accuracy.items():
        real = "" if math.isnan(accuracy.real) else f"; trained on real {accuracy.real:.3f}"
        table.add_row(
            f"{judge} predicts {quality.target}",
            f"{accuracy.synthetic:.3f}",
            f"trained on synthetic, tested on real; commonest class {accuracy.majority:.3f}{real}",
        )
    return table


def _marginals(num_columns: int, order: int, most: int | None) -> list[tuple[int, ...]]:
    """Sets of columns to compare: all, or a choice that is the same every time."""
    every = list(itertools.combinations(range(num_columns), order))
    if most is None or len(every) <= most:
        return every
    chosen = np.random.default_rng(0).choice(len(every), size=most, replace=False)
    return [every[i] for i in np.sort(chosen)]


def _distance(
    real: NDArray[np.int32],
    synthetic: NDArray[np.int32],
    columns: tuple[int, ...],
    schema: Schema,
) -> float:
    """Total variation distance of one marginal; codes column by column."""
    sides = [schema.shape[c] for c in columns]
    first, second = (_cells(codes, columns, sides) for codes in (real, synthetic))
    num_cells = math.prod(sides)
    if num_cells > _DENSE_CELLS:
        _, both = np.unique(np.concatenate([first, second]), return_inverse=True)
        first, second = both[: len(first)], both[len(first) :]
        num_cells = int(both.max()) + 1
    shares = [np.bincount(cells, minlength=num_cells) / len(cells) for cells in (first, second)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _cells(
    codes: NDArray[np.int32], columns: tuple[int, ...], sides: list[int]
) -> NDArray[np.int64]:
    """Cell of each record in the joint table of `columns`, `(num_records,)`."""
    if math.prod(sides) >= 1 << 62:
        raise DataError("the marginal has too many cells to be numbered; compare fewer columns")
    cells: NDArray[np.int64] = codes[columns[0]].astype(np.int64)
    for column, side in zip(columns[1:], sides[1:], strict=True):
        cells = cells * side + codes[column]
    return cells


def _judged(judge: str, train: Records, test: Records, schema: Schema, at: int) -> float:
    """Accuracy on `test` of one judge trained on `train`."""
    if len(train) > _MAX_TRAIN:
        kept = np.sort(np.random.default_rng(0).choice(len(train), _MAX_TRAIN, replace=False))
        train = train.take(kept)
    classes, truth = train.codes[:, at], test.codes[:, at]
    if (classes == classes[0]).all():  # nothing to tell apart: the judge knows one answer
        return float((truth == classes[0]).mean())
    seen, asked = (
        _ordinals(r, at) if judge == "boosting" else _one_hot(r, schema, at) for r in (train, test)
    )
    model = _model(judge, schema, at, batch=min(64, len(train)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a judge that stops early is still the same judge
        model.fit(seen, classes)
    return float((model.predict(asked) == truth).mean())


def _model(judge: str, schema: Schema, at: int, *, batch: int) -> Any:
    """A fresh judge with fixed settings."""
    if judge == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=1000, tol=1e-3)
    if judge == "network":
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((64,), batch_size=batch, max_iter=60, random_state=0)
    from sklearn.ensemble import HistGradientBoostingClassifier

    categorical = [
        not c.is_ordered and c.num_cells <= 255 for i, c in enumerate(schema.columns) if i != at
    ]
    return HistGradientBoostingClassifier(
        max_iter=100, early_stopping=False, categorical_features=categorical, random_state=0
    )


def _ordinals(records: Records, at: int) -> NDArray[np.float64]:
    """Codes of every column but the target, `(num_records, num_columns - 1)`."""
    return np.delete(records.codes, at, axis=1).astype(np.float64)


def _one_hot(records: Records, schema: Schema, at: int) -> "csr_matrix":
    """Cells of categories, ordered cells scaled to [0, 1], and pixels, as one sparse matrix."""
    from scipy.sparse import csr_matrix, hstack

    rows = np.arange(len(records))
    blocks = []
    for index, column in enumerate(schema.columns):
        codes = records.codes[:, index]
        if index == at:
            continue
        if not column.is_ordered:
            ones = np.ones(len(codes))
            blocks.append(csr_matrix((ones, (rows, codes)), (len(codes), column.num_cells)))
        else:
            gone = codes >= column.num_ordered_cells
            scaled = np.where(gone, 0.0, (codes + 0.5) / column.num_ordered_cells)
            blocks.append(csr_matrix(np.column_stack([scaled, gone])))
    if records.images is not None:
        pixels = records.images.reshape(len(records), -1) / 255.0
        blocks.append(csr_matrix(pixels))
    return csr_matrix(hstack(blocks))
