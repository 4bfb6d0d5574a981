"""The benchmark: what it counts, that it runs on a small scale, and what it may store."""

import json
import subprocess
from pathlib import Path

import keras
import pytest
from tiny_project import enter_project, make_project

from marsclf import bench, ledger, paths
from marsclf.backbones import build_backbone
from marsclf.data import Dataset
from marsclf.errors import MarsclfError
from marsclf.images import Augmentation
from marsclf.presets import parameters_of
from marsclf.tables import cost_table, first_result


def test_flops_of_a_hand_worked_network() -> None:
    pixels = keras.Input((8, 6, 3))
    x = keras.layers.Conv2D(5, 3, strides=2, padding="same")(pixels)  # 4 x 3 x 5 x 27
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)  # 4 x 3 x 5 x 9
    x = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x))  # 5 x 7
    model = keras.Model(pixels, x)
    assert bench.count_flops(model) == 2 * (4 * 3 * 5 * 27 + 4 * 3 * 5 * 9 + 5 * 7)


def test_flops_of_lite0_are_about_the_published_ones() -> None:
    # 407 million multiply-adds (the TensorFlow repository), which count more than the products
    # and the classifier's 1280 x 1000.
    flops = bench.count_flops(build_backbone("EfficientNetLite0", weights=None))
    assert flops / 2 + 1280 * 1000 == pytest.approx(407e6, rel=0.06)


def test_spread() -> None:
    assert bench.spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.fixture(scope="module")
def small(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The measurements, all but the pipeline's, on a few sample images."""
    files = [sample_dataset.root / path for path in sample_dataset.index["path"]]
    folder = tmp_path_factory.mktemp("bench")
    preset = parameters_of("smoke")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"REPEATS": 2, "IMAGES": 40, "REFERENCE_IMAGES": 10}.items():
            patch.setattr(bench, name, value)
        patch.setattr(bench, "GROWTH", (20, 400))
        return {
            "network": bench.measure_network(files, folder),
            "images": bench.measure_images(files, Augmentation(**preset["augmentation"])),
            "training": bench.measure_training(files, preset, folder),
            "classification": bench.measure_growth(files, preset, folder),
            "reference": bench.measure_reference(files, folder),
        }


def test_the_measurements_make_sense(small: dict) -> None:
    network = small["network"]
    assert network["largest_difference"] < 1e-4 and network["smallest_cosine"] > 0.99999
    # Of two turns the better, because other work on the machine can spoil one.
    assert network["engine_share_of_ceiling"]["max"] > 0.05
    assert network["engine_share_of_ceiling"]["min"] < 1.2
    times = network["ms_an_image"]
    assert times["engine"]["min"] <= times["engine"]["median"] <= times["engine"]["max"]
    assert times["keras_one_by_one"]["max"] > times["engine"]["min"]
    assert [size["images"] for size in small["classification"]] == [20, 400]
    memory = [size["peak_rss_mb"] for size in small["classification"]]
    assert memory[1] < 1.2 * memory[0]
    assert small["training"]["image_size"] == 96
    assert small["reference"]["library_against_reference"]["max"] > 1


def test_sample_data_are_measured_but_not_stored(
    small: dict,
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter_project(monkeypatch, make_project(tmp_path))
    preset = parameters_of("laptop") | {"augmentation": {}}
    monkeypatch.setattr(bench, "parameters_of", lambda _: preset)
    one = {"wall_s": {"command": 100.0}, "peak_rss_mb": 900}
    run = dict.fromkeys(("cold", "warm", "head_cold", "head_warm_another_head"), one)
    names = {"classification": "growth"}
    monkeypatch.setattr(bench, "_in_new_process", lambda work, *arguments: work(*arguments))
    for name, result in (small | {"run": run}).items():
        function = f"measure_{names.get(name, name)}"
        monkeypatch.setattr(bench, function, lambda *_, result=result: result)
    result = bench.bench(sample_dir)
    assert not (paths.RESULTS / "bench.json").exists()
    printed = capsys.readouterr().out
    assert "SAMPLE DATA" in printed and "Nothing was stored" in printed
    assert cost_table(json.loads(json.dumps(result))) in printed
    seconds = result["run"]["cold"]["wall_s"]["command"]
    assert f"`make run` takes {seconds:.0f} s" in first_result(result)
    assert "| `make run`, nothing cached | 100 s, 900 MB | one run |" in printed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, make_project(tmp_path / "project"))
    for folder in ("marsclf", "results"):
        (tmp_path / "project" / folder).mkdir()
    (paths.RESULTS / ledger.NAME).write_text("time,commit,preset\nthen,abc,laptop\n")
    return tmp_path / "project"


def test_the_pipeline_is_measured_in_a_copy_and_its_scores_are_entered(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def fake(command: list[str], cwd: Path, env: dict, **_: object) -> subprocess.CompletedProcess:
        assert cwd != project and env["PYTHONPATH"] == str(cwd) and (cwd / "notebooks").is_dir()
        preset = command[command.index("--preset") + 1]
        commands.append(command[command.index("--preset") + 1 :])
        (cwd / "runs" / preset).mkdir(parents=True, exist_ok=True)
        result = {"wall_s": {"total": 1.5}, "peak_rss_mb": len(commands)}
        (cwd / "runs" / preset / "metrics.json").write_text(json.dumps(result))
        with (cwd / "results" / ledger.NAME).open("a") as file:
            file.write(f"now,unknown,{preset}\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(bench, "commit", lambda: "def")
    runs = bench.measure_run(tmp_path / "images", tmp_path / "copy")
    assert commands[0] == commands[1] == ["laptop"]
    assert commands[3] == ["laptop-head", "--set", "head_hidden=0"]
    assert [run["peak_rss_mb"] for run in runs.values()] == [1, 2, 3, 4]
    assert runs["cold"]["wall_s"].keys() == {"total", "command"}
    lines = (paths.RESULTS / ledger.NAME).read_text().splitlines()
    assert lines[1:3] == ["then,abc,laptop", "now,def,laptop"] and len(lines) == 6


def test_a_run_that_fails_ends_the_benchmark(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "error: the disk is full.\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MarsclfError, match=r"run .* failed: error: the disk is full\."):
        bench.measure_run(tmp_path / "images", tmp_path / "copy")
