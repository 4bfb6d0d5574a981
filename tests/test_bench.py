"""The benchmark: what it counts, that it runs on a small scale, and what it may store."""

import copy
import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest
from tiny_project import enter_project, make_project

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.data.msl import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.images.views import Augmentation
from marsclf.networks.backbones import build_backbone
from marsclf.pipeline.presets import parameters_of
from tools import bench, throughput
from tools.tables import archive_table, cost_table, first_result


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


def two_layers(_: str, image_size: int | tuple[int, int]) -> keras.Model:
    """Return a backbone of two blocks, stem and top."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = keras.Input((*sides, 3))
    x = keras.layers.Conv2D(8, 3, strides=4, name="stem_conv")(pixels)
    x = keras.layers.Conv2D(16, 3, strides=4, name="top_conv")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x))


@pytest.fixture(scope="module")
def small(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The measurements, all but the pipeline's, on a few sample images."""
    files = [sample_dataset.root / path for path in sample_dataset.index["path"]]
    folder = tmp_path_factory.mktemp("bench")
    preset = parameters_of("smoke", {"finetune_blocks": ["top"]})
    with pytest.MonkeyPatch.context() as patch:
        smaller = {
            "REPEATS": 2,
            "BATCH": 8,
            "IMAGES": 40,
            "REFERENCE_IMAGES": 10,
            "BLOCKS": ("top",),
        }
        for name, value in smaller.items():
            patch.setattr(bench, name, value)
        patch.setattr(throughput, "GROWTH", (100, 300))
        network = bench.measure_network(files, folder)
        # Lite0 once is enough: to compile its training four times takes half a minute.
        patch.setattr(bench, "build_backbone", two_layers)
        return {
            "network": network,
            "images": bench.measure_images(files, Augmentation(**preset["augmentation"])),
            "training": bench.measure_training(files, preset, folder),
            "classification": throughput.measure_growth(files, folder),
            "reference": bench.measure_reference(files, folder),
        }


def test_the_measurements_make_sense(small: dict) -> None:
    network = small["network"]
    assert network["largest_difference"] < 1e-4 and network["smallest_cosine"] > 0.99999
    # Wide, because other work on the machine can spoil what is timed: a wrong unit is far off.
    assert network["engine_share_of_ceiling"]["max"] > 0.05
    assert network["engine_share_of_ceiling"]["min"] < 5
    times = network["ms_an_image"]
    assert times["engine"]["min"] <= times["engine"]["median"] <= times["engine"]["max"]
    assert times["keras_one_by_one"]["max"] > times["engine"]["min"]
    assert [size["images"] for size in small["classification"]] == [100, 300]
    memory = [size["peak_rss_mb"] for size in small["classification"]]
    assert memory[1] - memory[0] < 20  # 200 images' views take 44 MB
    assert memory[0] < 500  # Keras alone takes more, and so does the process of these tests
    assert small["training"]["image_size"] == 96
    ways = small["reference"]["ms_an_image"]
    assert ways["library"]["min"] < ways["reference"]["max"]


def test_the_shipped_classifier_is_timed_at_all_its_zooms(small: dict) -> None:
    zooms = classifier_file.read(paths.CLASSIFIER)[1]["zooms"]
    assert [list(size["zooms"]) for size in small["classification"]] == [zooms, zooms]


def test_what_is_timed_is_what_predict_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    class Fake:
        zooms = (1.0, 0.5)

        def rows(self, items: Iterator[str], threshold: float) -> Iterator[None]:
            asked.append((list(items), threshold))
            yield

    def load(*arguments: object, cache: Path) -> Fake:
        assert arguments == () and cache == tmp_path
        return Fake()

    monkeypatch.setattr(throughput, "load_classifier", load)
    zooms, seconds, memory = throughput._classify([Path("a.jpg"), Path("b.jpg")], tmp_path)
    assert asked == [(["a.jpg", "b.jpg"], metrics.THRESHOLD)]
    assert zooms == (1.0, 0.5) and seconds >= 0 and memory > 1


