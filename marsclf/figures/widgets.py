"""Controls in JupyterLab: figures and tables that answer to them, and are plain elsewhere."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import ipywidgets
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import product_ids
from marsclf.figures.results import gallery, png_of, save_figure
from marsclf.images.decode import read_rgb

COLUMNS = 6
MOST_TILES = 24
SIDE = 300  # pixels of a tile; the images may be large
PAGE_WIDTH = 900  # pixels
Choice = TypeVar("Choice")


def explore(
    draw: Callable[[Choice], Figure],
    choices: Mapping[str, Choice],
    label: str,
    folder: Path,
    name: str,
    sample: bool,
    start: str | None = None,
) -> None:
    """Show the figure of one choice, and in JupyterLab a control that draws the others.

    Numbers get a slider, all else a menu. A notebook that nobody looks on at, as papermill runs
    it, shows and stores the plain figure: a control would be dead there.

    Args:
        draw: makes the figure of a choice.
        choices: by the words that the control shows.
        label: what the control is called.
        folder, name, sample: as of `figures.save_figure`.
        start: the words of the choice that is saved and shown first; None is the first.
    """
    start = start or next(iter(choices))
    path = save_figure(draw(choices[start]), folder, name, sample)
    if not _someone_looks_on():
        display(Image(path, width=PAGE_WIDTH))
        return
    numbers = all(isinstance(choice, int | float) for choice in choices.values())
    kind = ipywidgets.SelectionSlider if numbers else ipywidgets.Dropdown
    slow = {"continuous_update": False} if numbers else {}  # drawn once, when the slider rests
    width = ipywidgets.Layout(width="500px")
    control = kind(options=list(choices), value=start, description=label, layout=width, **slow)
    picture = ipywidgets.Image(value=path.read_bytes(), format="png", width=PAGE_WIDTH)

    def redraw(change: dict) -> None:
        picture.value = png_of(draw(choices[change["new"]]), sample)

    control.observe(redraw, "value")
    display(ipywidgets.VBox([control, picture]))


def chooser(table: pd.DataFrame, most_shown: int) -> ipywidgets.VBox | None:
    """Return menus of class and confidence, and what they choose, the least certain first.

    None where nobody looks on, as in a batch run. `table` is what a classifier's `predict` gives.
    """
    if not _someone_looks_on():
        return None
    classes = {"all classes": None} | {name: name for name in counts(table).index}
    predicted = ipywidgets.Dropdown(options=classes, description="Class")
    between = ipywidgets.FloatRangeSlider(
        value=(0, 1), max=1, step=0.01, description="Confidence", continuous_update=False
    )
    rows, images = ipywidgets.HTML(), ipywidgets.Image(width=PAGE_WIDTH)

    def show(_: object) -> None:
        chosen = select(table, predicted.value, *between.value)
        shown = chosen.head(most_shown)
        said = f"{len(chosen):,} images chosen, the first {len(shown)} shown"
        rows.value = said if shown.empty else said + shown.to_html()
        images.value = b"" if shown.empty else png_of(thumbnails(shown), sample=False)

    for menu in (predicted, between):
        menu.observe(show, "value")
    show(None)
    return ipywidgets.VBox([ipywidgets.HBox([predicted, between]), rows, images])


def _someone_looks_on() -> bool:
    """Tell whether Jupyter's server started this kernel, which then knows its notebook's name."""
    return "JPY_SESSION_NAME" in os.environ


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
    sols = product_ids(shown)["sol"]
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
