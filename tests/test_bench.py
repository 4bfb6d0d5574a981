"""Benchmarks and the costs of B7: on a small scale, on the CPU, and what is stored of them."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf
from tiny_project import enter_project

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.networks import backbones
from marsclf.pipeline.presets import parameters_of
from tools import bench, documents, gpu_cost


def two_blocks(_: str, image_size: int | tuple = 224, mixed: bool = False, **__) -> keras.Model:
    """Return a backbone of two blocks, stem and top, perhaps in the precision of a new GPU."""
    policy = "mixed_bfloat16" if mixed else "float32"
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = keras.Input((*sides, 3))
    x = keras.layers.Conv2D(8, 3, strides=4, dtype=policy, name="stem_conv")(pixels)
    x = keras.layers.Conv2D(16, 3, strides=4, dtype=policy, name="top_conv")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(dtype=policy)(x))


def test_a_benchmark_is_complete_and_stored(sample_dataset, tmp_path, monkeypatch, capsys) -> None:
    """All measurements but those of commands, on a few images that pass for the real ones."""
    parameters = parameters_of("smoke", {"finetune_blocks": ["top"]})
    enter_project(monkeypatch, tmp_path)
    sizes = {"REPEATS": 2, "BATCH": 8, "IMAGES": 40, "BLOCKS": ("top",), "GROWTH": (9,)}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(backbones, "build_backbone", two_blocks)
    run = {"wall_s": {"command": 100.0}, "peak_rss_mb": 900}
    start = {key: bench.spread([9, 1, 2]) for key in ("first_s", "again_s")}
    commands = {"measure_start": start, "measure_runs": dict.fromkeys(bench.RUNS, run)}

    def in_new_process(measure, *arguments) -> object:
        return commands.get(measure.__name__) or measure(*arguments)

    monkeypatch.setattr(bench, "in_new_process", in_new_process)
    classifier = SimpleNamespace(zooms=[1.0, 0.5], predict=lambda files: time.sleep(0.01))
    monkeypatch.setattr(bench, "load_classifier", lambda cache: classifier)
    monkeypatch.setattr(bench, "parameters_of", lambda _: parameters)
    monkeypatch.setattr(
        bench, "open_dataset", lambda _: dataclasses.replace(sample_dataset, name="msl-v1")
    )
    result = bench.bench(None)
    times = result["network"]["ms_per_image"]["engine"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert result["recipe"] == ledger.recipe_digest({"parameters": parameters | {"seed": 5}})
    assert json.loads((paths.RESULTS / "bench.json").read_text()).keys() == result.keys()
    printed = capsys.readouterr().out
    assert "| `make run`, nothing cached | 100 s, 900 MB | one run |" in printed
    assert "predict` for one image, the first time | 2.0 s | 1.0 s to 9.0 s |" in printed
    archive = documents.TEMPLATES.get_template("archive.md")
    text = archive.render(bench=result, is_outdated=False)
    rate, cores = result["classification"][0]["images_per_s"], result["hardware"]["cores"]
    assert f"| 31 million such images | {31e6 * cores / rate / 3600:.0f} core-hours |" in text


@pytest.mark.parametrize("failing", [None, 2])
def test_runs_are_measured_in_a_copy_and_no_score_is_lost(failing, tmp_path, monkeypatch) -> None:
    project, presets = tmp_path / "project", []
    enter_project(monkeypatch, project)
    for folder in ("marsclf", "notebooks", "presets", "results"):
        (project / folder).mkdir(parents=True)
    (paths.RESULTS / ledger.NAME).write_text("time,commit,preset\nthen,abc,laptop\n")

    def fake(command: list[str], cwd: Path, env: dict, **_: object) -> subprocess.CompletedProcess:
        assert cwd != project and env["PYTHONPATH"] == str(cwd)
        presets.append(command[command.index("--preset") + 1])
        with (cwd / "results" / ledger.NAME).open("a") as file:
            file.write(f"{len(presets)},unknown,{presets[-1]}\n")
        if len(presets) == failing:
            return subprocess.CompletedProcess(command, 1, "", "error: the disk is full.\n")
        record = {"wall_s": {"total": 1.5}, "peak_rss_mb": len(presets)}
        (cwd / "runs" / presets[-1]).mkdir(parents=True, exist_ok=True)
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
    assert presets == ["laptop", "laptop", "laptop-head", "laptop-head"][:failing]
    lines = (paths.RESULTS / ledger.NAME).read_text().splitlines()[2:]
    assert lines == [f"{number},def,{preset}" for number, preset in enumerate(presets, start=1)]


def test_both_parts_of_b7_are_measured_stored_and_shown(tmp_path, monkeypatch) -> None:
    parameters = parameters_of("b7", {"image_size": 64, "finetune_batch_size": 2})
    enter_project(monkeypatch, tmp_path)
    (tmp_path / "README.md").write_text("<!-- b7-gpu:begin -->\nold\n<!-- b7-gpu:end -->\n")
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(gpu_cost, "parameters_of", lambda _: parameters)
    monkeypatch.setattr(gpu_cost, "load_backbone", two_blocks)
    with pytest.raises(MarsclfError, match="sees no GPU.*measure B7 on a machine with a GPU"):
        gpu_cost.measure_costs()
    memory = tf.config.experimental
    monkeypatch.setattr(memory, "reset_memory_stats", lambda _: None)
    monkeypatch.setattr(memory, "get_memory_info", lambda _: {"peak": 2_340_000_000})
    monkeypatch.setattr(gpu_cost, "has_gpu", lambda: True)
    result = gpu_cost.measure_costs()
    assert json.loads((paths.RESULTS / "b7_gpu_cost.json").read_text()) == result
    text = (tmp_path / "README.md").read_text()
    for part in ("features", "finetune"):
        rate = result["parts"][part]["images_per_s"]["median"]
        assert f"| {part} | {rate:.4g} | " in text
    assert text.count(" | 2.3 GB |\n") == 2
