# SPDX-License-Identifier: Apache-2.0
"""Real tables and images with schemas declared by hand, so that no bound is read from the data.

The tables lie outside the project, in `../shared/data` or in the folder that FEDSYNTH_DATA names;
only the example's cut of diabetes130 and scikit-learn's digits are always at hand. Bounds that no
codebook states are declared here as a plausible range, as an owner's policy would; values outside
are counted at its ends.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fedsynth.client.bounding import bound
from fedsynth.client.shard import Shard, encode, read_shard
from fedsynth.core.privacy import PrivacyUnit, User
from fedsynth.core.records import BoundedShard, Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.core.users import partition_of

_ROOT = Path(__file__).resolve().parent.parent
_EXAMPLE = _ROOT / "examples" / "diabetes130"
_RECORD = PrivacyUnit()
CLIENTS = 20  # among which people are dealt out, where that matters; ACS has as many areas
_HELD_OUT = 0.2  # share of a table without users that judges are tested on


@dataclass(frozen=True)
class Case:
    """A population to learn from, and records of others to judge by.

    Attributes:
      name: What the table is called in figures.
      schema: Public schema; its target is what judges predict.
      train: The population, bounded.
      test: Records of people who are not in it.
      delta: At which its runs are priced; below 1 / (10 x users).
    """

    name: str
    schema: Schema
    train: BoundedShard
    test: Records
    delta: float


def dealt_out(case: Case, split: str, rng: np.random.Generator) -> list[BoundedShard]:
    """A shard a client; each user is whole at one of them, told by the user's first record.

    Args:
      case: The population.
      split: `IID`, `PUMA`, or `Dirichlet ALPHA`: client k gets a share of the users of each class,
        the shares of a class drawn from a symmetric Dirichlet distribution.
      rng: Source of the dealing.
    """
    shard = case.train
    first = shard.records.codes[shard.starts[:-1]]
    if split == "IID":
        client = rng.permutation(np.arange(shard.num_users) % CLIENTS)
    elif split.startswith("Dirichlet"):
        label = first[:, case.schema.index(case.schema.target or case.schema.names[-1])]
        client = np.empty(shard.num_users, dtype=np.int64)
        for value in np.unique(label):
            mine = np.flatnonzero(label == value)
            shares = rng.dirichlet(np.full(CLIENTS, float(split.split()[1])))
            client[mine] = rng.choice(CLIENTS, len(mine), p=shares)
    else:
        client = first[:, case.schema.index(split)]
    return [shard.only(client == k) for k in np.unique(client)]


class Missing(Exception):
    """A table that is not on this machine."""


def folder() -> Path:
    """Where the shared tables lie."""
    return Path(os.environ.get("FEDSYNTH_DATA", _ROOT.parent / "shared" / "data")) / "tabular"


def load(name: str, *, quick: bool = False) -> Case:
    """A case by its name; one of `TABLES` or `SHIPPED`.

    Args:
      name: Which table.
      quick: A small part of it.

    Raises:
      Missing: The table is not on this machine.
    """
    case = _LOADERS[name]()
    if not quick:
        return case
    few = np.arange(case.train.num_users) < 1500
    test = slice(0, 500)
    images = None if case.test.images is None else case.test.images[test]
    part = Records(case.test.codes[test], images)
    return Case(case.name, case.schema, case.train.only(few), part, max(case.delta, 1e-5))


def _adult_coded() -> Case:
    """Adult as the AIM and MST papers code it: all records learn, so there is nobody to test on."""
    table = _table("adult_coded")
    domain = json.loads(_file("adult_coded_domain.json").read_text(encoding="utf-8"))
    origin = "public: the coding of the AIM and MST papers"
    numbers = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
    columns = [
        Column(name, "integer", origin, bounds=(0.0, size - 1.0), num_bins=size)
        if name in numbers
        else Column(name, "category", origin, tuple(str(i) for i in range(size)))
        for name, size in domain.items()
    ]
    codes = np.column_stack([table[name].to_numpy() for name in domain]).astype(np.int32)
    schema = Schema(tuple(columns), target="income>50K")
    shard = _bounded(Shard(Records(codes), _own_ids(codes)), _RECORD)
    return Case("adult_coded", schema, shard, Records(codes[:0]), 1e-9)


def _adult() -> Case:
    """Raw Adult; categories from UCI's `adult.names`, which also says that age is above 16."""
    uci = "public: UCI adult.names"
    census = "public: Current Population Survey, top code"
    lists = {
        "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov"
        " Without-pay Never-worked",
        "education": "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th"
        " 7th-8th 12th Masters 1st-4th 10th Doctorate 5th-6th Preschool",
        "marital_status": "Married-civ-spouse Divorced Never-married Separated Widowed"
        " Married-spouse-absent Married-AF-spouse",
        "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial"
        " Prof-specialty Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing"
        " Transport-moving Priv-house-serv Protective-serv Armed-Forces",
        "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
        "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
        "sex": "Female Male",
        "native_country": "United-States Cambodia England Puerto-Rico Canada Germany"
        " Outlying-US(Guam-USVI-etc) India Japan Greece South China Cuba Iran Honduras"
        " Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France"
        " Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua"
        " Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands",
        "income": "<=50K >50K",
    }
    unknown = ("workclass", "occupation", "native_country")  # "?" stands for missing
    columns = [
        Column("age", "integer", uci + ", top code 90", bounds=(17, 90), num_bins=37),
        *(
            Column(name, "category", uci, tuple(text.split()), missing=name in unknown)
            for name, text in lists.items()
        ),
        Column("capital_gain", "integer", census, bounds=(0, 99_999), num_bins=32),
        Column("capital_loss", "integer", "policy: declared", bounds=(0, 4499), num_bins=30),
        Column("hours_per_week", "integer", census, bounds=(1, 99), num_bins=33),
    ]
    schema = Schema(tuple(columns), target="income")
    return _split("adult", schema, encode(_table("adult"), schema, _RECORD), 1e-6)


