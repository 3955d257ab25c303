# SPDX-License-Identifier: Apache-2.0
"""Read data files as they are: CSV, JSON lines, parquet and npz, in batches of named columns.

Nothing is guessed: text formats are read as text, numbers as they are spelled. No message shows a
value or a count of records; it names file, column or line, what was expected and what to do.
"""

import codecs
import csv
import difflib
import gzip
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..core.errors import ShardError

MISSING = ("", "?")
"""Texts that stand for a missing value, whatever the column."""

NUMBER = r"^[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf(?:inity)?))$"
"""What a text that spells a number looks like."""

DATE = (
    r"^(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
    r"(?:[T ](?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:\.[0-9]+)?)?"
    r"(?:Z|(?P<sign>[+-])(?P<ahead>[0-9]{2}):?(?P<ahead_minutes>[0-9]{2}))?)?$"
)
"""What an ISO 8601 date or time looks like, and its parts."""

_BATCH = 1 << 16  # records in a batch
_CSV_BLOCK = 1 << 24  # bytes parsed at a time
_SEEN_LINES = 1000  # records of a text file that `columns_of` looks at
_NO_COMMAS = "its header has no commas: save it with commas between values"


@dataclass(frozen=True)
class SeenColumn:
    """A column of a data file, by its name and type alone.

    Attributes:
      name: Its name in the file.
      type: What its values are.
      shape: Of one value, for an image.
    """

    name: str
    type: Literal["text", "integer", "real", "boolean", "date", "image", "other"]
    shape: tuple[int, ...] = ()


def columns_of(path: Path) -> list[SeenColumn]:
    """Names and types of a data file's columns, for `fedsynth init`.

    Parquet and npz files declare their types. A text file does not: the first 1,000 records say
    whether a column parses as whole numbers, numbers, dates or truth values, and are forgotten.

    Raises:
      ShardError: The file cannot be read or parsed.
    """
    if not path.is_file():
        raise ShardError(f"there is no file {path}; check the path of the data")
    match format_of(path):
        case "parquet":
            found = _parquet_columns(path)
        case "npz":
            found = _npz_columns(path)
        case "csv":
            found = _csv_columns(path)
        case _:
            found = _jsonl_columns(path)
    names = [column.name for column in found]
    for name, times in Counter(names).items():
        if times > 1:
            find_column(name, names, path.name)
    return found


