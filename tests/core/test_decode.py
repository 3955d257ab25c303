# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fedsynth.client.shard import encode, read_shard
from fedsynth.core.decode import decode, save_records
from fedsynth.core.errors import SchemaError
from fedsynth.core.privacy import PrivacyUnit, User
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.export import write_table
from hypothesis import given, settings
from hypothesis import strategies as st

ORIGIN = "public: test"
RECORD = PrivacyUnit()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def mixed_schema() -> Schema:
    return Schema(
        (
            Column("sex", "category", ORIGIN, ("F", "M"), missing=True),
            Column("age", "integer", ORIGIN, bounds=(0, 100), num_bins=10),
            Column("dose", "real", ORIGIN, bounds=(-1.5, 2.5), num_bins=8, missing=True),
        )
    )


@pytest.fixture
def mixed_codes(mixed_schema: Schema) -> Records:
    cells = [rng().integers(0, c.num_cells, 500) for c in mixed_schema.columns]
    return Records(np.stack(cells, axis=1).astype(np.int32))


def test_decoding_and_encoding_gives_the_same_codes(mixed_schema: Schema, mixed_codes: Records):
    table = decode(mixed_schema, mixed_codes, rng(1))

    assert (encode(table, mixed_schema, RECORD).records.codes == mixed_codes.codes).all()


def test_values_have_the_types_of_their_columns(mixed_schema: Schema, mixed_codes: Records):
    table = decode(mixed_schema, mixed_codes, rng())

    assert table.schema.types == [pa.string(), pa.int64(), pa.float64()]
    assert set(table["sex"].to_pylist()) == {"F", "M", None}
    assert table["age"].null_count == 0
    assert table["dose"].null_count == (mixed_codes.codes[:, 2] == 8).sum()


@settings(max_examples=150, deadline=None)
@given(
    low=st.integers(-1000, 1000),
    width=st.integers(1, 300),
    num_bins=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_integers_come_back_to_their_bin_if_it_holds_one(
    low: int, width: int, num_bins: int, seed: int
):
    column = Column("n", "integer", ORIGIN, bounds=(low, low + width), num_bins=num_bins)
    schema = Schema((column,))
    everyone = np.arange(num_bins, dtype=np.int32)[:, None]
    integers = np.arange(low, low + width + 1)
    codes_of_integers = encode(pa.table({"n": integers}), schema, RECORD).records.codes[:, 0]
    holding = np.isin(everyone[:, 0], codes_of_integers)

    table = decode(schema, Records(everyone), rng(seed))

    back = encode(table, schema, RECORD).records.codes
    values = table["n"].to_numpy()
    assert (back[holding] == everyone[holding]).all()
    assert ((low <= values) & (values <= low + width)).all()


@settings(max_examples=150, deadline=None)
@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-3, 1e6),
    num_bins=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_reals_come_back_to_their_bin(low: float, width: float, num_bins: int, seed: int):
    schema = Schema((Column("x", "real", ORIGIN, bounds=(low, low + width), num_bins=num_bins),))
    codes = np.arange(num_bins, dtype=np.int32)[:, None].repeat(5, axis=0)

    table = decode(schema, Records(codes), rng(seed))

    assert (encode(table, schema, RECORD).records.codes == codes).all()