def _acs() -> Case:
    """NIST's national excerpt; categories and bounds from the dictionary that comes with it."""
    dictionary = json.loads(_file("acs_national2019_dictionary.json").read_text(encoding="utf-8"))
    origin = "public: NIST Diverse Community Excerpts, data dictionary"
    # left out: INDP (its codes are not in the dictionary), DENSITY (follows from PUMA), weights
    numbers = {
        "AGEP": ((0, 99), 25, origin),
        "NOC": ((0, 19), 20, origin),
        "NPF": ((2, 20), 19, origin),
        "PINCP": ((-9000, 199_999), 38, "policy: declared; the dictionary's range is to 1,341,000"),
        "POVPIP": ((0, 501), 26, origin),
    }
    table = _table("acs_national2019")
    columns, arrays = [], {}
    for name, entry in dictionary.items():
        if name in numbers:
            bounds, num_bins, where = numbers[name]
            column = Column(
                name,
                "integer",
                where,
                bounds=(float(bounds[0]), float(bounds[1])),
                num_bins=num_bins,
                missing="N" in entry["values"],
            )
            values = table[name]
            values = pc.if_else(pc.equal(values, "N"), pa.scalar(None, values.type), values)
            arrays[name] = pc.cast(values, pa.float64())
        elif name not in ("INDP", "DENSITY", "WGTP", "PWGTP"):
            column = Column(name, "category", origin, tuple(entry["values"]))
            arrays[name] = table[name]
        else:
            continue
        columns.append(column)
    schema = Schema(tuple(columns), target="OWN_RENT")
    return _split("acs_national2019", schema, encode(pa.table(arrays), schema, _RECORD), 1e-6)


