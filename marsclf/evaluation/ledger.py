"""The ledger: one line for every set of test predictions that was scored, good or bad.

`score` writes the line before it returns any figure, so the ledger shows how often the test split
was looked at. Lines are only ever added.
"""

import csv
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import read_predictions, run_record
from marsclf.files import sha256_of

NAME = "test_ledger.csv"
SELECTION = "selection.csv"  # validation results of recipes; holds no test figures
FIGURES = ("accuracy", "macro_f1", "ece")


def score(predictions_file: Path) -> dict[str, dict]:
    """Return `metrics.measure` of a predictions file, and enter the file in the ledger first.

    A line is added where the JSON beside the file says that the data set is "msl-v1" and no line
    has the file's digest yet, so scoring a file again adds nothing.

    Raises:
        MarsclfError: for a faulty predictions file, for a JSON that lacks what the line needs, and
            where the ledger cannot be written.
    """
    splits = metrics.measure(read_predictions(predictions_file))
    record, digest = run_record(predictions_file), digest_of(predictions_file)
    if record.get("dataset") != "msl-v1" or digest in scored():
        return splits
    missing = {"commit", "preset", "seed", "settings", "parameters"} - record.keys()
    if missing:
        raise MarsclfError(
            f"{predictions_file} cannot be scored: the JSON file beside it lacks "
            f"{', '.join(sorted(missing))}; run notebook 02 again."
        )
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: record[name] for name in ("commit", "preset", "seed")},
        "settings": json.dumps(record["settings"]),
        "predictions_sha256": digest,
        **_figures(splits["test"]),
        "recipe": recipe_digest(record),
    }
    append_row(paths.RESULTS / NAME, row)
    return splits


def digest_of(predictions_file: Path) -> str:
    """Return the SHA-256 of a predictions file, uncompressed if its name ends with .gz."""
    content = predictions_file.read_bytes()
    return sha256_of(gzip.decompress(content) if predictions_file.suffix == ".gz" else content)


def recipe_digest(record: dict) -> str:
    """Return 16 hexadecimal digits that identify a run's parameters, ignoring the seed."""
    parameters = {name: value for name, value in record["parameters"].items() if name != "seed"}
    return sha256_of(json.dumps(parameters, sort_keys=True).encode())[:16]


def seeds(result: dict) -> dict[str, dict[str, float]]:
    """Return the test figures of every seed that the recipe of a run's metrics was scored with.

    The figures of the run's own seed are the run's; those of another seed are from its last line.
    """
    found = {
        row["seed"]: {name: float(row[name]) for name in (*FIGURES, "burst_accuracy")}
        for row in rows()
        if row["recipe"] == recipe_digest(result)
    }
    return found | {str(result["seed"]): _figures(result["splits"]["test"])}


def _figures(test: dict) -> dict[str, float]:
    """Return the figures of the test split that a line holds."""
    figures = {name: test[name] for name in FIGURES}
    return figures | {"burst_accuracy": test["burst"]["accuracy"]}


def append_row(path: Path, row: dict[str, object]) -> None:
    """Append a row to a CSV file, after a header if the file is new; raise MarsclfError if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_new:
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
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise MarsclfError(f"{path} cannot be read: {error}.") from error


def scored() -> set[str]:
    """Return the SHA-256 of every predictions file in the ledger."""
    return {row["predictions_sha256"] for row in rows()}
