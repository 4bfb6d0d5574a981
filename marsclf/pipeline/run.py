"""The command `run`: executes a preset's notebooks with papermill and stores their results."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from marsclf import paths
from marsclf.data.msl import PUBLISHED, SAMPLE_NOTICE
from marsclf.data.open import open_dataset
from marsclf.data.sample import make_sample
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.files import replace_atomically, write_json
from marsclf.pipeline import presets
from marsclf.pipeline.machine import check_machine
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDER_NOTEBOOK, LADDERS, NOTEBOOKS
from marsclf.provenance import commit, hardware, peak_rss_mb
from marsclf.training.recipe import Recipe

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
    yes_on_cpu: bool = False,
) -> dict:
    """Run a preset's notebooks, print the results and return its metrics.json, or ladder.json.

    Files are in runs/unfinished/<preset>/ until the run is complete; then they replace those in
    runs/<preset>/. `settings` override the preset's parameters; `sample` uses the generated images,
    whatever else is available; `yes_on_cpu` trains without a GPU even if that takes many hours.
    Raises MarsclfError for an invalid preset, setting or data set, for what the machine lacks,
    while another process runs the preset, and if a notebook fails.
    """
    started, is_ladder, run_dir = time.monotonic(), preset in LADDERS, paths.RUNS / preset
    parameters, code, training = presets.parameters_of(preset, settings), commit(), {}
    source = make_sample(paths.CACHE / "sample") if sample else data_dir
    dataset = open_dataset(source, wanted := presets.data_of(preset))
    if not source and dataset.name in PUBLISHED and dataset.name != wanted:
        place = f"MARSCLF_DATA_DIR names {dataset.root}, which holds {dataset.name}"
        raise MarsclfError(f"{place}; {preset} is for {wanted}: name a folder with --data-dir.")
    if not is_ladder:
        Recipe(**{field.name: parameters[field.name] for field in fields(Recipe)})
    print(f"Data: {dataset.name}, {len(dataset.index):,} images in {dataset.root}")
    check_machine(preset, parameters["backbone"], yes_on_cpu)
    result = {"dataset": dataset.name, "data_digest": dataset.digest, "preset": preset}
    result |= {"backbone": parameters["backbone"], "seed": parameters["seed"], "commit": code}
    result |= {"settings": settings or {}, "parameters": parameters, "classes": dataset.classes}
    wall_s, peaks = {"total": 0.0, "data": time.monotonic() - started}, []
    with _replacing(run_dir) as folder:
        # The parameters include the preset's, so a preset named in notebook 02 is not loaded.
        given = parameters | {"preset": None, "dataset": dataset.name, "yes_on_cpu": True}
        given |= {"data_dir": str(dataset.root), "run_dir": str(folder)}
        given["predictions_file"] = str(folder / "predictions.csv")
        for name in (LADDER_NOTEBOOK,) if is_ladder else NOTEBOOKS:
            wall_s[name], peak = execute(name, folder / f"{name}.ipynb", given)
            peaks.append(peak)
            if name == NOTEBOOKS[1]:  # score the predictions before notebook 03 shows them
                file = folder / "training.json"  # what notebook 02 writes last
                if not file.is_file():
                    raise MarsclfError(f"{name} did not write {file}.")
                training = json.loads(file.read_text(encoding="utf-8"))
                training |= {part: result[part] for part in ("preset", "settings", "parameters")}
                write_json(file, training)
                wall_s |= training["wall_s"]
                result["splits"] = ledger.score(folder / "predictions.csv")
                result["temperature"] = training["temperature"]
        if is_ladder:
            result["rungs"] = json.loads((folder / "rungs.json").read_text(encoding="utf-8"))
        wall_s["total"] = time.monotonic() - started
        rounded = {stage: round(seconds, 1) for stage, seconds in wall_s.items()}
        result["wall_s"] = rounded["total"] if is_ladder else rounded
        result |= {"hardware": hardware(), "peak_rss_mb": max(*peaks, peak_rss_mb())}
        write_json(folder / ("ladder.json" if is_ladder else "metrics.json"), result)
    for checkpoints in training.get("checkpoints", []):
        shutil.rmtree(paths.CACHE / "training" / checkpoints, ignore_errors=True)
    print(f"{wall_s['total'] / 60:.1f} minutes, {result['peak_rss_mb'] / 1000:.1f} GB of memory")
    _report(result, run_dir)
    return result


@contextmanager
def _replacing(run_dir: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `run_dir` if the block succeeds and stays if it fails.

    Raises MarsclfError while another process does the same.
    """
    # Notebooks take the name of their run from that of its folder.
    unfinished = run_dir.parent / "unfinished" / run_dir.name
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(unfinished.with_name(f"{run_dir.name}.lock")).acquire(timeout=0)
    except Timeout:
        reason = f"Another process is running the preset {run_dir.name}"
        raise MarsclfError(f"{reason}: wait until it ends, or stop it.") from None
    with held:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        yield unfinished
        with replace_atomically(run_dir) as temporary:
            unfinished.rename(temporary)


