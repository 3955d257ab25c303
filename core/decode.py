# SPDX-License-Identifier: Apache-2.0
"""Turn codes back into values people can read, and save them as data files."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .dates import SECONDS
from .errors import SchemaError
from .records import Family, Records
from .schema import Column, Schema

if TYPE_CHECKING:
    import pyarrow as pa

    Tables = dict[str, pa.Table]

SINGLE = "synthetic"
"""Name of the table where there is only one."""


def decode(schema: Schema, records: Records, rng: np.random.Generator) -> "pa.Table":
    """A table of values, one column for each of the schema's table columns.

    A category or an ordinal reads as its text, a boolean as true or false. An integer is drawn
    among the integers of its bin, a date among the days (or hours, ...) of its, a real number
    uniformly within its bin; a missing value is null. Encoding the table by the same schema gives
    the same codes, as long as every bin of an integer or a date holds one. An id column that the
    schema wants as serial numbers comes first: 1, 2, 3 and so on. Where the schema orders two
    columns, their values are in order too, unless the cells cannot be.

    Args:
      schema: Public schema of the records.
      records: Codes, and texts; images are left out.
      rng: Where within its bin a number lies; the same `rng` gives the same table.

    Raises:
      SchemaError: The codes have another number of columns than the schema.
    """
    import pyarrow as pa

    if records.codes.ndim != 2 or records.codes.shape[1] != len(schema.columns):
        raise SchemaError(
            f"records of shape {records.codes.shape} do not fit a schema of"
            f" {len(schema.columns)} table columns"
        )
    serial = [column.name for column in schema.ids if column.synthesize == "serial"]
    columns = [pa.array(np.arange(1, len(records) + 1)) for _ in serial]
    drawn = [_drawn(c, records.codes[:, i], rng) for i, c in enumerate(schema.columns)]
    for order in schema.rules.orders:
        given = {i: drawn[i].astype(np.float64) for i in order.columns}
        for i, values in order.settled(records.codes, given, rng).items():
            drawn[i] = values.astype(drawn[i].dtype)
    columns += [
        _values(c, codes, values)
        for c, codes, values in zip(schema.columns, records.codes.T, drawn, strict=True)
    ]
    names = [*serial, *schema.names]
    if schema.text is not None:
        if records.texts is None:
            raise SchemaError(f"the records hold no texts for the column {schema.text.name!r}")
        columns.append(pa.array(records.texts, type=pa.string()))
        names.append(schema.text.name)
    return pa.table(columns, names=names)


def split_tables(table: "pa.Table", family: Family, owners: NDArray[np.int64]) -> "Tables":
    """A table of records as one of users and one of their records, joined by a key.

    The key is 1, 2, 3 and so on, and has nothing to do with real ids. A user's columns are those
    of the user's first record.

    Args:
      table: The records, decoded.
      family: Names of both tables, of the key and of the user's columns.
      owners: User of each record, from 0 without a gap and not falling.
    """
    import pyarrow as pa

    first = np.flatnonzero(np.diff(owners, prepend=-1))
    users = pa.table({family.key: pa.array(np.arange(1, len(first) + 1))})
    for name in family.columns:
        users = users.append_column(name, table.column(name).take(pa.array(first)))
    records = table.drop_columns(list(family.columns))
    return {
        family.parent: users,
        family.child: records.add_column(0, family.key, pa.array(owners + 1)),
    }


def joined_table(tables: "Tables", family: Family) -> "pa.Table":
    """Records beside their users' columns, the key first; `split_tables` turned round."""
    import pyarrow as pa

    users, records = tables[family.parent], tables[family.child]
    place = pa.array(records.column(family.key).to_numpy() - 1)
    for name in family.columns:
        records = records.append_column(name, users.column(name).take(place))
    return records


def save_records(
    schema: Schema,
    records: Records,
    rng: np.random.Generator,
    folder: Path,
    *,
    family: Family | None = None,
) -> list[Path]:
    """Write records below `folder`, and the files that were written.

    `data/synthetic.parquet` holds the table, if the schema has table columns; two files named
    after the tables of a `family` hold users and records in its place; `data/images.npz`
    holds the images under the image column's name and the table columns beside them, as integers
    where they are, else as text. The same records and `rng` give the same bytes.
    """
    import pyarrow.parquet as pq

    target = folder / "data"
    target.mkdir(parents=True, exist_ok=True)
    table = decode(schema, records, rng)
    written: list[Path] = []
    tables = {SINGLE: table} if schema.columns or schema.text else {}
    if family is not None and records.owners is not None:
        tables = split_tables(table, family, records.owners)
    for name, part in tables.items():
        written.append(target / f"{name}.parquet")
        pq.write_table(part, written[-1], compression="zstd", write_page_checksum=True)
    if schema.image is not None:
        if records.images is None:
            raise SchemaError(f"the records hold no images for the column {schema.image.name!r}")
        arrays: dict[str, NDArray[Any]] = {schema.image.name: records.images}
        for i, column in enumerate(schema.columns):
            arrays[column.name] = _array(column, records.codes[:, i], table.column(column.name))
        for id_column in schema.ids:
            if id_column.synthesize == "serial":
                arrays[id_column.name] = table.column(id_column.name).to_numpy()
        written.append(target / "images.npz")
        _save_npz(written[-1], arrays)
    return written


def _drawn(column: Column, codes: NDArray[np.int32], rng: np.random.Generator) -> NDArray[Any]:
    """A value within each cell: of a number or a date in its own unit, else the cell itself."""
    if column.is_categorical:
        return codes
    bins = np.where(codes < column.num_bins, codes, 0)
    if column.kind != "real":
        lows, highs = (ends.astype(np.int64) for ends in column.ends)
        return np.asarray(rng.integers(lows[bins], highs[bins], endpoint=True))
    low, high = column.edges[bins], column.edges[bins + 1]
    reals = np.minimum(low + rng.random(len(bins)) * (high - low), np.nextafter(high, low))
    return np.asarray(np.maximum(reals, low))


def _values(column: Column, codes: NDArray[np.int32], drawn: NDArray[Any]) -> "pa.Array":
    """The values of one column."""
    import pyarrow as pa

    missing = codes == column.num_cells - 1 if column.missing else np.zeros(len(codes), np.bool_)
    if column.kind == "boolean":
        return pa.array(codes == 1, mask=missing)
    if column.is_categorical:
        categories = pa.array(column.categories, type=pa.string())
        return categories.take(pa.array(codes, mask=missing))
    if column.kind != "date":
        return pa.array(drawn, mask=missing)
    if column.resolution == "day":
        return pa.array(drawn.astype(np.int32), mask=missing).cast(pa.date32())
    seconds = drawn * SECONDS[column.resolution]
    return pa.array(seconds, mask=missing).cast(pa.timestamp("s"))


def _array(column: Column, codes: NDArray[np.int32], values: "pa.ChunkedArray") -> NDArray[Any]:
    """One column as a plain array: missing text is empty, a missing number is NaN."""
    if not column.is_categorical:
        return np.asarray(values.to_numpy())
    if not column.missing and all(_is_whole(c) for c in column.categories):
        return np.array([int(c) for c in column.categories], dtype=np.int64)[codes]
    return np.array([*column.categories, ""], dtype=np.str_)[codes]


def _is_whole(text: str) -> bool:
    """Whether a category is the plain spelling of a 64-bit integer."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19 and str(int(text)) == text


def _save_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays as `numpy.savez_compressed` does, whatever their names are, dateless."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that equal data is equal bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
