"""Counts, filters and thumbnails of a classifier's table."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from marsclf import browse
from marsclf.errors import MarsclfError
from marsclf.rows import Row, table


@pytest.fixture
def rows(tmp_path: Path) -> pd.DataFrame:
    for name in ("a", "b"):
        Image.new("RGB", (1500, 900), "brown").save(tmp_path / f"{name}.png")
    return table(
        [
            Row(str(tmp_path / "a.png"), "wheel", 0.95, "ground", 0.01, False),
            Row(str(tmp_path / "b.png"), "wheel", 0.35, "ground", 0.3, True),
            Row(str(tmp_path / "gone.png"), "ground", 0.6, "wheel", 0.3, True),
            Row(str(tmp_path / "broken.png"), error="the file is empty"),
        ]
    )


def test_counts(rows: pd.DataFrame) -> None:
    found = browse.counts(rows)
    assert found.index.tolist() == ["wheel", "ground"]
    assert found["images"].tolist() == [2, 1] and found["uncertain"].tolist() == [1, 1]
    assert found["median_confidence"].tolist() == pytest.approx([0.65, 0.6])


def test_select(rows: pd.DataFrame) -> None:
    assert browse.select(rows)["confidence"].tolist() == [0.35, 0.6, 0.95]
    assert browse.select(rows, "wheel", least=0.5)["confidence"].tolist() == [0.95]
    assert browse.select(rows, most=0.6)["predicted"].tolist() == ["wheel", "ground"]
    with pytest.raises(MarsclfError, match="no class 'Wheel'"):
        browse.select(rows, "Wheel")


def test_thumbnails(rows: pd.DataFrame) -> None:
    figure = browse.thumbnails(browse.select(rows))
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["wheel\n0.35", "ground\n0.60", "wheel\n0.95"]
    with pytest.raises(MarsclfError, match="No image is chosen"):
        browse.thumbnails(rows[:0])


def test_a_batch_run_has_no_menus(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert browse.chooser(rows, 24) is None


def test_menus(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "05_classify_new_images.ipynb")
    menus, shown, images = browse.chooser(rows, 2).children
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
