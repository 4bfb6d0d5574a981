"""What the work costs, measured side by side on this machine: python -m marsclf bench.

Times are medians of repeats in which all contestants take turns; each comes with the smallest and
the largest value. Ratios are formed turn by turn, because a machine's speed drifts.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import keras
import numpy as np

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.files import write_json
from marsclf.images.decode import read_rgb
from marsclf.images.views import Augmentation, fit_view, random_view
from marsclf.networks.backbones import BLOCKS, build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import compare_outputs, make_predictor, predict_each
from marsclf.pipeline.presets import DEFAULT_PRESET, parameters_of
from marsclf.provenance import commit, hardware
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, compile_stage, join, one_hot
from tools.publish import rewrite_tables
from tools.tables import cost_table
from tools.throughput import in_new_process, measure_growth

REPEATS = 5
BATCH = 32  # of Keras, its own default
IMAGES = 256  # a turn
MATRIX = 2048
REFERENCE_IMAGES = 200
REFERENCE_SIZE = (193, 256)  # height, width in the reference's notebook


def bench(data_dir: str | Path | None = None) -> dict:
    """Measure everything, print it and, for the real data, store it in results/bench.json."""
    dataset = open_dataset(data_dir)
    files = [dataset.root / path for path in dataset.index["path"]]
    preset = parameters_of(DEFAULT_PRESET)
    with tempfile.TemporaryDirectory(prefix="marsclf-bench-") as folder:
        result = {
            "commit": commit(),
            "dataset": dataset.name,
            "data_digest": dataset.digest,
            # `verify` compares it with that of the published run.
            "recipe": ledger.recipe_digest({"parameters": preset}),
            "hardware": hardware(),
            "repeats": REPEATS,
        }
        cache, augmentation = Path(folder), Augmentation(**preset["augmentation"])
        for name, measure, *arguments in (
            ("network", measure_network, files, cache),
            ("images", measure_images, files, augmentation),
            ("training", measure_training, files, preset, cache),
            ("classification", measure_growth, files, cache),
            ("reference", measure_reference, files, cache),
            ("start", measure_start, files[0], cache),
            ("run", measure_run, dataset.root, cache),
        ):
            started = time.monotonic()
            print(f"measuring: {name} ...", file=sys.stderr, flush=True)
            result[name] = in_new_process(measure, *arguments)
            print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(cost_table(result))
    if dataset.name == "sample":
        print(f"{data.SAMPLE_NOTICE} Nothing was stored.")
    else:
        write_json(paths.RESULTS / "bench.json", result)
        rewrite_tables()
        print(f"Stored in {paths.RESULTS / 'bench.json'} and in the README.")
    return result


def count_flops(model: keras.Model) -> int:
    """Return the additions and multiplications of the convolutions and dense layers, an image."""
    total = 0
    for layer in model.layers:
        if isinstance(
            layer, keras.layers.Dense | keras.layers.Conv2D | keras.layers.DepthwiseConv2D
        ):
            places = int(np.prod(layer.output.shape[1:3])) if len(layer.output.shape) == 4 else 1
            total += 2 * int(np.prod(layer.kernel.shape)) * places
    return total


def measure_network(files: list[Path], cache: Path) -> dict:
    """Return times of Lite0 on the engine and in Keras, and the share of the possible rate."""
    network = build_backbone("EfficientNetLite0")
    views = _views(files, network.input_shape[1])
    predict = make_predictor(network, cache)
    matrix = np.random.default_rng(0).random((MATRIX, MATRIX), dtype=np.float32)
    parallel = _side_by_side(
        {
            "matrix_product_s": lambda: matrix @ matrix,
            "engine_s": lambda: list(predict_each(range(len(views)), views.__getitem__, predict)),
            "keras_predict_s": lambda: network.predict(views, batch_size=BATCH, verbose=0),
            "keras_one_by_one_s": lambda: [
                network.predict_on_batch(view[np.newaxis]) for view in views[:BATCH]
            ],
        }
    )
    difference, cosine = compare_outputs(
        predict(views[:BATCH]), network.predict_on_batch(views[:BATCH])
    )
    flops = count_flops(network)
    ceiling = [2 * MATRIX**3 / 1e9 / seconds for seconds in parallel["matrix_product_s"]]
    rate = [flops * len(views) / 1e9 / seconds for seconds in parallel["engine_s"]]
    each = {
        "engine": _scaled(parallel["engine_s"], 1e3 / len(views)),
        "keras_predict": _scaled(parallel["keras_predict_s"], 1e3 / len(views)),
        "keras_one_by_one": _scaled(parallel["keras_one_by_one_s"], 1e3 / BATCH),
    }
    return {
        "backbone": "EfficientNetLite0",
        "gflop_an_image": round(flops / 1e9, 3),
        "matrix_product_gflop_a_s": spread(ceiling),
        "engine_gflop_a_s": spread(rate),
        "engine_share_of_ceiling": spread(_ratio(rate, ceiling)),
        "ms_an_image": {name: spread(values) for name, values in each.items()},
        "engine_against_keras_predict": spread(_ratio(each["keras_predict"], each["engine"])),
        "engine_against_keras_one_by_one": spread(_ratio(each["keras_one_by_one"], each["engine"])),
        "largest_possible_against_keras_predict": spread(
            [
                keras_ms * limit / flops * 1e6
                for keras_ms, limit in zip(each["keras_predict"], ceiling, strict=True)
            ]
        ),
        "largest_difference": float(f"{difference:.2g}"),
        "smallest_cosine": round(cosine, 7),
    }


def measure_images(files: list[Path], augmentation: Augmentation) -> dict:
    """Return milliseconds an image, one thread: decoding, the whole image, a random view."""
    chosen = _some(files, IMAGES)
    decoded = [read_rgb(path) for path in chosen]
    rng = np.random.default_rng(0)
    turns = _side_by_side(
        {
            "decode": lambda: [read_rgb(path) for path in chosen],
            "whole_image": lambda: [fit_view(image, 224) for image in decoded],
            "random_view": lambda: [
                random_view(image, 224, augmentation, rng) for image in decoded
            ],
        }
    )
    return {
        "ms_an_image": {
            name: spread(_scaled(seconds, 1e3 / len(chosen))) for name, seconds in turns.items()
        }
    }


def measure_training(files: list[Path], preset: dict, cache: Path) -> dict:
    """Return milliseconds an image of a training step, from ready views or stored features on."""
    steps = 4
    schedule = Recipe.of(preset).schedule("finetune", BATCH)
    size = preset["image_size"] or build_backbone(preset["backbone"], weights=None).input_shape[1]
    contestants = {
        "all_blocks_224": (224, list(BLOCKS), False),
        "all_blocks": (size, list(BLOCKS), False),
        "preset_blocks": (size, preset["finetune_blocks"], False),
        "preset_blocks_stored": (size, preset["finetune_blocks"], True),
    }
    turns = {}
    for name, (pixels, blocks, split) in contestants.items():
        backbone = build_backbone(preset["backbone"], pixels)
        width = backbone.output_shape[1]
        model = join(backbone, build_head(width, preset["head_hidden"], preset["head_dropout"]))
        unfreeze_blocks(model, blocks)
        inputs, learning = _views(files, pixels), model
        if split:
            frozen, learning = split_frozen(model, blocks)
            inputs = make_predictor(frozen, cache)(inputs)
        compile_stage(learning, schedule, steps=1000)
        turns[name] = functools.partial(_steps, learning, inputs, steps)
    seconds = _side_by_side(turns)
    each = {name: _scaled(values, 1e3 / steps / BATCH) for name, values in seconds.items()}
    return {
        "image_size": size,
        "blocks": preset["finetune_blocks"],
        "ms_an_image": {name: spread(values) for name, values in each.items()},
    }


def measure_reference(files: list[Path], cache: Path) -> dict:
    """Return the reference notebook's way and this library's way of predicting the same images.

    The notebook by E. Orsini (see results/published.json) reads all images into one array of
    floats and predicts them one by one; here with Lite0 on both sides.
    """
    network = build_backbone("EfficientNetLite0", REFERENCE_SIZE)
    predict = make_predictor(network, cache)
    chosen = _some(files, REFERENCE_IMAGES)

    def read(path: Path) -> np.ndarray:
        return cv2.resize(cv2.imread(str(path)), REFERENCE_SIZE[::-1])

    def reference() -> None:
        images = np.array([read(path) for path in chosen], dtype=np.float64)
        for image in images:
            network.predict_on_batch(image[np.newaxis])

    seconds = _side_by_side(
        {"reference": reference, "library": lambda: list(predict_each(chosen, read, predict))}
    )
    return {
        "images": len(chosen),
        "ms_an_image": {
            name: spread(_scaled(values, 1e3 / len(chosen))) for name, values in seconds.items()
        },
    }


def measure_start(file: Path, folder: Path) -> dict:
    """Return the seconds of the command `predict` for one image, the first time and again.

    The first time it exports the network. Each turn is of a new copy of the project.
    """
    first, again = [], []
    for turn in range(REPEATS):
        project = _copy_of_the_project(folder / f"start-{turn}")
        for seconds in (first, again):
            started = time.perf_counter()
            _marsclf(project, "predict", str(file))
            seconds.append(time.perf_counter() - started)
    return {"first_s": spread(first), "again_s": spread(again)}


def measure_run(root: Path, folder: Path) -> dict:
    """Return times by stage and peak memory of `make run`: cold, again, and with another head.

    The project is copied, so that nothing cached is found and nothing here is touched but the
    ledger, in which the runs' scores of the test split are entered, whether or not a later run
    fails. The copy's packages are this environment's. Raises MarsclfError where a run fails.
    """
    project, code = _copy_of_the_project(folder / "run"), commit()
    scores = project / "results" / ledger.NAME
    runs, entered = {}, len(ledger.rows(scores))
    for name, arguments in {
        "cold": ["--preset", DEFAULT_PRESET],
        "warm": ["--preset", DEFAULT_PRESET],
        "head_cold": ["--preset", "laptop-head"],
        "head_warm_another_head": ["--preset", "laptop-head", "--set", "head_hidden=0"],
    }.items():
        started = time.monotonic()
        try:
            _marsclf(project, "run", "--data-dir", str(root), *arguments)
        finally:  # a run that fails, or is interrupted, may have seen the score already
            new = ledger.rows(scores)[entered:]
            entered += len(new)
            for row in new:  # the copy does not know its commit
                ledger.append_row(paths.RESULTS / ledger.NAME, row | {"commit": code})
        metrics = json.loads((project / "runs" / arguments[1] / "metrics.json").read_text())
        runs[name] = {
            "wall_s": metrics["wall_s"] | {"command": round(time.monotonic() - started, 1)},
            "peak_rss_mb": metrics["peak_rss_mb"],
        }
    return runs


def _copy_of_the_project(project: Path) -> Path:
    for part in ("marsclf", "notebooks", "presets", "results"):
        shutil.copytree(paths.PROJECT_ROOT / part, project / part)
    return project


def _marsclf(project: Path, *arguments: str) -> None:
    """Run a command of a copy of the project. Raises MarsclfError where it fails."""
    command = [sys.executable, "-m", "marsclf", *arguments]
    environment = os.environ | {"PYTHONPATH": str(project)}
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise MarsclfError(f"{' '.join(command)} failed: {ended.stderr.strip()}")


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest value, four significant digits."""
    numbers = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def _side_by_side(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the seconds of each contestant's turns; all take a turn before the next begins."""
    for work in contestants.values():  # compiles and fills caches; not counted
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _ratio(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _scaled(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def _some(files: list[Path], count: int) -> list[Path]:
    """Return so many of the files, from all over the list."""
    return files[:: max(1, len(files) // count)][:count]


def _views(files: list[Path], size: int) -> np.ndarray:
    chosen = _some(files, IMAGES)
    return np.stack([fit_view(read_rgb(path), size) for path in chosen])


def _steps(model: keras.Model, inputs: np.ndarray, steps: int) -> None:
    """Train so many steps."""
    targets = one_hot(np.arange(BATCH) % data.NUM_CLASSES)
    for i in range(steps):
        batch = inputs.take(range(i * BATCH, (i + 1) * BATCH), axis=0, mode="wrap")
        model.train_on_batch(batch, targets)
