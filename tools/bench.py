"""Benchmarks of this machine: python -m tools.bench [--data-dir D].

Times are medians over repeats, each of which runs all contestants in turn; the smallest and largest
values come with them. Ratios are computed within each repeat, because a machine's speed drifts.

Each part is measured in a process of its own. Importing this module loads no Keras, because such a
process begins with it, and `predict`, whose memory is measured here, works without Keras.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from timeit import timeit

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.images.decode import read_rgb
from marsclf.images.views import Augmentation, fit_view, random_view
from marsclf.networks.engine import make_predictor, predict_each
from marsclf.networks.specs import BLOCKS
from marsclf.pipeline.presets import DEFAULT_PRESET, parameters_of
from marsclf.provenance import commit, hardware, peak_rss_mb
from marsclf.training.recipe import Recipe
from tools.command import make_main
from tools.documents import TEMPLATES, store
from tools.results import read_json

GROWTH = (500, 1000, 2000, 4000)  # images
REPEATS, STARTS = 5, 5
BATCH = 32  # Keras's own default
IMAGES = 256  # in one repeat
STEPS = 4  # of training, in one repeat
RUNS = {
    "cold": ["--preset", DEFAULT_PRESET],
    "warm": ["--preset", DEFAULT_PRESET],
    "head_cold": ["--preset", "laptop-head"],
    "head_warm_another_head": ["--preset", "laptop-head", "--set", "head_hidden=0"],
}


def bench(data_dir: Path | None) -> dict:
    """Measure the time and memory of each step, in about half an hour; print and store them."""
    dataset = open_dataset(data_dir)
    files = [dataset.root / path for path in dataset.index["path"]]
    parameters = parameters_of(DEFAULT_PRESET)
    result = {"commit": commit(), "dataset": dataset.name, "data_digest": dataset.digest}
    result |= {"recipe": ledger.recipe_digest({"parameters": parameters})}
    result |= {"hardware": hardware(), "repeats": REPEATS}
    with tempfile.TemporaryDirectory(prefix="marsclf-bench-") as folder:
        cache, augmentation = Path(folder), Augmentation(**parameters["augmentation"])
        for name, measure, *arguments in (
            ("network", measure_network, files, cache),
            ("images", measure_images, files, augmentation),
            ("training", measure_training, files, parameters, cache),
            ("classification", measure_growth, files, cache),
            ("start", measure_start, files[0], cache),
            ("run", measure_runs, dataset.root, cache),
        ):
            print(f"measuring: {name} ...", file=sys.stderr, flush=True)
            result[name] = in_new_process(measure, *arguments)
    print(TEMPLATES.get_template("costs.md").render(bench=result, is_outdated=False))
    store(result, paths.RESULTS / "bench.json", dataset)
    return result


def in_new_process(work: Callable, *arguments: object) -> object:
    """Return what `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest value with four significant digits."""
    numbers = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def take_turns(contestants: dict[str, Callable[[], object]]) -> pd.DataFrame:
    """Return the seconds of each contestant, a column, in each repeat, a row.

    One more turn comes first, to compile and to fill caches; it is not counted.
    """
    turns = [
        {name: timeit(work, number=1) for name, work in contestants.items()}
        for _ in range(1 + REPEATS)
    ]
    return pd.DataFrame(turns[1:])


def ms_per_image(seconds: pd.DataFrame, images: int) -> dict[str, dict[str, float]]:
    """Return the spread of what `take_turns` measured, in milliseconds for one of the images."""
    return {name: spread(values) for name, values in (1e3 * seconds / images).items()}


def measure_network(files: list[Path], cache: Path) -> dict:
    """Measure Lite0 on the engine and in Keras."""
    from marsclf.networks.backbones import build_backbone

    network = build_backbone("EfficientNetLite0")
    views = _load_views(files, network.input_shape[1])
    predict = make_predictor(network, cache)
    work = {
        "engine": lambda: list(predict_each(range(len(views)), views.__getitem__, predict)),
        "keras_predict": lambda: network.predict(views, batch_size=BATCH, verbose=0),
        "keras_one_by_one": lambda: [network.predict_on_batch(view[None]) for view in views],
    }
    seconds = take_turns(work)
    return {
        "ms_per_image": ms_per_image(seconds, len(views)),
        "engine_against_keras_predict": spread(seconds["keras_predict"] / seconds["engine"]),
        "engine_against_keras_one_by_one": spread(seconds["keras_one_by_one"] / seconds["engine"]),
    }


def measure_images(files: list[Path], augmentation: Augmentation) -> dict:
    """Measure decoding, fitting the complete image and a random view, in one thread."""
    chosen = _choose(files, IMAGES)
    decoded = [read_rgb(path) for path in chosen]
    rng = np.random.default_rng(0)
    work = {
        "decode": lambda: [read_rgb(path) for path in chosen],
        "whole_image": lambda: [fit_view(image, 224) for image in decoded],
        "random_view": lambda: [random_view(image, 224, augmentation, rng) for image in decoded],
    }
    return {"ms_per_image": ms_per_image(take_turns(work), len(chosen))}


def measure_training(files: list[Path], parameters: dict, cache: Path) -> dict:
    """Measure training steps from pixels, and from stored features of the frozen blocks."""
    from marsclf.networks.backbones import build_backbone
    from tools.gpu_cost import prepare_training, train

    recipe = Recipe(**parameters)
    size, blocks = recipe.image_size, recipe.finetune_blocks
    steps = {}
    for name, pixels, trained, is_stored in (
        ("all_blocks_224", 224, list(BLOCKS), False),
        ("all_blocks", size, list(BLOCKS), False),
        ("preset_blocks", size, blocks, False),
        ("preset_blocks_stored", size, blocks, True),
    ):
        backbone, inputs = build_backbone(recipe.backbone, pixels), _load_views(files, pixels)
        frozen, model = prepare_training(recipe, backbone, trained, is_stored)
        inputs = make_predictor(frozen, cache)(inputs) if is_stored else inputs
        steps[name] = partial(train, model, inputs[: STEPS * BATCH], STEPS)
    times = ms_per_image(take_turns(steps), STEPS * BATCH)
    return {"image_size": size, "blocks": blocks, "ms_per_image": times}


def measure_growth(files: list[Path], cache: Path) -> list[dict]:
    """Measure the library's classifier on more and more images, each time in a new process."""
    in_new_process(classify, [], cache)  # exports the network, so that no other has to
    # Where there are fewer files, they are repeated.
    return [in_new_process(classify, [*np.resize(files, count)], cache) for count in GROWTH]


def classify(files: list[Path], cache: Path) -> dict:
    """Classify files in this process and measure it; only the memory includes the loading."""
    classifier = load_classifier(cache=cache)
    seconds = timeit(lambda: classifier.predict(files), number=1)
    measured = {"images": len(files), "zooms": classifier.zooms, "seconds": round(seconds, 2)}
    rate = round(len(files) / seconds, 1)
    return measured | {"images_per_s": rate, "peak_rss_mb": peak_rss_mb()}


def measure_start(file: Path, folder: Path) -> dict:
    """Measure `predict` for one image, the first and the second time in copies of the project."""
    seconds: dict[str, list[float]] = {"first_s": [], "again_s": []}
    for number in range(STARTS):
        project = _copy_project(folder / f"start-{number}")
        for values in seconds.values():
            values.append(_run_marsclf(project, "predict", str(file)))
    return {name: spread(values) for name, values in seconds.items()}


def measure_runs(root: Path, folder: Path) -> dict:
    """Measure time by stage and peak memory of RUNS in a copy of the project, with nothing cached.

    The copy's new ledger lines are added to the ledger of this project, even if a run fails.
    """
    project, code = _copy_project(folder / "run"), commit()
    copied_ledger, runs = project / "results" / ledger.NAME, {}
    for name, arguments in RUNS.items():
        known = len(ledger.rows(copied_ledger))
        try:
            seconds = _run_marsclf(project, "run", "--data-dir", str(root), *arguments)
        finally:  # a run that fails may have shown the score already
            for row in ledger.rows(copied_ledger)[known:]:  # the copy does not know its commit
                ledger.append_row(paths.RESULTS / ledger.NAME, row | {"commit": code})
        metrics = read_json(project / "runs" / arguments[1] / "metrics.json", "run it again")
        wall_s = metrics["wall_s"] | {"command": round(seconds, 1)}
        runs[name] = {"wall_s": wall_s, "peak_rss_mb": metrics["peak_rss_mb"]}
    return runs


def _choose(files: list[Path], count: int) -> list[Path]:
    """Return at most `count` of the files, spread over the list."""
    return files[:: max(1, len(files) // count)][:count]


def _load_views(files: list[Path], size: int) -> np.ndarray:
    return np.stack([fit_view(read_rgb(path), size) for path in _choose(files, IMAGES)])


def _copy_project(project: Path) -> Path:
    for part in ("marsclf", "notebooks", "presets", "results"):
        shutil.copytree(paths.PROJECT_ROOT / part, project / part)
    return project


def _run_marsclf(project: Path, *arguments: str) -> float:
    """Return the seconds of a command of a copy of the project; raise MarsclfError if it fails."""
    command = [sys.executable, "-m", "marsclf", *arguments]
    environment, started = os.environ | {"PYTHONPATH": str(project)}, time.monotonic()
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise MarsclfError(f"`{' '.join(command)}` failed: {ended.stderr.strip()}")
    return time.monotonic() - started


main = make_main(bench, "data_dir")

if __name__ == "__main__":
    sys.exit(main())
