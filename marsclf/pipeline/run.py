"""The command `run`: executes a preset's notebooks with papermill and stores their results."""

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import psutil
from filelock import FileLock, Timeout

from marsclf import paths
from marsclf.data.msl import SAMPLE_NOTICE, SPLITS
from marsclf.data.open import open_dataset
from marsclf.data.sample import make_sample
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.files import write_json
from marsclf.pipeline import presets
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDER_NOTEBOOK, LADDERS, NOTEBOOKS
from marsclf.provenance import commit, hardware, peak_rss_mb

CELL_TIMEOUT_S = 6 * 3600
PUBLISHED_RESULTS = "03_published_results.ipynb"
KERNEL_ENVIRONMENT = {  # the user's own variables take precedence
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorFlow reports a missing GPU as an error
    # Let glibc keep the memory of large arrays: returning it after every training step and getting
    # it again, page by page, takes a sixth of the time.
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
    """Run a preset's notebooks into runs/<preset>/, print the results and return its metrics.json.

    For LADDERS that is ladder.json. The files of an earlier run are replaced when the new run is
    complete; until then the new ones are in runs/unfinished/<preset>/. `settings` override the
    preset's parameters; `sample` uses the generated images, whatever else is available. Raises
    MarsclfError for an invalid preset, setting or data set, while another process runs the preset,
    and if a notebook fails.
    """
    started = time.monotonic()
    parameters, code = presets.parameters_of(preset, settings), commit()
    expected, run_dir = presets.load_preset(preset)["expected"], paths.RUNS / preset
    dataset = open_dataset(make_sample(paths.CACHE / "sample") if sample else data_dir)
    print(f"Data: {dataset.name}, {len(dataset.index):,} images in {dataset.root}")
    result = {"dataset": dataset.name, "data_digest": dataset.digest, "preset": preset}
    result |= {name: parameters.get(name) for name in ("backbone", "seed")}
    result |= {"commit": code, "settings": settings or {}, "parameters": parameters}
    wall_s = {"total": 0.0, "data": time.monotonic() - started}
    with _replacing(run_dir) as folder:
        # The preset's values are among the parameters, so the notebooks need not load it.
        given = parameters | {"data_dir": str(dataset.root.resolve()), "preset": None}
        given |= {"run_dir": str(folder), "predictions_file": str(folder / "predictions.csv")}
        given["dataset"] = dataset.name
        is_ladder = preset in LADDERS
        found = _run_ladder(folder, given) if is_ladder else _run_three(folder, given, result)
        published = paths.RESULTS / DEFAULT_PRESET / "predictions.csv.gz"
        if dataset.name == "sample" and not sample and not is_ladder and published.is_file():
            # The published predictions show the real results without the real images.
            given |= {"data_dir": None, "run_dir": str(folder / "published"), "dataset": "msl-v1"}
            given["predictions_file"] = str(published)
            execute(NOTEBOOKS[2], folder / PUBLISHED_RESULTS, given)
        wall_s |= found["wall_s"] | {"total": time.monotonic() - started}
        rounded = {stage: round(seconds, 1) for stage, seconds in wall_s.items()}
        found["wall_s"] = rounded["total"] if is_ladder else rounded
        found["peak_rss_mb"] = max(found["peak_rss_mb"], peak_rss_mb())
        result |= {"hardware": hardware()} | found
        write_json(folder / ("ladder.json" if is_ladder else "metrics.json"), result)
    _report(result, run_dir, expected)
    return result


@contextmanager
def _replacing(run_dir: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `run_dir` if the block succeeds and stays if it fails.

    Raises MarsclfError while another process does the same, and if `run_dir` cannot be replaced.
    """
    # Notebooks take the name of their run from that of its folder.
    unfinished = run_dir.parent / "unfinished" / run_dir.name
    old = unfinished.with_name(f"{run_dir.name}.old")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(unfinished.with_name(f"{run_dir.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise MarsclfError(
            f"Another process is running the preset {run_dir.name}: wait until it ends, or stop it."
        ) from None
    with lock:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        yield unfinished
        try:
            if run_dir.exists():
                shutil.rmtree(old, ignore_errors=True)
                run_dir.rename(old)
            unfinished.rename(run_dir)
        except OSError as error:  # such as an open file on Windows
            raise MarsclfError(
                f"The run is complete, but {run_dir} cannot be replaced ({error.strerror}): rename "
                f"{unfinished} yourself."
            ) from error
        shutil.rmtree(old, ignore_errors=True)


def _run_three(folder: Path, given: dict[str, object], result: dict) -> dict:
    """Execute notebooks 01 to 03; the predictions of 02 are scored before 03 shows them."""
    wall_s, peaks = {}, []
    for name in NOTEBOOKS:
        wall_s[name], peak = execute(name, folder / f"{name}.ipynb", given)
        peaks.append(peak)
        if name == NOTEBOOKS[1]:
            for file in ("predictions.csv", "training.json", "model.keras"):
                if not (folder / file).is_file():
                    raise MarsclfError(f"{name} did not write {folder / file}.")
            training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            training |= {part: result[part] for part in ("preset", "settings", "parameters")}
            write_json(folder / "training.json", training)
            splits = ledger.score(folder / "predictions.csv")
    found = {"temperature": training.get("temperature"), "wall_s": wall_s | training["wall_s"]}
    return found | {"peak_rss_mb": max(peaks), "splits": splits}


def _run_ladder(folder: Path, given: dict[str, object]) -> dict:
    _, peak = execute(LADDER_NOTEBOOK, folder / f"{LADDER_NOTEBOOK}.ipynb", given)
    rungs = json.loads((folder / "rungs.json").read_text(encoding="utf-8"))
    return {"wall_s": {}, "peak_rss_mb": peak, "rungs": rungs}


def execute(name: str, output: Path, parameters: dict[str, object]) -> tuple[float, int]:
    """Run the notebook `name`; return the seconds it took and its peak memory (10^6 bytes).

    It gets those of the parameters that it declares. The executed notebook is at `output` once it
    is complete. Raises MarsclfError with the cell and the reason; what was executed until then is
    in `output` with the suffix .failed.ipynb.
    """
    source = paths.NOTEBOOKS / f"{name}.ipynb"
    declared = presets.notebook_parameters(source)
    given = {key: value for key, value in parameters.items() if key in declared}
    partial, failed = output.with_suffix(".partial.ipynb"), output.with_suffix(".failed.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{output.stem} ...", flush=True)
    started = time.monotonic()
    # In another thread, because nbclient takes Ctrl-C away from the main one.
    pool = ThreadPoolExecutor(max_workers=1)
    job = pool.submit(_execute_in_thread, source, partial, given)
    try:
        while not job.done():
            wait([job], timeout=1)  # on Windows, Ctrl-C does not end a wait without a timeout
        peak = job.result()
        partial.replace(output)
    except KeyboardInterrupt:
        while not job.done():  # once is not enough while the kernel is starting
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    child.kill()
            wait([job], timeout=0.2)
        raise
    except Exception as error:
        reason = _failure(name, partial, error)
        raise MarsclfError(f"{reason}\nThe notebook, executed up to there, is {failed}") from error
    finally:
        pool.shutdown()
        if partial.exists():
            partial.replace(failed)
    seconds = time.monotonic() - started
    print(f"{output.stem} took {seconds:.0f} s")
    return seconds, peak


def _execute_in_thread(source: Path, output: Path, parameters: dict[str, object]) -> int:
    """Execute a notebook with papermill; return the peak memory of its kernel (10^6 bytes)."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    # The kernel imports the package that this process runs, whichever others are installed.
    search_path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = KERNEL_ENVIRONMENT | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    peak = 0

    class KernelManager(AsyncKernelManager):
        """Starts the kernel of this package; what it prints is in the notebook alone."""

        def __init__(self, **options: object) -> None:
            kernels = KernelSpecManager(kernel_dirs=[str(paths.JUPYTER / "kernels")])
            super().__init__(kernel_spec_manager=kernels, **options)

        def start_kernel(self, **options: object) -> Awaitable[None]:
            return super().start_kernel(**options, env=environment, stderr=subprocess.DEVNULL)

        def shutdown_kernel(self, **options: object) -> Awaitable[None]:
            nonlocal peak
            peak = peak_rss_mb(self.provisioner.pid)
            return super().shutdown_kernel(**options)

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # `execute` reports the failure
    try:
        papermill.execute_notebook(
            source,
            output,
            parameters,
            kernel_name="python3",
            kernel_manager_class=KernelManager,
            progress_bar=sys.stderr.isatty(),
            stdout_file=sys.stdout if sys.stdout.isatty() else None,
            execution_timeout=CELL_TIMEOUT_S,
            cwd=paths.NOTEBOOKS,
        )
    finally:
        with suppress(RuntimeError):  # there is no loop if papermill failed early
            asyncio.get_event_loop().close()  # nbclient leaves it open
    return peak


def _failure(name: str, partial: Path, error: Exception) -> str:
    """Return one sentence: notebook, cell, the cell's first line, and the reason."""
    cells = json.loads(partial.read_text(encoding="utf-8"))["cells"] if partial.exists() else []
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    begun = ["".join(c["source"]) for c in code if c["metadata"]["papermill"]["start_time"]]
    line = begun[-1].strip().partition("\n")[0] if begun else ""
    # A PapermillExecutionError holds name and text of the error that the cell raised.
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    known = {
        "MarsclfError": text,
        "DeadKernelError": "its Python process was killed, perhaps because the memory ran out.",
        "CellTimeoutError": f"it took longer than {CELL_TIMEOUT_S / 3600:g} hours.",
    }
    reason = " ".join(known.get(kind, f"{kind}: {text}").split())
    return f"{name} failed in cell [{len(begun)}] `{line}`: {reason[:1000]}"


def _report(result: dict, run_dir: Path, expected: dict) -> None:
    """Print the results: a table of the splits or, of a ladder, a line per rung."""
    percent = "{:.1%}".format
    print()
    for rung in result.get("rungs", {}).values():
        shares = [f"{split} {percent(rung['splits'][split]['accuracy'])}" for split in SPLITS]
        print(f"{rung['name']:>18}  {', '.join(shares)}")
    if "splits" in result:
        rows = {}
        for split, numbers in result["splits"].items():
            rows |= {split: numbers, f"{split}, by burst": numbers["burst"]}
        fractions = ("accuracy", "top3", "coverage_at_0.9", "accuracy_at_0.9")
        formats = dict.fromkeys(fractions, percent)
        formats["accuracy_ci95"] = lambda interval: " to ".join(map(percent, interval))
        table = pd.DataFrame(rows, dtype=object).T.drop(columns="burst")
        print(table.to_string(formatters=formats, float_format="{:.3f}".format))
        minutes, memory = result["wall_s"]["total"] / 60, result["peak_rss_mb"] / 1000
        print(f"\n{minutes:.1f} minutes, {memory:.1f} GB of memory at most.")
    if result["dataset"] == "msl-v1":
        print("Expected of this preset:", ", ".join(f"{k} {v}" for k, v in expected.items()))
    print(f"Figures: {run_dir / 'figures'}\nNotebooks, model and predictions: {run_dir}")
    if (run_dir / PUBLISHED_RESULTS).is_file():
        print(f"Published results on the real images: {run_dir / PUBLISHED_RESULTS}")
    if result["dataset"] == "sample":
        print(f"\n{SAMPLE_NOTICE}")
