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
from tiny_project import pretend_gpu

from marsclf.data.dataset import Dataset
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view
from marsclf.networks.backbones import build_backbone

SETTINGS = ["image_size=64", "head_epochs=1", "finetune_epochs=2", "finetune_batch_size=16"]
SETTINGS += ["temperature=1.0", "test_zooms=[1.0]"]  # fewer images to predict


@pytest.fixture(scope="module")
def weights(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random B7 whose features have the scale of trained ones."""
    paths = sample_dataset.root / sample_dataset.index["path"].iloc[::3]
    images = np.stack([fit_view(read_rgb(path), 64) for path in paths])
    images = images / np.sqrt([0.229, 0.224, 0.225])  # as Keras scales them for ImageNet's weights
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB7", 64, weights=None)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # it takes the statistics of the images
            # Random layers would amplify every difference between images a little.
            is_last = "project" in layer.name
            layer.gamma.assign(layer.gamma * (0.2 if is_last else 1.0))
            layer.beta.assign(layer.beta + (0.0 if is_last else 1.0))
    network(images, training=True)
    path = tmp_path_factory.mktemp("weights") / "copy.h5"
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)
    return path


def pretend(folder: Path, project: Path, weights: Path, capability: tuple | None) -> dict[str, str]:
    """Return an environment where the weights are Keras's own, and perhaps a GPU exists."""
    environment = pretend_gpu(folder, project, capability)
    md5 = hashlib.md5(weights.read_bytes()).hexdigest()
    with (folder / "sitecustomize.py").open("a") as file:
        file.write(
            "from keras.src.applications import efficientnet\n"
            f"efficientnet.WEIGHTS_HASHES['b7'] = (None, '{md5}')\n"
        )
    return environment | {"KERAS_HOME": str(folder)}


@pytest.mark.slow
def test_b7_from_the_weights_to_predict(project: Path, weights: Path, tmp_path: Path) -> None:
    environment = pretend(tmp_path / "home", project, weights, (7, 5))
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
    elsewhere = options | {"env": pretend(tmp_path / "elsewhere", project, weights, None)}
    ended = subprocess.run(predict, capture_output=True, **elsewhere)
    *_, message = ended.stderr.splitlines()
    assert ended.returncode == 1 and message.startswith("error: The ImageNet weights of Efficient")
    assert "efficientnetb7_notop.h5" in message and "--weights" in message
    predict += ["--weights", str(weights)]
    ended = subprocess.run(predict, capture_output=True, **elsewhere)
    assert ended.returncode == 0, ended.stderr
    tables = (pd.read_csv(file) for file in (tmp_path / "table.csv", folder / "predictions.csv"))
    found, stored = (t.set_index(t["path"].map(os.path.basename))["confidence"] for t in tables)
    assert stored.nunique() > 10
    np.testing.assert_allclose(found.loc[stored.index], stored, atol=0.03)  # float32 to float16
