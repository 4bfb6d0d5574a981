"""The notebooks on the sample data: a run of 01 to 03 from the command line, and each by hand."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_project import SIZE, SMALL, enter_project, execute_here, write_predictions, write_preset

import marsclf
from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1, SAMPLE_NOTICE
from marsclf.evaluation import metrics
from marsclf.evaluation.calibration import with_temperature
from marsclf.evaluation.predictions import probabilities_of, read_predictions, run_record
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view
from marsclf.networks import engine
from marsclf.pipeline.presets import NOTEBOOKS, parse_settings
from marsclf.training import train
from marsclf.training.checkpoints import Checkpoints


def figures_of(name: str, left_out: set[str] = frozenset()) -> set[str]:
    """Return the files of the figures that a notebook names."""
    named = re.findall(r"\d\d_(\w+)\.png", (paths.NOTEBOOKS / f"{name}.ipynb").read_text())
    return {f"{name[:2]}_{figure}.png" for figure in {*named} - left_out}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., str]:
    """Execute a notebook in this process, in a project without data; return what it printed."""
    root = tmp_path / "project"
    for folder in (paths.NOTEBOOKS, paths.PRESETS):
        shutil.copytree(folder, root / folder.name)
    enter_project(monkeypatch, root)
    monkeypatch.delenv("MARSCLF_DATA_DIR", raising=False)

    def call(name: str, **parameters: object) -> str:
        parameters = {"run_dir": str(tmp_path / "run")} | parameters
        capsys.readouterr()  # what one that was killed has printed
        execute_here(name, tmp_path / "executed.ipynb", parameters)
        return capsys.readouterr().out

    return call


def check_outputs(path: Path) -> tuple[str, int]:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    streams = [output for output in outputs if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    assert path.stat().st_size < 5e6
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in streams), pictures


def test_the_run_is_complete_and_stays_in_its_folder(smoke_run, project) -> None:
    folder, printed = smoke_run
    files = {"model.keras", "classifier.safetensors", "predictions.csv", "metrics.json", "figures"}
    files |= {"training.json", "test_errors.csv", *(f"{name}.ipynb" for name in NOTEBOOKS)}
    assert names_in(folder) == files
    assert names_in(project) == {"marsclf", "notebooks", "presets", "examples", "runs", "cache"}
    assert names_in(project / "runs") == {"smoke", "unfinished"}
    texts, pictures = zip(*(check_outputs(folder / f"{n}.ipynb") for n in NOTEBOOKS), strict=True)
    assert all(SAMPLE_NOTICE in text for text in (printed, *texts))
    drawn = [figures_of(name, left_out={"familiarity"}) for name in NOTEBOOKS]
    assert pictures == tuple(map(len, drawn))
    assert names_in(folder / "figures") == set().union(*drawn)
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            assert image.width in (1000, 1800) and image.height >= 200


def test_the_results_of_the_run(smoke_run: tuple[Path, str], sample_dataset: Dataset) -> None:
    folder, _ = smoke_run
    result = json.loads((folder / "metrics.json").read_text())
    about = {"dataset": "sample", "data_digest": sample_dataset.digest, "preset": "smoke"}
    about |= {"seed": 0, "commit": "unknown"}
    assert about.items() <= result.items() and result["parameters"]["image_size"] == SIZE
    assert set(result["wall_s"]) == {"total", "data", "features", "head", "finetune", *NOTEBOOKS}
    assert 100 < result["peak_rss_mb"] < 30_000
    predictions = read_predictions(folder / "predictions.csv")
    assert result["splits"] == metrics.measure(predictions)
    columns = ["split", "path", "label"]
    pd.testing.assert_frame_equal(predictions[columns], sample_dataset.index[columns])
    assert predictions["predicted"].nunique() > 5
    training = run_record(folder / "predictions.csv")
    assert about.items() <= training.items()
    for part in ("settings", "parameters", "temperature", "backbone"):
        assert training[part] == result[part], part
    stages = [(record["stage"], record["epoch"]) for record in training["history"]]
    assert stages == [("head", 1), ("head", 2), ("finetune", 1)]


def test_the_saved_model_gives_the_stored_predictions(smoke_run, sample_dir) -> None:
    stored = read_predictions(smoke_run[0] / "predictions.csv")[::10]
    model = keras.saving.load_model(smoke_run[0] / "model.keras")
    views = [fit_view(read_rgb(sample_dir / path), SIZE) for path in stored["path"]]
    temperature = run_record(smoke_run[0] / "predictions.csv")["temperature"]
    found = with_temperature(np.asarray(model(np.stack(views), training=False)), temperature)
    np.testing.assert_allclose(found, probabilities_of(stored), atol=1e-3)


def test_own_images_in_mixed_precision_after_a_kill(
    sample_dataset: Dataset, eager: None, execute: Callable, tmp_path: Path, monkeypatch
) -> None:
    """As on a GPU, by hand: three classes without sols and without a test split.

    Notebook 02 gets a preset in its first cell and is killed after the first epoch.
    """
    root, run = tmp_path / "my images", tmp_path / "run"
    index, names = sample_dataset.index, {14: "rotes Ding", 15: "Größe 2", 8: "soil"}
    chosen = index[index["label"].isin(names)].groupby(["label", "split"]).head(5)
    for row in chosen.itertuples():
        folder = root / ("val" if row.split == "val" else "train") / names[row.label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(sample_dataset.root / row.path).save(folder / f"{row.Index}.png")
    printed = execute("01_data_exploration", data_dir=str(root))
    assert f"Data set: my images, {len(chosen)} images" in printed and "no sols or cam" in printed
    drawn = figures_of("01_data_exploration", left_out={"sols_and_cameras"})
    assert names_in(run / "figures") == drawn

    settings = parse_settings(SMALL) | {"mixed_precision": True, "temperature": 1.0}
    text = f"extends: smoke\nparameters: {json.dumps(settings)}"
    write_preset(paths.PRESETS / "mine.yaml", text)
    for module in (engine, train):
        monkeypatch.setattr(module, "gpu_capability", lambda: (7, 5))
    by_hand = {"preset": "mine", "data_dir": str(root)}
    end_epoch = Checkpoints.on_epoch_end

    def die(*epoch: object) -> None:
        end_epoch(*epoch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "on_epoch_end", die)
        execute("02_fine_tuning", **by_hand)
    printed = execute("02_fine_tuning", **by_hand)
    assert "computing in float16" in printed and "head epoch 1/2" not in printed
    assert "head epoch 2/2" in printed and "finetune epoch 1/1" in printed
    stored = read_predictions(run / "predictions.csv")
    classifier = load_classifier(run / "classifier.safetensors", tmp_path / "cache")
    table = classifier.predict([root / path for path in stored["path"]])
    differences = np.abs(table["confidence"] - stored["confidence"])  # of float32 to 16 bits
    assert differences.mean() < 0.03 and differences.max() < 0.2
    assert set(table["predicted"]) <= {*names.values()}


def test_error_analysis_of_the_published_predictions(execute: Callable, tmp_path: Path) -> None:
    told = paths.RESULTS / "classifiers" / "parts" / "familiarity.csv.gz"
    write_predictions(paths.RESULTS / "laptop" / "predictions.csv.gz")
    told.parent.mkdir(parents=True)
    table = pd.DataFrame({"known": [True, True, False], "familiarity": [0.9, 0.7, 0.1]})
    table.assign(class_name=["wheel", "drill", "Sun"]).to_csv(told)
    printed = execute("03_error_analysis", dataset="msl-v1")
    need_images = {"confident_mistakes", "gradcam_right", "gradcam_wrong", "mistakes_by_pair"}
    drawn = figures_of("03_error_analysis", left_out=need_images | {"reliability_before"})
    assert names_in(tmp_path / "run" / "figures") == drawn
    assert SAMPLE_NOTICE not in printed and "these are the published predictions" in printed
    assert "Run laptop, data set msl-v1, 120 predictions" in printed


def test_classify_new_images(
    smoke_run, sample_dir: Path, execute: Callable, prepared: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(marsclf, "load_classifier", partial(load_classifier, cache=prepared))
    folder = tmp_path / "my images"
    folder.mkdir()
    for path in sorted((sample_dir / "calibrated").iterdir())[:12]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_text("no image")
    model_file = str(smoke_run[0] / "classifier.safetensors")
    given = {"folder": str(folder), "model_file": model_file, "shown_images": 8}
    printed = execute("05_classify_new_images", **given)
    assert "13 images" in printed and "1 could not be read" in printed
    assert "12 images chosen, the first 8 shown" in printed and SAMPLE_NOTICE not in printed
    assert names_in(tmp_path / "run" / "figures") == figures_of("05_classify_new_images")


def test_the_ladder(sample_dir: Path, eager: None, execute: Callable, tmp_path: Path) -> None:
    """On fewer images than a batch holds."""
    few, run = shutil.copytree(sample_dir, tmp_path / "few"), tmp_path / "run"
    for name in MSL_V1.lists.values():
        lines = (few / name).read_text().splitlines(keepends=True)
        (few / name).write_text("".join(lines[:9]))
    tiny = {"backbone": "EfficientNetLite0", "sides": [33, 44], "side": 40, "views": 1}
    tiny |= {"frozen_epochs": 2, "upper_epochs": 1, "steps": [], "data_dir": str(few)}
    assert SAMPLE_NOTICE in execute("04_reference_reproduction", **tiny)
    assert names_in(run / "figures") == figures_of("04_reference_reproduction")
    ((name, rung),) = json.loads((run / "rungs.json").read_text()).items()
    assert name == "original"
    assert [epoch["stage"] for epoch in rung["history"]] == ["frozen", "frozen", "upper"]
    predictions = read_predictions(run / "original" / "predictions.csv")
    assert rung["splits"] == metrics.measure(predictions)
    assert rung["dataset"] == "sample" and rung["commit"] == "unknown"
    assert not paths.RESULTS.exists()  # sample data is never entered in the ledger