def execute(name: str, output: Path, parameters: dict[str, object]) -> tuple[float, int]:
    """Run the notebook `name`; return the seconds it took and its peak memory (10^6 bytes).

    It gets those of the parameters that it declares. The executed notebook is at `output` once it
    is complete, and until then, or if it fails, at `output` with the suffix .partial.ipynb. Raises
    MarsclfError with the cell and the reason; the kernel's stderr is then beside the notebook.
    """
    source, partial = paths.NOTEBOOKS / f"{name}.ipynb", output.with_suffix(".partial.ipynb")
    log = output.with_suffix(".stderr")
    declared = presets.notebook_parameters(source)
    given = {key: value for key, value in parameters.items() if key in declared}
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{output.stem} ...", flush=True)
    started = time.monotonic()
    try:
        peak = _execute(source, partial, given, log)
    except Exception as error:
        reason = _failure(name, partial, error, log)
        raise MarsclfError(f"{reason}\nThe notebook, executed up to there, is {partial}") from error
    partial.replace(output)
    log.unlink()
    seconds = time.monotonic() - started
    print(f"{output.stem} took {seconds:.0f} s")
    return seconds, peak


def _execute(source: Path, output: Path, parameters: dict[str, object], log: Path) -> int:
    """Execute a notebook with papermill; return the peak memory of its kernel (10^6 bytes)."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    # The kernel imports the package that this process runs, whichever others are installed.
    search_path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = KERNEL_ENVIRONMENT | os.environ | {"KERAS_BACKEND": "tensorflow"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    environment["PYTHONFAULTHANDLER"] = "1"  # it says why a kernel crashed, see `_failure`
    peak = 0

    class KernelManager(AsyncKernelManager):
        """Starts the kernel of this package; what it prints is in the notebook alone."""

        def __init__(self, **options: object) -> None:
            kernels = KernelSpecManager(kernel_dirs=[str(paths.JUPYTER / "kernels")])
            super().__init__(kernel_spec_manager=kernels, **options)

        def start_kernel(self, **options: object) -> Awaitable[None]:
            return super().start_kernel(**options, env=environment, stderr=stderr)

        def shutdown_kernel(self, **options: object) -> Awaitable[None]:
            nonlocal peak
            peak = peak_rss_mb(self.provisioner.pid)
            return super().shutdown_kernel(**options)

    for library in ("papermill", "asyncio"):  # `execute` reports the failure
        logging.getLogger(library).setLevel(logging.CRITICAL)
    options = {"kernel_name": "python3", "kernel_manager_class": KernelManager}
    # No bar of progress: what the notebook prints tells more.
    options |= {"cwd": paths.NOTEBOOKS, "progress_bar": False}
    options |= {"stdout_file": sys.stdout if sys.stdout and sys.stdout.isatty() else None}
    with log.open("wb") as stderr:
        papermill.execute_notebook(source, output, parameters, **options)
    return peak


def _failure(name: str, partial: Path, error: Exception, log: Path) -> str:
    """Return one sentence: notebook, cell, the cell's first line, and the reason."""
    cells = []
    with suppress(OSError, ValueError):  # it does not exist, or the disk is full
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    begun = ["".join(c["source"]) for c in code if c["metadata"]["papermill"]["start_time"]]
    place = f" in cell [{len(begun)}] `{begun[-1].strip().partition(chr(10))[0]}`" if begun else ""
    # A PapermillExecutionError holds name and text of the error that the cell raised.
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    known = {"MarsclfError": text}
    if "ernel died" in text:  # Jupyter's own notes start with "[", stacks follow "Fatal ..."
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip() and line[0] != "["]
        words = ["perhaps the memory ran out", *lines, *(s for s in lines if s[:5] == "Fatal")]
        known[kind] = f"its Python process was killed or did not start: {words[-1]}."
    reason = " ".join(known.get(kind, f"{kind}: {text}").split())
    return f"{name} failed{place}: {reason[:1000]}"


def _report(result: dict, run_dir: Path) -> None:
    """Print the metrics of each split, of a ladder for each recipe, and where the files are."""
    percent, rows = "{:.1%}".format, {}
    for recipe in result.get("rungs", {"": result}).values():
        for split, numbers in recipe["splits"].items():
            name = f"{recipe['name']}, {split}" if "name" in recipe else split
            rows |= {name: numbers, f"{name}, by burst": numbers["burst"]}
    formats = dict.fromkeys(("accuracy", "top3", "coverage_at_0.9", "accuracy_at_0.9"), percent)
    formats["accuracy_ci95"] = lambda interval: " to ".join(map(percent, interval))
    table = pd.DataFrame(rows, dtype=object).T.drop(columns="burst")
    print(f"\n{table.to_string(formatters=formats, float_format='{:.3f}'.format)}\n")
    if result["dataset"] == presets.data_of(result["preset"]):
        expected = presets.load_preset(result["preset"])["expected"]
        print("Expected of this preset:", ", ".join(f"{k} {v}" for k, v in expected.items()))
    print(f"Figures: {run_dir / 'figures'}\nNotebooks, model and predictions: {run_dir}")
    if result["dataset"] == "sample":
        print(f"\n{SAMPLE_NOTICE}")
