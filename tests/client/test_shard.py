# SPDX-License-Identifier: Apache-2.0
import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import math
import traceback
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fedsynth.client import files
from fedsynth.client.shard import SeenColumn, columns_of, encode, read_shard
from fedsynth.core.decode import decode
from fedsynth.core.errors import ConfigError, ShardError
from fedsynth.core.privacy import PrivacyUnit, User
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, IdColumn, ImageColumn, Schema
from fedsynth.core.users import partition_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tabular"
ORIGIN = "public: test"
RECORD = PrivacyUnit()
BY_USER = User("user", max_records=5)
TEXT_FORMATS = ("csv", "csv.gz", "jsonl", "jsonl.gz")
FORMATS = (*TEXT_FORMATS, "parquet")


def category(name: str, *categories: str, missing: bool = False) -> Column:
    return Column(name, "category", ORIGIN, categories, missing=missing)


def number(
    name: str, low: float, high: float, num_bins: int, *, kind: Any = "real", missing: bool = False
) -> Column:
    return Column(name, kind, ORIGIN, bounds=(low, high), num_bins=num_bins, missing=missing)


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns as the path's ending says; values as their own types where there are any."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    text = io.StringIO(newline="")
    if path.name.endswith((".csv", ".csv.gz")):
        writer = csv.DictWriter(text, list(columns))  # quotes a bare \\r only if rows end in one
        writer.writeheader()
        writer.writerows(rows)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        text.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        pq.write_table(pa.table(columns), path)
        return path
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def codes(path: Path, *columns: Column, unit: PrivacyUnit = RECORD) -> list[list[int]]:
    return read_shard(path, Schema(columns), unit).records.codes.tolist()


def codes_of(values: Any, column: Column) -> list[int]:
    """Codes of one column of an Arrow table."""
    table = pa.table({column.name: values})
    return encode(table, Schema((column,)), RECORD).records.codes[:, 0].tolist()


# --- what values become -----------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_the_same_records_give_the_same_codes_in_every_format(tmp_path: Path, ending: str):
    path = write(
        tmp_path / f"shard.{ending}",
        {
            "user": [2**53 + 1, 7, 2**53],
            "ignored": ["x", "y", "z"],
            "sex": ["F", "M", "?"],
            "grade": [3, 1, 2],
            "smoker": [True, False, True],
            "age": [0, 100, 55],
            "dose": [0.5, -9.0, 1e300],
        },
    )
    schema = Schema(
        (
            category("sex", "F", "M", missing=True),
            category("grade", "1", "2", "3"),
            category("smoker", "true", "false"),
            number("age", 0, 100, 10, kind="integer"),
            number("dose", 0, 1, 4),
        )
    )

    shard = read_shard(path, schema, BY_USER)

    assert shard.records.codes.tolist() == [[0, 2, 0, 0, 2], [1, 0, 1, 9, 0], [2, 1, 0, 5, 3]]
    assert shard.user_ids.tolist() == ["9007199254740993", "7", "9007199254740992"]


def test_numbers_clamp_to_their_bounds_and_the_top_edge_is_inside():
    column = number("x", 0, 10, 5)

    values = [-np.inf, -1.0, 0.0, 1.999, 2.0, 9.999, 10.0, 11.0, np.inf]

    assert codes_of(values, column) == [0, 0, 0, 0, 1, 4, 4, 4, 4]


NUMBER_TYPES = {
    "int8": pa.array([3], pa.int8()),
    "uint64": pa.array([3], pa.uint64()),
    "float16": pa.array(np.array([3.0], np.float16)),
    "float32": pa.array([3.0], pa.float32()),
    "decimal": pa.array([decimal.Decimal("3.00")]),
    "text": pa.array([" 3 "]),
    "text with a sign": pa.array(["+3"]),
    "text with an exponent": pa.array(["0.3e1"]),
    "text of a float": pa.array(["3."]),
    "large text": pa.array(["3"], pa.large_string()),
    "text by view": pa.array(["3"], pa.string_view()),
    "bytes": pa.array([b"3"]),
    "dictionary": pa.array(["3"]).dictionary_encode(),
    "numbers in a dictionary": pa.array([3]).dictionary_encode(),
}


@pytest.mark.parametrize("case", NUMBER_TYPES)
def test_a_number_and_a_category_read_from_any_type_that_holds_one(case: str):
    assert codes_of(NUMBER_TYPES[case], number("x", 0, 5, 5)) == [3]


