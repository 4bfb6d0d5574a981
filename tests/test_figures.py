"""Every chart, drawn from generated data; what it says and how it is saved."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from marsclf.data import msl as data
from marsclf.data.msl import Dataset
from marsclf.evaluation.predictions import read_predictions, write_predictions
from marsclf.figures import exploration
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
    """All that is written on a figure."""
    return "\n".join(
        text.get_text() for text in fig.findobj(lambda item: hasattr(item, "get_text"))
    )


@pytest.fixture(scope="module")
def predictions(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    index = sample_dataset.index
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(index), data.NUM_CLASSES))
    logits[np.arange(len(index)), index["label"]] += rng.normal(3, 2, len(index))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    path = tmp_path_factory.mktemp("run") / "predictions.csv"
    write_predictions(path, index, probabilities)
    table = read_predictions(path)
    return table[table["split"] == "test"]


def draw(fig: Figure) -> None:
    fig.savefig(BytesIO(), dpi=50)
    assert plt.get_fignums() == []


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_charts_of_predictions(
    chart: Callable[[pd.DataFrame], Figure], predictions: pd.DataFrame
) -> None:
    fig = chart(predictions)
    assert f"Test split, {len(predictions):,} images" in texts(fig)
    draw(fig)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
@pytest.mark.parametrize("right", [True, False])
def test_charts_where_all_or_nothing_is_right(
    chart: Callable[[pd.DataFrame], Figure], right: bool, predictions: pd.DataFrame
) -> None:
    label = predictions["label"]
    predicted = label if right else (label + 1) % data.NUM_CLASSES
    extreme = predictions.assign(predicted=predicted, confidence=0.5)
    draw(chart(extreme))


def test_charts_per_class_show_numbers_and_name_what_is_absent(predictions: pd.DataFrame) -> None:
    cases = predictions[predictions["label"].isin([8, 9])].head(10)
    cases = cases.assign(predicted=[9] + cases["label"].tolist()[1:], label=[8] * 5 + [9] * 5)
    cases["predicted"] = [9] * 3 + [8] * 2 + [9] * 5
    counts = texts(figures.cases_and_errors_per_class(cases))
    assert "3 wrong (30.0%)" in counts
    assert "no image in this split: apxs, apxs cal target" in counts
    rates = texts(figures.error_rate_per_class(cases))
    assert "ground (3 of 5)" in rates and "60%" in rates and "horizon (0 of 5)" in rates
    confusions = texts(figures.commonest_confusions(cases))
    assert "3 of 3 errors shown" in confusions and "3 (60% of ground)" in confusions
    assert "accuracy 70.0%" in texts(figures.confusion_matrix(cases))


def test_saved_figure_is_stamped_only_with_sample_data(tmp_path: Path) -> None:
    fig, axes = figures.new_figure(2)
    axes.plot([0, 1], [0, 1])
    plain = figures.save_figure(fig, tmp_path / "new", "plain.png", sample=False)
    assert "sample data" not in texts(fig)
    stamped = figures.save_figure(fig, tmp_path / "new", "sample.png", sample=True)
    assert "sample data" in texts(fig)
    assert sorted(p.name for p in plain.parent.iterdir()) == ["plain.png", "sample.png"]
    assert pixels_of(plain).shape == (400, 1800, 3)
    assert pixels_of(plain)[0, 0].tolist() == [255, 255, 255]
    difference = np.abs(pixels_of(plain) - pixels_of(stamped)).max(axis=2) > 30
    assert difference.mean() > 0.01


def test_learning_curves_mark_the_second_stage() -> None:
    numbers = {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.2}
    history = [
        {"stage": stage, "epoch": epoch, "val_accuracy": 0.1 * epoch, **numbers}
        for stage, epoch in (("head", 1), ("head", 2), ("finetune", 1))
    ]
    fig = figures.learning_curves(history)
    assert "3 epochs, best validation accuracy 20.0%" in texts(fig)
    assert "fine-tuning starts" in texts(fig)
    assert "fine-tuning starts" not in texts(figures.learning_curves(history[:2]))
    draw(fig)


def test_gallery_places_each_image_under_its_title(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 40, 60, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    fig = figures.gallery([red, None, blue[:, :20]], ["red", "", "blue"], 2, "Two of three")
    pixels = pixels_of(figures.save_figure(fig, tmp_path, "gallery.png", sample=False))
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1:].sum(axis=2) < 100)
    is_blue = (pixels[..., 2] > 200) & (pixels[..., :2].sum(axis=2) < 100)
    height, width = pixels.shape[:2]
    for mask, rows, columns in ((is_red, (0, 0.5), 892), (is_blue, (0.5, 1), 446)):
        y, x = np.nonzero(mask)
        assert rows[0] * height < y.min() and y.max() < rows[1] * height
        assert x.max() < width / 2
        assert x.max() - x.min() + 1 == pytest.approx(columns, abs=6)
    assert {"red", "blue", "Two of three"} <= set(texts(fig).splitlines())


def test_heatmap_overlay_is_bright_where_the_map_is() -> None:
    image = np.full((60, 80, 3), 100, np.uint8)
    heatmap = np.zeros((3, 4), np.float32)
    heatmap[0, 3] = 1
    overlay = figures.heatmap_overlay(image, heatmap).astype(int)
    assert overlay.shape == image.shape
    assert overlay[0, -1].sum() > overlay[-1, 0].sum() + 150


def test_exploration_charts(sample_dataset: Dataset) -> None:
    index = sample_dataset.index
    thumbnails, brightness = exploration.measure_images(sample_dataset)
    assert thumbnails.shape == (len(index), 256)
    assert brightness.shape == (len(index),)
    assert brightness.min() > 0 and brightness.max() < 255
    charts = {
        "counts": exploration.class_counts(index),
        "shift": exploration.class_shift(index),
        "sols": exploration.sols_and_cameras(index),
        "sizes": exploration.sizes_and_brightness(index, brightness),
        "bursts": exploration.bursts(index),
        "copies": exploration.near_duplicates(exploration.resemblances(index, thumbnails)),
        "gallery": exploration.class_gallery(sample_dataset),
        "alike": exploration.look_alike_gallery(sample_dataset, thumbnails),
    }
    for fig in charts.values():
        draw(fig)
    for split in data.SPLITS:
        count = (index["split"] == split).sum()
        assert f"{figures.SPLIT_NAMES[split]}: {count:,}" in texts(charts["counts"])


def test_nearest_finds_the_copy_and_never_the_image_itself() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.normal(size=(1100, 256)).astype(np.float32)
    thumbnails[1050] = thumbnails[3]
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    everything = np.arange(1100)
    correlation, partner = exploration.nearest(thumbnails, everything, everything)
    assert (partner[3], partner[1050]) == (1050, 3)
    assert correlation[3] == pytest.approx(1, abs=1e-5)
    assert (partner != everything).all()
    assert correlation[[0, 1, 2]].max() < 0.5


def test_flat_image_resembles_nothing(sample_dataset: Dataset, tmp_path: Path) -> None:
    rows = sample_dataset.index.head(2)
    folder = tmp_path / "calibrated"
    folder.mkdir()
    for path in rows["path"]:
        Image.new("RGB", (64, 48), (90, 90, 90)).save(tmp_path / path)
    flat = Dataset(tmp_path, "other", "", rows)
    thumbnails, brightness = exploration.measure_images(flat)
    assert np.abs(thumbnails).max() == 0
    assert brightness == pytest.approx([90, 90], abs=1)


def test_coverage_at_another_threshold(predictions: pd.DataFrame) -> None:
    shown = predictions[predictions["confidence"] >= 0.5]
    right = (shown["label"] == shown["predicted"]).mean()
    text = texts(figures.coverage_accuracy(predictions, 0.5))
    share = len(shown) / len(predictions)
    assert f"at 0.5: {share:.1%} of the images covered, {right:.1%} of them right" in text
    assert "of them right" not in texts(figures.coverage_accuracy(predictions, 1.01))


def test_ladder_shows_each_rung_and_the_interval_of_test() -> None:
    def splits(test: float) -> dict[str, dict]:
        of_split = {"train": 0.9, "val": 0.8, "test": test}
        return {
            name: {"accuracy": at, "macro_f1": at / 2, "accuracy_ci95": [at - 0.1, at + 0.05]}
            for name, at in of_split.items()
        }

    figure = figures.ladder([("original", splits(0.6)), ("RGB", splits(0.7))])
    draw(figure)
    accuracy, macro_f1 = figure.axes
    assert [tick.get_text() for tick in accuracy.get_yticklabels()] == ["original", "+ RGB"]
    assert accuracy.yaxis_inverted()
    drawn = [list(line.get_xdata()) for line in accuracy.lines]
    np.testing.assert_allclose(drawn, [[90, 90], [80, 80], [60, 70]])
    np.testing.assert_allclose(macro_f1.lines[2].get_xdata(), [30, 35])
    (intervals,) = accuracy.collections
    ends = [segment[:, 0] for segment in intervals.get_segments()]
    np.testing.assert_allclose(ends, [[50, 65], [60, 75]])
