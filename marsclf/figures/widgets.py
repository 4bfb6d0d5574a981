"""Notebook controls: interactive in JupyterLab, plain figures and tables in a papermill run."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.figures.results import gallery, png_of, save_figure, tile

COLUMNS, MAX_TILES, PAGE_WIDTH = 6, 24, 900  # width in pixels
WIDE = {"width": "500px"}


def explore(
    draw: Callable[[Any], Figure], choices: Mapping[str, Any], label: str, start: str, **saved: Any
) -> None:
    """Save and show the figure of one choice; in JupyterLab add a control that shows the others.

    `draw` returns the figure of a choice. The control is a slider if all choices are numbers, else
    a menu; `label` and the keys of `choices` are its texts. `start` is the key of the choice that
    is saved; `saved` are the arguments of `save_figure`: folder, name, and dataset.
    """
    path = save_figure(draw(choices[start]), **saved)
    if not _in_jupyterlab():
        display(Image(path, width=PAGE_WIDTH))
        return
    options = {"options": [*choices], "value": start, "description": label, "layout": WIDE}
    if all(isinstance(choice, int | float) for choice in choices.values()):
        control = ipywidgets.SelectionSlider(**options, continuous_update=False)
    else:
        control = ipywidgets.Dropdown(**options)

    def show(text: str) -> None:
        display(Image(png_of(draw(choices[text]), saved["dataset"]), width=PAGE_WIDTH))

    display(ipywidgets.interactive(show, text=control))


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

    classes = [("all classes", None), *((name, name) for name in counts(table).index)]
    options = {"value": (0, 1), "max": 1, "step": 0.01, "layout": WIDE}
    between = ipywidgets.FloatRangeSlider(**options, continuous_update=False)
    menu = ipywidgets.Dropdown(options=classes, description="class")
    flags = [("all images", None), ("familiar", False), ("unfamiliar", True)]
    return ipywidgets.interactive(show, predicted=menu, confidence=between, familiarity=flags)


def _in_jupyterlab() -> bool:
    """Tell whether a Jupyter server started this kernel; a papermill run has none."""
    return "JPY_SESSION_NAME" in os.environ


def styled(rows: pd.DataFrame) -> Styler:
    """Return rows of a table of `predict` as a page shows them: file names, and what fits."""
    shown = rows.assign(path=rows["path"].map(os.path.basename)).dropna(axis=1, how="all")
    shown = shown.drop(columns=["runner_up_confidence", "familiarity"], errors="ignore")
    return shown.rename(columns={"path": "file"}).style.hide().format(precision=2, na_rep="–")


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each predicted class, the commonest first, its images, flags and confidence."""
    classes = table.groupby("predicted")
    counted = pd.DataFrame({"images": classes.size(), "uncertain": classes["uncertain"].sum()})
    counted["unfamiliar"] = classes["unfamiliar"].sum(min_count=1)
    counted["median_confidence"] = classes["confidence"].median()
    return counted.sort_values("images", ascending=False, kind="stable")


def select(
    table: pd.DataFrame,
    predicted: str | None = None,
    least: float = 0.0,
    most: float = 1.0,
    unfamiliar: bool | None = None,
) -> pd.DataFrame:
    """Return rows by class and flag (None: any), surest last; MarsclfError if no row has it."""
    found = counts(table).index
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


def mistaken_pairs(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return pairs of true and predicted class by texts such as "ground → horizon (59)"."""
    table = metrics.commonest_confusions(predictions, classes)
    rows = table[["true", "predicted", "count"]].itertuples(index=False)
    return {f"{true} → {predicted} ({n})": (true, predicted) for true, predicted, n in rows}


def mistakes(
    predictions: pd.DataFrame, root: Path, pair: tuple[str, str], classes: Sequence[str]
) -> Figure:
    """Lay out up to 24 images below `root` of one class predicted as another, surest first.

    Every group (sol) has its turn before any shows a second image.
    """
    label, predicted = map(classes.index, pair)
    rows = predictions.query("label == @label and predicted == @predicted")
    shown = rows.sort_values("confidence", ascending=False, kind="stable")
    turns = shown.groupby("group").cumcount().sort_values(kind="stable")
    shown = shown.loc[turns.index].head(MAX_TILES)
    titles = shown["confidence"].map("{:.2f}".format)
    if "sol" in shown:
        titles = "sol " + shown["sol"].astype(str) + ", " + titles
    title = f"{pair[0]} predicted as {pair[1]}: {len(shown)} of {len(rows)} images"
    return gallery([tile(root / path) for path in shown["path"]], [*titles], COLUMNS, title)
