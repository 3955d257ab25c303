# SPDX-License-Identifier: Apache-2.0
"""Cut the example's two files out of all speeches of Shakespeare's plays, by role.

Run once, by whoever maintains the example; the files it writes are committed:

    python examples/shakespeare/make_cut.py PATH/TO/shakespeare_roles.jsonl.gz

`speeches.parquet` holds speeches of 500 roles, `holdout.parquet` those of 100 others, who take part
in no run and only judge what came out. Of a role up to four speeches of five words or more are
kept, of a speech the first thirty words on one line.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROLES, NUM_HELD_OUT = 500, 100
MOST_SPEECHES, FEWEST_WORDS, MOST_WORDS = 4, 5, 30


def main(source: Path) -> None:
    """Write both files next to this one."""
    speeches: dict[str, list[str]] = {}
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            words = row["text"].split()
            if len(words) >= FEWEST_WORDS:
                speeches.setdefault(row["user"], []).append(" ".join(words[:MOST_WORDS]))
    rng = np.random.default_rng(0)
    roles = rng.permutation(sorted(speeches)).tolist()
    parts = {
        "speeches.parquet": roles[:NUM_ROLES],
        "holdout.parquet": roles[NUM_ROLES : NUM_ROLES + NUM_HELD_OUT],
    }
    for name, chosen in parts.items():
        kept = [(role, text) for role in chosen for text in speeches[role][:MOST_SPEECHES]]
        table = pa.table({"role": [r for r, _ in kept], "speech": [t for _, t in kept]})
        path = Path(__file__).with_name(name)
        pq.write_table(table, path, compression="zstd")
        size = path.stat().st_size
        print(f"{name}: {len(kept):,} speeches, {len(chosen):,} roles, {size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
