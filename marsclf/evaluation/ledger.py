"""The ledger: one line for every set of test predictions that was scored, good or bad.

`score` writes the line before it returns any figure. Lines are only ever added.
"""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from marsclf import paths
from marsclf.data.msl import PUBLISHED
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import read_predictions, run_record
from marsclf.files import sha256_of

NAME = "test_ledger.csv"
FIGURES = ("accuracy", "macro_f1", "ece")


def score(predictions_file: Path) -> dict[str, dict]:
    """Return `metrics.measure` of a predictions file, and enter the file in the ledger first.

    A line is added if the JSON beside the file names a published data set, the file has a test
    split, and no line has its digest and recipe yet. Raises MarsclfError for a faulty predictions
    file, and if the ledger cannot be read or written.
    """
    splits = metrics.measure(read_predictions(predictions_file))
    record, digest = run_record(predictions_file), digest_of(predictions_file)
    is_published = record.get("dataset") in PUBLISHED and "test" in splits
    known = [(row["predictions_sha256"], row["recipe"]) for row in rows()]
    if not is_published or (digest, recipe_digest(record)) in known:
        return splits
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    row |= {name: record[name] for name in ("commit", "preset", "seed")}
    row |= {"settings": json.dumps(record["settings"]), "predictions_sha256": digest}
    row |= figures(splits["test"]) | {"recipe": recipe_digest(record)}
    append_row(paths.RESULTS / NAME, row | {"dataset": record["dataset"]})
    return splits


def digest_of(predictions_file: Path) -> str:
    """Return the SHA-256 of a predictions file, uncompressed if its name ends with .gz."""
    content = predictions_file.read_bytes()
    return sha256_of(gzip.decompress(content) if predictions_file.suffix == ".gz" else content)


def recipe_digest(record: dict) -> str:
    """Return 16 hexadecimal digits that identify a run's parameters, ignoring the seed."""
    parameters = {name: value for name, value in record["parameters"].items() if name != "seed"}
    return sha256_of(json.dumps(parameters, sort_keys=True).encode())[:16]


def figures(test: dict) -> dict[str, float]:
    """Return those of the metrics of a test split that a line has."""
    return {name: test[name] for name in FIGURES} | {"burst_accuracy": test["burst"]["accuracy"]}


def append_row(path: Path, row: dict[str, object]) -> None:
    """Append a row to a CSV file, after a header if it is new; raise MarsclfError if impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"mode": "a", "header": not path.exists(), "lineterminator": "\n"}
        pd.DataFrame([row]).to_csv(path, index=False, **options)
    except OSError as error:
        reason = f"The score cannot be entered in {path} ({error.strerror})"
        raise MarsclfError(f"{reason}; make it writable.") from error


def rows(path: Path | None = None) -> list[dict[str, str]]:
    """Return the lines of the ledger, or of a copy of it at `path`, oldest first."""
    path = path or paths.RESULTS / NAME
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise MarsclfError(f"{path} cannot be read: {error}.") from error
