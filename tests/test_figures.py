"""Charts of predictions and training: what they show, and how figures are saved."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from marsclf.data.msl import NUM_CLASSES, Dataset
from marsclf.evaluation.predictions import as_predictions
from marsclf.figures import results as figures

CHARTS = [
    figures.cases_and_errors_per_class,
    figures.error_rate_per_class,
    figures.confusion_matrix,
    figures.commonest_confusions,
    figures.reliability_diagram,
    figures.coverage_accuracy,
    figures.errors_by_camera_and_sol,
]


def texts(fig: Figure) -> str:
    found = fig.findobj(lambda item: hasattr(item, "get_text"))
    return "\n".join(text.get_text() for text in found)


def draw(fig: Figure) -> None:
    fig.savefig(BytesIO(), dpi=50)
    assert plt.get_fignums() == []


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def predictions(sample_dataset: Dataset) -> pd.DataFrame:
    index = sample_dataset.index[sample_dataset.index["split"] == "test"]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(index), NUM_CLASSES))
    logits[np.arange(len(index)), index["label"]] += rng.normal(3, 2, len(index))
    probabilities = np.exp(logits)
    return as_predictions(index, probabilities / probabilities.sum(axis=1, keepdims=True))


@pytest.fixture
def ten(predictions: pd.DataFrame) -> pd.DataFrame:
    """Five images of ground, of which three are predicted as horizon, and five of horizon."""
    return predictions.head(10).assign(
        label=[8] * 5 + [9] * 5, predicted=[9] * 3 + [8] * 2 + [9] * 5
    )


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_charts_of_predictions(
    chart: Callable[[pd.DataFrame], Figure], predictions: pd.DataFrame
) -> None:
    label = predictions["label"]
    all_right = predictions.assign(predicted=label, confidence=0.5)
    all_wrong = predictions.assign(predicted=(label + 1) % NUM_CLASSES, confidence=0.5)
    for table in (predictions, all_right, all_wrong):
        fig = chart(table)
        assert f"Test split, {len(table):,} images" in texts(fig)
        draw(fig)


def test_charts_per_class(ten: pd.DataFrame) -> None:
    counts = figures.cases_and_errors_per_class(ten)
    assert "3 wrong (30.0%)" in texts(counts)
    assert "no images in this split: apxs, apxs cal target" in texts(counts)
    lengths = [[bar.get_width() for bar in bars] for bars in counts.axes[0].containers]
    assert lengths == [[5, 5], [3, 0]]
    rates = figures.error_rate_per_class(ten)
    names = [label.get_text() for label in rates.axes[0].get_yticklabels()]
    assert names == ["ground (3 of 5)", "horizon (0 of 5)"]
    assert [text.get_text() for text in rates.axes[0].texts] == ["60%", "0%"]
    confusions = texts(figures.commonest_confusions(ten))
    assert "3 of 3 errors shown" in confusions
    assert "ground → horizon" in confusions and "3 (60% of ground)" in confusions


def test_confusion_matrix_shows_counts_shaded_by_share(ten: pd.DataFrame) -> None:
    axes = figures.confusion_matrix(ten).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "3", "", "5"]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [40, 60, 0, 100])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ground", "horizon"]
    assert axes.get_title().endswith("accuracy 70.0%")


def test_errors_by_camera_and_sol(ten: pd.DataFrame) -> None:
    names = [
        f"{sol:04d}{camera}0036510000500684E01_DRCL.JPG"
        for sol, camera in [(600, "MH")] * 2 + [(700, "MH")] * 2 + [(800, "ML")] * 6
    ]
    fig = figures.errors_by_camera_and_sol(ten.assign(path=names))
    assert "half of the 3 errors fall on 1 of 3 sols" in texts(fig)
    assert "MAHLI\n3 of 4 wrong (75%)" in texts(fig)
    assert "Mastcam left\n0 of 6 wrong (0%)" in texts(fig)


def test_calibration_and_coverage(ten: pd.DataFrame) -> None:
    ten = ten.assign(confidence=[0.95] * 8 + [0.5] * 2)
    upper, lower = figures.reliability_diagram(ten).axes
    accuracy = [bar.get_height() for bar in upper.patches]
    assert (accuracy[14], accuracy[7], accuracy[0]) == (5 / 8, 1, 0)
    assert lower.patches[14].get_height() == 8
    assert "at 0.9, 80.0% covered, 62.5% of them right" in texts(figures.coverage_accuracy(ten))
    nothing = texts(figures.coverage_accuracy(ten, 0.97))
    assert "at 0.97, 0.0% covered" in nothing and "of them right" not in nothing


def test_learning_curves_mark_the_second_stage() -> None:
    numbers = {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.2}
    history = [
        {"stage": stage, "epoch": epoch, "val_accuracy": 0.1 * epoch, **numbers}
        for stage, epoch in (("head", 1), ("head", 2), ("finetune", 1))
    ]
    fig = figures.learning_curves(history)
    assert "3 epochs, best validation accuracy 20.0%" in texts(fig)
    (start,) = [line for line in fig.axes[0].lines if line.get_label() == "fine-tuning starts"]
    assert list(start.get_xdata()) == [2.5, 2.5]
    assert "fine-tuning starts" not in texts(figures.learning_curves(history[:2]))


def test_ladder_shows_each_rung_and_the_interval_in_test() -> None:
    def splits(test: float) -> dict[str, dict]:
        return {
            split: {"accuracy": x, "macro_f1": x / 2, "accuracy_ci95": [x - 0.1, x + 0.05]}
            for split, x in {"train": 0.9, "val": 0.8, "test": test}.items()
        }

    fig = figures.ladder([("original", splits(0.6)), ("RGB", splits(0.7))])
    accuracy, macro_f1 = fig.axes
    assert [tick.get_text() for tick in accuracy.get_yticklabels()] == ["original", "+ RGB"]
    np.testing.assert_allclose(
        [line.get_xdata() for line in accuracy.lines], [[90, 90], [80, 80], [60, 70]]
    )
    np.testing.assert_allclose(macro_f1.lines[2].get_xdata(), [30, 35])
    ends = [segment[:, 0] for segment in accuracy.collections[0].get_segments()]
    np.testing.assert_allclose(ends, [[50, 65], [60, 75]])


def test_saved_figure_is_stamped_only_with_sample_data(tmp_path: Path) -> None:
    fig, axes = figures.new_figure(2)
    axes.plot([0, 1], [0, 1])
    plain = figures.save_figure(fig, tmp_path / "new", "plain.png", sample=False)
    assert "sample data" not in texts(fig)
    stamped = figures.save_figure(fig, tmp_path / "new", "sample.png", sample=True)
    assert sorted(path.name for path in plain.parent.iterdir()) == ["plain.png", "sample.png"]
    assert pixels_of(plain).shape == (400, 1800, 3)
    assert pixels_of(plain)[0, 0].tolist() == [255, 255, 255]
    difference = np.abs(pixels_of(plain) - pixels_of(stamped)).max(axis=2) > 30
    assert difference.mean() > 0.01


def test_gallery_places_each_image_under_its_title(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 40, 60, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    fig = figures.gallery([red, None, blue[:, :20]], ["red", "", "blue"], 2, "Two of three")
    pixels = pixels_of(figures.save_figure(fig, tmp_path, "gallery.png", sample=False))
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1:].sum(axis=2) < 100)
    is_blue = (pixels[..., 2] > 200) & (pixels[..., :2].sum(axis=2) < 100)
    height, width = pixels.shape[:2]
    for mask, rows, columns in ((is_red, (0, 0.5), 876), (is_blue, (0.5, 1), 438)):
        y, x = np.nonzero(mask)
        assert rows[0] * height < y.min() and y.max() < rows[1] * height
        assert x.max() < width / 2
        assert x.max() - x.min() + 1 == pytest.approx(columns, abs=15)
    assert [axes.get_title(loc="left") for axes in fig.axes] == ["red", "", "blue", ""]


def test_heatmap_overlay_is_bright_where_the_heatmap_is() -> None:
    heatmap = np.zeros((3, 4), np.float32)
    heatmap[0, 3] = 1
    overlay = figures.heatmap_overlay(np.full((60, 80, 3), 100, np.uint8), heatmap).astype(int)
    assert overlay.shape == (60, 80, 3)
    assert overlay[0, -1].sum() > overlay[-1, 0].sum() + 150