@pytest.mark.parametrize("case", [case for case in NUMBER_TYPES if "text with" not in case])
def test_a_whole_number_is_the_category_of_its_digits(case: str):
    if case in ("text", "text of a float"):
        assert codes_of(NUMBER_TYPES[case], category("x", "3", missing=True)) == [1]
    else:
        assert codes_of(NUMBER_TYPES[case], category("x", "1", "3")) == [1]


NO_NUMBERS = ["", "?", "abc", "1_000", "1,5", "0x1A", "1 2", "\uff11", "--1", "nan", "1e", None]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_spells_no_number_is_missing_where_that_is_allowed(text: str | None):
    column = number("x", 0, 10, 5, missing=True)

    assert codes_of(pa.array(["4.5", text]), column) == [2, 5]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_spells_no_number_is_refused_where_nothing_may_be_missing(text: str | None):
    with pytest.raises(ShardError, match=r"column 'x': a value is missing or not a number"):
        codes_of(pa.array(["4.5", text]), number("x", 0, 10, 5))


def test_null_and_nan_are_missing_numbers():
    column = number("x", 0, 10, 5, missing=True)

    assert codes_of(pa.array([None, 1.0, float("nan")]), column) == [5, 0, 5]
    assert codes_of(pa.nulls(2), column) == [5, 5]
    assert codes_of(pa.array([None, True, False]), column) == [5, 0, 0]


def test_a_missing_or_unlisted_category_has_a_cell_where_the_schema_gives_one():
    values = pa.array(["a", None, "", "?", "zebra"])

    assert codes_of(values, category("x", "a", "b", missing=True)) == [0, 2, 2, 2, 2]
    assert codes_of(pa.nulls(1), category("x", "a", missing=True)) == [1]
    assert codes_of(pa.array([1.0, float("nan")]), category("x", "1", missing=True)) == [0, 1]


def test_a_marker_that_is_listed_is_a_category():
    assert codes_of(pa.array(["?", ""]), category("x", "?", "")) == [0, 1]


@pytest.mark.parametrize("value", ["zebra", "", "?", None])
def test_a_missing_or_unlisted_category_is_refused_where_it_has_no_cell(value: str | None):
    with pytest.raises(ShardError, match=r"column 'x': a value is missing or not among") as refusal:
        codes_of(pa.array(["a", value]), category("x", "a", "b"))

    assert "zebra" not in str(refusal.value)
    assert "missing = true" in str(refusal.value)


