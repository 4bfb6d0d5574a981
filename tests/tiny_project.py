"""A project folder with notebooks of a few lines, for tests of the machinery around them."""

import os
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from marsclf import paths
from marsclf.data import msl as data
from marsclf.evaluation import predictions
from marsclf.pipeline.presets import NOTEBOOKS

SIZE = 48  # pixels
# What makes the preset `smoke` smaller still.
SMALL = [f"image_size={SIZE}", "views=1", "views_rare=1", "head_epochs=2", "finetune_blocks=[top]"]
COMMON = 'data_dir = None\nrun_dir = "runs/by-hand"'
PARAMETERS = (
    COMMON,
    f'{COMMON}\nbackbone = "EfficientNetLite0"\nseed = 0\nrate = 0.1\nepochs = 1\nblocks = ()',
    f"{COMMON}\npredictions_file = None",
)
PREDICT = """
import json
from pathlib import Path
import numpy as np
from marsclf.data import msl as data
from marsclf.evaluation.predictions import write_predictions
index = data.load_dataset(data_dir).index
probabilities = np.random.RandomState(seed).dirichlet(np.full(25, 0.1), len(index))
write_predictions(Path(run_dir) / "predictions.csv", index, probabilities)
(Path(run_dir) / "model.keras").touch()
training = {"dataset": "sample", "wall_s": {"head": rate}}
(Path(run_dir) / "training.json").write_text(json.dumps(training))
"""
READ = """
from pathlib import Path
figures = Path(run_dir) / "figures"
figures.mkdir(parents=True, exist_ok=True)
(figures / "graph.png").write_text(str(predictions_file))
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


def make_project(root: Path, training: str = PREDICT) -> Path:
    """Make the folders at `root`; notebook 02 holds the code `training`."""
    codes = ("import sys; print(sys.executable)", training, READ)
    for name, parameters, code in zip(NOTEBOOKS, PARAMETERS, codes, strict=True):
        write_notebook(root / "notebooks", name, parameters, code)
    (root / "presets").mkdir()
    (root / "presets" / "laptop.yaml").write_text(
        "description: tiny\nexpected: {test_accuracy: 0.04}\nparameters: {rate: 1e-3}\n"
    )
    return root


def enter_project(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let the library take `root` for the project's folder."""
    folders = {"NOTEBOOKS": "notebooks", "PRESETS": "presets", "RUNS": "runs", "CACHE": "cache"}
    folders |= {"RESULTS": "results", "FIGURES": "figures", "DATA": "data/msl-images"}
    patch.setattr(paths, "PROJECT_ROOT", root)
    patch.setattr(paths, "CLASSIFIER", root / "marsclf" / "classifier.safetensors")
    for constant, folder in folders.items():
        patch.setattr(paths, constant, root / folder)


def write_predictions(path: Path, images_a_split: int = 40) -> None:
    """Write predictions, right in about half of the cases, for names like the real ones."""
    random = np.random.RandomState(0)
    sols = {"train": 3, "val": 182, "test": 565}
    rows = [
        {"split": split, "path": f"calibrated/{sols[split] + i % 9:04d}ML{i:016d}E01_DRCL.JPG"}
        for split in data.SPLITS
        for i in range(images_a_split)
    ]
    labels = random.randint(data.NUM_CLASSES, size=len(rows))
    probabilities = random.dirichlet(np.full(data.NUM_CLASSES, 0.2), len(rows))
    probabilities[::2] = 0.05 / 24
    probabilities[np.arange(0, len(rows), 2), labels[::2]] = 0.95
    predictions.write_predictions(path, pd.DataFrame(rows).assign(label=labels), probabilities)


def environment_of(project: Path) -> dict[str, str]:
    """Let the notebooks import the copy, and find no data but what they are given."""
    outer = os.environ.copy()
    outer.pop("PYTEST_CURRENT_TEST", None)  # a kernel that sees it does not show all that it prints
    return outer | {"PYTHONPATH": str(project), "MARSCLF_DATA_DIR": ""}
