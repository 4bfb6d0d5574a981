"""The three notebooks, run once on the sample data by the command line, and what they leave."""

import gzip
import json
import shutil
from pathlib import Path

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score
from tiny_project import SIZE, enter_project, environment_of

from marsclf.data import msl as data
from marsclf.data.msl import Dataset
from marsclf.evaluation import metrics
from marsclf.evaluation.calibration import with_temperature
from marsclf.evaluation.predictions import COLUMNS, PROBABILITY_COLUMNS, read_predictions
from marsclf.figures import results as figures
from marsclf.figures.results import WIDTH_INCHES
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view
from marsclf.pipeline import run
from marsclf.pipeline.presets import NOTEBOOKS

FIGURES = {
    "01": [
        "bursts",
        "class_counts",
        "class_gallery",
        "class_shift",
        "look_alikes",
        "near_duplicates",
        "sizes_and_brightness",
        "sols_and_cameras",
    ],
    "02": ["learning_curves", "random_views"],
    "03": [
        "commonest_confusions",
        "confident_mistakes",
        "confusion_matrix",
        "coverage_accuracy",
        "error_rate_per_class",
        "errors_by_camera_and_sol",
        "errors_per_class",
        "gradcam_right",
        "gradcam_wrong",
        "mistakes_by_pair",
        "reliability",
        "reliability_before",
    ],
}
NUMBERS = ["n", "accuracy", "accuracy_ci95", "macro_f1", "top3", "nll", "ece"]
NUMBERS += ["coverage_at_0.9", "accuracy_at_0.9"]


@pytest.fixture(scope="session")
def predictions(smoke_run: tuple[Path, str]) -> pd.DataFrame:
    return pd.read_csv(smoke_run[0] / "predictions.csv")


def execute_alone(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, output: Path, **parameters: object
) -> nbformat.NotebookNode:
    """Run one notebook of the copied project into `output` and return it."""
    enter_project(monkeypatch, project)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    for variable, value in environment_of(project).items():
        monkeypatch.setenv(variable, value)
    run.execute(name, output / f"{name}.ipynb", {"run_dir": str(output)} | parameters)
    return nbformat.read(output / f"{name}.ipynb", as_version=4)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed_by(notebook: nbformat.NotebookNode) -> str:
    streams = [output for output in outputs_of(notebook) if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


def pictures_in(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def test_the_run_is_whole_and_stays_in_its_folder(
    smoke_run: tuple[Path, str], project: Path
) -> None:
    folder, printed = smoke_run
    left = {path.name for path in folder.iterdir()} - {"html"}  # made by the tests of web pages
    files = {"model.keras", "classifier.npz", "predictions.csv", "metrics.json", "training.json"}
    files.add("test_errors.csv")
    assert left == files | {f"{name}.ipynb" for name in NOTEBOOKS} | {"figures", "checkpoints"}
    made = {"marsclf", "notebooks", "presets", "runs", "cache"}
    assert {path.name for path in project.iterdir()} == made
    assert {path.name for path in (project / "runs").iterdir()} == {"smoke"}
    assert data.SAMPLE_NOTICE in printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_executed_notebooks(name: str, smoke_run: tuple[Path, str]) -> None:
    path = smoke_run[0] / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    kinds = [output.output_type for output in outputs_of(notebook)]
    assert "error" not in kinds
    streams = [output for output in outputs_of(notebook) if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    assert pictures_in(notebook) == len(FIGURES[name[:2]])
    assert data.SAMPLE_NOTICE in printed_by(notebook)
    assert path.stat().st_size < 5e6


def test_every_figure_is_wide_and_stamped(smoke_run: tuple[Path, str], tmp_path: Path) -> None:
    expected = [f"{number}_{name}.png" for number, names in FIGURES.items() for name in names]
    folder = smoke_run[0] / "figures"
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    for name in expected:
        pixels = grey_pixels(folder / name)
        height, width = pixels.shape
        assert width >= 1500 and height >= 300
        assert np.ptp(pixels) > 100
        # Its letters are dark and have a white rim, whatever is beneath them.
        empty = Figure((WIDTH_INCHES, height * WIDTH_INCHES / width), facecolor="grey")
        stamp = grey_pixels(figures.save_figure(empty, tmp_path, name, sample=True))
        letters, rim = stamp < 100, stamp > 155
        assert letters.any() and rim.any()
        assert np.percentile(pixels[letters], 99) < 190, name
        assert np.percentile(pixels[rim], 1) > 70, name


def grey_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def test_predictions_of_every_image(predictions: pd.DataFrame, sample_dataset: Dataset) -> None:
    assert list(predictions.columns) == COLUMNS
    index = sample_dataset.index
    for column in ("split", "path", "label"):
        assert predictions[column].tolist() == index[column].tolist()
    probabilities = predictions[PROBABILITY_COLUMNS].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-3)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), predictions["predicted"])
    np.testing.assert_array_equal(probabilities.max(axis=1), predictions["confidence"])
    assert predictions["predicted"].nunique() > 5