def test_the_archive_counts_fitting_once_a_zoom(small: dict) -> None:
    result = copy.deepcopy(small) | {"hardware": {"cores": 2}}
    result["images"]["ms_an_image"] = {name: {"median": 0.25} for name in ("decode", "whole_image")}
    result["classification"][-1]["zooms"] = [1.0, 0.5, 2.0]
    assert "| of it decoding and fitting at 3 zooms | 1.00 ms |" in archive_table(result)
    del result["classification"][-1]["zooms"]  # as a benchmark of one look was stored
    assert "| of it decoding and fitting | 0.50 ms |" in archive_table(result)


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
    start = {name: bench.spread([seconds]) for name, seconds in (("first_s", 9), ("again_s", 2))}
    names = {"classification": "growth"}
    monkeypatch.setattr(bench, "in_new_process", lambda work, *arguments: work(*arguments))
    for name, result in (small | {"start": start, "run": run}).items():
        function = f"measure_{names.get(name, name)}"
        monkeypatch.setattr(bench, function, lambda *_, result=result: result)
    result = bench.bench(sample_dir)
    assert not (paths.RESULTS / "bench.json").exists()
    printed = capsys.readouterr().out
    assert "SAMPLE DATA" in printed and "Nothing was stored" in printed
    assert cost_table(json.loads(json.dumps(result))) in printed
    assert result["recipe"] == ledger.recipe_digest({"parameters": preset | {"seed": 5}})
    seconds = result["run"]["cold"]["wall_s"]["command"]
    assert f"`make run` takes {seconds:.0f} s" in first_result(result)
    assert "| `make run`, nothing cached | 100 s, 900 MB | one run |" in printed
    assert "predict` for one image, the first time | 9.0 s | 9.0 s to 9.0 s |" in printed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, make_project(tmp_path / "project"))
    for folder in ("marsclf", "results"):
        (tmp_path / "project" / folder).mkdir()
    (paths.RESULTS / ledger.NAME).write_text(
        "time,commit,preset\nthen,abc,laptop\nearlier,unknown,laptop\n"
    )
    return tmp_path / "project"


def test_a_first_start_has_nothing_prepared(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []

    def fake(command: list[str], cwd: Path, env: dict, **_: object) -> subprocess.CompletedProcess:
        assert command[2:] == ["marsclf", "predict", "a.jpg"] and env["PYTHONPATH"] == str(cwd)
        assert (cwd / "marsclf").is_dir()
        prepared.append((cwd / "cache").exists())
        (cwd / "cache").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    seconds = bench.measure_start(Path("a.jpg"), tmp_path / "copies")
    assert prepared == [False, True] * bench.REPEATS
    assert seconds.keys() == {"first_s", "again_s"}


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
    assert lines[1:3] == ["then,abc,laptop", "earlier,unknown,laptop"]
    heads = ["laptop-head"] * 2
    assert lines[3:] == [f"now,def,{preset}" for preset in ("laptop", "laptop", *heads)]


def test_a_run_that_fails_ends_the_benchmark_and_no_score_is_lost(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fake(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        calls.append(command)
        with (cwd / "results" / ledger.NAME).open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([len(calls), "unknown", "laptop"])
        # Another run, at the same time, scores the test split as well.
        with (paths.RESULTS / ledger.NAME).open("a") as file:
            file.write(f"meanwhile {len(calls)},fed,laptop\n")
        if len(calls) == 2:
            return subprocess.CompletedProcess(command, 1, "", "error: the disk is full.\n")
        (cwd / "runs" / "laptop").mkdir(parents=True)
        result = {"wall_s": {"total": 1.5}, "peak_rss_mb": 1}
        (cwd / "runs" / "laptop" / "metrics.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(bench, "commit", lambda: "def")
    with pytest.raises(MarsclfError, match=r"run .* failed: error: the disk is full\."):
        bench.measure_run(tmp_path / "images", tmp_path / "copy")
    lines = (paths.RESULTS / ledger.NAME).read_text().splitlines()[3:]
    assert lines == [
        "meanwhile 1,fed,laptop",
        "1,def,laptop",
        "meanwhile 2,fed,laptop",
        "2,def,laptop",
    ]