SPELLINGS = {
    "decomposed": (["e\u0301"], ("\u00e9",)),
    "composed": (["\u00e9"], ("e\u0301",)),
    "whole numbers of a column with gaps": (["3.0"], ("3",)),
    "truth as pandas writes it": (["True"], ("true",)),
    "truth as a schema in Python has it": ([True], ("True",)),
    "truth in capitals": (["TRUE"], ("true",)),
    "floats": ([0.5], ("0.5",)),
    "floats of a schema that lists floats": ([2.0, 2.0], ("2.0", "1.0")),
    "whole numbers of a schema that lists floats": ([2], ("2.0", "1.0")),
    "texts of a schema that lists floats": (["2", "2.00"], ("2.0", "1.0")),
    "32-bit floats": (pa.array([0.1], pa.float32()), ("0.1",)),
    "decimals": ([decimal.Decimal("0.5")], ("0.5",)),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_category_is_found_by_what_other_formats_make_of_it(case: str):
    values, categories = SPELLINGS[case]

    assert codes_of(pa.array(values), category("x", *categories)) == [0] * len(values)


def test_spellings_that_the_schema_tells_apart_stay_apart():
    twins = category("x", "\u00e9", "e\u0301", "true", "True", "3", "3.0")

    values = ["\u00e9", "e\u0301", "true", "True", "3", "3.0"]

    assert codes_of(pa.array(values), twins) == [0, 1, 2, 3, 4, 5]


def test_a_spelling_that_two_categories_share_is_neither():
    column = category("x", "1.0", "1.00", missing=True)

    assert codes_of(pa.array(["1.0", "1.00", "1", "1.000"]), column) == [0, 1, 2, 2]
    assert codes_of(pa.array([1.0]), column) == [2]


def test_a_value_that_a_run_has_cut_is_not_taken_for_a_whole_number():
    found = replace(category("x", "3.0", "(other)"), max_bytes=3, other="(other)")

    assert codes_of(pa.array(["3.05", "3"]), found) == [0, 1]


@pytest.mark.parametrize("value", ["a.", "abc.0", "trueish", "1.0.0", " a"])
def test_a_category_is_not_found_by_mere_likeness(value: str):
    column = category("x", "a", "abc", "true", "1", missing=True)

    assert codes_of(pa.array([value]), column) == [4]


# --- dates, booleans, ordinals and ids --------------------------------------------------------

DAYS = Column("d", "date", ORIGIN, bounds=(0, 99), num_bins=100, missing=True)
HOURS = Column("d", "date", ORIGIN, bounds=(0, 47), num_bins=48, missing=True, resolution="hour")


@pytest.mark.parametrize(
    "values",
    [
        ["1970-01-03"],
        [" 1970-01-03T23:59:59.999 "],
        ["1970-01-03 00:00"],
        ["1970-01-04T01:30+02:00"],
        ["1970-01-02T23:30:00-0100"],
        ["1970-01-03T00:00Z"],
        [datetime.date(1970, 1, 3)],
        [datetime.datetime(1970, 1, 3, 23, tzinfo=datetime.UTC)],
        pa.array([2 * 86_400_000 + 5], pa.timestamp("ms")),
        pa.array([2 * 86_400_000], pa.date64()),
        pa.array(["1970-01-03"]).dictionary_encode(),
        np.array(["1970-01-03T05"], dtype="datetime64[h]").astype("datetime64[ns]"),
    ],
    ids=str,
)
def test_a_date_is_read_from_every_spelling_and_type(values: Any):
    assert codes_of(values, DAYS) == [2]


@pytest.mark.parametrize(
    "text",
    ["1970-02-30", "1970-13-01", "1970-00-10", "03/01/1970", "1970-1-3", "1970-01-03T24:00", "x"],
)
def test_what_spells_no_date_is_missing_where_that_is_allowed(text: str):
    strict = Column("d", "date", ORIGIN, bounds=(0, 99), num_bins=100)

    assert codes_of([text, None], DAYS) == [100, 100]
    with pytest.raises(ShardError, match="not a date like 2024-12-31"):
        codes_of([text], strict)


def test_leap_days_are_days():
    leap = Column("d", "date", ORIGIN, bounds=(19_782, 19_783), num_bins=2, missing=True)

    texts = ["2024-02-29", "2024-03-01", "2023-02-29", "1900-02-29", "2000-02-29"]

    assert codes_of(texts, leap) == [0, 1, 2, 2, 0]


def test_dates_beyond_the_bounds_count_in_the_outermost_bins():
    values = ["0001-01-01", "1969-12-31T23:59", "1970-01-01", "1970-01-01T01:00", "9999-12-31"]

    assert codes_of(values, HOURS) == [0, 0, 0, 1, 47]
    assert codes_of(pa.array([-1, None], pa.timestamp("ns")), HOURS) == [0, 48]


def test_a_number_is_no_date():
    with pytest.raises(ShardError, match="expected dates, found int64"):
        codes_of([19_000], DAYS)


def test_a_boolean_is_read_from_every_spelling_and_type():
    column = Column("b", "boolean", ORIGIN, missing=True)

    assert codes_of(["true", "False", "TRUE", "0", "1", "1.0", "yes", None], column) == [
        *(1, 0, 1, 0, 1, 1, 2, 2)
    ]
    assert codes_of([True, False, None], column) == [1, 0, 2]
    assert codes_of([1, 0, 7], column) == [1, 0, 2]
    assert codes_of([1.0, 0.0, math.nan], column) == [1, 0, 2]


def test_an_ordinal_keeps_the_order_of_the_schema():
    column = Column("o", "ordinal", ORIGIN, ("low", "mid", "high"), missing=True)

    assert codes_of(["high", "low", "mid", "none"], column) == [2, 0, 1, 3]


def test_ids_are_read_for_their_users_alone(tmp_path: Path):
    path = write(tmp_path / "t.csv", {"user": ["a", "b"], "visit": ["v1", "v1"], "x": [1, 2]})
    ids = (IdColumn("user"), IdColumn("visit"), IdColumn("not_in_the_file"))
    schema = Schema((number("x", 0, 9, 10),), ids=ids)

    shard = read_shard(path, schema, BY_USER)

    assert shard.records.codes.tolist() == [[1], [2]]
    assert shard.user_ids.tolist() == ["a", "b"]


# --- users, partitions, batches ---------------------------------------------------------------


def test_records_are_known_by_their_position_where_the_record_is_the_unit(tmp_path: Path):
    path = write(tmp_path / "s.csv", {"a": ["x", "y", "x"]})

    shard = read_shard(path, Schema((category("a", "x", "y"),)), RECORD)

    assert shard.user_ids.tolist() == ["0", "1", "2"]


@pytest.mark.parametrize("unit", [BY_USER, RECORD])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "npz"])
def test_partitions_split_the_users_among_them(tmp_path: Path, ending: str, unit: PrivacyUnit):
    path = tmp_path / f"s.{ending}"
    users = [f"u{i % 37}" for i in range(200)]
    values = [i % 5 for i in range(200)]
    if ending == "npz":
        np.savez(path, user=np.array(users), a=np.array(values))
    else:
        write(path, {"user": users, "a": values})
    schema = Schema((category("a", *"01234"),))

    whole = read_shard(path, schema, unit)
    parts = [read_shard(path, schema, unit, partition=(i, 3)) for i in range(3)]

    belongs = partition_of(whole.user_ids, 3)
    for i, part in enumerate(parts):
        assert part.user_ids.tolist() == whole.user_ids[belongs == i].tolist()
        assert (part.records.codes == whole.records.codes[belongs == i]).all()


