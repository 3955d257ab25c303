# SPDX-License-Identifier: Apache-2.0
"""Read a client's private records from a file and encode them by the public schema.

Nothing is guessed: text formats are read as text, and the schema alone says what a value means.
No message shows a value of a record or a count of records; it names file, column, what was
expected and what to do.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..core.errors import ConfigError, ShardError
from ..core.privacy import PrivacyUnit
from ..core.records import Records
from ..core.schema import Column, ImageColumn, Schema
from ..core.users import canonical_user_ids, partition_of
from .files import (
    MISSING,
    NUMBER,
    SeenColumn,
    arrays,
    batches,
    columns_of,
    find_column,
    format_of,
)

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
    """

    records: Records
    user_ids: NDArray[np.str_]

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
    needed = _needed(schema, unit)
    if format_of(path) == "npz":
        return _npz_shard(path, schema, unit, partition)
    if schema.image is not None:
        raise ShardError(
            f"{path.name}: the schema has the image column {schema.image.name!r}, and images are"
            " read from .npz files; convert the file"
        )
    parts: list[Shard] = []
    first = 0
    for table in batches(path, needed):
        parts.append(_encode(table, schema, unit, partition, first, path.name))
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
    for name in _needed(schema, unit):
        find_column(name, table.column_names, where)
    return _encode(table, schema, unit, partition, 0, where, images)


def _needed(schema: Schema, unit: PrivacyUnit) -> list[str]:
    """Table columns to read."""
    user = [] if unit.column is None or unit.column in schema.names else [unit.column]
    return [*schema.names, *user]


def _npz_shard(path: Path, schema: Schema, unit: PrivacyUnit, partition: Partition | None) -> Shard:
    """The shard in a npz file: one array a column."""
    image = [schema.image.name] if schema.image else []
    found = arrays(path, [*_needed(schema, unit), *image])
    images = found.pop(image[0]) if image else None
    columns = {name: _npz_column(array, name, path) for name, array in found.items()}
    if len({len(column) for column in columns.values()}) > 1:
        raise ShardError(f"{path.name}: its arrays differ in length; write them anew")
    return _encode(pa.table(columns), schema, unit, partition, 0, path.name, images)


def _npz_column(array: NDArray[Any], name: str, path: Path) -> pa.Array:
    """A table column from its array."""
    if array.ndim != 1 or array.dtype.kind not in "biufUS":
        raise ShardError(
            f"{path.name}: array {name!r} must be one-dimensional, of numbers, text or truth"
            f" values, not {array.dtype} of {array.ndim} dimensions"
        )
    return pa.array(array.astype(array.dtype.newbyteorder("="), copy=False))