class Highest(np.random.Generator):
    """Draws the largest number below one, always."""

    def random(self, size: int) -> np.ndarray:  # type: ignore[override]
        return np.full(size, np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("bounds", [(0.1, 0.3), (1.0, 1.0 + 2**-48), (-1e9, 1e-9)])
def test_no_draw_reaches_the_next_bin(bounds: tuple[float, float]):
    schema = Schema((Column("x", "real", ORIGIN, bounds=bounds, num_bins=7),))
    codes = np.arange(7, dtype=np.int32)[:, None]

    table = decode(schema, Records(codes), Highest(np.random.PCG64()))

    assert (encode(table, schema, RECORD).records.codes == codes).all()


def test_an_integer_is_uniform_among_those_of_its_bin():
    schema = Schema((Column("n", "integer", ORIGIN, bounds=(0, 9), num_bins=2),))
    records = Records(np.zeros((50_000, 1), dtype=np.int32))

    counts = np.bincount(decode(schema, records, rng())["n"].to_numpy())

    def chi_squared(expected: np.ndarray) -> float:
        return float(((counts - expected) ** 2 / expected).sum())

    assert len(counts) == 5  # 0 to 4
    assert chi_squared(np.full(5, 10_000.0)) < 18.5  # 4 degrees of freedom, p = 0.001
    wrong = np.array([4, 3, 3, 3, 2]) / 15 * 50_000  # the ends wrong by a third
    assert chi_squared(wrong) > 1000


def test_the_same_rng_gives_the_same_bytes(
    tmp_path: Path, mixed_schema: Schema, mixed_codes: Records
):
    (one,) = save_records(mixed_schema, mixed_codes, rng(3), tmp_path / "a")
    (two,) = save_records(mixed_schema, mixed_codes, rng(3), tmp_path / "b")
    (other,) = save_records(mixed_schema, mixed_codes, rng(4), tmp_path / "c")

    assert one == tmp_path / "a" / "data" / "synthetic.parquet"
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_a_saved_table_reads_back_to_the_same_codes(
    tmp_path: Path, mixed_schema: Schema, mixed_codes: Records
):
    (path,) = save_records(mixed_schema, mixed_codes, rng(), tmp_path)

    assert (read_shard(path, mixed_schema, RECORD).records.codes == mixed_codes.codes).all()
    assert pq.read_table(path).num_rows == 500


def test_images_are_saved_beside_their_labels(tmp_path: Path):
    schema = Schema(
        (
            Column("label", "category", ORIGIN, tuple("0123456789")),
            Column("file", "category", ORIGIN, ("a", "b"), missing=True),  # savez's own argument
            Column("age", "integer", ORIGIN, bounds=(0, 9), num_bins=10, missing=True),
        ),
        ImageColumn("images", (4, 5, 1), ORIGIN),
    )
    codes = np.array([[3, 0, 1], [9, 2, 10]], dtype=np.int32)
    images = rng().integers(0, 256, (2, 4, 5, 1)).astype(np.uint8)

    paths = save_records(schema, Records(codes, images), rng(), tmp_path)
    again = save_records(schema, Records(codes, images), rng(), tmp_path / "again")

    back = read_shard(paths[1], schema, RECORD).records
    with np.load(paths[1], allow_pickle=False) as arrays:
        assert arrays["label"].dtype == np.int64
        assert arrays["label"].tolist() == [3, 9]
        assert arrays["file"].tolist() == ["a", ""]
    assert [path.name for path in paths] == ["synthetic.parquet", "images.npz"]
    assert (back.codes == codes).all()
    assert (back.images == images).all()
    assert paths[1].read_bytes() == again[1].read_bytes()


def test_a_schema_of_images_alone_makes_no_table(tmp_path: Path):
    schema = Schema((), ImageColumn("images", (2, 2, 3), ORIGIN))
    images = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    records = Records(np.empty((3, 0), dtype=np.int32), images)

    paths = save_records(schema, records, rng(), tmp_path)

    assert [path.name for path in paths] == ["images.npz"]
    assert len(read_shard(paths[0], schema, RECORD).records) == 3


def test_no_records_decode_to_an_empty_table(mixed_schema: Schema):
    table = decode(mixed_schema, Records(np.empty((0, 3), dtype=np.int32)), rng())

    assert table.num_rows == 0
    assert table.column_names == ["sex", "age", "dose"]


def test_codes_of_another_schema_are_refused(mixed_schema: Schema):
    with pytest.raises(SchemaError, match="do not fit"):
        decode(mixed_schema, Records(np.zeros((2, 2), dtype=np.int32)), rng())


def test_records_without_their_images_are_refused(tmp_path: Path):
    schema = Schema((), ImageColumn("images", (2, 2, 3), ORIGIN))

    with pytest.raises(SchemaError, match="no images"):
        save_records(schema, Records(np.empty((3, 0), dtype=np.int32)), rng(), tmp_path)


# --- ordinals, booleans, dates and ids --------------------------------------------------------

KINDS = Schema.from_json(
    {
        "columns": {
            "patient": {"type": "id", "synthesize": "serial"},
            "visit": {"type": "id"},
            "grade": {"type": "ordinal", "categories": ["low", "mid", "high"], "origin": "policy"},
            "ill": {"type": "boolean", "missing": True},
            "born": {
                "type": "date",
                "bounds": ["1920-01-01", "2024-12-31"],
                "num_bins": 40,
                "missing": True,
                "origin": "policy",
            },
            "at": {
                "type": "date",
                "bounds": ["1969-12-31T20:00", "1970-01-01T03:30"],
                "resolution": "minute",
                "num_bins": 7,
                "origin": "policy",
            },
        }
    }
)


def kinds_codes(num_records: int = 400) -> Records:
    cells = [rng().integers(0, c.num_cells, num_records) for c in KINDS.columns]
    return Records(np.stack(cells, axis=1).astype(np.int32))


def test_every_kind_decodes_to_its_own_type_and_back_to_its_codes():
    records = kinds_codes()

    table = decode(KINDS, records, rng())

    assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
        "patient": pa.int64(),
        "grade": pa.string(),
        "ill": pa.bool_(),
        "born": pa.date32(),
        "at": pa.timestamp("s"),
    }
    assert (encode(table, KINDS, RECORD).records.codes == records.codes).all()
    assert table["born"].null_count == (records.codes[:, 2] == 40).sum() > 0


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_kind_comes_back_from_every_format(tmp_path: Path, ending: str):
    records = kinds_codes()

    write_table(decode(KINDS, records, rng()), tmp_path / f"t.{ending}")

    again = read_shard(tmp_path / f"t.{ending}", KINDS, User("patient")).records.codes
    assert (again == records.codes).all()


