"""Controls in JupyterLab: figures and tables that answer to them, and are plain elsewhere."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import ipywidgets
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

from marsclf.browse import counts, select, thumbnails
from marsclf.figures import png_of, save_figure

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