@pytest.mark.parametrize("partition", [(3, 3), (-1, 3), (0, 0)])
def test_a_partition_that_is_none_is_refused(tmp_path: Path, partition: tuple[int, int]):
    path = write(tmp_path / "s.csv", {"a": ["x"]})

    with pytest.raises(ConfigError):
        read_shard(path, Schema((category("a", "x"),)), RECORD, partition=partition)


@pytest.mark.parametrize("ending", FORMATS)
def test_batches_join_without_a_seam(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_BATCH", 100)
    monkeypatch.setattr(files, "_CSV_BLOCK", 1000)
    values = [i % 7 for i in range(1234)]
    path = write(
        tmp_path / f"s.{ending}",
        {"user": [f"user \u00e9 {i}" for i in range(1234)], "a": values, "b": ['q"\n,'] * 1234},
    )
    schema = Schema((category("a", *"0123456"), category("b", 'q"\n,')))

    shard = read_shard(path, schema, BY_USER)

    assert shard.records.codes[:, 0].tolist() == values
    assert not shard.records.codes[:, 1].any()
    assert shard.user_ids.tolist() == [f"user \u00e9 {i}" for i in range(1234)]
    assert read_shard(path, schema, RECORD).user_ids.tolist() == [str(i) for i in range(1234)]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_shard_without_records_is_empty(tmp_path: Path, ending: str):
    if ending == "parquet":
        pq.write_table(
            pa.table({"user": pa.array([], pa.string()), "a": pa.nulls(0)}), tmp_path / "s.parquet"
        )
    else:
        write(tmp_path / f"s.{ending}", {"user": [], "a": []})

    shard = read_shard(tmp_path / f"s.{ending}", Schema((category("a", "x"),)), BY_USER)

    assert len(shard.records) == 0
    assert shard.records.codes.shape == (0, 1)


def test_a_header_without_a_line_end_is_an_empty_shard(tmp_path: Path):
    (tmp_path / "s.csv").write_text("user,a")

    assert codes(tmp_path / "s.csv", category("a", "x"), unit=BY_USER) == []


# --- texts ------------------------------------------------------------------------------------

TEXTS = [
    *("plain", "two words", " leading", "trailing ", "  ", "\t", "a\tb", "\u00a0", "\u3000"),
    *("a,b", ",", ";", "a;b", "|", "'", "it's", '"', '""', 'say "hi"', '"quoted"', "\\", "\\n"),
    *("line\nend", "line\r\nend", "old\rmac", "\n", "a\n\nb", "\u2028", "\u2029", "\x85", "\x0b"),
    *("=1+1", "=HYPERLINK(\"x\")", "+1", "-1", "@SUM(A1)", "#REF!", "%00", "{{x}}", "${x}", "<b>"),
    *("\u00e9", "e\u0301", "\u212b", "\ufb01", "\u00df", "\u0130", "\u05e9\u05dc\u05d5\u05dd"),
    *("\u0645\u0631\u062d\u0628\u0627", "\u202eabc", "\u200b", "\ufeff", "a\ufeffb", "\u6f22"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"),
    *("\U00010348", "\x1b[31mred", "\x07", "\x7f", "null", "None", "NaN", "true", "1e5", "007"),
    *("0.1", "-0", "[]", "{}", '{"a": 1}', "a" * 300, "../../etc/passwd", "C:\\x"),
]  # fmt: skip


def test_the_corpus_is_large_and_its_texts_differ():
    assert len(set(TEXTS)) == len(TEXTS) >= 60


@pytest.mark.parametrize("ending", FORMATS)
def test_every_text_of_the_corpus_comes_through(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"before": [1] * len(TEXTS), "x": TEXTS})
    schema = Schema((category("x", *TEXTS),))

    shard = read_shard(path, schema, RECORD)

    assert shard.records.codes[:, 0].tolist() == list(range(len(TEXTS)))
    assert decode(schema, shard.records, np.random.default_rng(0))["x"].to_pylist() == TEXTS


def test_escaped_json_is_read_as_what_it_stands_for(tmp_path: Path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"x": text}) + "\r\n" for text in TEXTS))

    assert codes(path, category("x", *TEXTS)) == [[i] for i in range(len(TEXTS))]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"x": ["a", "b"]})
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())

    assert codes(path, category("x", "a", "b")) == [[0], [1]]
    assert columns_of(path) == [SeenColumn("x", "text")]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_cell_of_twenty_megabytes_is_read(tmp_path: Path, ending: str):
    huge = "x" * 20_000_000
    path = write(tmp_path / f"s.{ending}", {"note": [huge, "y"], "x": ["a", "b"]})

    assert codes(path, category("x", "a", "b")) == [[0], [1]]
    assert codes(path, category("note", "y", missing=True)) == [[1], [0]]