def test_metrics_json(smoke_run: tuple[Path, str], sample_dataset: Dataset) -> None:
    result = json.loads((smoke_run[0] / "metrics.json").read_text())
    assert result["dataset"] == "sample"
    assert result["data_digest"] == sample_dataset.digest
    assert (result["preset"], result["backbone"]) == ("smoke", "EfficientNetLite0")
    assert result["seed"] == 0
    assert result["parameters"]["image_size"] == SIZE
    assert result["commit"] == "unknown"
    assert {"cpu", "cores", "memory_gb", "gpu", "python"} <= set(result["hardware"])
    stages = {"total", "data", "features", "head", "finetune", *NOTEBOOKS}
    assert set(result["wall_s"]) == stages
    assert all(seconds > 0 for stage, seconds in result["wall_s"].items() if stage != "data")
    assert 100 < result["peak_rss_mb"] < 30_000
    assert list(result["splits"]) == ["train", "val", "test"]
    for split, numbers in result["splits"].items():
        assert list(numbers) == [*NUMBERS, "burst"] and list(numbers["burst"]) == NUMBERS
        assert numbers["n"] == (sample_dataset.index["split"] == split).sum()
        low, high = numbers["accuracy_ci95"]
        assert low < numbers["accuracy"] < high


def test_metrics_agree_with_scikit_learn(
    smoke_run: tuple[Path, str], predictions: pd.DataFrame
) -> None:
    stored = json.loads((smoke_run[0] / "metrics.json").read_text())["splits"]
    for split, rows in predictions.groupby("split"):
        label, predicted, numbers = rows["label"], rows["predicted"], stored[split]
        probabilities = rows[PROBABILITY_COLUMNS].to_numpy()
        top3 = top_k_accuracy_score(label, probabilities, k=3, labels=range(25))
        f1 = f1_score(label, predicted, labels=label.unique(), average="macro", zero_division=0)
        normalized = probabilities / probabilities.sum(axis=1, keepdims=True)
        assert numbers["accuracy"] == pytest.approx(accuracy_score(label, predicted), abs=1e-6)
        assert numbers["macro_f1"] == pytest.approx(f1, abs=1e-6)
        assert numbers["top3"] == pytest.approx(top3, abs=1e-6)
        expected = log_loss(label, normalized, labels=range(25))
        assert numbers["nll"] == pytest.approx(expected, abs=2e-3)


def test_both_stages_were_trained(smoke_run: tuple[Path, str]) -> None:
    training = json.loads((smoke_run[0] / "training.json").read_text())
    assert training["dataset"] == "sample"
    stages = [(record["stage"], record["epoch"]) for record in training["history"]]
    assert stages == [("head", 1), ("head", 2), ("finetune", 1)]


def test_the_saved_model_gives_the_stored_predictions(
    smoke_run: tuple[Path, str], predictions: pd.DataFrame, sample_dir: Path
) -> None:
    model = keras.saving.load_model(smoke_run[0] / "model.keras")
    views = [fit_view(read_rgb(sample_dir / path), SIZE) for path in predictions["path"]]
    temperature = json.loads((smoke_run[0] / "training.json").read_text())["temperature"]
    found = with_temperature(model.predict(np.stack(views), verbose=0), temperature)
    stored = predictions[PROBABILITY_COLUMNS].to_numpy()
    np.testing.assert_allclose(found, stored, atol=1e-3)


