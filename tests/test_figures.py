"""Charts of predictions and training: what they show, and how figures are saved."""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1
from marsclf.evaluation.predictions import as_predictions
from marsclf.figures import results as figures

OF_CLASSES = "cases_and_errors_per_class", "error_rate_per_class", "confusion_matrix"
CHARTS = *OF_CLASSES, "reliability_diagram", "coverage_accuracy", "errors_by_camera_and_sol"


def texts(fig: Figure) -> str:
    found = fig.findobj(lambda item: hasattr(item, "get_text"))
    return "\n".join(text.get_text() for text in found)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def predictions(sample_dataset: Dataset) -> pd.DataFrame:
    index = sample_dataset.index[sample_dataset.index["split"] == "test"]
    guesses = np.random.default_rng(0).dirichlet(np.full(25, 0.1), len(index))
    return as_predictions(index, (guesses + 0.5 * np.eye(25)[index["label"]]) / 1.5)


@pytest.fixture
def ten(predictions: pd.DataFrame) -> pd.DataFrame:
    """Five images of ground, three of them predicted as horizon, and five of horizon."""
    return predictions.head(10).assign(
        label=[8] * 5 + [9] * 5,
        predicted=[9] * 3 + [8] * 2 + [9] * 5,
        confidence=[0.95] * 8 + [0.5] * 2,
        sol=[600] * 4 + [800] * 6,
        camera=["MH"] * 4 + ["ML"] * 6,
    )


@pytest.mark.parametrize("name", CHARTS)
def test_charts_of_perfect_predictions(name: str, predictions: pd.DataFrame) -> None:
    table = predictions.assign(predicted=predictions["label"], confidence=0.5)
    fig = getattr(figures, name)(table, *[MSL_V1.classes] * (name in OF_CLASSES))
    assert f"Test split, {len(table):,} images" in texts(fig)
    fig.savefig(BytesIO(), dpi=20)
    assert plt.get_fignums() == []


def test_errors_in_charts(ten: pd.DataFrame) -> None:
    counts = figures.cases_and_errors_per_class(ten, MSL_V1.classes)
    assert "3 wrong (30.0%)" in texts(counts)
    assert "no images in this split: apxs, apxs cal target" in texts(counts)
    lengths = [[bar.get_width() for bar in bars] for bars in counts.axes[0].containers]
    assert lengths == [[5, 5], [3, 0]]
    rates = figures.error_rate_per_class(ten, MSL_V1.classes)
    assert "ground: 60% (3 of 5)\nhorizon: 0% (0 of 5)" in texts(rates)
    matrix = figures.confusion_matrix(ten, MSL_V1.classes)
    assert "accuracy 70.0%" in texts(matrix)
    assert [text.get_text() for text in matrix.axes[0].texts] == ["2", "3", "", "5"]
    shares = matrix.axes[0].collections[0].get_array()
    np.testing.assert_allclose(shares, [[40, 60], [0, 100]])
    places = texts(figures.errors_by_camera_and_sol(ten))
    assert "half of the 3 errors fall on 1 of 2 sols" in places
    assert "MAHLI\n3 of 4 wrong (75%)" in places


def test_calibration_and_coverage(ten: pd.DataFrame) -> None:
    upper, lower = figures.reliability_diagram(ten).axes
    accuracy = [bar.get_height() for bar in upper.patches]
    assert (accuracy[14], accuracy[7], accuracy[0]) == (5 / 8, 1, 0)
    assert lower.patches[14].get_height() == 8
    assert "at 0.9, 80.0% covered, 62.5% of them right" in texts(figures.coverage_accuracy(ten))
    nothing = texts(figures.coverage_accuracy(ten, 0.97))
    assert "at 0.97, 0.0% covered" in nothing and "of them right" not in nothing


def test_familiarity_shows_the_share_that_is_flagged() -> None:
    images = pd.DataFrame({"familiarity": [*np.linspace(0.4, 1, 7), 0, 0, 0]})
    images = images.assign(known=images.index < 7, class_name=["wheel"] * 7 + ["Sun"] * 3)
    fig = figures.familiarity(images)
    for title in ("images of the classes: 14.3% of 7 unfamiliar", "Sun: 100.0% of 3 unfamiliar"):
        assert title in texts(fig)
    heights = [sum(bar.get_height() for bar in axes.patches) for axes in fig.axes]
    assert heights == [7, 3]


