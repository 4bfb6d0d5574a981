"""Notebook controls, and the tables and figures behind them."""

import os
import re
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from IPython.display import Image
from matplotlib.figure import Figure
from PIL import Image as Picture

from marsclf.data.msl import MSL_V1
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import as_predictions
from marsclf.figures import widgets


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is displayed, as in JupyterLab."""
    displayed = []
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    monkeypatch.setattr(widgets, "display", lambda *items: displayed.extend(items))
    return displayed


def explore(folder: Path, choices: list | tuple, start: object) -> bytes:
    """Explore the choices, and return the PNG file."""

    def draw(choice: object) -> Figure:
        figure = Figure((4, 2))
        figure.suptitle(str(choice))
        return figure

    widgets.explore(draw, choices, start, folder=folder, name="x.png", dataset="")
    return (folder / "x.png").read_bytes()


MENU = [("a", (1, 2)), ("b", (3, 4))]


def test_a_batch_run_has_no_controls(shown, monkeypatch, tmp_path, classified) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME")
    saved = explore(tmp_path, MENU, (3, 4))
    assert [item.data for item in shown] == [saved]
    assert widgets.chooser(classified, 24) is None


@pytest.mark.parametrize(
    ("choices", "start", "other", "kind"),
    [((0.0, 1.0, 0.01), 0.9, 0.5, ipywidgets.FloatSlider)]
    + [(MENU, (3, 4), (1, 2), ipywidgets.Dropdown)],
)
def test_a_control_in_jupyterlab(choices, start, other, kind, shown: list, tmp_path: Path) -> None:
    saved = explore(tmp_path, choices, start)
    control = shown[-1].children[0]
    assert type(control) is kind and control.value == start
    control.value = other
    assert shown[-1].data != saved
    control.value = start
    assert shown[-1].data == saved == (tmp_path / "x.png").read_bytes()


def test_chooser(shown: list, classified: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    menu, confidence, flag, _ = widgets.chooser(classified, 2).children
    assert [name for name, _ in menu.options] == ["all classes", "wheel", "ground"]
    menu.value = "wheel"
    assert shown[-1].data["confidence"].tolist() == [0.35, 0.95] and isinstance(shown[-2], Image)
    confidence.value = (0.5, 1.0)
    assert shown[-1].data["confidence"].tolist() == [0.95]
    confidence.value = (0.96, 1.0)
    printed = re.findall(r"(\d) images chosen, the first (\d)", capsys.readouterr().out)
    assert printed == [("3", "2"), ("2", "2"), ("1", "1"), ("0", "0")]
    confidence.value, flag.value = (0.0, 1.0), True
    assert shown[-1].data["confidence"].tolist() == [0.35]
    page = shown[-1].to_html()
    assert os.sep not in re.findall("<td.*?>(.*?)</td>", page)[0] and "nan" not in page.lower()


def test_select_and_thumbnails(classified: pd.DataFrame) -> None:
    selected = widgets.select(classified)
    assert selected["confidence"].tolist() == [0.35, 0.6, 0.95]
    assert widgets.select(classified, "wheel", least=0.5)["confidence"].tolist() == [0.95]
    assert widgets.select(classified, most=0.6)["predicted"].tolist() == ["wheel", "ground"]
    tiles = widgets.thumbnails(selected).axes
    titles = [tile.get_title("left") for tile in tiles[:3]]
    assert titles == ["wheel\n0.35", "ground\n0.60", "wheel\n0.95"]
    assert [len(tile.images) for tile in tiles] == [1, 0, 1]  # the second file is missing
    with pytest.raises(
        MarsclfError, match="No image is of class 'Wheel': choose one of wheel, ground"
    ):
        widgets.select(classified, "Wheel")
    with pytest.raises(MarsclfError, match="No image is selected"):
        widgets.thumbnails(classified[:0])


def test_mistakes_by_class_pair(tmp_path: Path) -> None:
    names = [f"0{sol}MR0036510000500684E01_DRCL.JPG" for sol in range(565, 598)]
    for name in names[:25]:
        Picture.new("RGB", (64, 48), "brown").save(tmp_path / name)
    wheel, ground, horizon = (MSL_V1.classes.index(name) for name in ("wheel", "ground", "horizon"))
    index = pd.DataFrame({"split": "test", "path": names, "label": [ground] * 26 + [wheel] * 7})
    confidence = np.linspace(0.6, 0.9, len(names))[:, None]
    predicted = np.eye(25)[[horizon] * 26 + [ground] * 5 + [wheel] * 2]
    predictions = as_predictions(index, predicted * confidence + np.eye(25)[0] * (1 - confidence))
    pair = ground, horizon
    figure = widgets.mistakes(predictions, tmp_path, pair, MSL_V1.classes)
    assert figure.get_suptitle() == "ground predicted as horizon: 24 of 26 images"
    assert len(figure.axes) == 24 and figure.axes[0].get_title("left") == "sol 590, 0.83"
    assert [len(axes.images) for axes in figure.axes] == [0] + [1] * 23  # one file is missing
    other = widgets.mistakes(predictions.drop(columns="sol"), tmp_path, pair, MSL_V1.classes)
    assert other.axes[0].get_title("left") == "0.83"
