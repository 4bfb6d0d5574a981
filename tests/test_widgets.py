"""Notebook controls, and the tables and figures behind them."""

import re
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from IPython.display import Image
from matplotlib.figure import Figure
from PIL import Image as Picture

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import as_predictions
from marsclf.figures import widgets


def draw(choice: object) -> Figure:
    figure = Figure((4, 2))
    figure.suptitle(str(choice))
    return figure


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is displayed."""
    displayed = []
    monkeypatch.setattr(widgets, "display", lambda *items: displayed.extend(items))
    return displayed


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


@pytest.fixture
def jupyterlab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")


def titles_of(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_a_batch_run_shows_plain_figures(
    batch: None, shown: list, tmp_path: Path, classified: pd.DataFrame
) -> None:
    saved = {"folder": tmp_path, "name": "x.png", "sample": False}
    widgets.explore(draw, {"a": 1, "b": 2}, "which", "a", **saved)
    assert [type(item) for item in shown] == [Image]
    assert shown[0].data == (tmp_path / "x.png").read_bytes()
    assert widgets.chooser(classified, 24) is None


@pytest.mark.parametrize(
    ("choices", "kind"),
    [
        ({"a": 1, "b": 2.5}, ipywidgets.SelectionSlider),
        ({"a": ("x", "y"), "b": ("y", "x")}, ipywidgets.Dropdown),
    ],
)
def test_jupyterlab_gets_a_control(
    choices: dict, kind: type, jupyterlab: None, shown: list, tmp_path: Path
) -> None:
    saved = {"folder": tmp_path, "name": "x.png", "sample": False}
    widgets.explore(draw, choices, "which", "b", **saved)
    control = shown[-1].children[0]
    assert type(control) is kind and (control.value, control.description) == ("b", "which")
    first = (tmp_path / "x.png").read_bytes()
    control.value = "a"
    assert shown[-1].data != first
    control.value = "b"
    assert shown[-1].data == first == (tmp_path / "x.png").read_bytes()


def test_chooser(
    jupyterlab: None, shown: list, classified: pd.DataFrame, capsys: pytest.CaptureFixture
) -> None:
    menu, confidence, _ = widgets.chooser(classified, 2).children
    assert [name for name, _ in menu.options] == ["all classes", "wheel", "ground"]
    menu.value = "wheel"
    table, picture = shown[-2:]
    assert table["confidence"].tolist() == [0.35, 0.95] and isinstance(picture, Image)
    confidence.value = (0.5, 1.0)
    assert shown[-2]["path"].str.endswith("a.png").tolist() == [True]
    displayed = len(shown)
    confidence.value = (0.96, 1.0)
    assert len(shown) == displayed
    printed = capsys.readouterr().out
    assert re.findall(r"(\d) images chosen, the first (\d)", printed) == [
        ("3", "2"),
        ("2", "2"),
        ("1", "1"),
        ("0", "0"),
    ]


def test_counts_and_select(classified: pd.DataFrame) -> None:
    found = widgets.counts(classified)
    assert found.index.tolist() == ["wheel", "ground"]
    assert found["images"].tolist() == [2, 1] and found["uncertain"].tolist() == [1, 1]
    assert found["median_confidence"].tolist() == pytest.approx([0.65, 0.6])
    assert widgets.select(classified)["confidence"].tolist() == [0.35, 0.6, 0.95]
    assert widgets.select(classified, "wheel", least=0.5)["confidence"].tolist() == [0.95]
    assert widgets.select(classified, most=0.6)["predicted"].tolist() == ["wheel", "ground"]
    with pytest.raises(MarsclfError, match="no class 'Wheel'"):
        widgets.select(classified, "Wheel")


def test_thumbnails(classified: pd.DataFrame) -> None:
    figure = widgets.thumbnails(widgets.select(classified))
    assert titles_of(figure) == ["wheel\n0.35", "ground\n0.60", "wheel\n0.95"]
    assert [len(axes.images) for axes in figure.axes] == [1, 0, 1, 0, 0, 0]  # one file is missing
    with pytest.raises(MarsclfError, match="No image is selected"):
        widgets.thumbnails(classified[:0])


def test_mistakes_by_class_pair(tmp_path: Path) -> None:
    names = [f"{sol:04d}MR0036510000500684E01_DRCL.JPG" for sol in range(565, 598)]
    for name in names[:30]:
        Picture.new("RGB", (64, 48), "brown").save(tmp_path / name)
    wheel, ground, horizon = (CLASS_NAMES.index(name) for name in ("wheel", "ground", "horizon"))
    labels = [ground] * 26 + [wheel] * 5 + [wheel] * 2
    predicted = [horizon] * 26 + [ground] * 5 + [wheel] * 2
    confidence = np.linspace(0.6, 0.9, len(names))
    probabilities = np.zeros((len(names), 25))
    probabilities[:, 0] = 1 - confidence
    probabilities[np.arange(len(names)), predicted] = confidence
    index = pd.DataFrame({"split": "test", "path": names, "label": labels})
    predictions = as_predictions(index, probabilities)
    assert widgets.mistaken_pairs(predictions) == {
        "ground → horizon (26)": ("ground", "horizon"),
        "wheel → ground (5)": ("wheel", "ground"),
    }
    figure = widgets.mistakes(predictions, tmp_path, ("ground", "horizon"))
    assert figure.get_suptitle() == "ground predicted as horizon: 24 of 26 images"
    titles = titles_of(figure)
    assert titles[0] == f"sol 590, {confidence[25]:.2f}" and len(titles) == 24
    # A missing image leaves its tile empty.
    figure = widgets.mistakes(predictions, tmp_path, ("wheel", "ground"))
    assert sum(len(axes.images) for axes in figure.axes) == 4 and len(titles_of(figure)) == 5
