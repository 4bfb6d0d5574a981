"""Benchmarks of this machine: python -m tools.bench [--data-dir D].

Each part is measured in a process of its own. This module loads no Keras, because such a process
begins with it, and `predict`, whose memory is measured here, works without Keras.
"""

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.images.views import Augmentation
from marsclf.pipeline.presets import DEFAULT_PRESET, parameters_of
from marsclf.provenance import commit, hardware, peak_rss_mb
from tools.command import make_main
from tools.documents import TEMPLATES, store
from tools.results import read_json

GROWTH = (500, 1000, 2000, 4000)  # images
STARTS = 5
RUNS = {
    "cold": ["--preset", DEFAULT_PRESET],
    "warm": ["--preset", DEFAULT_PRESET],
    "head_cold": ["--preset", "laptop-head"],
    "head_warm_another_head": ["--preset", "laptop-head", "--set", "head_hidden=0"],
}


def bench(data_dir: str | Path | None) -> dict:
    """Measure the time and memory of each step, in about half an hour, and print them.

    With the real data set, also stores them in results/bench.json and updates the documents.
    """
    from tools import measurements  # loads Keras

    dataset = open_dataset(data_dir)
    files = [dataset.root / path for path in dataset.index["path"]]
    parameters = parameters_of(DEFAULT_PRESET)
    result = {
        "commit": commit(),
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "recipe": ledger.recipe_digest({"parameters": parameters}),
        "hardware": hardware(),
        "repeats": measurements.REPEATS,
    }
    with tempfile.TemporaryDirectory(prefix="marsclf-bench-") as folder:
        cache, augmentation = Path(folder), Augmentation(**parameters["augmentation"])
        for name, measure, *arguments in (
            ("network", measurements.measure_network, files, cache),
            ("images", measurements.measure_images, files, augmentation),
            ("training", measurements.measure_training, files, parameters, cache),
            ("classification", measure_growth, files, cache),
            ("reference", measurements.measure_reference, files, cache),
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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def measure_growth(files: list[Path], cache: Path) -> list[dict]:
    """Measure the library's classifier on more and more images, each time in a new process."""
    in_new_process(classify, [], cache)  # exports the network, so that no other has to
    chosen = ([*itertools.islice(itertools.cycle(files), count)] for count in GROWTH)
    return [in_new_process(classify, images, cache) for images in chosen]


def classify(files: list[Path], cache: Path) -> dict:
    """Classify files in this process and measure it; only the memory includes the loading."""
    classifier = load_classifier(cache=cache)
    started = time.perf_counter()
    classifier.predict(files)
    seconds = time.perf_counter() - started
    return {
        "images": len(files),
        "zooms": classifier.zooms,
        "seconds": round(seconds, 2),
        "images_per_s": round(len(files) / seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


def measure_start(file: Path, folder: Path) -> dict:
    """Measure `predict` for one image, the first and the second time in copies of the project."""
    from tools.measurements import spread

    seconds: dict[str, list[float]] = {"first_s": [], "again_s": []}
    for number in range(STARTS):
        project = _copy_project(folder / f"start-{number}")
        for values in seconds.values():
            started = time.perf_counter()
            _run_marsclf(project, "predict", str(file))
            values.append(time.perf_counter() - started)
    return {name: spread(values) for name, values in seconds.items()}


def measure_runs(root: Path, folder: Path) -> dict:
    """Measure time by stage and peak memory of RUNS in a copy of the project, with nothing cached.

    The copy's new ledger lines are added to the ledger of this project, even if a run fails.
    """
    project, code = _copy_project(folder / "run"), commit()
    copied_ledger, runs = project / "results" / ledger.NAME, {}
    for name, arguments in RUNS.items():
        known, started = len(ledger.rows(copied_ledger)), time.monotonic()
        try:
            _run_marsclf(project, "run", "--data-dir", str(root), *arguments)
        finally:  # a run that fails may have shown the score already
            for row in ledger.rows(copied_ledger)[known:]:  # the copy does not know its commit
                ledger.append_row(paths.RESULTS / ledger.NAME, row | {"commit": code})
        seconds = round(time.monotonic() - started, 1)
        metrics = read_json(project / "runs" / arguments[1] / "metrics.json", "run it again")
        wall_s = metrics["wall_s"] | {"command": seconds}
        runs[name] = {"wall_s": wall_s, "peak_rss_mb": metrics["peak_rss_mb"]}
    return runs


def _copy_project(project: Path) -> Path:
    for part in ("marsclf", "notebooks", "presets", "results"):
        shutil.copytree(paths.PROJECT_ROOT / part, project / part)
    return project


def _run_marsclf(project: Path, *arguments: str) -> None:
    """Run a command of a copy of the project; raise MarsclfError if it fails."""
    command = [sys.executable, "-m", "marsclf", *arguments]
    environment = os.environ | {"PYTHONPATH": str(project)}
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise MarsclfError(f"`{' '.join(command)}` failed: {ended.stderr.strip()}")


main = make_main(bench, "data_dir")

if __name__ == "__main__":
    sys.exit(main())
