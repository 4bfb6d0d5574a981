"""The rows that a classifier gives, one an image, and the table of them."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from marsclf.data.msl import CLASS_NAMES
from marsclf.data.product_id import parse_product_id
from marsclf.errors import MarsclfError

DECIMALS = 6  # of a confidence; the engine's own error is about 1e-6


class Row(NamedTuple):
    """What is said of one image; what does not apply is None.

    Attributes:
        path: as it was found (see `shown`), or None for an image from memory.
        predicted: the name of the likeliest class.
        confidence: its calibrated probability, 0 to 1.
        runner_up, runner_up_confidence: the same of the next class.
        uncertain: whether the confidence is beneath the threshold.
        sol, camera: from the file's name, where it is a Curiosity product id.
        error: why the file could not be read.
    """

    path: str | None
    predicted: str | None = None
    confidence: float | None = None
    runner_up: str | None = None
    runner_up_confidence: float | None = None
    uncertain: bool | None = None
    sol: int | None = None
    camera: str | None = None
    error: str | None = None


# The types of the columns, as pandas names them.
COLUMNS = {
    "path": "str",
    "predicted": "str",
    "confidence": "float64",
    "runner_up": "str",
    "runner_up_confidence": "float64",
    "uncertain": "boolean",
    "sol": "Int64",
    "camera": "str",
    "error": "str",
}


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a DataFrame; what does not apply is missing."""
    return pd.DataFrame(list(rows), columns=list(Row._fields)).astype(COLUMNS)


def count(rows: Iterable[Row]) -> Counter:
    """Count the rows: "images", "uncertain", "errors", and each class by its name."""
    counts: Counter = Counter()
    for row in rows:
        counts["images"] += 1
        counts["errors"] += row.error is not None
        counts["uncertain"] += bool(row.uncertain)
        if row.predicted:
            counts[row.predicted] += 1
    return counts


def image_row(path: str | None, probabilities: np.ndarray, threshold: float) -> Row:
    """Return the row of an image with calibrated probabilities (25,)."""
    second, first = np.argsort(probabilities, kind="stable")[-2:]
    # Rounded first, so that a row is uncertain by the number that it shows.
    confidence = round(float(probabilities[first]), DECIMALS)
    return Row(
        path and shown(path),
        CLASS_NAMES[first],
        confidence,
        CLASS_NAMES[second],
        round(float(probabilities[second]), DECIMALS),
        confidence < threshold,
        *sol_and_camera(path),
    )


def error_row(path: str | None, error: str) -> Row:
    """Return the row of a file that could not be read."""
    sol, camera = sol_and_camera(path)
    return Row(path and shown(path), sol=sol, camera=camera, error=shown(error))


def shown(text: str) -> str:
    r"""Return a path, or a message with one, as every program can read it.

    Bytes that are not UTF-8 become backslashes and codes, \udce9 for the byte e9; so do carriage
    returns, \r, which programs take for line breaks or drop.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")


def check_threshold(threshold: float) -> None:
    """Raise MarsclfError for a threshold that is no confidence."""
    if not 0 <= threshold <= 1:
        raise MarsclfError(f"The threshold is {threshold}; a confidence lies between 0 and 1.")


def sol_and_camera(path: str | None) -> tuple[int | None, str | None]:
    """Return sol and camera (ML, MR, MH) of a file named after a Curiosity product, or two None."""
    try:
        product = parse_product_id(f"{Path(path or '').stem.upper()}.JPG")
    except MarsclfError:
        return None, None
    return product.sol, product.camera
