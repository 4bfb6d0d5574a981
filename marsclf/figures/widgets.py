"""Notebook controls: interactive in JupyterLab, plain figures and tables in a papermill run."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from marsclf.errors import MarsclfError
from marsclf.figures.results import gallery, png_of, save_figure, tile

COLUMNS, MAX_TILES, PAGE_WIDTH = 6, 24, 900  # width in pixels
WIDE = {"width": "500px"}  # a slider's layout


def explore(draw: Callable[[Any], Figure], choices: Sequence, start: Any, **saved: Any) -> None:
    """Save and show the figure of one choice; in JupyterLab a control shows those of the others.

    `draw` returns the figure of a choice, and `start` is the one that is saved. `choices` are the
    lowest, the highest and the step of a slider as a tuple, or a list of texts and choices for a
    menu. `saved` are the arguments of `save_figure`: folder, name, and dataset.
    """
    path = save_figure(draw(start), **saved)
    if not _in_jupyterlab():
        display(Image(path, width=PAGE_WIDTH))
        return

    def show(choice: Any = start) -> None:
        display(Image(png_of(draw(choice), saved["dataset"]), width=PAGE_WIDTH))

    interactive = ipywidgets.interactive(show, choice=choices)
    interactive.children[0].layout = WIDE
    interactive.children[0].continuous_update = False  # a slider draws when it is released
    display(interactive)


def chooser(
    table: pd.DataFrame, most_shown: int, dataset: str = ""
) -> ipywidgets.interactive | None:
    """Return controls that filter `predict`'s table, in JupyterLab only; `dataset`: see png_of."""
    if not _in_jupyterlab():
        return None

    def show(predicted: str | None, confidence: tuple, familiarity: bool | None) -> None:
        chosen = select(table, predicted, *confidence, familiarity)
        shown = chosen.head(most_shown)
        print(f"{len(chosen):,} images chosen, the first {len(shown)} shown")
        if len(shown):
            display(Image(png_of(thumbnails(shown), dataset), width=PAGE_WIDTH), styled(shown))

    found = table["predicted"].value_counts().index
    classes = [("all classes", None), *zip(found, found, strict=True)]
    options = {"max": 1, "step": 0.01, "continuous_update": False, "layout": WIDE}
    between = ipywidgets.FloatRangeSlider(value=(0, 1), **options)
    flags = [("all images", None), ("familiar", False), ("unfamiliar", True)]
    return ipywidgets.interactive(show, predicted=classes, confidence=between, familiarity=flags)


def _in_jupyterlab() -> bool:
    """Tell whether a Jupyter server started this kernel; a papermill run has none."""
    return "JPY_SESSION_NAME" in os.environ


def styled(rows: pd.DataFrame) -> Styler:
    """Return rows of a table of `predict` as a page shows them: file names, and what fits."""
    shown = rows.assign(path=rows["path"].map(os.path.basename)).dropna(axis=1, how="all")
    shown = shown.drop(columns=["runner_up_confidence", "familiarity"], errors="ignore")
    return shown.rename(columns={"path": "file"}).style.hide().format(precision=2, na_rep="–")


def select(
    table: pd.DataFrame,
    predicted: str | None = None,
    least: float = 0.0,
    most: float = 1.0,
    unfamiliar: bool | None = None,
) -> pd.DataFrame:
    """Return rows by class and flag (None: any), surest last; MarsclfError if no row has it."""
    found = table["predicted"].dropna().unique()
    if predicted not in (None, *found):
        raise MarsclfError(f"No image is of class {predicted!r}: choose one of {', '.join(found)}.")
    chosen = table["confidence"].between(least, most)
    if predicted is not None:
        chosen &= table["predicted"] == predicted
    if unfamiliar is not None:
        chosen &= (table["unfamiliar"] == unfamiliar).fillna(False)
    return table[chosen].sort_values("confidence", kind="stable")


def thumbnails(rows: pd.DataFrame) -> Figure:
    """Lay out the images of a table's rows; raise MarsclfError if there are no rows."""
    if rows.empty:
        raise MarsclfError("No image is selected: choose another class or a wider range.")
    titles = [f"{row.predicted}\n{row.confidence:.2f}" for row in rows.itertuples()]
    return gallery([tile(path) for path in rows["path"]], titles, COLUMNS, "Selected images")


def mistakes(
    predictions: pd.DataFrame, root: Path, pair: tuple[int, int], classes: Sequence[str]
) -> Figure:
    """Lay out up to 24 images below `root` of one class id predicted as another, surest first.

    Every group (sol) has its turn before any shows a second image.
    """
    label, predicted = pair
    rows = predictions.query("label == @label and predicted == @predicted")
    shown = rows.sort_values("confidence", ascending=False, kind="stable")
    turns = shown.groupby("group").cumcount().sort_values(kind="stable")
    shown = shown.loc[turns.index].head(MAX_TILES)
    titles = shown["confidence"].map("{:.2f}".format)
    if "sol" in shown:
        titles = "sol " + shown["sol"].astype(str) + ", " + titles
    names = f"{classes[label]} predicted as {classes[predicted]}"
    title = f"{names}: {len(shown)} of {len(rows)} images"
    return gallery([tile(root / path) for path in shown["path"]], [*titles], COLUMNS, title)
