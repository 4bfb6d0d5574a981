"""A figure with a control where someone looks on, and a plain figure elsewhere."""

from pathlib import Path

import ipywidgets
import pytest
from IPython.display import Image
from matplotlib.figure import Figure

from marsclf import explore as module
from marsclf.explore import explore


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