def _smoking() -> Case:
    """Biosignals; no codebook, so ranges are declared as a laboratory would."""
    origin = "policy: declared, a range that a laboratory would expect"
    ranges = {
        "age": (20, 89, 14),
        "height(cm)": (130, 194, 13),
        "weight(kg)": (30, 139, 22),
        "waist(cm)": (50, 130, 32),
        "eyesight(left)": (0, 2.5, 25),
        "eyesight(right)": (0, 2.5, 25),
        "systolic": (70, 229, 32),
        "relaxation": (40, 139, 25),
        "fasting blood sugar": (40, 299, 26),
        "Cholesterol": (50, 399, 35),
        "triglyceride": (0, 599, 30),
        "HDL": (0, 149, 30),
        "LDL": (0, 299, 30),
        "hemoglobin": (4, 22, 36),
        "serum creatinine": (0, 4, 20),
        "AST": (0, 199, 40),
        "ALT": (0, 199, 40),
        "Gtp": (0, 299, 30),
    }
    listed = {
        "hearing(left)": "1 2",
        "hearing(right)": "1 2",
        "Urine protein": "1 2 3 4 5 6",
        "dental caries": "0 1",
        "smoking": "0 1",
    }
    columns = [
        *(
            Column(name, "real", origin, bounds=(float(low), float(high)), num_bins=bins)
            for name, (low, high, bins) in ranges.items()
        ),
        *(
            Column(name, "category", "public: the table's description", tuple(text.split()))
            for name, text in listed.items()
        ),
    ]
    schema = Schema(tuple(columns), target="smoking")
    return _split("smoking", schema, encode(_table("smoking"), schema, _RECORD), 1e-6)


def _nltcs() -> Case:
    """Sixteen answers of yes or no; the judge predicts whether a person manages their money."""
    table = _table("nltcs")
    columns = tuple(
        Column(name, "category", "public: the survey's questions", ("0", "1"))
        for name in table.column_names
    )
    schema = Schema(columns, target="managing money")
    return _split("nltcs", schema, encode(table, schema, _RECORD), 1e-6)


def _diabetes130() -> Case:
    """Encounters by patient, all of each patient's; a fifth of the patients to test on."""
    table = _table("diabetes130")
    grouped = _make_cut().diagnosis
    groups = {code: grouped(code) for code in pc.unique(table["diag_1"]).to_pylist()}
    named = pa.array([groups[code] for code in table["diag_1"].to_pylist()])
    table = table.append_column("diagnosis", named)
    schema = Schema.read(_EXAMPLE / "schema.toml")
    unit = User("patient_nbr", max_records=40)
    return _split_by_user("diabetes130", schema, encode(table, schema, unit), unit, 1e-6)


def _diabetes130_cut() -> Case:
    """The example's cut: 30,000 patients with up to 5 encounters each, 5,000 others to test on."""
    schema = Schema.read(_EXAMPLE / "schema.toml")
    unit = User("patient_nbr", max_records=5)
    train = read_shard(_EXAMPLE / "encounters.parquet", schema, unit)
    test = read_shard(_EXAMPLE / "holdout.parquet", schema, unit)
    return Case("diabetes130_cut", schema, _bounded(train, unit), test.records, 1e-6)


