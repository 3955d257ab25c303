# SPDX-License-Identifier: Apache-2.0
"""Cut the example's two files out of the whole "Diabetes 130-US hospitals" table.

Run once, by whoever maintains the example; the files it writes are committed:

    python examples/diabetes130/make_cut.py PATH/TO/diabetes130.parquet

`encounters.parquet` holds all encounters of 30,000 patients, `holdout.parquet` those of 5,000
others, who take part in no run and only judge what came out. Values are kept as they are, `?`
(missing) included; the one derived column, `diagnosis`, is the grouping of the first ICD-9 code
that Strack et al. (2014) publish in their Table 2.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

USER = "patient_nbr"
COLUMNS = (
    "race",
    "gender",
    "age",
    "admission_type_id",
    "time_in_hospital",
    "num_lab_procedures",
    "num_procedures",
    "num_medications",
    "number_inpatient",
    "number_diagnoses",
    "A1Cresult",
    "metformin",
    "insulin",
    "change",
    "readmitted",
)
NUM_PATIENTS, NUM_HELD_OUT = 30_000, 5_000

# Strack et al. (2014), "Impact of HbA1c Measurement on Hospital Readmission Rates", Table 2.
_CHAPTERS = (
    ("circulatory", ((390, 459), (785, 785))),
    ("respiratory", ((460, 519), (786, 786))),
    ("digestive", ((520, 579), (787, 787))),
    ("injury", ((800, 999),)),
    ("musculoskeletal", ((710, 739),)),
    ("genitourinary", ((580, 629), (788, 788))),
    ("neoplasms", ((140, 239),)),
    ("diabetes", ((250, 250),)),
)


def diagnosis(code: str) -> str:
    """Group of an ICD-9 code; `?` stays missing."""
    if code == "?":
        return "?"
    if code[0] in "EV":
        return "other"
    number = int(float(code))
    for name, ranges in _CHAPTERS:
        if any(low <= number <= high for low, high in ranges):
            return name
    return "other"


def main(source: Path) -> None:
    """Write both files next to this one."""
    table = pq.read_table(source)
    groups = pa.array([diagnosis(code) for code in table["diag_1"].to_pylist()])
    table = table.select([USER, *COLUMNS]).add_column(9, "diagnosis", groups)
    patients = np.sort(pc.unique(table[USER]).to_numpy(zero_copy_only=False))
    shuffled = np.random.default_rng(0).permutation(patients)
    parts = {
        "encounters.parquet": shuffled[:NUM_PATIENTS],
        "holdout.parquet": shuffled[NUM_PATIENTS : NUM_PATIENTS + NUM_HELD_OUT],
    }
    for name, chosen in parts.items():
        cut = table.filter(pc.is_in(table[USER], value_set=pa.array(chosen, pa.string())))
        path = Path(__file__).with_name(name)
        pq.write_table(cut.replace_schema_metadata(None), path, compression="zstd")
        size = path.stat().st_size
        print(f"{name}: {len(cut):,} encounters, {len(chosen):,} patients, {size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