@pytest.mark.parametrize("ending", TEXT_FORMATS)
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
def test_text_that_is_not_utf8_is_refused_with_its_offset(tmp_path: Path, ending: str, bad: bytes):
    path = tmp_path / f"s.{ending}"
    row = b"a%s\n" if "csv" in ending else b'{"x": "a%s"}\n'
    good = (b"x\n" if "csv" in ending else b"") + (row % (b"-" * 500)) * 2_500  # over a megabyte
    content = good + row % (b"\xc3\xa9" + bad + b"secret")
    path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
    offset = content.index(bad)

    with pytest.raises(ShardError, match=rf"not UTF-8 at byte offset {offset};") as refusal:
        codes(path, category("x", "a", missing=True))

    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_text_that_breaks_off_within_a_character_is_refused(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"x": ["a"]})
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\xe2\x82")

    with pytest.raises(ShardError, match=rf"not UTF-8 at byte offset {length};"):
        codes(path, category("x", "a"))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_nul_byte_is_refused_with_its_offset(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"x": ["a", "bXc"]})
    offset = path.read_bytes().index(b"X")
    path.write_bytes(path.read_bytes().replace(b"X", b"\0"))

    with pytest.raises(ShardError, match=rf"NUL byte at offset {offset},"):
        codes(path, category("x", "a", missing=True))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_utf16_is_named(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"x": ["a"]})
    path.write_bytes(path.read_text().encode("utf-16"))

    with pytest.raises(ShardError, match="UTF-16; save it as UTF-8"):
        codes(path, category("x", "a"))


def test_a_nul_within_a_text_is_refused_in_formats_that_hold_one(tmp_path: Path):
    parquet = write(tmp_path / "s.parquet", {"x": ["a\0b"]})
    (tmp_path / "s.jsonl").write_text('{"x": "a\\u0000b"}\n')

    for path in (parquet, tmp_path / "s.jsonl"):
        with pytest.raises(ShardError, match=r"column 'x': text holds a NUL"):
            codes(path, category("x", "a", missing=True))


def test_a_lone_surrogate_is_refused(tmp_path: Path):
    (tmp_path / "s.jsonl").write_text('{"x": "\\ud800"}\n')

    with pytest.raises(ShardError, match="column 'x' holds text that is not valid Unicode"):
        codes(tmp_path / "s.jsonl", category("x", "a", missing=True))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path):
    text = pa.array([b"\xffsecret"]).view(pa.string())
    pq.write_table(pa.table({"x": text}), tmp_path / "s.parquet")

    with pytest.raises(ShardError, match=r"column 'x': text is not UTF-8"):
        codes(tmp_path / "s.parquet", category("x", "a", missing=True))


# --- files that cannot be used ----------------------------------------------------------------

