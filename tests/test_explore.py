"""A figure with a control where someone looks on, and a plain figure elsewhere."""

from pathlib import Path

import ipywidgets
import pandas as pd
import pytest
from IPython.display import Image
from matplotlib.figure import Figure

from marsclf.figures import widgets as module
from marsclf.figures.widgets import explore


def draw(choice: object) -> Figure:
    figure = Figure((4, 2))
    figure.suptitle(str(choice))
    return figure


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is displayed."""
    displayed = []
    monkeypatch.setattr(module, "display", displayed.append)
    return displayed


def test_a_plain_figure_where_nobody_looks_on(
    shown: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    explore(draw, {"a": 1, "b": 2}, "which", tmp_path, "x.png", sample=False)
    assert [type(item) for item in shown] == [Image]
    assert shown[0].data == (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize(
    ("choices", "kind"),
    [
        ({"a": 1, "b": 2.5}, ipywidgets.SelectionSlider),
        ({"a": ("x", "y"), "b": ("y", "x")}, ipywidgets.Dropdown),
    ],
)
def test_a_control_in_jupyterlab(
    choices: dict, kind: type, shown: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    explore(draw, choices, "which", tmp_path, "x.png", sample=False, start="b")
    control, picture = shown[0].children
    assert type(control) is kind and (control.value, control.description) == ("b", "which")
    first = (tmp_path / "x.png").read_bytes()
    assert picture.value == first
    control.value = "a"
    assert picture.value != first and bytes(picture.value).startswith(b"\x89PNG")
    control.value = "b"
    assert picture.value == first
    assert (tmp_path / "x.png").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png"]


def test_a_batch_run_has_no_menus(
    classified: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert module.chooser(classified, 24) is None


def test_menus(classified: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "05_classify_new_images.ipynb")
    menus, shown, images = module.chooser(classified, 2).children
    predicted, between = menus.children
    assert list(predicted.options) == ["all classes", "wheel", "ground"]
    assert shown.value.startswith("3 images chosen, the first 2 shown<table")
    assert bytes(images.value).startswith(b"\x89PNG")
    predicted.value = "wheel"
    assert shown.value.startswith("2 images chosen, the first 2 shown<table")
    between.value = (0.5, 1.0)
    assert shown.value.startswith("1 images chosen, the first 1 shown<table")
    assert "a.png" in shown.value and "b.png" not in shown.value
    between.value = (0.96, 1.0)
    assert shown.value == "0 images chosen, the first 0 shown" and not bytes(images.value)
