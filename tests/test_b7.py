"""The preset `b7` from the weights to `predict`, as on a GPU that is older than bfloat16.

A file of random weights in Keras's format stands in for ImageNet's, and the GPU is a pretense: the
CPU computes in float16. Images have 64 pixels.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from keras.src.legacy.saving import legacy_h5_format
from tiny_project import environment_of

from marsclf.networks.backbones import build_backbone
from tools.gpu_cost import set_scale

PRETENSE = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
from keras.src.applications import efficientnet
from marsclf.networks import engine
efficientnet.WEIGHTS_HASHES["b7"] = (None, "{md5}")
engine.gpu_capability = lambda: {capability}
"""
SETTINGS = ["image_size=64", "head_epochs=1", "finetune_epochs=2", "finetune_batch_size=16"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random B7 whose features have the scale of trained ones."""
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB7", 64, weights=None)
    set_scale(network, np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3)))
    path = tmp_path_factory.mktemp("weights") / "copy.h5"
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)
    return path


def pretend(folder: Path, project: Path, weights: Path, capability: str) -> dict[str, str]:
    """Return an environment where the weights are Keras's own and a GPU has this capability."""
    folder.mkdir()
    md5 = hashlib.md5(weights.read_bytes()).hexdigest()
    (folder / "sitecustomize.py").write_text(PRETENSE.format(md5=md5, capability=capability))
    environment = environment_of(project)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(folder)])
    return environment | {"KERAS_HOME": str(folder)}


@pytest.mark.slow
def test_b7_from_the_weights_to_predict(project: Path, weights: Path, tmp_path: Path) -> None:
    environment = pretend(tmp_path / "home", project, weights, "(7, 5)")
    command = [sys.executable, "-m", "marsclf", "run", "--preset", "b7", "--sample"]
    command += ["--set", *SETTINGS, "--weights", str(weights)]
    options = {"cwd": project, "env": environment, "text": True}
    checkpoints = project / "cache" / "training"

    def finetuned_epochs() -> int:
        files = checkpoints.glob("*/progress.json")
        histories = [json.loads(file.read_text()) for file in files]
        return max((len(h) for h in histories if h[0]["stage"] == "finetune"), default=0)

    with subprocess.Popen(command, start_new_session=True, **options) as run:
        while finetuned_epochs() == 0:
            assert run.poll() is None
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGKILL)
    ended = subprocess.run(command, capture_output=True, **options)
    assert ended.returncode == 0, ended.stderr
    folder = project / "runs" / "b7"
    notebook = (folder / "02_fine_tuning.ipynb").read_text(encoding="utf-8")
    assert "computing in float16" in notebook
    assert "finetune epoch 2/2" in notebook and "epoch 1/" not in notebook  # it was resumed
    history = json.loads((folder / "training.json").read_text())["history"]
    assert [(r["stage"], r["epoch"]) for r in history] == [
        ("head", 1), ("finetune", 1), ("finetune", 2),
    ]  # fmt: skip
    assert (folder / "figures" / "03_gradcam_right.png").is_file()
    assert not list(checkpoints.iterdir())  # the run is complete

    predict = [sys.executable, "-m", "marsclf", "predict", "--output", str(tmp_path / "table.csv")]
    predict += ["--model", str(folder / "classifier.safetensors")]
    predict.append(str(project / "cache" / "sample" / "calibrated"))
    elsewhere = options | {"env": pretend(tmp_path / "elsewhere", project, weights, "None")}
    ended = subprocess.run(predict, capture_output=True, **elsewhere)
    assert ended.returncode == 1 and "efficientnetb7_notop.h5" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and "--weights" in ended.stderr
    predict += ["--weights", str(weights)]
    ended = subprocess.run(predict, capture_output=True, **elsewhere)
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(tmp_path / "table.csv").assign(
        name=lambda t: t["path"].map(os.path.basename)
    )
    stored = pd.read_csv(folder / "predictions.csv")
    stored = stored.assign(name=stored["path"].map(os.path.basename)).set_index("name")
    found = table.set_index("name")["confidence"].loc[stored.index]
    np.testing.assert_allclose(found, stored["confidence"], atol=0.03)  # float32 to float16
