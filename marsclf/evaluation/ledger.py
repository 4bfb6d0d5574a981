"""The ledger: one line for every time that predictions of the real test split were scored.

It is written by the run itself, good result or bad, so that nobody has to take on trust how often
the test split was looked at. Lines are only ever added.
"""

import csv
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import sha256_of

NAME = "test_ledger.csv"
SELECTION = "selection.csv"  # what recipes did in validation; nothing of test
FIGURES = ("accuracy", "macro_f1", "ece")


def append(result: dict, predictions: Path) -> None:
    """Add the test figures of a run's metrics and the SHA-256 of its predictions file.

    Raises MarsclfError where the ledger cannot be written: a score that is not written down must
    not be seen.
    """
    about = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: result[name] for name in ("commit", "preset", "seed")},
        "settings": json.dumps(result["settings"]),
        "predictions_sha256": digest_of(predictions),
    }
    test = result["splits"]["test"]
    figures = {figure: test[figure] for figure in FIGURES}
    figures |= {"burst_accuracy": test["burst"]["accuracy"], "recipe": recipe_digest(result)}
    append_row(paths.RESULTS / NAME, about | figures)


def digest_of(predictions: Path) -> str:
    """Return the SHA-256 of a predictions file, unpacked where its name ends with .gz."""
    content = predictions.read_bytes()
    return sha256_of(gzip.decompress(content) if predictions.suffix == ".gz" else content)


def recipe_digest(result: dict) -> str:
    """Return 16 hexadecimal digits for a run's parameters but its seed."""
    parameters = {name: value for name, value in result["parameters"].items() if name != "seed"}
    return sha256_of(json.dumps(parameters, sort_keys=True).encode())[:16]


def seeds(result: dict) -> dict[str, dict[str, float]]:
    """Return the test figures of each seed that a run's recipe was scored with.

    Of its own seed they are the run's, of others those scored last.
    """
    names, test = (*FIGURES, "burst_accuracy"), result["splits"]["test"]
    found = {
        row["seed"]: {name: float(row[name]) for name in names}
        for row in rows()
        if row["recipe"] == recipe_digest(result)
    }
    own = {figure: test[figure] for figure in FIGURES}
    return found | {str(result["seed"]): own | {"burst_accuracy": test["burst"]["accuracy"]}}


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add a line to a CSV file, with a header if it is the first; or raise MarsclfError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not begun:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise MarsclfError(
            f"The score cannot be entered in {path} ({error.strerror}); make it writable."
        ) from error


def rows(path: Path | None = None) -> list[dict[str, str]]:
    """Return the lines of the ledger, or of a copy of it at `path`, oldest first."""
    path = path or paths.RESULTS / NAME
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scored() -> set[str]:
    """Return the SHA-256 of every predictions file that the ledger holds."""
    return {row["predictions_sha256"] for row in rows()}