def test_error_analysis_of_the_published_predictions_alone(
    smoke_run: tuple[Path, str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = project / "results" / "laptop" / "predictions.csv.gz"
    published.parent.mkdir(parents=True)
    published.write_bytes(gzip.compress((smoke_run[0] / "predictions.csv").read_bytes()))
    try:
        notebook = execute_alone("03_error_analysis", project, monkeypatch, tmp_path)
    finally:
        shutil.rmtree(project / "results")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    galleries = {"confident_mistakes", "gradcam_right", "gradcam_wrong", "mistakes_by_pair"}
    drawn = set(FIGURES["03"]) - galleries - {"reliability_before"}
    assert names == {f"03_{name}.png" for name in drawn}
    assert pictures_in(notebook) == len(names)
    printed = printed_by(notebook)
    assert "the galleries are left out" in printed and "Grad-CAM is left out" in printed
    assert data.SAMPLE_NOTICE not in printed  # nothing says what they are of
    own = tmp_path / "predictions.csv"
    assert f"There is no {own} yet: these are the published predictions." in printed
    assert "Data set: unknown, 375 predictions in predictions.csv.gz" in printed


def test_classify_new_images(
    sample_dir: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    for path in sorted((sample_dir / "calibrated").iterdir())[:30]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_text("no image")
    parameters = {"folder": str(folder), "shown_images": 8, "threshold": 0.5}
    name = "05_classify_new_images"
    notebook = execute_alone(name, project, monkeypatch, tmp_path, **parameters)
    printed = printed_by(notebook)
    assert "31 images" in printed and "1 could not be read" in printed
    assert "30 images chosen, the first 8 shown" in printed
    assert data.SAMPLE_NOTICE not in printed
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["05_thumbnails.png"]
    assert pictures_in(notebook) == 1
    tables = [output.get("data", {}).get("text/html", "") for output in outputs_of(notebook)]
    assert ["broken.jpg" in text for text in tables if text] == [False, False, True, False]
    assert [o for o in outputs_of(notebook) if o.get("name") == "stderr"] == []


def test_the_ladder(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {"backbone": "EfficientNetLite0", "sides": [33, 44], "side": 40, "views": 1}
    tiny |= {"frozen_epochs": 2, "upper_epochs": 1, "steps": []}
    name = "04_reference_reproduction"
    notebook = execute_alone(name, project, monkeypatch, tmp_path, **tiny)
    printed = printed_by(notebook)
    assert data.SAMPLE_NOTICE in printed
    assert pictures_in(notebook) == 2
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "04_as_read.png",
        "04_ladder.png",
    }
    rungs = json.loads((tmp_path / "rungs.json").read_text())
    assert list(rungs) == ["original"]
    record = rungs["original"]
    epochs = [(epoch["stage"], epoch["epoch"]) for epoch in record["history"]]
    assert epochs == [("frozen", 1), ("frozen", 2), ("upper", 1)]
    # The head does learn.
    assert record["history"][1]["loss"] < record["history"][0]["loss"]
    predictions = read_predictions(tmp_path / "original" / "predictions.csv")
    assert metrics.measure(predictions) == record["splits"]
    assert record["dataset"] == "sample" and record["commit"] == "unknown"
    # Sample data is never entered in the ledger of test scores.
    assert not (project / "results").exists()


@pytest.mark.realdata
def test_data_exploration_of_the_real_images(
    real_data_dir: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = execute_alone(
        "01_data_exploration", project, monkeypatch, tmp_path, data_dir=str(real_data_dir.resolve())
    )
    printed = printed_by(notebook)
    assert "Data set: msl-v1, 6,691 images" in printed
    assert data.SAMPLE_NOTICE not in printed
    assert pictures_in(notebook) == len(FIGURES["01"])
    assert (tmp_path / "01_data_exploration.ipynb").stat().st_size < 5e6
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"01_{name}.png" for name in FIGURES["01"]}