def _online_retail() -> Case:
    """Lines of invoices by customer, up to 20 of each; lines without a customer are nobody's."""
    table = _table("online_retail_sample")
    table = table.filter(pc.is_valid(table["CustomerID"]))
    when = pc.strptime(table["InvoiceDate"], format="%Y-%m-%d %H:%M:%S", unit="s")
    lots = ("returned", "1", "2 to 5", "6 to 11", "12 to 23", "24 or more")
    lot = np.array(lots)[np.digitize(table["Quantity"].to_numpy(), (1, 2, 6, 12, 24))]
    table = (
        table.append_column("lot", pa.array(lot))
        .append_column("month", pc.month(when))
        .append_column("weekday", pc.day_of_week(when))
        .append_column("hour", pc.hour(when))
    )
    declared, clock = "policy: declared, a wholesaler of gifts", "public: the calendar"
    abroad = "Germany France EIRE Netherlands Spain Switzerland Belgium Portugal Norway Australia"
    schema = Schema(
        (
            Column("lot", "category", declared, lots),
            Column("UnitPrice", "real", declared, bounds=(0, 20), num_bins=40),
            Column(
                "Country", "category", declared, ("United Kingdom", *abroad.split()), missing=True
            ),
            Column("month", "integer", clock, bounds=(1, 12), num_bins=12),
            Column("weekday", "integer", clock, bounds=(0, 6), num_bins=7),
            Column("hour", "integer", clock, bounds=(6, 20), num_bins=15),
        ),
        target="lot",
    )
    unit = User("CustomerID", max_records=20)
    return _split_by_user("online_retail", schema, encode(table, schema, unit), unit, 1e-5)


def _digits() -> Case:
    """Scikit-learn's digits, 8 x 8 pixels of 17 levels; one user an image."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    schema = Schema(
        (Column("label", "category", "public: ten digits", tuple("0123456789")),),
        ImageColumn("image", (8, 8, 1), "public: the scanner's format"),
        target="label",
    )
    codes = labels[:, None].astype(np.int32)
    return _split("digits", schema, Shard(Records(codes, images), _own_ids(codes)), 1e-5)


_LOADERS: Mapping[str, Callable[[], Case]] = {
    "adult_coded": _adult_coded,
    "adult": _adult,
    "acs_national2019": _acs,
    "smoking": _smoking,
    "nltcs": _nltcs,
    "diabetes130": _diabetes130,
    "online_retail": _online_retail,
    "diabetes130_cut": _diabetes130_cut,
    "digits": _digits,
}
SHIPPED = ("diabetes130_cut", "digits")  # at hand everywhere
TABLES = tuple(name for name in _LOADERS if name not in SHIPPED)


def _own_ids(codes: Any) -> Any:
    """Every record is a user."""
    return np.arange(len(codes)).astype(np.str_)


def _bounded(shard: Shard, unit: PrivacyUnit) -> BoundedShard:
    return bound(shard, unit, seed=0)


def _split(name: str, schema: Schema, shard: Shard, delta: float) -> Case:
    """A fixed fifth of the records to test on; the others are the population."""
    shuffled = np.random.default_rng(0).permutation(len(shard.records))
    held_out = np.zeros(len(shuffled), dtype=np.bool_)
    held_out[shuffled[: round(_HELD_OUT * len(shuffled))]] = True
    train, test = (_part(shard.records, part) for part in (~held_out, held_out))
    kept = Shard(train, shard.user_ids[~held_out])
    return Case(name, schema, _bounded(kept, _RECORD), test, delta)


def _split_by_user(name: str, schema: Schema, shard: Shard, unit: User, delta: float) -> Case:
    """A fixed fifth of the users to test on; the others are the population."""
    held_out = partition_of(shard.user_ids, 5) == 0
    train = Shard(_part(shard.records, ~held_out), shard.user_ids[~held_out])
    return Case(name, schema, _bounded(train, unit), _part(shard.records, held_out), delta)


def _make_cut() -> Any:
    """The example's own script, for its grouping of diagnoses."""
    spec = importlib.util.spec_from_file_location("make_cut", _EXAMPLE / "make_cut.py")
    if spec is None or spec.loader is None:
        raise Missing(f"make_cut.py is not at {_EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _part(records: Records, part: Any) -> Records:
    images = None if records.images is None else records.images[part]
    return Records(records.codes[part], images)


def _file(name: str) -> Path:
    """A shared file."""
    path = folder() / name
    if not path.is_file():
        raise Missing(
            f"{name} is not at {folder()}: left out. Set FEDSYNTH_DATA to the folder above it"
        )
    return path


def _table(name: str) -> pa.Table:
    """A shared table."""
    return pq.read_table(_file(f"{name}.parquet"))
