"""A project folder with notebooks of a few lines, for tests of the machinery around them."""

import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from marsclf import paths
from marsclf.data.dataset import SPLITS
from marsclf.evaluation import predictions
from marsclf.pipeline.presets import LADDER_NOTEBOOK, NOTEBOOKS, notebook_parameters

SIZE = 48  # pixels
# Of the small classifier; its words are those of the summary, and its signs those of paths.
CLASSES = ("errors", "images", "uncertain", "a/../b, 'c'", "日本", "sol")
# Makes the preset `smoke` smaller still.
SMALL = [f"image_size={SIZE}", "views=1", "views_rare=1", "head_epochs=2", "finetune_blocks=[top]"]
COMMON = 'data_dir = None\nrun_dir = "runs/by-hand"'


def real_parameters(name: str) -> str:
    """Return the parameters of a notebook of the project, for a network that needs no GPU."""
    declared = notebook_parameters(paths.NOTEBOOKS / f"{name}.ipynb")
    declared |= {"backbone": "EfficientNetLite0", "head_epochs": 1}
    return "\n".join(f"{parameter} = {value!r}" for parameter, value in declared.items())


PARAMETERS = (
    COMMON,
    f"{real_parameters(NOTEBOOKS[1])}\nrate = 0.1\nepochs = 1\nblocks = []\nsize = None",
    f"{COMMON}\npredictions_file = None",
    real_parameters(LADDER_NOTEBOOK),
)
PREDICT = """
import json
from pathlib import Path
import numpy as np
from marsclf.data.open import load_dataset
from marsclf.evaluation.predictions import write_predictions
index = load_dataset(data_dir).index
probabilities = np.random.RandomState(seed).dirichlet(np.full(25, 0.1), len(index))
write_predictions(Path(run_dir) / "predictions.csv", index, probabilities)
(Path(run_dir) / "model.keras").touch()
training = {"dataset": "sample", "commit": "unknown", "seed": seed, "temperature": 0.5}
training["wall_s"] = {"head": 0.1}
(Path(run_dir) / "training.json").write_text(json.dumps(training))
"""
READ = """
from pathlib import Path
figures = Path(run_dir) / "figures"
figures.mkdir(parents=True, exist_ok=True)
(figures / "graph.png").write_text(str(predictions_file))
"""
CLIMB = f"""{PREDICT}
from marsclf.evaluation import ledger
splits = ledger.score(Path(run_dir) / "predictions.csv")
rungs = {{"original": {{"name": "original", "splits": splits}}}}
(Path(run_dir) / "rungs.json").write_text(json.dumps(rungs))
"""


def write_notebook(folder: Path, name: str, parameters: str, code: str, tagged: int = 1) -> None:
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell(parameters)]
    cells += [nbformat.v4.new_code_cell("first = 1"), nbformat.v4.new_code_cell(code)]
    for cell in cells[1 : 1 + tagged]:
        cell.metadata["tags"] = ["parameters"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / f"{name}.ipynb")


def execute_here(name: str, output: Path, parameters: dict) -> tuple[float, int]:
    """Do what `run.execute` does in this process, as to start a kernel takes seconds."""
    source = paths.NOTEBOOKS / f"{name}.ipynb"
    cells = nbformat.read(source, as_version=4).cells
    first, *others = (cell.source for cell in cells if cell.cell_type == "code")
    names: dict[str, object] = {"display": print}
    exec(first, names)
    names |= {key: value for key, value in parameters.items() if key in names}
    exec("\n".join(others), names)
    shutil.copy(source, output)
    return 1.0, 100


def make_project(root: Path) -> Path:
    """Make the folders at `root`."""
    codes = ("pass", PREDICT, READ, CLIMB)
    names = (*NOTEBOOKS, LADDER_NOTEBOOK)
    for name, parameters, code in zip(names, PARAMETERS, codes, strict=True):
        write_notebook(root / "notebooks", name, parameters, code)
    write_preset(root / "presets" / "laptop.yaml", "parameters: {rate: 1e-3}")
    write_preset(root / "presets" / "ladder.yaml", "parameters: {}")
    return root


def write_preset(path: Path, rest: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"description: tiny\nexpected: {{test_accuracy: 0.04}}\n{rest}\n")


def enter_project(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let the library take `root` for the project's folder."""
    folders = {"NOTEBOOKS": "notebooks", "PRESETS": "presets", "RUNS": "runs", "CACHE": "cache"}
    folders |= {"RESULTS": "results", "FIGURES": "figures", "DATA": "data/msl-images"}
    patch.setattr(paths, "PROJECT_ROOT", root)
    own = {name: root / "marsclf" / file.name for name, file in paths.CLASSIFIERS.items()}
    patch.setattr(paths, "CLASSIFIERS", own)
    for constant, folder in folders.items():
        patch.setattr(paths, constant, root / folder)


def write_predictions(path: Path, images_a_split: int = 40, splits: tuple = SPLITS) -> None:
    """Write predictions, right in about half of the cases, for names like the real ones."""
    random = np.random.RandomState(0)
    sols = {"train": 3, "val": 182, "test": 565}
    rows = [
        {"split": split, "path": f"calibrated/{sols[split] + i % 9:04d}ML{i:016d}E01_DRCL.JPG"}
        for split in splits
        for i in range(images_a_split)
    ]
    labels = random.randint(25, size=len(rows))
    probabilities = random.dirichlet(np.full(25, 0.2), len(rows))
    probabilities[::2] = 0.05 / 24
    probabilities[np.arange(0, len(rows), 2), labels[::2]] = 0.95
    predictions.write_predictions(path, pd.DataFrame(rows).assign(label=labels), probabilities)


def stamp_environment(root: Path) -> None:
    """Let `make` take the environment in `root` for complete."""
    lock = (root / "requirements.lock").read_text()
    (root / ".venv" / "made-from.lock").write_text(f"{root.resolve()}\n{lock}")


PRETENSE = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
from marsclf.networks import engine
engine.gpu_capability = lambda: {capability}
"""


def pretend_gpu(folder: Path, project: Path, capability: tuple | None) -> dict[str, str]:
    """Return an environment where TensorFlow seems to see a GPU; the CPU computes in its place.

    `folder` gets a sitecustomize.py, which each Python process runs first.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PRETENSE.format(capability=capability))
    environment = environment_of(project)
    return environment | {"PYTHONPATH": os.pathsep.join([str(project), str(folder)])}


def environment_of(project: Path) -> dict[str, str]:
    """Return an environment with the package of `project`, and without any data."""
    outer = os.environ.copy()
    outer.pop("PYTEST_CURRENT_TEST", None)  # a kernel that sees it does not show all that it prints
    own = {"PYTHONPATH": str(project), "MARSCLF_DATA_DIR": "", "MARSCLF_CACHE_DIR": ""}
    return outer | own
