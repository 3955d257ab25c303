# SPDX-License-Identifier: Apache-2.0
"""Write synthetic records to one file, in the format that its ending names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".csv", ".jsonl")


def check_ending(path: Path) -> None:
    """Refuse a file whose ending names no format, before anything is drawn.

    Raises:
      ConfigError: It names none.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path}: the ending must be one of {', '.join(ENDINGS)}")


def write_table(table: "pa.Table", path: Path) -> None:
    """A table as a file, which must not be there yet.

    Raises:
      ConfigError: The file is there, or its ending names no format.
      DataError: It cannot be written, or the format cannot hold the table.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    check_ending(path)
    try:
        with path.open("xb") as file:
            match path.suffix:
                case ".parquet":
                    parquet.write_table(table, file)
                case ".csv":
                    csv.write_csv(table, file)
                case _:
                    for batch in table.to_batches(max_chunksize=10_000):
                        rows = (_json_line(record) for record in batch.to_pylist())
                        file.write("".join(rows).encode())
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already; name another file") from error
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    except pa.ArrowInvalid as error:
        path.unlink(missing_ok=True)
        raise DataError(f"{path.suffix} cannot hold images; write a .parquet file") from error


def _json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, dates as ISO 8601 text."""
    return json.dumps(record, ensure_ascii=False, default=lambda moment: moment.isoformat()) + "\n"
