"""Looking through the table that a classifier gives: counts, filters and thumbnails."""

import io
import os
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from marsclf.data import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.figures import gallery
from marsclf.read import read_rgb

if TYPE_CHECKING:
    import ipywidgets

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


def chooser(table: pd.DataFrame, most_shown: int) -> "ipywidgets.VBox | None":
    """Return menus of class and confidence, and what they choose, the least certain first.

    None where no Jupyter server shows the notebook, as in a batch run: there are no menus.
    """
    if "JPY_SESSION_NAME" not in os.environ:  # which Jupyter servers tell their kernels
        return None
    import ipywidgets

    classes = {"all classes": None} | {name: name for name in counts(table).index}
    predicted = ipywidgets.Dropdown(options=classes, description="Class")
    between = ipywidgets.FloatRangeSlider(
        value=(0, 1), max=1, step=0.01, description="Confidence", continuous_update=False
    )
    rows, images = ipywidgets.HTML(), ipywidgets.Image()

    def show(_: object) -> None:
        chosen = select(table, predicted.value, *between.value)
        shown = chosen.head(most_shown)
        said = f"{len(chosen):,} images chosen, the first {len(shown)} shown"
        rows.value = said if shown.empty else said + shown.to_html()
        drawn = io.BytesIO()
        if not shown.empty:
            thumbnails(shown).savefig(drawn, dpi=100)
        images.value = drawn.getvalue()

    for menu in (predicted, between):
        menu.observe(show, "value")
    show(None)
    return ipywidgets.VBox([ipywidgets.HBox([predicted, between]), rows, images])


def _tile(path: str) -> np.ndarray | None:
    try:
        image = read_rgb(path)
    except MarsclfError:
        return None
    step = max(1, max(image.shape[:2]) // (2 * SIDE))
    return np.ascontiguousarray(image[::step, ::step])
