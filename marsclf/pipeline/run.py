"""The pipeline: a preset, the data, the three notebooks, and the numbers that come out of them."""

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import psutil

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.open import open_dataset
from marsclf.data.sample import make_sample
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.files import write_json
from marsclf.pipeline.presets import (
    DEFAULT_PRESET,
    NOTEBOOKS,
    load_preset,
    notebook_parameters,
    parameters_of,
)
from marsclf.provenance import commit, hardware, peak_rss_mb

CELL_TIMEOUT_S = 6 * 3600
PUBLISHED_RESULTS = "03_published_results.ipynb"
KERNEL_ENVIRONMENT = {
    # Less of TensorFlow's chatter, which calls it an error to have no GPU; and a kernel whose
    # notebook shows what Python prints, but not what libraries in C++ do.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JUPYTER_PATH": str(paths.JUPYTER),
    # The kernel of this environment, even where the user has a personal one of the same name.
    "JUPYTER_PREFER_ENV_PATH": "1",
    # Let glibc keep the memory of large arrays: to give it back after every training step and get
    # it anew, page by page, takes a sixth of the time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def run(
    preset: str = DEFAULT_PRESET,
    data_dir: str | Path | None = None,
    settings: dict[str, object] | None = None,
    sample: bool = False,
) -> dict:
    """Run the three notebooks into runs/<preset>/ and return (and write) its metrics.

    `settings` override the preset's parameters; `sample` takes the generated data whatever else is
    there. metrics.json is written last: where it lies, the run is whole. Raises MarsclfError for a
    preset or settings that are none, for faulty data, and where a notebook fails.
    """
    started = time.monotonic()
    parameters = parameters_of(preset, settings)
    run_dir = paths.RUNS / preset
    _remove_results(run_dir)
    code = commit()
    if sample:
        data_dir = make_sample(paths.CACHE / "sample")
    dataset = open_dataset(data_dir)  # says so where it is sample data
    print(f"Data: {dataset.name}, {len(dataset.index):,} images in {dataset.root}")
    wall_s = {"total": 0.0, "data": time.monotonic() - started}
    fixed = {"data_dir": str(dataset.root.resolve()), "run_dir": str(run_dir)}
    fixed |= {"predictions_file": str(run_dir / "predictions.csv"), "dataset": dataset.name}
    fixed["preset"] = None  # its values are among the parameters
    for name in NOTEBOOKS:
        wall_s[name] = execute(name, run_dir / f"{name}.ipynb", parameters | fixed)
    for product in ("predictions.csv", "training.json", "model.keras"):
        if not (run_dir / product).is_file():
            raise MarsclfError(f"The notebooks ended, but did not write {run_dir / product}.")
    training = json.loads((run_dir / "training.json").read_text(encoding="utf-8"))
    published = paths.RESULTS / DEFAULT_PRESET / "predictions.csv.gz"
    if dataset.name == "sample" and not sample and published.is_file():
        # Offline, the true result can still be seen: the published predictions need no images.
        fixed |= {"data_dir": None, "run_dir": str(run_dir / "published"), "dataset": "msl-v1"}
        fixed["predictions_file"] = str(published)
        execute(NOTEBOOKS[2], run_dir / PUBLISHED_RESULTS, parameters | fixed)
    splits = ledger.score(run_dir / "predictions.csv")
    wall_s |= training["wall_s"]
    wall_s["total"] = time.monotonic() - started
    result = {
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "preset": preset,
        "backbone": parameters.get("backbone"),
        "seed": parameters.get("seed"),
        "commit": code,
        "settings": settings or {},
        "parameters": parameters,
        "temperature": training.get("temperature"),
        "hardware": hardware(),
        "wall_s": {stage: round(seconds, 1) for stage, seconds in wall_s.items()},
        "peak_rss_mb": peak_rss_mb(),
        "splits": splits,
    }
    write_json(run_dir / "metrics.json", result)
    _report(result, run_dir, load_preset(preset)["expected"])
    if (run_dir / PUBLISHED_RESULTS).is_file():
        print(f"Published results on the real images: {run_dir / PUBLISHED_RESULTS}")
    if dataset.name == "sample":
        print(f"\n{data.SAMPLE_NOTICE}")
    return result


def _remove_results(run_dir: Path) -> None:
    """Remove what an earlier run left, but for its checkpoints, so that nothing old looks new."""
    (run_dir / "metrics.json").unlink(missing_ok=True)
    for pattern in ("*.csv", "training.json", "model.keras", "*.npz", "*.ipynb", "figures/*.png"):
        for path in run_dir.glob(pattern):
            path.unlink()
    for folder in ("published", "html"):
        shutil.rmtree(run_dir / folder, ignore_errors=True)