def batches(path: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of the named columns of a CSV, JSON lines or parquet file, in file order.

    Every column of a text format is text; a parquet file's have the types it declares.

    Raises:
      ShardError: The file cannot be read or parsed, or a column is missing or nested.
    """
    match format_of(path):
        case "csv":
            return _csv_batches(path, names)
        case "jsonl":
            return _jsonl_batches(path, names)
        case "parquet":
            return _parquet_batches(path, names)
        case other:
            raise ShardError(f"{path.name}: expected a table, not {other}")


def arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of a npz file; nothing in it is ever unpickled.

    Raises:
      ShardError: The file cannot be read, or an array is missing or holds Python objects.
    """
    with reading(path), path.open("rb") as source:
        if not zipfile.is_zipfile(source):
            raise _damaged(path)
        source.seek(0)
        archive = np.load(source, allow_pickle=False)
        for name in names:
            find_column(name, archive.files, path.name)
        return {name: _npz_array(archive, name, path) for name in names}


def format_of(path: Path) -> str:
    """The format of a data file, by its ending."""
    name = path.name.lower()
    for ending, kind in (
        (".csv", "csv"),
        (".csv.gz", "csv"),
        (".jsonl", "jsonl"),
        (".jsonl.gz", "jsonl"),
        (".parquet", "parquet"),
        (".npz", "npz"),
    ):
        if name.endswith(ending):
            return kind
    raise ShardError(
        f"{path.name}: the ending says no format that is read here; use .csv, .jsonl (also with"
        " .gz), .parquet or .npz"
    )


def find_column(name: str, columns: Sequence[str], where: str) -> None:
    """Refuse a file that lacks a column, or has it twice."""
    found = columns.count(name)
    if found == 1:
        return
    if found:
        raise ShardError(f"{where}: two columns are called {name!r}; rename or drop one of them")
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    if _is_parted_otherwise(columns):
        hint = f"; {_NO_COMMAS}."
    raise ShardError(
        f"{where}: there is no column {name!r}{hint} Rename the column in the file, in the schema"
        " or in unit.column, so that all agree"
    )


def _is_parted_otherwise(columns: Sequence[str]) -> bool:
    """Whether a header looks like several, with something else than commas between."""
    return len(columns) == 1 and (";" in columns[0] or "\t" in columns[0])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a broken file makes readers raise into a `ShardError` without its text."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise ShardError(f"cannot read {path}: {error.strerror}") from None
        raise _damaged(path) from None
    except (EOFError, ValueError, csv.Error, zlib.error, zipfile.BadZipFile, pa.ArrowException):
        raise _damaged(path) from None


def _damaged(path: Path) -> ShardError:
    """The refusal of a file that its format's reader does not understand."""
    return ShardError(
        f"{path.name} cannot be read as {format_of(path)}: it is cut off, damaged, or of another"
        " format than its ending says; copy or export it anew"
    )


# --- csv --------------------------------------------------------------------------------------


class _CheckedText(io.RawIOBase):
    """A file of bytes that stops, with a byte offset, where it is not clean UTF-8."""

    def __init__(self, source: IO[bytes] | gzip.GzipFile, name: str) -> None:
        super().__init__()
        self._source, self._name, self._offset = source, name, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer`; how many bytes."""
        data = self._source.read(len(buffer))
        self._check(data)
        buffer[: len(data)] = data
        return len(data)

    def _check(self, data: bytes) -> None:
        """Refuse what no text in UTF-8 holds."""
        if self._offset == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ShardError(f"{self._name} is UTF-16; save it as UTF-8")
        nul = data.find(b"\0")
        if nul >= 0:
            raise ShardError(
                f"{self._name} has a NUL byte at offset {self._offset + nul}, as no text has;"
                " save it as UTF-8 text, or copy it anew if it was cut off"
            )
        waiting = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = self._offset - waiting + error.start
            raise ShardError(
                f"{self._name} is not UTF-8 at byte offset {offset}; save it as UTF-8"
            ) from None
        self._offset += len(data)


@contextmanager
def _text_file(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a text file, unpacked if it is packed, and clean UTF-8."""
    packed = path.name.lower().endswith(".gz")
    with reading(path), gzip.open(path) if packed else path.open("rb") as source:
        yield io.BufferedReader(_CheckedText(source, path.name), 1 << 20)


def _csv_header(path: Path) -> tuple[list[str], bool]:
    """Column names of a CSV file, and whether anything follows them."""
    with _text_file(path) as source:
        text = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
        header = next(csv.reader(text), [])
        if not header:
            raise ShardError(f"{path.name} is empty; expected a header with column names")
        return header, any(line.strip() for line in text)


def _csv_batches(path: Path, needed: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a CSV file's columns, every value as text."""
    import pyarrow.csv as pcsv

    header, has_records = _csv_header(path)
    for name in needed:
        find_column(name, header, path.name)
    if not has_records:
        return
    bad_rows: list[int | None] = []

    def refuse(row: Any) -> str:
        bad_rows.append(row.number)
        return "error"

    with _text_file(path) as source:
        try:
            for batch in pcsv.open_csv(
                source,
                read_options=pcsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
                parse_options=pcsv.ParseOptions(
                    newlines_in_values=True, invalid_row_handler=refuse
                ),
                convert_options=pcsv.ConvertOptions(
                    include_columns=list(needed),
                    column_types={name: pa.large_string() for name in needed},
                ),
            ):
                yield pa.Table.from_batches([batch])
        except pa.ArrowInvalid:  # its own text quotes the row
            row = f" in row {bad_rows[0]}" if bad_rows and bad_rows[0] is not None else ""
            raise ShardError(
                f"{path.name} does not parse{row}: expected {len(header)} values in each row,"
                " separated by commas, texts with commas or line ends in double quotes"
            ) from None


def _csv_columns(path: Path) -> list[SeenColumn]:
    """`columns_of` a CSV file."""
    header, _ = _csv_header(path)
    if _is_parted_otherwise(header):
        raise ShardError(f"{path.name}: {_NO_COMMAS}")
    table = next(_csv_batches(path, header), pa.table({name: [] for name in header}))
    return [
        SeenColumn(name, _parsed_type(table.column(name)[:_SEEN_LINES].to_pylist()))
        for name in header
    ]


# --- jsonl ------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON lines file, numbers as they are spelled."""
    decoder = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)
    with _text_file(path) as source:
        for number, line in enumerate(source, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            text = line.decode().strip(" \t\r\n")
            if not text:
                continue
            try:
                record = decoder.decode(text)
            except (ValueError, RecursionError):
                raise ShardError(
                    f"{path.name}, line {number}: not JSON; expected one object a line"
                ) from None
            if not isinstance(record, dict):
                raise ShardError(
                    f'{path.name}, line {number}: expected an object, like {{"column": value}}'
                )
            yield number, record


def _jsonl_batches(path: Path, needed: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a JSON lines file's columns, every value as text."""
    seen: set[str] = set()
    columns: dict[str, list[str | None]] = {name: [] for name in needed}
    waiting = 0
    for number, record in _json_lines(path):
        for name, values in columns.items():
            value = record.get(name)
            if value is True or value is False:
                value = "true" if value else "false"
            elif isinstance(value, dict | list):
                raise ShardError(
                    f"{path.name}, line {number}: column {name!r} must hold text, a number, true,"
                    " false or null, not a list or an object; flatten it"
                )
            values.append(value)
        seen.update(record)
        waiting += 1
        if waiting == _BATCH:
            yield _text_table(columns, path)
            columns, waiting = {name: [] for name in needed}, 0
    for name in needed if seen else ():
        find_column(name, sorted(seen), path.name)
    if waiting:
        yield _text_table(columns, path)


def _text_table(columns: dict[str, list[str | None]], path: Path) -> pa.Table:
    """Columns of text as a table."""
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values, type=pa.large_string())
        except UnicodeError:
            raise ShardError(
                f"{path.name}: column {name!r} holds text that is not valid Unicode; write the"
                " file again from its source"
            ) from None
    return pa.table(arrays)


def _jsonl_columns(path: Path) -> list[SeenColumn]:
    """`columns_of` a JSON lines file."""
    values: dict[str, list[Any]] = {}
    for _, (_, record) in zip(range(_SEEN_LINES), _json_lines(path), strict=False):
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    found: list[SeenColumn] = []
    for name, seen in values.items():
        plain = all(v is None or isinstance(v, str | bool) for v in seen)
        texts = ["" if v is None else str(v) for v in seen]
        found.append(SeenColumn(name, _parsed_type(texts) if plain else "other"))
    return found


def _parsed_type(texts: Sequence[str]) -> Literal["text", "integer", "real", "boolean", "date"]:
    """What all of a column's texts parse as; NaN is missing among numbers, so it tells nothing."""
    stripped = [text.strip() for text in texts]
    present = pa.array(
        [t for t in stripped if t not in MISSING and t.lower() != "nan"], pa.string()
    )
    if len(present) == 0:
        return "text"
    patterns: tuple[tuple[str, Literal["integer", "real", "boolean", "date"]], ...] = (
        (r"^(?i:true|false)$", "boolean"),
        (r"^[+-]?(?:0|[1-9][0-9]*)$", "integer"),  # 007 is text: its zeros mean something
        (NUMBER, "real"),
        (DATE, "date"),
    )
    for pattern, kind in patterns:
        if pc.all(pc.match_substring_regex(present, pattern)).as_py():
            zeros = kind == "real" and pc.any(pc.match_substring_regex(present, "^0[0-9]")).as_py()
            return "text" if zeros else kind
    return "text"


# --- parquet ----------------------------------------------------------------------------------


def _opened_parquet(path: Path) -> Any:
    """A parquet file whose footer has been read."""
    import pyarrow.parquet as pq

    with reading(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def _parquet_columns(path: Path) -> list[SeenColumn]:
    """`columns_of` a parquet file, from its footer."""
    schema = _opened_parquet(path).schema_arrow
    return [SeenColumn(field.name, _seen_type(field.type)) for field in schema]


def _parquet_batches(path: Path, needed: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a parquet file's columns, in the types the file declares."""
    file = _opened_parquet(path)
    for name in needed:
        find_column(name, file.schema_arrow.names, path.name)
        if pa.types.is_nested(file.schema_arrow.field(name).type):
            raise ShardError(
                f"{path.name}: column {name!r} must hold text, numbers or truth values, not"
                f" {file.schema_arrow.field(name).type}; flatten it"
            )
    with reading(path):
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(needed)):
            yield pa.Table.from_batches([batch])


def _seen_type(
    kind: pa.DataType,
) -> Literal["text", "integer", "real", "boolean", "date", "other"]:
    """A column's type as its file declares it."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind):
        return "integer"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "real"
    if types.is_boolean(kind):
        return "boolean"
    if types.is_date(kind) or types.is_timestamp(kind):
        return "date"
    is_text = types.is_string(kind) or types.is_large_string(kind) or kind == pa.string_view()
    return "text" if is_text else "other"


# --- npz --------------------------------------------------------------------------------------

_NPZ_TYPES: dict[str, Literal["text", "integer", "real", "boolean", "date"]] = {
    "b": "boolean",
    "i": "integer",
    "u": "integer",
    "f": "real",
    "U": "text",
    "S": "text",
    "M": "date",
}


def _npz_array(archive: Any, name: str, path: Path) -> NDArray[Any]:
    """One array of a npz file, never unpickled."""
    try:
        array: NDArray[Any] = archive[name]
    except ValueError:
        raise ShardError(
            f"{path.name}: array {name!r} holds Python objects or is cut off; save it as numbers"
            " or as text of fixed length"
        ) from None
    return array


def _npz_columns(path: Path) -> list[SeenColumn]:
    """`columns_of` a npz file, from the headers of its arrays."""
    found: list[SeenColumn] = []
    with reading(path), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as member:
                shape, dtype = _npy_header(member)
            name = entry.removesuffix(".npy")
            if len(shape) in (3, 4) and dtype == np.uint8:
                found.append(SeenColumn(name, "image", shape[1:]))
            elif len(shape) == 1 and dtype.kind in _NPZ_TYPES:
                found.append(SeenColumn(name, _NPZ_TYPES[dtype.kind]))
            else:
                found.append(SeenColumn(name, "other"))
    return found


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, by its header."""
    version = np.lib.format.read_magic(member)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(member)
    return tuple(shape), dtype
