"""The notebooks on the sample data: a run of 01 to 03 from the command line, and each one alone."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import keras
import nbformat
import numpy as np
import pandas as pd
import psutil
from PIL import Image
from tiny_project import (
    SIZE,
    SMALL,
    environment_of,
    pretend_gpu,
    write_predictions,
    write_preset,
)

from marsclf.classify.classifier import load_classifier
from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1, SAMPLE_NOTICE
from marsclf.evaluation import metrics
from marsclf.evaluation.calibration import with_temperature
from marsclf.evaluation.predictions import probabilities_of, read_predictions, run_record
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view
from marsclf.pipeline.presets import NOTEBOOKS, parse_settings

FIGURES = {
    "01": "bursts class_counts class_gallery class_shift look_alikes near_duplicates "
    "sizes_and_brightness sols_and_cameras",
    "02": "learning_curves random_views",
    "03": "confident_mistakes confusion_matrix coverage_accuracy error_rate_per_class "
    "errors_by_camera_and_sol errors_per_class gradcam_right gradcam_wrong mistakes_by_pair "
    "reliability reliability_before",
    "04": "as_read ladder",
    "05": "thumbnails gradcam",
}
NEED_IMAGES = {"confident_mistakes", "gradcam_right", "gradcam_wrong", "mistakes_by_pair"}


def figures_of(number: str, left_out: set[str] = frozenset()) -> set[str]:
    return {f"{number}_{name}.png" for name in set(FIGURES[number].split()) - left_out}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def start(
    name: str, project: Path, output: Path, environment: dict | None = None, **parameters: object
) -> subprocess.Popen:
    """Start to execute one notebook of the copied project into `output`."""
    code = "import json, sys; from pathlib import Path; from marsclf.pipeline.run import execute; "
    code += "name, output, parameters = json.loads(sys.argv[1]); "
    code += "execute(name, Path(output), parameters)"
    given = [name, str(output / f"{name}.ipynb"), {"run_dir": str(output)} | parameters]
    command, streams = [sys.executable, "-c", code, json.dumps(given)], {"stderr": subprocess.PIPE}
    environment = environment or environment_of(project)
    return subprocess.Popen(command, cwd=project, env=environment, text=True, **streams)


def execute(
    name: str, project: Path, output: Path, environment: dict | None = None, **parameters: object
) -> tuple[str, int]:
    """Execute one notebook; return what it printed, and how many pictures it shows."""
    with start(name, project, output, environment, **parameters) as process:
        _, message = process.communicate()
    assert process.returncode == 0, message
    return check_outputs(output / f"{name}.ipynb")


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
    assert pictures == tuple(len(figures_of(name[:2])) for name in NOTEBOOKS)
    assert names_in(folder / "figures") == set().union(*(figures_of(n[:2]) for n in NOTEBOOKS))
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


def test_own_images_in_mixed_precision_after_a_kill(project, sample_dataset, tmp_path) -> None:
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
    printed, pictures = execute("01_data_exploration", project, run, data_dir=str(root))
    assert f"Data set: my images, {len(chosen)} images" in printed and "no sols or cam" in printed
    assert pictures == len(figures_of("01", left_out={"sols_and_cameras"}))
    settings = parse_settings(SMALL) | {"mixed_precision": True, "temperature": 1.0}
    text = f"extends: smoke\nparameters: {json.dumps(settings)}"
    write_preset(project / "presets" / "mine.yaml", text)
    environment = pretend_gpu(tmp_path / "gpu", project, (7, 5))
    environment["MARSCLF_CACHE_DIR"] = str(tmp_path / "cache")
    by_hand = {"environment": environment, "preset": "mine", "data_dir": str(root)}
    with start("02_fine_tuning", project, run, **by_hand) as process:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("cache/training/*/progress.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for each in (*psutil.Process(process.pid).children(), process):
            each.kill()
    printed, _ = execute("02_fine_tuning", project, run, **by_hand)
    assert "computing in float16" in printed and "head epoch 1/2" not in printed
    assert "finetune epoch 1/1" in printed
    stored = read_predictions(run / "predictions.csv")
    classifier = load_classifier(run / "classifier.safetensors", tmp_path / "cache")
    table = classifier.predict([root / path for path in stored["path"]])
    differences = np.abs(table["confidence"] - stored["confidence"])  # of float32 to 16 bits
    assert differences.mean() < 0.03 and differences.max() < 0.2
    assert set(table["predicted"]) <= {*names.values()}


def test_error_analysis_of_the_published_predictions(project: Path, tmp_path: Path) -> None:
    root, output = tmp_path / "project", tmp_path / "by hand"
    shutil.copytree(project, root, ignore=shutil.ignore_patterns("runs", "cache"))
    told = root / "results" / "classifiers" / "parts" / "familiarity.csv.gz"
    write_predictions(root / "results" / "laptop" / "predictions.csv.gz")
    told.parent.mkdir(parents=True)
    table = pd.DataFrame({"known": [True, True, False], "familiarity": [0.9, 0.7, 0.1]})
    table.assign(class_name=["wheel", "drill", "Sun"]).to_csv(told)
    printed, pictures = execute("03_error_analysis", root, output, dataset="msl-v1")
    drawn = figures_of("03", left_out=NEED_IMAGES | {"reliability_before"}) | {"03_familiarity.png"}
    assert names_in(output / "figures") == drawn and pictures == len(drawn)
    assert SAMPLE_NOTICE not in printed and "these are the published predictions" in printed
    assert "Run laptop, data set msl-v1, 120 predictions" in printed


def test_classify_new_images(smoke_run, sample_dir: Path, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    for path in sorted((sample_dir / "calibrated").iterdir())[:12]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_text("no image")
    given = {"folder": str(folder), "model_file": str(smoke_run[0] / "classifier.safetensors")}
    given["shown_images"] = 8
    printed, pictures = execute("05_classify_new_images", project, tmp_path, **given)
    assert "13 images" in printed and "1 could not be read" in printed
    assert "12 images chosen, the first 8 shown" in printed and SAMPLE_NOTICE not in printed
    assert names_in(tmp_path / "figures") == figures_of("05") and pictures == 2
    assert "broken.jpg" in (tmp_path / "05_classify_new_images.ipynb").read_text()


def test_the_ladder(sample_dir: Path, project: Path, tmp_path: Path) -> None:
    """On fewer images than a batch holds."""
    few = shutil.copytree(sample_dir, tmp_path / "few")
    for name in MSL_V1.lists.values():
        lines = (few / name).read_text().splitlines(keepends=True)
        (few / name).write_text("".join(lines[:9]))
    tiny = {"backbone": "EfficientNetLite0", "sides": [33, 44], "side": 40, "views": 1}
    tiny |= {"frozen_epochs": 2, "upper_epochs": 1, "steps": [], "data_dir": str(few)}
    printed, pictures = execute("04_reference_reproduction", project, tmp_path, **tiny)
    assert SAMPLE_NOTICE in printed
    assert names_in(tmp_path / "figures") == figures_of("04") and pictures == 2
    ((name, rung),) = json.loads((tmp_path / "rungs.json").read_text()).items()
    assert name == "original"
    assert [epoch["stage"] for epoch in rung["history"]] == ["frozen", "frozen", "upper"]
    predictions = read_predictions(tmp_path / "original" / "predictions.csv")
    assert rung["splits"] == metrics.measure(predictions)
    assert rung["dataset"] == "sample" and rung["commit"] == "unknown"
    assert not (project / "results").exists()  # sample data is never entered in the ledger