SECRET = "s3cret"
A = category("a", "x", "y", missing=True)
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty csv": ("s.csv", b"", "is empty; expected a header"),
    "a csv row too short": ("s.csv", b"a,b\nx,y\ns3cret\n", r"does not parse in row 3: expected 2"),
    "a csv row too long": ("s.csv", b"a,b\ns3cret,x,y\n", r"does not parse in row 2: expected 2"),
    "an open quote": ("s.csv", b'a,b\n"s3cret,x\n', "does not parse"),
    "a csv column missing": ("s.csv", b"A,b\ns3cret,1\n", "no column 'a'"),
    "a csv column twice": ("s.csv", b"a,a\ns3cret,1\n", "two columns are called 'a'"),
    "semicolons": ("s.csv", b"a;b\ns3cret;1\n", "its header has no commas"),
    "a csv that is no gzip": ("s.csv.gz", b"a,b\ns3cret,1\n", "cannot be read as csv"),
    "a cut gzip": ("s.csv.gz", gzip.compress(b"a\n" + b"s3cret\n" * 999)[:40], "as csv"),
    "no json": ("s.jsonl", b'{"a": "x"}\n{"a": s3cret}\n', "line 2: not JSON"),
    "a json list": ("s.jsonl", b'["s3cret"]\n', "line 1: expected an object"),
    "json text": ("s.jsonl", b'"s3cret"\n', "line 1: expected an object"),
    "a list as value": ("s.jsonl", b'{"a": ["s3cret"]}\n', "line 1: column 'a' must hold text"),
    "a json key missing": ("s.jsonl", b'{"aa": "s3cret"}\n', "no column 'a'; did you mean 'aa'"),
    "a json well": ("s.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "no parquet": ("s.parquet", b"PAR1s3cret", "cannot be read as parquet"),
    "an empty parquet": ("s.parquet", b"", "cannot be read as parquet"),
    "no npz": ("s.npz", b"s3cret", "cannot be read as npz"),
    "another ending": ("s.xlsx", b"s3cret", "use .csv, .jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_read_says_why_and_shows_nothing_of_it(tmp_path: Path, case: str):
    name, content, reason = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ShardError, match=reason) as refusal:
        codes(tmp_path / name, A)

    told = "".join(traceback.format_exception(refusal.value))
    assert name in str(refusal.value)
    assert SECRET not in told.replace(repr(content), "")


def test_no_file_is_refused(tmp_path: Path):
    with pytest.raises(ShardError, match="there is no file"):
        codes(tmp_path / "s.csv", A)
    with pytest.raises(ShardError, match="there is no file"):
        columns_of(tmp_path / "s.csv")


@pytest.mark.parametrize("ending", [*FORMATS, "npz"])
def test_a_shard_without_its_user_column_is_refused(tmp_path: Path, ending: str):
    path = tmp_path / f"s.{ending}"
    if ending == "npz":
        np.savez(path, User=np.array(["p"]), a=np.array(["x"]))
    else:
        write(path, {"User": ["p"], "a": ["x"]})

    with pytest.raises(ShardError, match="no column 'user'; did you mean 'User'"):
        codes(path, A, unit=BY_USER)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_record_of_nobody_is_refused(tmp_path: Path, ending: str):
    path = write(tmp_path / f"s.{ending}", {"user": ["p", None], "a": ["x", "x"]})

    with pytest.raises(ShardError, match=r"user-id column 'user' holds null ids"):
        codes(path, A, unit=BY_USER)


WRONG_TYPES = {
    "a date as category": (datetime.date(2020, 1, 1), A, "expected text, whole numbers or true"),
    "a time as number": (
        datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        number("a", 0, 1, 2),
        "expected numbers",
    ),
    "a list": (["x"], A, "must hold text, numbers or truth values"),
    "a struct": ({"x": 1}, A, "must hold text, numbers or truth values"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_a_column_of_another_type_is_refused(tmp_path: Path, case: str):
    value, column, reason = WRONG_TYPES[case]
    path = write(tmp_path / "s.parquet", {"a": [value]})

    with pytest.raises(ShardError, match=reason):
        codes(path, column)


def test_a_column_that_no_record_of_a_table_has_is_refused():
    with pytest.raises(ShardError, match="table: there is no column 'a'"):
        encode(pa.table({"b": [1]}), Schema((A,)), RECORD)


@pytest.mark.parametrize("ending", [*FORMATS, "npz"])
def test_a_damaged_file_is_read_or_refused_but_nothing_else(tmp_path: Path, ending: str):
    path = tmp_path / f"s.{ending}"
    rng = np.random.default_rng(5)
    if ending == "npz":
        np.savez(path, user=np.array(["p", "q"] * 50), a=np.array(["x", "y"] * 50))
    else:
        write(path, {"user": ["p", "q"] * 50, "a": ["x", "y"] * 50})
    content = path.read_bytes()

    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            del damaged[rng.integers(len(damaged)) :]
        for _ in range(rng.integers(0, 4)):
            if damaged:
                damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            codes(path, A, unit=BY_USER)
        except ShardError:
            refused += 1

    assert refused > 20


# --- images and npz ---------------------------------------------------------------------------


def test_images_and_labels_are_read_from_npz(tmp_path: Path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.savez_compressed(
        tmp_path / "s.npz",
        pixels=images,
        label=np.array([7, 9], np.int16),
        name=np.array(["b", ""]),
        code=np.array([b"u", b"v"]),
        dose=np.array([0.5, np.nan], ">f4"),
        writer=np.array([40_000, 3], np.uint16),
        unused=np.array([{"a": 1}, None], dtype=object),
    )
    schema = Schema(
        (
            category("label", "7", "9"),
            category("name", "a", "b", missing=True),
            category("code", "v", "u"),
            number("dose", 0, 1, 2, missing=True),
        ),
        ImageColumn("pixels", (3, 4, 1), ORIGIN),
    )

    shard = read_shard(tmp_path / "s.npz", schema, User("writer"))

    assert shard.records.images is not None
    assert (shard.records.images[..., 0] == images).all()
    assert shard.records.codes.tolist() == [[0, 1, 1, 1], [1, 2, 0, 2]]
    assert shard.user_ids.tolist() == ["40000", "3"]


PIXELS = Schema((), ImageColumn("pixels", (2, 2, 1), ORIGIN))
WRONG_IMAGES = {
    "floats": (
        np.zeros((3, 2, 2), np.float32),
        "expected uint8 images of shape .2, 2, 1., found float32",
    ),
    "another shape": (np.zeros((3, 2, 3), np.uint8), r"found uint8 of shape \[2, 3, 1\]"),
    "color": (np.zeros((3, 2, 2, 3), np.uint8), r"found uint8 of shape \[2, 2, 3\]"),
    "one image": (np.zeros((2, 2), np.uint8), "expected uint8 images"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_images_of_another_kind_are_refused(tmp_path: Path, case: str):
    images, reason = WRONG_IMAGES[case]
    np.savez(tmp_path / "s.npz", pixels=images)

    with pytest.raises(ShardError, match=reason):
        read_shard(tmp_path / "s.npz", PIXELS, RECORD)


def test_images_are_partitioned_with_their_users(tmp_path: Path):
    images = np.arange(40, dtype=np.uint8).repeat(4).reshape(40, 2, 2)
    np.savez(tmp_path / "s.npz", pixels=images, user=np.arange(40) % 9)

    whole = read_shard(tmp_path / "s.npz", PIXELS, User("user"))
    parts = [read_shard(tmp_path / "s.npz", PIXELS, User("user"), partition=(i, 2)) for i in (0, 1)]

    assert sum(len(part.records) for part in parts) == 40
    for i, part in enumerate(parts):
        expected = whole.records.images[partition_of(whole.user_ids, 2) == i]  # type: ignore[index]
        assert (part.records.images == expected).all()


def test_images_without_a_table_are_read_by_record(tmp_path: Path):
    np.savez(tmp_path / "s.npz", pixels=np.zeros((5, 2, 2), np.uint8))

    shard = read_shard(tmp_path / "s.npz", PIXELS, RECORD, partition=(0, 1))

    assert shard.records.codes.shape == (5, 0)
    assert len(shard.user_ids) == 5


def test_images_in_a_table_format_are_refused(tmp_path: Path):
    path = write(tmp_path / "s.csv", {"pixels": ["0"]})

    with pytest.raises(ShardError, match=r"read from \.npz"):
        read_shard(path, PIXELS, RECORD)


def test_arrays_of_different_length_are_refused_without_their_lengths(tmp_path: Path):
    np.savez(tmp_path / "s.npz", pixels=np.zeros((13, 2, 2), np.uint8), user=np.arange(17))
    np.savez(tmp_path / "t.npz", a=np.array(["x"] * 13), user=np.arange(17))

    with pytest.raises(ShardError, match="differ in length") as one:
        read_shard(tmp_path / "s.npz", PIXELS, User("user"))
    with pytest.raises(ShardError, match="differ in length") as two:
        codes(tmp_path / "t.npz", A, unit=User("user"))

    assert not any(figure in f"{one.value}{two.value}" for figure in ("13", "17"))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import builtins; builtins.fedsynth_bomb = True",)


def test_objects_in_a_npz_are_refused_and_never_unpickled(tmp_path: Path):
    np.savez(tmp_path / "s.npz", a=np.array([Bomb()], dtype=object))

    with pytest.raises(ShardError, match="array 'a' holds Python objects"):
        codes(tmp_path / "s.npz", A)

    import builtins

    assert not hasattr(builtins, "fedsynth_bomb")


def test_an_array_of_more_dimensions_is_no_column(tmp_path: Path):
    np.savez(tmp_path / "s.npz", a=np.zeros((2, 2)))

    with pytest.raises(ShardError, match="array 'a' must be one-dimensional"):
        codes(tmp_path / "s.npz", A)


# --- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_columns_are_listed_with_their_types(tmp_path: Path, ending: str):
    path = write(
        tmp_path / f"s.{ending}",
        {
            "id": ["p-1", "p-2"],
            "zip": ["01234", "99999"],
            "age": [30, 40],
            "dose": [0.5, 2.0],
            "smoker": [True, False],
        },
    )

    assert columns_of(path) == [
        SeenColumn("id", "text"),
        SeenColumn("zip", "text"),
        SeenColumn("age", "integer"),
        SeenColumn("dose", "real"),
        SeenColumn("smoker", "boolean"),
    ]


def test_columns_with_gaps_keep_their_type(tmp_path: Path):
    path = tmp_path / "s.csv"
    path.write_text("a,b,c\n1,?,\n,2.5,?\n3,1e5,\n")

    assert [column.type for column in columns_of(path)] == ["integer", "real", "text"]


def test_columns_of_other_kinds_are_named_so(tmp_path: Path):
    table = pa.table({"d": [datetime.date(2020, 1, 1)], "l": [["x"]], "n": pa.nulls(1)})
    pq.write_table(table, tmp_path / "s.parquet")
    (tmp_path / "s.jsonl").write_text('{"l": ["x"], "a": null}\n{"b": 2}\n')
    np.savez(tmp_path / "s.npz", i=np.zeros((2, 3, 4), np.uint8), y=np.zeros(2), z=np.zeros((2, 2)))

    assert [c.type for c in columns_of(tmp_path / "s.parquet")] == ["date", "other", "other"]
    assert columns_of(tmp_path / "s.jsonl") == [
        SeenColumn("l", "other"),
        SeenColumn("a", "text"),
        SeenColumn("b", "integer"),
    ]
    assert columns_of(tmp_path / "s.npz") == [
        SeenColumn("i", "image", (3, 4)),
        SeenColumn("y", "real"),
        SeenColumn("z", "other"),
    ]


def test_columns_of_a_npz_are_listed_without_reading_its_arrays(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 28, 28)}
        )
        archive.writestr("images.npy", header.getvalue())

    assert columns_of(tmp_path / "s.npz") == [SeenColumn("images", "image", (28, 28))]


# --- a real table -----------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "diabetes130.parquet").exists(), reason="no shared data here")
def test_a_real_table_of_encounters_is_read():
    schema = Schema(
        (
            category("gender", "Female", "Male", missing=True),
            category("race", "Caucasian", "AfricanAmerican", missing=True),
            number("time_in_hospital", 1, 14, 14, kind="integer"),
        )
    )

    shard = read_shard(SHARED / "diabetes130.parquet", schema, User("patient_nbr", max_records=3))

    assert len(shard.records) == 101_766
    assert len(np.unique(shard.user_ids)) == 71_518
    assert np.bincount(shard.records.codes[:, 0]).tolist() == [54_708, 47_055, 3]
    assert shard.records.codes[:, 2].max() == 13


def test_reading_and_decoding_are_each_others_inverse(tmp_path: Path):
    schema = Schema((category("a", "x", "y", missing=True), number("n", 0, 1, 9, missing=True)))
    rng = np.random.default_rng(1)
    before = np.stack([rng.integers(0, 3, 300), rng.integers(0, 10, 300)], axis=1)
    table = decode(schema, Records(before.astype(np.int32)), rng)

    for ending in FORMATS:
        path = write(tmp_path / f"s.{ending}", table.to_pydict())

        assert codes(path, *schema.columns) == before.tolist()