def _encode(
    table: pa.Table,
    schema: Schema,
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
    codes = np.empty((len(user_ids), len(schema.columns)), dtype=np.int32)
    for i, column in enumerate(schema.columns):
        codes[:, i] = _codes(table.column(column.name), column, where)
    return Shard(Records(codes, images if schema.image is not None else None), user_ids)


def _joined(parts: list[Shard], schema: Schema) -> Shard:
    """Batches of records as one shard."""
    if not parts:
        return Shard(
            Records(np.empty((0, len(schema.columns)), dtype=np.int32)),
            np.array([], dtype=np.str_),
        )
    if len(parts) == 1:
        return parts[0]
    return Shard(
        Records(np.concatenate([part.records.codes for part in parts])),
        np.concatenate([part.user_ids for part in parts]),
    )


def _codes(values: pa.ChunkedArray, column: Column, where: str) -> NDArray[np.int32]:
    """Cell of each value, `(num_records,)`."""
    array = values.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
    where = f"{where}: column {column.name!r}"
    if array.type == pa.string_view() or array.type == pa.float16():  # neither has an encoding
        array = array.cast(pa.float32() if array.type == pa.float16() else pa.large_string())
    if pa.types.is_dictionary(array.type) and column.kind != "category":
        array = array.dictionary_decode()
    if column.kind == "category":
        return _category_codes(array, column, where)
    return _number_codes(array, column, where)


def _category_codes(array: pa.Array, column: Column, where: str) -> NDArray[np.int32]:
    """Cell of each value of a category; -1 stands for a value without one on the way."""
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    texts = _category_texts(encoded.dictionary, where)
    cells = pc.index_in(texts, pa.array(column.categories, type=pa.large_string()))
    # one more entry, for null: `take` by an index of -1 finds it
    of_entry = np.append(cells.fill_null(-1).to_numpy(), -1).astype(np.int32)
    unlisted = np.flatnonzero(of_entry[:-1] < 0)
    if len(unlisted):
        known = _by_spelling(column.categories)
        values = texts.take(pa.array(unlisted)).to_pylist()
        of_entry[unlisted] = [_respelled(value, known) for value in values]
    codes: NDArray[np.int32] = of_entry[encoded.indices.fill_null(-1).to_numpy()]
    if column.missing:
        return np.where(codes < 0, np.int32(len(column.categories)), codes)
    if (codes < 0).any():
        raise _no_cell(where, "is missing or not among the schema's categories")
    return codes


def _category_texts(values: pa.Array, where: str) -> pa.Array:
    """Distinct values of a category as text, spelled as a schema spells them."""
    kind, types = values.type, pa.types
    if types.is_null(kind):
        return values.cast(pa.large_string())
    if types.is_integer(kind) or types.is_boolean(kind):
        return values.cast(pa.string()).cast(pa.large_string())
    if types.is_floating(kind):  # numpy's scalars spell a float32 as short as it is
        numbers = list(values.to_numpy(zero_copy_only=False))
        return pa.array([_number_text(n) for n in numbers], type=pa.large_string())
    if types.is_decimal(kind):
        return pa.array([_number_text(n) for n in values.to_pylist()], type=pa.large_string())
    return _checked_text(values, where, "text, whole numbers or true and false")


def _number_text(value: Any) -> str | None:
    """A number as a schema spells it: whole ones without a point, NaN as missing."""
    if value is None or value != value:
        return None
    whole = abs(value) < 2**53 and value == int(value)
    return str(int(value)) if whole else str(value)


def _by_spelling(categories: tuple[str, ...]) -> dict[str, int]:
    """Cell of each category by its looser spellings, those that two categories share left out."""
    found: dict[str, int] = {}
    for cell, category in enumerate(categories):
        spelling = unicodedata.normalize("NFC", category)
        if spelling.lower() in ("true", "false"):
            spelling = spelling.lower()
        found[spelling] = -1 if spelling in found else cell
    return found


def _respelled(text: str | None, known: dict[str, int]) -> int:
    """Cell of a value that no category spells exactly so; -1 if it has none.

    One value is written in several ways by different formats: `é` composed or not, `3` as `3.0`
    where a column has gaps, `true` as `True`.
    """
    if text is None:
        return -1
    spelling = unicodedata.normalize("NFC", text)
    if spelling in ("True", "TRUE", "False", "FALSE"):
        spelling = spelling.lower()
    elif whole := re.fullmatch(r"(-?[0-9]+)\.0+", spelling):
        spelling = whole[1]
    return known.get(spelling, -1)


def _number_codes(array: pa.Array, column: Column, where: str) -> NDArray[np.int32]:
    """Cell of each value of a number."""
    numbers = _numbers(array, where)
    absent = np.isnan(numbers)
    if absent.any() and not column.missing:
        raise _no_cell(where, "is missing or not a number")
    cells = np.searchsorted(column.edges, numbers, side="right") - 1
    cells = np.clip(cells, 0, column.num_bins - 1)  # clamps to the bounds; the top edge is inside
    return np.where(absent, column.num_bins, cells).astype(np.int32)


def _numbers(array: pa.Array, where: str) -> NDArray[np.float64]:
    """Values as float64; NaN where there is none or it is not a number."""
    kind, types = array.type, pa.types
    if types.is_null(kind):
        return np.full(len(array), np.nan)
    if types.is_boolean(kind):
        array = array.cast(pa.uint8())
    elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)):
        array = _parsed(_checked_text(array, where, "numbers"))
    numbers = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.asarray(numbers, dtype=np.float64)


def _parsed(texts: pa.Array) -> pa.Array:
    """Numbers that texts spell, null for those that spell none."""
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.is_in(texts, pa.array(MISSING, type=texts.type)), None, texts)
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        spelled = pc.match_substring_regex(texts, NUMBER)
        return pc.if_else(spelled, texts, None).cast(pa.float64())


def _checked_text(values: pa.Array, where: str, expected: str) -> pa.Array:
    """Values as text, once they are text."""
    kind, types = values.type, pa.types
    if not (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or kind == pa.string_view()
    ):
        raise ShardError(f"{where}: expected {expected}, found {kind}; convert the column")
    try:
        texts = values.cast(pa.large_string())
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raise ShardError(f"{where}: text is not UTF-8; write the file again as UTF-8") from None
    if pc.any(pc.match_substring(texts, "\0")).as_py():
        raise ShardError(f"{where}: text holds a NUL character; remove it where the file is made")
    return texts


def _no_cell(where: str, what: str) -> ShardError:
    """The refusal of a value that the schema has no cell for."""
    return ShardError(
        f"{where}: a value {what}; mend the file, or set missing = true for this column in the"
        " schema, which gives such values a cell of their own"
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
