"""The output of `predict`: one row per image, and the files that hold the rows.

To add or change an output column, edit `Row` and `Classifier._row`; all else follows from `Row`.
"""

import csv
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow
from pyarrow import parquet

from marsclf.errors import MarsclfError

DECIMALS = 6  # of a confidence; the engine's own error is about 1e-6
FAMILIAR = 0.5  # the least familiarity that is not flagged, see training.familiarity


class Row(NamedTuple):
    """The prediction for one image; values that do not apply are None."""

    path: str | None  # as `printable` returns it; None for an array
    predicted: str | None = None  # name of the most likely class
    confidence: float | None = None  # its calibrated probability, 0 to 1
    runner_up: str | None = None  # name of the second most likely class
    runner_up_confidence: float | None = None
    uncertain: bool | None = None  # whether the confidence is below the threshold
    familiarity: float | None = None  # 0 to 1, if the classifier has learned it
    unfamiliar: bool | None = None  # whether it is below 0.5: perhaps none of the classes fits
    sol: int | None = None  # Martian day, if the file name is a Curiosity product id
    camera: str | None = None  # ML, MR or MH, likewise
    error: str | None = None  # why the file could not be read


_DTYPES = {str | None: "str", float | None: "float64", bool | None: "boolean", int | None: "Int64"}
ROWS_PER_GROUP = 10_000  # of a Parquet file, in memory at once
# The columns and their pandas types.
COLUMNS = {name: _DTYPES[kind] for name, kind in Row.__annotations__.items()}
_SCHEMA = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a DataFrame with the types of COLUMNS."""
    return pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS)


def kind(row: Row) -> tuple[str | None, bool | None, bool | None]:
    """Return the predicted class, `uncertain` and `unfamiliar`; all None with an error."""
    return row.predicted, row.uncertain, row.unfamiliar


def printable(text: str) -> str:
    r"""Return a path, or a message that contains one, as text that every program can read.

    Bytes that are not UTF-8 become escapes (\udce9 for the byte e9), and so do carriage returns
    (\r), which some programs take for line breaks.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")


def check_threshold(threshold: float) -> None:
    """Raise MarsclfError for a threshold outside 0 to 1."""
    if not 0 <= threshold <= 1:
        raise MarsclfError(f"The threshold is {threshold}; it must be between 0 and 1.")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a Parquet file."""
    records = (row._asdict() for row in rows)
    with parquet.ParquetWriter(path, _SCHEMA) as writer:
        while group := list(islice(records, ROWS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, _SCHEMA))


WRITERS = {".csv": write_csv, ".parquet": write_parquet}