def test_learning_curves_mark_the_second_stage() -> None:
    epoch = {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.2, "val_accuracy": 0.2}
    history = [epoch | {"stage": stage} for stage in ("head", "head", "finetune")]
    fig = figures.learning_curves(history)
    assert "3 epochs, best validation accuracy 20.0%" in texts(fig)
    (start,) = [line for line in fig.axes[0].lines if line.get_label() == "fine-tuning starts"]
    assert list(start.get_xdata()) == [2.5, 2.5]


def test_ladder_shows_each_rung_and_the_interval_of_the_last_split() -> None:
    def splits(*accuracies: float) -> dict[str, dict]:
        return {
            split: {"accuracy": x, "macro_f1": x / 2, "accuracy_ci95": [x - 0.1, x + 0.05]}
            for split, x in zip(("train", "val", "test"), accuracies, strict=False)
        }

    rungs = [("original", splits(0.9, 0.8, 0.6)), ("RGB", splits(0.9, 0.8, 0.7))]
    accuracy, macro_f1 = figures.ladder(rungs).axes
    assert [tick.get_text() for tick in accuracy.get_yticklabels()] == ["original", "+ RGB"]
    drawn = [line.get_xdata() for line in (*accuracy.lines, macro_f1.lines[2])]
    np.testing.assert_allclose(drawn, [[90, 90], [80, 80], [60, 70], [30, 35]])
    ends = [segment[:, 0] for segment in accuracy.collections[0].get_segments()]
    np.testing.assert_allclose(ends, [[50, 65], [60, 75]])
    (ends,) = figures.ladder([("a", splits(0.9, 0.8))]).axes[0].collections[0].get_segments()
    np.testing.assert_allclose(ends[:, 0], [70, 85])


def test_only_sample_data_is_stamped(tmp_path: Path) -> None:
    fig, _ = figures.new_figure(2)
    plain = pixels_of(figures.save_figure(fig, tmp_path / "new", "plain.png", "msl-v1"))
    stamped = pixels_of(figures.save_figure(fig, tmp_path / "new", "stamped.png", "sample"))
    assert len(list((tmp_path / "new").iterdir())) == 2
    assert plain.shape == (400, 1800, 3) and (plain[0, 0] == 255).all()
    assert (np.abs(plain - stamped) > 30).mean() > 0.01


def test_gallery_places_each_image_under_its_title(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 40, 60, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    fig = figures.gallery([red, None, blue[:, :20]], ["red", "", "blue"], 2, "Two of three")
    assert [axes.get_title(loc="left") for axes in fig.axes] == ["red", "", "blue"]
    pixels = pixels_of(figures.save_figure(fig, tmp_path, "gallery.png", "my images"))
    for channel, width, height in ((0, 500, 333), (2, 250, 500)):
        others = np.delete(pixels, channel, axis=2).sum(axis=2)
        y, x = np.nonzero((pixels[..., channel] > 200) & (others < 100))
        assert x.min() < 20 and np.ptp(x) == pytest.approx(width, rel=0.05)
        assert np.ptp(y) == pytest.approx(height, rel=0.05)
        assert (y.min() < len(pixels) / 2) == (channel == 0)
    credited = pixels_of(figures.save_figure(fig, tmp_path, "credited.png", "msl-v1"))
    y, _ = np.nonzero((credited != pixels).any(axis=2))
    assert y.min() > pixels.shape[0] - 40  # in the margin at the bottom, over no image


def test_a_gallery_of_heatmaps_in_groups_with_a_scale() -> None:
    heatmap = np.float32([[0, 0, 1], [0, 0, 0]])
    overlay = figures.heatmap_overlay(np.full((40, 60, 3), 100, np.uint8), heatmap)
    assert overlay.shape == (40, 60, 3)
    assert overlay[0, -1].sum(dtype=int) > overlay[-1, 0].sum(dtype=int) + 150
    *tiles, scale = figures.gallery([overlay] * 6, ["x"] * 6, 6, "Pairs", 2, "evidence").axes
    edges = [axes.get_position().intervalx for axes in tiles]
    gaps = [after[0] - before[1] for before, after in zip(edges, edges[1:], strict=False)]
    assert min(gaps[1::2]) > 3 * max(gaps[::2]) and edges[-1][1] < 1
    assert [text.get_text() for text in scale.texts] == ["0", "1  evidence"]


def test_a_personal_matplotlibrc_changes_no_figure(tmp_path: Path) -> None:
    def png() -> bytes:
        figures.set_style()
        fig, axes = figures.new_figure(2)
        axes.set_title("5 % of $n$")
        return figures.png_of(fig)

    expected = png()
    with plt.rc_context({"savefig.bbox": "tight", "font.size": 30}):
        assert png() == expected
