"""The benchmark: what it counts, that it runs on a small scale, and what it stores."""

import dataclasses
import json
import subprocess
from pathlib import Path

import keras
import pytest
from tiny_project import enter_project

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.images.views import Augmentation
from marsclf.pipeline.presets import parameters_of
from tools import bench, documents, measurements


def test_flops_of_a_hand_worked_network() -> None:
    pixels = keras.Input((8, 6, 3))
    x = keras.layers.Conv2D(5, 3, strides=2, padding="same")(pixels)  # 4 x 3 x 5 x 27
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)  # 4 x 3 x 5 x 9
    x = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x))  # 5 x 7
    flops = measurements.count_flops(keras.Model(pixels, x))
    assert flops == 2 * (4 * 3 * 5 * 27 + 4 * 3 * 5 * 9 + 5 * 7)


def two_layers(_: str, image_size: int | tuple[int, int] = 224) -> keras.Model:
    """Return a backbone of two blocks, stem and top."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = keras.Input((*sides, 3))
    x = keras.layers.Conv2D(8, 3, strides=4, name="stem_conv")(pixels)
    x = keras.layers.Conv2D(16, 3, strides=4, name="top_conv")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x))


@pytest.fixture(scope="module")
def small(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All measurements but those of commands, on a few sample images."""
    files = [sample_dataset.root / path for path in sample_dataset.index["path"]]
    folder = tmp_path_factory.mktemp("bench")
    parameters = parameters_of("smoke", {"finetune_blocks": ["top"]})
    sizes = {"REPEATS": 2, "BATCH": 8, "IMAGES": 40, "REFERENCE_IMAGES": 10, "BLOCKS": ("top",)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(measurements, name, value)
        patch.setattr(bench, "GROWTH", (100, 300))
        # Compiling the training of Lite0 four times takes half a minute.
        patch.setattr(measurements, "build_backbone", two_layers)
        augmentation = Augmentation(**parameters["augmentation"])
        return {
            "network": measurements.measure_network(files, folder),
            "images": measurements.measure_images(files, augmentation),
            "training": measurements.measure_training(files, parameters, folder),
            "classification": bench.measure_growth(files, folder),
            "reference": measurements.measure_reference(files, folder),
        }


def test_the_measurements_make_sense(small: dict) -> None:
    network, classification = small["network"], small["classification"]
    times = network["ms_per_image"]
    assert times["engine"]["min"] <= times["engine"]["median"] <= times["engine"]["max"]
    assert times["keras_one_by_one"]["max"] > times["engine"]["min"]
    assert small["training"]["image_size"] == 96
    ways = small["reference"]["ms_per_image"]
    assert ways["library"]["min"] < ways["reference"]["max"]
    assert [size["images"] for size in classification] == [100, 300]
    zooms = classifier_file.read(paths.CLASSIFIER)[1]["zooms"]
    assert [list(size["zooms"]) for size in classification] == [zooms, zooms]
    memory = [size["peak_rss_mb"] for size in classification]
    assert memory[1] - memory[0] < 20  # the views of 200 images take 44 MB
    assert memory[0] < 500  # with Keras it would be more, as in the process of these tests


@pytest.mark.parametrize("name", ["sample", "msl-v1"])
def test_only_figures_of_the_real_data_are_stored(
    name: str,
    small: dict,
    sample_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter_project(monkeypatch, tmp_path)
    parameters = {"augmentation": {}, "seed": 0}
    dataset = dataclasses.replace(sample_dataset, name=name)
    monkeypatch.setattr(bench, "open_dataset", lambda _: dataset)
    monkeypatch.setattr(bench, "parameters_of", lambda _: parameters)
    run = {"wall_s": {"command": 100.0}, "peak_rss_mb": 900}
    measured = small | {"growth": small["classification"], "runs": dict.fromkeys(bench.RUNS, run)}
    measured["start"] = {key: measurements.spread([9, 1, 2]) for key in ("first_s", "again_s")}

    def in_new_process(measure: object, *_: object) -> object:
        return measured[measure.__name__.removeprefix("measure_")]

    monkeypatch.setattr(bench, "in_new_process", in_new_process)
    result = bench.bench(None)
    printed = capsys.readouterr().out
    assert "| `make run`, nothing cached | 100 s, 900 MB | one run |" in printed
    assert "predict` for one image, the first time | 2.0 s | 1.0 s to 9.0 s |" in printed
    assert result["recipe"] == ledger.recipe_digest({"parameters": parameters | {"seed": 5}})
    assert (paths.RESULTS / "bench.json").exists() is (name == "msl-v1")
    assert ("Nothing was stored" in printed) is (name != "msl-v1")


def test_the_archive_counts_fitting_once_per_zoom() -> None:
    row = {"images": 4000, "zooms": [1.0, 0.5, 2.0], "images_per_s": 100.0, "peak_rss_mb": 300}
    images = {name: {"median": 0.25} for name in ("decode", "whole_image")}
    measured = {"classification": [row], "images": {"ms_per_image": images}}
    measured["hardware"] = {"cores": 2}
    template = documents.TEMPLATES.get_template("archive.md")
    text = template.render(bench=measured, is_outdated=False)
    assert "| of which decoding, and fitting at 3 zooms | 1.00 ms |" in text
    assert f"| 31 million such images | {31e6 * 2 / 100 / 3600:.0f} core-hours |" in text


@pytest.mark.parametrize("failing", [None, 2])
def test_runs_are_measured_in_a_copy_and_no_score_is_lost(failing, tmp_path, monkeypatch) -> None:
    project, presets = tmp_path / "project", []
    enter_project(monkeypatch, project)
    for folder in ("marsclf", "notebooks", "presets", "results"):
        (project / folder).mkdir(parents=True)
    (paths.RESULTS / ledger.NAME).write_text("time,commit,preset\nthen,abc,laptop\n")

    def fake(command: list[str], cwd: Path, env: dict, **_: object) -> subprocess.CompletedProcess:
        assert cwd != project and env["PYTHONPATH"] == str(cwd) and (cwd / "notebooks").is_dir()
        presets.append(command[command.index("--preset") + 1])
        with (cwd / "results" / ledger.NAME).open("a") as file:
            file.write(f"{len(presets)},unknown,{presets[-1]}\n")
        # Another run scores the test split at the same time.
        with (paths.RESULTS / ledger.NAME).open("a") as file:
            file.write(f"meanwhile {len(presets)},fed,laptop\n")
        if len(presets) == failing:
            return subprocess.CompletedProcess(command, 1, "", "error: the disk is full.\n")
        (cwd / "runs" / presets[-1]).mkdir(parents=True, exist_ok=True)
        record = {"wall_s": {"total": 1.5}, "peak_rss_mb": len(presets)}
        (cwd / "runs" / presets[-1] / "metrics.json").write_text(json.dumps(record))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(bench, "commit", lambda: "def")
    if failing:
        with pytest.raises(MarsclfError, match=r"run .* failed: error: the disk is full\."):
            bench.measure_runs(tmp_path / "images", tmp_path / "copy")
    else:
        runs = bench.measure_runs(tmp_path / "images", tmp_path / "copy")
        assert [run["peak_rss_mb"] for run in runs.values()] == [1, 2, 3, 4]
        assert runs["cold"]["wall_s"].keys() == {"total", "command"}
    assert presets == ["laptop", "laptop", "laptop-head", "laptop-head"][:failing]
    lines = (paths.RESULTS / ledger.NAME).read_text().splitlines()[2:]
    numbered = enumerate(presets, start=1)
    assert lines == [
        line for n, name in numbered for line in (f"meanwhile {n},fed,laptop", f"{n},def,{name}")
    ]
