# SPDX-License-Identifier: Apache-2.0
"""Read a client's private records from a file, with each record's user.

Nothing is guessed: text formats are read as text, and the schema alone says what a value means.
No message shows a value of a record or a count of records; it names file, column, what was
expected and what to do.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..core.errors import ConfigError, ShardError
from ..core.privacy import PrivacyUnit
from ..core.records import Records
from ..core.schema import ImageColumn, Schema
from ..core.texts import as_texts
from ..core.users import canonical_user_ids, partition_of
from .coding import Coder, texts_in
from .files import (
    SeenColumn,
    arrays,
    batches,
    columns_of,
    find_column,
    format_of,
)
from .unread import Unread, unread_in

__all__ = ["Partition", "SeenColumn", "Shard", "columns_of", "encode", "read_shard"]

Partition = tuple[int, int]
"""(index, number of simulated clients)."""


@dataclass(frozen=True)
class Shard:
    """One client's private records, not yet bounded.

    Attributes:
      records: Encoded records, in file order.
      user_ids: Canonical user id of each record, `(num_records,)`; a record's position in its
        file where the unit is a record.
      unread: What of each column has no cell and so counts as missing, for the owner alone.
    """

    records: Records
    user_ids: NDArray[np.str_]
    unread: tuple[Unread, ...] = ()

    def __post_init__(self) -> None:
        if len(self.user_ids) != len(self.records):
            raise ShardError("user_ids and records differ in length")


def read_shard(
    path: Path, schema: Schema, unit: PrivacyUnit, *, partition: Partition | None = None
) -> Shard:
    """The shard in a `.csv`, `.jsonl` (each also `.gz`), `.parquet` or `.npz` file.

    Columns that the schema does not name are not read. Records are encoded in batches, so memory
    holds their codes and one batch of values.

    Args:
      path: The file.
      schema: Public schema; says which columns are read and how values become cells.
      unit: Says which column holds user ids.
      partition: `(i, n)` keeps the users whom `partition_of` gives to simulated client i of n;
        `None`: all of them.

    Raises:
      ShardError: The file cannot be read or parsed, a column is missing or of the wrong type, a
        value has no cell, or a user id is null.
    """
    if not path.is_file():
        raise ShardError(f"there is no file {path}; check the path of the shard")
    needed = columns_needed(schema, unit)
    if format_of(path) == "npz":
        return _npz_shard(path, schema, unit, partition)
    if schema.image is not None:
        raise ShardError(
            f"{path.name}: the schema has the image column {schema.image.name!r}, and images are"
            " read from .npz files; convert the file"
        )
    parts: list[Shard] = []
    first = 0
    coders = _coders(schema)
    for table in batches(path, needed):
        parts.append(_encode(table, schema, coders, unit, partition, first, path.name))
        first += table.num_rows
    return _joined(parts, schema)


def encode(
    table: pa.Table,
    schema: Schema,
    unit: PrivacyUnit,
    *,
    images: NDArray[np.uint8] | None = None,
    partition: Partition | None = None,
    where: str = "table",
) -> Shard:
    """The shard that an Arrow table (and an array of images beside it) holds.

    Arguments and errors are those of `read_shard`; `where` stands in messages for the file.
    """
    for name in columns_needed(schema, unit):
        find_column(name, table.column_names, where)
    return _encode(table, schema, _coders(schema), unit, partition, 0, where, images)


def _coders(schema: Schema) -> list[Coder]:
    """What turns the values of each column into cells."""
    return [Coder(column) for column in schema.columns]


def columns_needed(schema: Schema, unit: PrivacyUnit) -> list[str]:
    """Columns that are read, but for images."""
    text = [schema.text.name] if schema.text else []
    user = [] if unit.column is None or unit.column in schema.names else [unit.column]
    return [*schema.names, *text, *user]


def _npz_shard(path: Path, schema: Schema, unit: PrivacyUnit, partition: Partition | None) -> Shard:
    """The shard in a npz file: one array a column."""
    image = [schema.image.name] if schema.image else []
    found = arrays(path, [*columns_needed(schema, unit), *image])
    images = found.pop(image[0]) if image else None
    columns = {name: _npz_column(array, name, path) for name, array in found.items()}
    if len({len(column) for column in columns.values()}) > 1:
        raise ShardError(f"{path.name}: its arrays differ in length; write them anew")
    table, coders = pa.table(columns), _coders(schema)
    return _encode(table, schema, coders, unit, partition, 0, path.name, images)


def _npz_column(array: NDArray[Any], name: str, path: Path) -> pa.Array:
    """A table column from its array."""
    if array.ndim != 1 or array.dtype.kind not in "biufUSM":
        raise ShardError(
            f"{path.name}: array {name!r} must be one-dimensional, of numbers, text, dates or truth"
            f" values, not {array.dtype} of {array.ndim} dimensions"
        )
    return pa.array(array.astype(array.dtype.newbyteorder("="), copy=False))


def _encode(
    table: pa.Table,
    schema: Schema,
    coders: list[Coder],
    unit: PrivacyUnit,
    partition: Partition | None,
    first: int,
    where: str,
    images: NDArray[Any] | None = None,
) -> Shard:
    """A table as a shard; `first` is the position of its first record in the file."""
    num_records = table.num_rows if table.num_columns or images is None else len(images)
    if schema.image is not None:
        images = _checked_images(images, schema.image, num_records, where)
    if unit.column is None:
        width = len(str(first + num_records))
        user_ids = np.arange(first, first + num_records).astype(f"U{width}")
    else:
        user_ids = canonical_user_ids(
            table.column(unit.column), where=f"{where}: user-id column {unit.column!r}"
        )
    if partition is not None:
        index, num_partitions = partition
        if not 0 <= index < num_partitions:
            raise ConfigError(f"partition must be (i, n) with 0 <= i < n, not {partition}")
        keep = partition_of(user_ids, num_partitions) == index
        table = table.filter(pa.array(keep)) if table.num_columns else table
        user_ids = user_ids[keep]
        images = None if images is None else images[keep]
    codes = np.empty((len(user_ids), schema.num_codes), dtype=np.int32)
    word = len(schema.columns)
    unread: list[Unread] = []
    for i, coder in enumerate(coders):
        values = table.column(coder.column.name)
        if num_words := coder.column.num_words:
            codes[:, i], codes[:, word : word + num_words] = coder.words(values, where)
            word += num_words
        else:
            codes[:, i] = coder.codes(values, where)
            unread.append(unread_in(coder, values, codes[:, i]))
    texts = None
    if schema.text is not None:
        texts = texts_in(schema.text, table.column(schema.text.name), where)
    records = Records(codes, images if schema.image is not None else None, texts=texts)
    return Shard(records, user_ids, tuple(unread))


def _joined(parts: list[Shard], schema: Schema) -> Shard:
    """Batches of records as one shard."""
    if not parts:
        texts = None if schema.text is None else as_texts([])
        return Shard(
            Records(np.empty((0, schema.num_codes), dtype=np.int32), texts=texts),
            np.array([], dtype=np.str_),
        )
    if len(parts) == 1:
        return parts[0]
    return Shard(
        Records.joined([part.records for part in parts]),
        np.concatenate([part.user_ids for part in parts]),
        tuple(reduce(add, batches) for batches in zip(*(p.unread for p in parts), strict=True)),
    )


def _checked_images(
    images: NDArray[Any] | None, column: ImageColumn, num_records: int, where: str
) -> NDArray[np.uint8]:
    """Images of the schema's shape, `(num_records, height, width, channels)`."""
    where = f"{where}: image column {column.name!r}"
    if images is None:
        raise ShardError(f"{where}: there are no images; read them from a .npz file")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != column.shape:
        raise ShardError(
            f"{where}: expected uint8 images of shape {list(column.shape)}, found"
            f" {images.dtype} of shape {list(images.shape[1:])}; convert the array"
        )
    if len(images) != num_records:
        raise ShardError(f"{where}: images and table columns differ in length; write both anew")
    return images
