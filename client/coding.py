# SPDX-License-Identifier: Apache-2.0
"""Turn private values into the cells of a public column, whatever type a file gave them.

No message shows a value; it names the column, what was expected and what to do.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..core.dates import SECONDS
from ..core.errors import ShardError
from ..core.open_codes import cut_text, number_codes, text_words
from ..core.schema import Column, TextColumn
from ..core.texts import as_texts
from .files import DATE, MISSING, NUMBER

_FEW = 8  # times fewer values than categories: they are looked up one by one
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True, eq=False)
class Coder:
    """One column and what its values are looked up in, made once for all batches.

    Attributes:
      column: Public column of the schema.
    """

    column: Column

    def codes(self, values: pa.ChunkedArray, where: str) -> NDArray[np.int32]:
        """Cell of each value, `(num_records,)`.

        A category is found by its text, a boolean also as 0 and 1. Numbers and dates beyond the
        bounds, infinities too, count in the outermost bins. A missing value, NaN, what does not
        parse and an unlisted category go to the cell for missing values.

        An open number's code is that of `core.open_codes`; for an open category see `words`.

        Raises:
          ShardError: There is such a value, and no cell for it; or the type is another. `where`
            names the file.
        """
        where, array = self._prepared(values, where)
        if self.column.is_categorical:
            return self._category_codes(array, where)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        is_date = self.column.kind == "date"
        numbers = self._units(array, where) if is_date else _numbers(array, where)
        absent = np.isnan(numbers)
        if absent.any() and not self.column.missing:
            spelled = "a date like 2024-12-31 or 2024-12-31T08:30" if is_date else "a number"
            raise _no_cell(where, f"is missing or not {spelled}")
        if self.column.is_open:
            return number_codes(numbers)
        cells = np.searchsorted(self.column.edges, numbers, side="right") - 1
        cells = np.clip(cells, 0, self.column.num_bins - 1)  # to the bounds; the top edge is inside
        return np.where(absent, self.column.num_bins, cells).astype(np.int32)

    def words(
        self, values: pa.ChunkedArray, where: str
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Code and text of each value of an open category.

        Returns:
          `(num_records,)`, 0 or, where a value is missing, 1; and `(num_records, num_words)`.

        Raises:
          ShardError: A value is missing, and there is no cell for it; or the type is another.
        """
        where, array = self._prepared(values, where)
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        texts = _category_texts(encoded.dictionary, where).to_pylist()
        spelled = ["" if text in (None, *MISSING) else _spelling(text) for text in texts] + [""]
        entries = encoded.indices.fill_null(-1).to_numpy()
        absent = np.array([not text for text in spelled], dtype=np.int32)[entries]
        if absent.any() and not self.column.missing:
            raise _no_cell(where, "is missing")
        return absent, text_words(spelled, self.column.max_bytes)[entries]

    def num_empty(self, values: pa.ChunkedArray, rows: NDArray[np.intp]) -> int:
        """How many of the values in some rows, all read before, are null, NaN or empty texts."""
        _, array = self._prepared(values, "")
        chosen = array.take(pa.array(rows))
        if pa.types.is_dictionary(chosen.type):
            chosen = chosen.dictionary_decode()
        empty = chosen.is_null(nan_is_null=True)
        if not _is_text(chosen.type):
            return int(pc.sum(empty).as_py())
        texts = pc.utf8_lower(pc.utf8_trim_whitespace(chosen.cast(pa.large_string())))
        listed = pc.is_in(texts, pa.array([*MISSING, "nan"], type=texts.type))
        return int(pc.sum(pc.or_(empty, listed)).as_py())

    def _prepared(self, values: pa.ChunkedArray, where: str) -> tuple[str, pa.Array]:
        """The column's place in messages, and its values as one array."""
        array = values.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
        where = f"{where}: column {self.column.name!r}"
        if pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        if pa.types.is_nested(array.type):
            raise ShardError(
                f"{where}: expected one value in each record, found {array.type}; flatten it"
            )
        if pa.types.is_dictionary(array.type) and _encodable(array.type.value_type) is not None:
            entries = array.dictionary.cast(_encodable(array.type.value_type))
            array = pa.DictionaryArray.from_arrays(array.indices, entries)
        elif (kind := _encodable(array.type)) is not None:
            array = array.cast(kind)
        return where, array

    def _category_codes(self, array: pa.Array, where: str) -> NDArray[np.int32]:
        """Cell of each value of a category; -1 stands for a value without one on the way."""
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        texts = _category_texts(encoded.dictionary, where)
        # one more entry, for null: `take` by an index of -1 finds it
        of_entry = np.append(self._exact(texts), np.int32(-1))
        unlisted = np.flatnonzero(of_entry[:-1] < 0)
        if len(unlisted):
            values = texts.take(pa.array(unlisted)).to_pylist()
            of_entry[unlisted] = [self._respelled(value) for value in values]
        codes: NDArray[np.int32] = of_entry[encoded.indices.fill_null(-1).to_numpy()]
        if self.column.missing:
            return np.where(codes < 0, np.int32(len(self.column.categories)), codes)
        if (codes < 0).any():
            raise _no_cell(where, "is missing or not among the schema's categories")
        return codes

    def _exact(self, texts: pa.Array) -> NDArray[np.int32]:
        """Cell of each text that is a category letter by letter, -1 for others."""
        if len(texts) * _FEW < len(self.column.categories):  # Arrow would index all of them again
            cells = map(self._cells.get, texts.to_pylist())
            return np.array([-1 if cell is None else cell for cell in cells], dtype=np.int32)
        found = pc.index_in(texts, self._texts).fill_null(-1).to_numpy()
        return np.asarray(found, dtype=np.int32)

    def _respelled(self, text: str | None) -> int:
        """Cell of a value that no category spells exactly so; -1 if it has none."""
        if text is None:
            return -1
        spelling = _spelling(text)
        if self.column.max_bytes:
            spelling = cut_text(spelling, self.column.max_bytes)
        cell = self._spellings.get(spelling, -1)
        if cell < 0 and self.column.other and text not in MISSING:
            return self._cells[self.column.other]
        return cell

    @cached_property
    def _cells(self) -> dict[str, int]:
        """Cell of each category by its exact spelling."""
        return {category: cell for cell, category in enumerate(self.column.categories)}

    @cached_property
    def _texts(self) -> pa.Array:
        """The categories, as Arrow holds them."""
        return pa.array(self.column.categories, type=pa.large_string())

    @cached_property
    def _spellings(self) -> dict[str, int]:
        """Cell of each category by its looser spellings, without those that two share."""
        found = {"0": 0, "1": 1} if self.column.kind == "boolean" else {}
        for category, cell in self._cells.items():
            # one that a run found stands as it was cut: the end of `3.05` may be lost
            cut = self.column.max_bytes > 0
            spelling = unicodedata.normalize("NFC", category) if cut else _spelling(category)
            found[spelling] = -1 if spelling in found else cell
        return found

    def _units(self, array: pa.Array, where: str) -> NDArray[np.float64]:
        """Dates as units of the column's resolution since 1970, rounded down; NaN for none."""
        kind, types = array.type, pa.types
        if types.is_null(kind):
            return np.full(len(array), np.nan)
        if types.is_date(kind):
            whole, long, per_second = array.cast(pa.date32()).cast(pa.int32()), SECONDS["day"], 1
        elif types.is_timestamp(kind):
            whole, long, per_second = array.cast(pa.int64()), 1, _PER_SECOND[kind.unit]
        else:
            texts = _checked_text(array, where, "dates").dictionary_encode()
            seconds = np.append(_seconds(texts.dictionary), np.nan)
            found = seconds[texts.indices.fill_null(-1).to_numpy()]
            return np.asarray(np.floor(found / SECONDS[self.column.resolution]))
        absent = whole.is_null().to_numpy(zero_copy_only=False)
        seconds = whole.fill_null(0).to_numpy().astype(np.int64) * long // per_second
        return np.where(absent, np.nan, seconds // SECONDS[self.column.resolution])


def texts_in(column: TextColumn, values: pa.ChunkedArray, where: str) -> NDArray[np.object_]:
    """Free texts as they are kept, `(num_records,)`: without blanks around them, and cut.

    A missing text is empty; it takes part in nothing.

    Raises:
      ShardError: They are no texts. `where` names the file.
    """
    if pa.types.is_null(values.type):
        values = values.cast(pa.large_string())
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _is_text(values.type):
        raise ShardError(
            f"{where}: text column {column.name!r}: expected texts, found {values.type}; convert"
            " the column, or declare another type in the schema"
        )
    kept = pc.utf8_trim_whitespace(values.cast(pa.large_string()).fill_null(""))
    return as_texts(cut_text(text, column.max_bytes).rstrip() for text in kept.to_pylist())


def _encodable(kind: pa.DataType) -> pa.DataType | None:
    """The type to use in place of one that Arrow can neither encode nor take; `None`: it can."""
    if kind == pa.string_view():
        return pa.large_string()
    if kind == pa.binary_view():
        return pa.large_binary()
    return pa.float32() if kind == pa.float16() else None


def _seconds(texts: pa.Array) -> NDArray[np.float64]:
    """Seconds since 1970 of ISO 8601 dates and times; NaN where a text is none.

    An offset from UTC is applied; without one a time is taken as it stands.
    """
    parts = pc.extract_regex(pc.utf8_trim_whitespace(texts), pattern=DATE)
    absent = parts.is_null().to_numpy(zero_copy_only=False)

    def number(name: str) -> NDArray[np.int64]:
        digits = pc.struct_field(parts, name)
        filled = pc.if_else(pc.equal(digits, ""), "0", digits)
        found: NDArray[np.int64] = filled.cast(pa.int64()).fill_null(0).to_numpy()
        return found

    year, month, day = number("year"), number("month"), number("day")
    hour, minute, second = number("hour"), number("minute"), number("second")
    months = (year - 1970) * 12 + month - 1
    first = months.astype("datetime64[M]").astype("datetime64[D]")
    after = (months + 1).astype("datetime64[M]").astype("datetime64[D]")
    days = (first.astype(np.int64) + day - 1).astype(np.int64)
    impossible = (month < 1) | (month > 12) | (day < 1) | (days >= after.astype(np.int64))
    impossible |= (hour > 23) | (minute > 59) | (second > 60) | (year < 1)
    behind = pc.equal(pc.struct_field(parts, "sign"), "-").fill_null(False)
    ahead = 60 * (60 * number("ahead") + number("ahead_minutes"))
    ahead = np.where(behind.to_numpy(zero_copy_only=False), -ahead, ahead)
    seconds = 86_400 * days + 3_600 * hour + 60 * minute + second - ahead
    return np.where(absent | impossible, np.nan, seconds)


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


def _spelling(text: str) -> str:
    """The one spelling of a value that different formats write in several ways.

    That is `é` composed or not, `3` as `3.0` where a column has gaps, `true` as `True`.
    """
    spelling = unicodedata.normalize("NFC", text)
    if spelling in ("True", "TRUE", "False", "FALSE"):
        spelling = spelling.lower()
    elif whole := re.fullmatch(r"(-?[0-9]+)\.0+", spelling):
        spelling = whole[1]
    return spelling


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
    if not _is_text(values.type):
        raise ShardError(f"{where}: expected {expected}, found {values.type}; convert the column")
    try:
        texts = values.cast(pa.large_string())
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raise ShardError(f"{where}: text is not UTF-8; write the file again as UTF-8") from None
    if pc.any(pc.match_substring(texts, "\0")).as_py():
        raise ShardError(f"{where}: text holds a NUL character; remove it where the file is made")
    return texts


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are text, or bytes that may be."""
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or kind == pa.string_view()
    )


def _no_cell(where: str, what: str) -> ShardError:
    """The refusal of a value that the schema has no cell for."""
    return ShardError(
        f"{where}: a value {what}; mend the file, or set missing = true for this column in the"
        " schema, which gives such values a cell of their own"
    )
