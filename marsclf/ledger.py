"""The ledger: one line for every time that predictions of the real test split were scored.

It is written by the run itself, good result or bad, so that nobody has to take on trust how often
the test split was looked at. Lines are only ever added.
"""

import csv
import json
from datetime import UTC, datetime
from pathlib import Path

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import sha256_of

NAME = "test_ledger.csv"
COLUMNS = ("time", "commit", "preset", "seed", "settings", "predictions_sha256")
FIGURES = ("accuracy", "macro_f1", "ece")


def append(result: dict, predictions: Path) -> None:
    """Add the test figures of a run's metrics and the SHA-256 of its predictions file.

    Raises MarsclfError where the ledger cannot be written: a score that is not written down must
    not be seen.
    """
    row = [
        datetime.now(UTC).isoformat(timespec="seconds"),
        result["commit"],
        result["preset"],
        result["seed"],
        json.dumps(result["settings"]),
        sha256_of(predictions.read_bytes()),
        *(result["splits"]["test"][figure] for figure in FIGURES),
    ]
    path = paths.RESULTS / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([row] if begun else [(*COLUMNS, *FIGURES), row])
    except OSError as error:
        raise MarsclfError(
            f"The score cannot be entered in {path} ({error.strerror}); make it writable."
        ) from error


def scored() -> set[str]:
    """Return the SHA-256 of every predictions file that the ledger holds."""
    path = paths.RESULTS / NAME
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {row["predictions_sha256"] for row in csv.DictReader(file)}