def test_serial_numbers_are_the_only_ids_in_a_release():
    table = decode(KINDS, kinds_codes(5), rng())

    assert table["patient"].to_pylist() == [1, 2, 3, 4, 5]
    assert "visit" not in table.column_names


def test_a_date_is_uniform_among_those_of_its_bin():
    days = {"type": "date", "bounds": ["2024-02-26", "2024-03-02"], "num_bins": 1}
    schema = Schema.from_json({"columns": {"d": days | {"origin": "policy"}}})
    records = Records(np.zeros((60_000, 1), dtype=np.int32))

    values = decode(schema, records, rng())["d"].to_numpy()

    days_found, counts = np.unique(values, return_counts=True)
    assert [str(d) for d in days_found[[0, 3, -1]]] == ["2024-02-26", "2024-02-29", "2024-03-02"]

    def chi_squared(expected: np.ndarray) -> float:
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_squared(np.full(6, 10_000.0)) < 20.5  # 5 degrees of freedom, p = 0.001
    assert chi_squared(np.array([4, 3, 3, 3, 3, 2]) / 18 * 60_000) > 1000


def test_images_stand_beside_dates_and_serial_numbers(tmp_path: Path):
    image = ImageColumn("picture", (2, 2, 1), ORIGIN)
    schema = Schema(KINDS.columns, image=image, ids=KINDS.ids)
    records = Records(kinds_codes(6).codes, np.zeros((6, 2, 2, 1), np.uint8))

    save_records(schema, records, rng(), tmp_path)

    again = read_shard(tmp_path / "data" / "images.npz", schema, User("patient"))
    assert (again.records.codes == records.codes).all()
    assert again.user_ids.tolist() == list("123456")