def execute(name: str, output: Path, parameters: dict[str, object]) -> float:
    """Run the notebook `name` with those parameters that it declares; return the seconds it took.

    The executed notebook appears at `output` when it is whole. Raises MarsclfError with the cell
    and the reason; what had been executed then lies in `output` with the suffix .failed.ipynb.
    """
    source = paths.NOTEBOOKS / f"{name}.ipynb"
    declared = notebook_parameters(source)
    partial, failed = output.with_suffix(".partial.ipynb"), output.with_suffix(".failed.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    for variable, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the error raised below says it all
    print(f"{output.stem} ...", flush=True)
    started = time.monotonic()
    # In a thread of its own, because nbclient takes Ctrl-C away from the main thread.
    pool = ThreadPoolExecutor(max_workers=1)
    job = pool.submit(
        _execute_in_thread,
        source,
        partial,
        parameters={key: value for key, value in parameters.items() if key in declared},
        kernel_name="python3",
        progress_bar=sys.stderr.isatty(),
        stdout_file=sys.stdout if sys.stdout.isatty() else None,
        execution_timeout=CELL_TIMEOUT_S,
        cwd=paths.NOTEBOOKS,
    )
    try:
        job.result()
        partial.replace(output)
    except KeyboardInterrupt:
        while not job.done():  # once is not enough while the kernel is only starting
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    child.kill()
            wait([job], timeout=0.2)
        raise
    except Exception as error:
        raise MarsclfError(
            f"{_failure(name, partial, error)}\nThe notebook, executed up to there, is {failed}"
        ) from error
    finally:
        pool.shutdown()
        if partial.exists():
            partial.replace(failed)
    seconds = time.monotonic() - started
    print(f"{output.stem} took {seconds:.0f} s")
    return seconds


def _execute_in_thread(*arguments: object, **options: object) -> None:
    import papermill
    from jupyter_client import AsyncKernelManager

    class QuietKernelManager(AsyncKernelManager):
        """Keeps off the terminal what a kernel prints; the notebook holds it all the same."""

        def start_kernel(self, **start: object) -> Awaitable[None]:
            return super().start_kernel(**start, stderr=subprocess.DEVNULL)

    try:
        papermill.execute_notebook(*arguments, **options, kernel_manager_class=QuietKernelManager)
    finally:
        with suppress(RuntimeError):  # there is none if papermill failed early
            asyncio.get_event_loop().close()  # nobody else closes the one that nbclient made


def _failure(name: str, partial: Path, error: Exception) -> str:
    """Return one sentence: notebook, cell, the cell's first line, and the reason."""
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        number, source = error.exec_count, error.source
        reason = error.evalue if error.ename == "MarsclfError" else f"{error.ename}: {error.evalue}"
    else:
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"] if partial.exists() else []
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        begun = [cell for cell in code if cell["metadata"]["papermill"]["start_time"]]
        number, source = len(begun), "".join(begun[-1]["source"]) if begun else ""
        reasons = {
            "DeadKernelError": "its Python process was killed, perhaps because the memory ran out.",
            "CellTimeoutError": f"it took longer than {CELL_TIMEOUT_S / 3600:g} hours.",
        }
        kind = type(error).__name__
        reason = reasons.get(kind, f"{kind}: {error}")
    line = next(iter(source.strip().splitlines()), "")
    return f"{name} failed in cell [{number}] `{line}`: {' '.join(reason.split())[:1000]}"


def _report(result: dict, run_dir: Path, expected: dict) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    header = ["split", "images", "accuracy", "95 % interval", "macro-F1", "top-3", "ECE"]
    rows = [[*header, "coverage@0.9", "accuracy@0.9"]]
    both = {}
    for split, numbers in result["splits"].items():
        both |= {split: numbers, f"{split}, by burst": numbers["burst"]}
    for split, numbers in both.items():
        low, high = numbers["accuracy_ci95"]
        row = [split, str(numbers["n"]), percent(numbers["accuracy"])]
        row += [f"{100 * low:.1f}-{100 * high:.1f} %", f"{numbers['macro_f1']:.3f}"]
        row += [percent(numbers["top3"]), f"{numbers['ece']:.3f}"]
        row += [percent(numbers["coverage_at_0.9"]), percent(numbers["accuracy_at_0.9"])]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    minutes, memory = result["wall_s"]["total"] / 60, result["peak_rss_mb"] / 1000
    print(f"\n{minutes:.1f} minutes, {memory:.1f} GB of memory at most.")
    if result["dataset"] == "msl-v1":
        print("Expected of this preset:", ", ".join(f"{k} {v}" for k, v in expected.items()))
    print(f"Figures: {run_dir / 'figures'}\nNotebooks, model and predictions: {run_dir}")
