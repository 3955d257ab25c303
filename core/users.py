# SPDX-License-Identifier: Apache-2.0
"""User ids in one canonical spelling, so that no user is split in two or merged with another.

An id is text. Whole numbers keep all their digits, whatever a file format or a spreadsheet made
of them; what could stand for nobody, or for two people at once, is refused.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .errors import ConfigError, ShardError

if TYPE_CHECKING:
    from decimal import Decimal

MAX_LENGTH = 256
_NOBODY = ("", "?", "nan", "none", "null", "<na>")
_EDGES = (  # whitespace, and what cannot be seen at all, at either end of an id
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
    + "".join(map(chr, range(0x2000, 0x200E)))
)
_WHOLE_FLOAT = r"^-?(?:0|[1-9][0-9]*)\.0+$"
_ROUNDED = r"^[+-]?[0-9](?:\.[0-9]+)?[eE]\+[0-9]+$"
_EXACT_FLOAT = {"halffloat": 2**11, "float": 2**24, "double": 2**53}


def canonical_user_ids(
    values: pa.Array | pa.ChunkedArray | NDArray[Any] | Sequence[Any],
    *,
    where: str = "the user-id column",
) -> NDArray[np.str_]:
    """Every record's user id in canonical spelling, `(num_records,)`.

    Text is NFC-normalized and stripped of whitespace at both ends. Whole numbers, also those a
    float column or a text such as `12.0` holds, read as their digits; `007` stays as it is.
    Canonical ids come back unchanged.

    Args:
      values: Ids as a file held them: text, integers of any size, or floats.
      where: How a message names the column.

    Raises:
      ShardError: An id is null, blank or says that it is none; is not text or a whole number;
        may have been rounded; is not valid Unicode, holds a NUL, or is longer than 256 characters.

    Example:
      >>> canonical_user_ids(["12.0", " 12", "007", "9007199254740993"]).tolist()
      ['12', '12', '007', '9007199254740993']
    """
    column = _arrow(values, where)
    if column.null_count:
        raise _nobody(where)
    if len(column) == 0:
        return np.array([], dtype=np.str_)
    encoded = _text(column, where).dictionary_encode()
    ids = _canonical(encoded.dictionary, where)
    unique: NDArray[np.str_] = ids.to_numpy(zero_copy_only=False).astype(np.str_)
    index: NDArray[np.int32] = encoded.indices.to_numpy()
    return unique[index]


def partition_of(user_ids: NDArray[np.str_], num_partitions: int) -> NDArray[np.int64]:
    """Which of `num_partitions` simulated clients holds each record, `(num_records,)`.

    Depends on the record's user id alone, by SHA-256, so it is the same on every machine.

    Raises:
      ConfigError: `num_partitions` is below 1.
    """
    if num_partitions < 1:
        raise ConfigError(f"num_partitions must be 1 or more, not {num_partitions}")
    unique, index = np.unique(user_ids, return_inverse=True)
    digests = b"".join(hashlib.sha256(i.encode()).digest()[:8] for i in unique.tolist())
    words = np.frombuffer(digests, dtype=">u8")
    return (words % np.uint64(num_partitions)).astype(np.int64)[index]


def near_duplicates(ids: Iterable[str]) -> int:
    """How many distinct ids differ from another only by case, spaces or leading zeros.

    For the owner's own eyes (`fedsynth client check`): the figure is a count of private records.

    Example:
      >>> near_duplicates(["Ann", "ann", "007", "7", "Bob", "Bob"])
      4
    """
    folded: dict[str, int] = {}
    for user_id in set(map(str, ids)):
        key = "".join(user_id.casefold().split()).lstrip("0")
        folded[key] = folded.get(key, 0) + 1
    return sum(count for count in folded.values() if count > 1)


def _arrow(values: Any, where: str) -> pa.Array:
    """The ids as one Arrow array of a plain type."""
    try:
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError):
        column = _one_by_one(values, where)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what combining leaves where there is no chunk
        column = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _one_by_one(values: Iterable[Any], where: str) -> pa.Array:
    """Ids of mixed Python types, or integers beyond 64 bits, as text."""
    texts: list[str | None] = []
    for value in values:
        if value is None or isinstance(value, str):
            texts.append(value)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            texts.append(str(int(value)))
        elif isinstance(value, float | np.floating):
            texts.append(None if value != value else _digits(float(value), where))
        else:
            raise _wrong_type(where, type(value).__name__)
    try:
        return pa.array(texts, type=pa.large_string())
    except UnicodeError:
        raise ShardError(f"{where} holds text that is not valid Unicode; {_WRITE_AGAIN}") from None


def _digits(value: float, where: str) -> str:
    """The digits of a whole number that a float holds exactly."""
    if not (value.is_integer() and abs(value) < 2**53):
        raise _rounded(where)
    return str(int(value))


def _text(column: pa.Array, where: str) -> pa.Array:
    """The ids as text, every digit of a number in it."""
    kind, types = column.type, pa.types
    if types.is_integer(kind):
        return column.cast(pa.string())
    if types.is_floating(kind):
        return _float_text(column, where)
    if types.is_decimal(kind):
        return _decimal_text(column, where)
    if not (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or kind == pa.string_view()
    ):
        raise _wrong_type(where, str(kind))
    try:
        text = column.cast(pa.large_string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        raise ShardError(f"{where} holds text that is not valid UTF-8; {_WRITE_AGAIN}") from None
    return text


def _float_text(column: pa.Array, where: str) -> pa.Array:
    """Ids that a format turned into floats, as digits."""
    values = column.to_numpy(zero_copy_only=False)
    if np.isnan(values).any():
        raise _nobody(where)
    exact = _EXACT_FLOAT[str(column.type)]
    if not ((np.abs(values) < exact) & (values == np.floor(values))).all():
        raise _rounded(where)
    return pa.array(values.astype(np.int64)).cast(pa.string())


def _decimal_text(column: pa.Array, where: str) -> pa.Array:
    """Ids that a format holds as decimals, as digits."""
    encoded = column.dictionary_encode()
    numbers: list[Decimal] = encoded.dictionary.to_pylist()
    if any(number != number.to_integral_value() for number in numbers):
        raise _rounded(where)
    return pa.array([str(int(number)) for number in numbers]).take(encoded.indices)


def _canonical(texts: pa.Array, where: str) -> pa.Array:
    """Distinct texts in canonical spelling, in the same order."""
    texts = pc.utf8_trim(pc.utf8_normalize(texts, form="NFC"), characters=_EDGES)
    nobody = pc.is_in(pc.utf8_lower(texts), pa.array(_NOBODY, type=texts.type))
    if pc.any(nobody).as_py():
        raise _nobody(where)
    if pc.any(pc.match_substring(texts, "\0")).as_py():
        raise ShardError(f"{where} holds a NUL character, which no id has; {_WRITE_AGAIN}")
    if pc.max(pc.utf8_length(texts)).as_py() > MAX_LENGTH:
        raise ShardError(
            f"{where} holds text longer than {MAX_LENGTH} characters, which is no user id;"
            " check that unit.column names the right column and that its quotes are closed"
        )
    if pc.any(pc.match_substring_regex(texts, _ROUNDED)).as_py():
        raise _rounded(where)
    floats = pc.match_substring_regex(texts, _WHOLE_FLOAT)
    if not pc.any(floats).as_py():
        return texts
    plain = re.compile(_WHOLE_FLOAT)
    return pa.array(
        [_plain_digits(t, where) if plain.match(t) else t for t in texts.to_pylist()],
        type=texts.type,
    )


def _plain_digits(text: str, where: str) -> str:
    """The digits of a text like `12.0`, which was a float on its way here."""
    number = int(text.partition(".")[0])
    if abs(number) >= 2**53:
        raise _rounded(where)
    return str(number)


_WRITE_AGAIN = "write the file again from its source, as UTF-8 text"


def _nobody(where: str) -> ShardError:
    """The refusal of records that belong to nobody."""
    return ShardError(
        f"{where} holds null ids (null, blank, '?' or 'nan'); every record must name its user, or"
        " one person would count as many: fill the ids in, or leave such records out of the file"
    )


def _rounded(where: str) -> ShardError:
    """The refusal of ids that have been through a float and may be two people's."""
    return ShardError(
        f"{where} holds numbers that are not whole, or so large that a float has rounded them,"
        " which would merge users: export the ids as text or as integers"
    )


def _wrong_type(where: str, found: str) -> ShardError:
    """The refusal of a column that cannot be one of ids."""
    return ShardError(
        f"{where} must hold text or whole numbers, not {found}; name another column in"
        " unit.column, or export the ids as text"
    )
