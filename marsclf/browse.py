"""Looking through the table that a classifier gives: counts, filters and thumbnails."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from marsclf.data import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.figures import gallery
from marsclf.read import read_rgb

COLUMNS = 6
SIDE = 300  # pixels of a tile; the images may be large


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each class its images, its uncertain ones, and its median confidence.

    Classes that were not predicted are left out; the commonest comes first.
    """
    groups = table.dropna(subset="predicted").groupby("predicted")
    return groups.agg(
        images=("path", "size"),
        uncertain=("uncertain", "sum"),
        median_confidence=("confidence", "median"),
    ).sort_values("images", ascending=False, kind="stable")


def select(
    table: pd.DataFrame, predicted: str | None = None, least: float = 0.0, most: float = 1.0
) -> pd.DataFrame:
    """Return the rows of one class (None: of all) with a confidence between two, rising.

    Raises MarsclfError for a name that is no class.
    """
    if predicted is not None and predicted not in CLASS_NAMES:
        raise MarsclfError(
            f"There is no class {predicted!r}; the classes are {', '.join(CLASS_NAMES)}."
        )
    chosen = table[table["confidence"].between(least, most)]
    if predicted is not None:
        chosen = chosen[chosen["predicted"] == predicted]
    return chosen.sort_values("confidence", kind="stable")


def thumbnails(rows: pd.DataFrame) -> Figure:
    """Lay out the images of a table's rows, each under its class and confidence.

    Raises MarsclfError where there is no row. A file that is gone leaves its tile empty.
    """
    if rows.empty:
        raise MarsclfError("No image is chosen: ask for another class or wider confidences.")
    titles = [f"{row.predicted}\n{row.confidence:.2f}" for row in rows.itertuples()]
    return gallery([_tile(path) for path in rows["path"]], titles, COLUMNS, "Images chosen")


def _tile(path: str) -> np.ndarray | None:
    try:
        image = read_rgb(path)
    except MarsclfError:
        return None
    step = max(1, max(image.shape[:2]) // (2 * SIDE))
    return np.ascontiguousarray(image[::step, ::step])
