"""Looking through what a classifier says: counts, filters, thumbnails, and mistakes by class."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from marsclf import metrics
from marsclf.data import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.figures import gallery
from marsclf.read import read_rgb

COLUMNS = 6
MOST_TILES = 24
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


def mistaken_pairs(predictions: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Return every true class and the class it was taken for, the commonest first.

    By words such as "ground → horizon (59)", with the number of images.
    """
    table = metrics.commonest_confusions(predictions, limit=None)
    columns = zip(table["true"], table["predicted"], table["count"], strict=True)
    return {f"{true} → {said} ({images})": (true, said) for true, said, images in columns}


def mistakes(predictions: pd.DataFrame, root: Path, pair: tuple[str, str]) -> Figure:
    """Lay out the images of a true class that were taken for another, the surest first.

    At most MOST_TILES of them. The paths of `predictions` count from `root`.
    """
    true, said = (CLASS_NAMES.index(name) for name in pair)
    rows = predictions[(predictions["label"] == true) & (predictions["predicted"] == said)]
    shown = rows.sort_values("confidence", ascending=False, kind="stable").head(MOST_TILES)
    sols = metrics.product_ids(shown)["sol"]
    titles = [f"sol {sol}, {sure:.2f}" for sol, sure in zip(sols, shown["confidence"], strict=True)]
    title = f"{pair[0]}, taken for {pair[1]}: {len(shown)} of {len(rows)} images"
    return gallery([_tile(root / path) for path in shown["path"]], titles, COLUMNS, title)


def _tile(path: str | Path) -> np.ndarray | None:
    try:
        image = read_rgb(path)
    except MarsclfError:
        return None
    step = max(1, max(image.shape[:2]) // (2 * SIDE))
    return np.ascontiguousarray(image[::step, ::step])
