"""Figures that answer to a control in JupyterLab, and are plain figures everywhere else."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import ipywidgets
from IPython.display import Image, display
from matplotlib.figure import Figure

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


def _someone_looks_on() -> bool:
    """Tell whether Jupyter's server started this kernel, which then knows its notebook's name."""
    return "JPY_SESSION_NAME" in os.environ
