"""The predictions file: its columns, and how it is written and read.

A CSV (or .csv.gz) with the columns split, path, label, predicted, confidence, p_00 ... p_24, one
row per image. Probabilities have four significant digits.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf.data.msl import NUM_CLASSES, SPLITS
from marsclf.data.product_id import Product, parse_product_id
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

PROBABILITY_COLUMNS = [f"p_{label:02d}" for label in range(NUM_CLASSES)]
COLUMNS = ["split", "path", "label", "predicted", "confidence", *PROBABILITY_COLUMNS]


def as_predictions(index_rows: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Return predictions for `index_rows` (split, path, label) and `probabilities` (n, 25).

    Predicted class and confidence are those of the rounded probabilities.
    """
    rounded = np.char.mod("%.4g", probabilities).astype(np.float64)
    table = index_rows[["split", "path", "label"]].reset_index(drop=True)
    table = table.assign(predicted=rounded.argmax(axis=1), confidence=rounded.max(axis=1))
    return table.join(pd.DataFrame(rounded, columns=PROBABILITY_COLUMNS))


def write_predictions(path: Path, index_rows: pd.DataFrame, probabilities: np.ndarray) -> None:
    """Write `as_predictions` of the arguments as CSV, gzipped if the name ends with .gz."""
    table = as_predictions(index_rows, probabilities)
    with replace_atomically(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g", lineterminator="\n")


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a predictions file; raise MarsclfError, with the line, for the first fault."""
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise MarsclfError(f"There is no predictions file {path}: call `make run`.") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise MarsclfError(f"{path} cannot be read as a CSV file: {error}.") from error
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise MarsclfError(f"{path} lacks the columns {', '.join(missing)}.")
    if table.empty:
        raise MarsclfError(f"{path} holds no predictions.")
    numbers = table[COLUMNS[2:]].apply(pd.to_numeric, errors="coerce")
    probabilities = numbers[PROBABILITY_COLUMNS].to_numpy(dtype=np.float64)
    # Rounding 25 probabilities to four digits leaves their sum within 0.0005 of 1.
    sums_to_1 = np.abs(probabilities.sum(axis=1) - 1) <= 0.002
    highest = probabilities.argmax(axis=1), probabilities.max(axis=1)
    matches = (numbers["predicted"] == highest[0]) & (numbers["confidence"] == highest[1])
    faults = {
        "the split is not train, val or test": ~table["split"].isin(SPLITS),
        "the path is missing": table["path"].isna(),
        "a number is missing or is not a number": numbers.isna().any(axis=1),
        "the label is not a class id from 0 to 24": ~numbers["label"].isin(range(NUM_CLASSES)),
        "the probabilities are not in 0 to 1": (probabilities < 0).any(axis=1),
        "the sum of the probabilities is not 1": ~sums_to_1,
        "predicted and confidence do not match the highest probability": ~matches,
    }
    for fault, rows in faults.items():
        if rows.any():
            raise MarsclfError(f"{path}, line {int(np.argmax(rows)) + 2}: {fault}.")
    return table[COLUMNS].astype({"label": int, "predicted": int})


def run_record(predictions_file: Path) -> dict:
    """Return training.json, else metrics.json, beside a predictions file; {} without either."""
    for path in map(predictions_file.with_name, ("training.json", "metrics.json")):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            raise MarsclfError(f"{path} cannot be read as a run's record: {error}.") from error
    return {}


def product_ids(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return sol, camera, sequence, ... from the path of every row, in the same order."""
    products = [parse_product_id(path) for path in predictions["path"]]
    return pd.DataFrame(products, predictions.index, Product._fields)
