"""The command `export`: other libraries get the network that predicts here, and how to use it."""

import json
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
import onnx
import openvino
import pandas as pd
import pytest
from tiny_project import CLASSES

from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.classify.classifier_file import save_classifier
from marsclf.cli import main
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.images.views import Condition, fit_view
from marsclf.networks import engine
from marsclf.networks.backbones import build_backbone
from marsclf.networks.engine import check_export
from marsclf.networks.onnx_file import save_onnx

ZOOMS = [1.0, 0.5]
realdata = pytest.mark.realdata


@pytest.fixture(scope="module")
def trained(small_model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier file with two zooms and a temperature."""
    path = tmp_path_factory.mktemp("trained") / "c.safetensors"
    options = {"backbone": "EfficientNetLite0", "training": {"seed": 0}, "classes": CLASSES}
    save_classifier(small_model, path, zooms=ZOOMS, temperature=0.5, **options)
    return path


def outputs_and_metadata(file: Path, views: np.ndarray) -> tuple[np.ndarray, dict]:
    """Use an exported network as its library's users do."""
    if file.suffix == ".keras":
        metadata = json.loads(zipfile.ZipFile(file).read("marsclf.json"))
        return keras.saving.load_model(file).predict(views, verbose=0), metadata
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if file.suffix == ".onnx":
        onnx.checker.check_model(file, full_check=True)
        metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    else:
        rt_info = openvino.Core().read_model(file).get_rt_info()
        metadata = {key: str(value) for key, value in rt_info["marsclf"].items()}
    return compiled(views.astype(np.float32))[0], metadata


@pytest.fixture(scope="module", params=["sample", pytest.param("real", marks=realdata)])
def example(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, np.ndarray, pd.DataFrame]:
    """A classifier file, views of some images (n, zooms, size, size, 3), and their table."""
    if request.param == "real":
        file, cache = paths.CLASSIFIERS["parts"], paths.CACHE
        images = sorted(request.getfixturevalue("real_data_dir").rglob("*.JPG"))[::200]
    else:
        file, cache = trained, tmp_path_factory.mktemp("cache")
        dataset = request.getfixturevalue("sample_dataset")
        images = [dataset.root / path for path in dataset.index["path"][::20]]
    classifier = load_classifier(file, cache)
    conditions = [Condition(zoom=zoom) for zoom in ZOOMS]
    views = [[fit_view(read_rgb(i), classifier.image_size, c) for c in conditions] for i in images]
    return file, np.array(views), classifier.predict(images)


@pytest.mark.parametrize(
    ("format", "name"), [("onnx", "c.onnx"), ("openvino", "c.xml"), ("keras", "c.keras")]
)
def test_an_exported_network_predicts_what_the_classifier_predicts(
    format: str, name: str, example: tuple, tmp_path: Path
) -> None:
    classifier, views, table = example
    file = tmp_path / "new" / name
    assert main(["export", "--format", format, "--model", str(classifier), str(file)]) == 0
    assert {path.stem for path in file.parent.iterdir()} == {"c"}
    outputs, metadata = outputs_and_metadata(file, views.reshape(-1, *views.shape[2:]))
    assert f"(n, {views.shape[2]}, {views.shape[3]}, 3)" in metadata["input"]
    assert json.loads(metadata["zooms"]) == ZOOMS
    # The recipe of the metadata.
    logits = np.log(outputs.astype(float)).reshape(*views.shape[:2], -1).mean(axis=1)
    pooled = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = json.loads(metadata["classes"])
    assert table["predicted"].tolist() == [classes[i] for i in pooled.argmax(axis=1)]
    np.testing.assert_allclose(pooled.max(axis=1), table["confidence"], atol=2e-5)


def test_onnx_has_the_layers_of_the_larger_networks(
    sample_dataset: Dataset, tmp_path: Path
) -> None:
    """EfficientNetB0 to B7 differ in the number and size of their layers alone."""
    files = sample_dataset.root / sample_dataset.index["path"].iloc[::10]
    images = np.stack([fit_view(read_rgb(path), 64) for path in files])
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB0", 64, weights=None)
    (colors,) = (x for x in network.layers if isinstance(x, keras.layers.Normalization))
    count = colors.get_weights()[2]
    colors.set_weights([np.array([0.4, 0.5, 0.6]), np.array([0.9, 1.0, 1.1]), count])
    colors.finalize_state()  # as Keras does when it loads weights
    features = network.predict_on_batch(images)
    assert np.ptp(features, axis=0).max() > 0.1 * features.max()
    save_onnx(network, tmp_path / "b0.onnx", {})
    check_export(tmp_path / "b0.onnx", network, images)
    gamma = network.get_layer("top_bn").gamma
    gamma.assign(gamma * 1.1)
    with pytest.raises(MarsclfError, match=r"b0.onnx: OpenVINO's outputs differ from Keras's"):
        check_export(tmp_path / "b0.onnx", network, images)


@pytest.mark.parametrize(
    ("format", "name", "reason"),
    [
        ("keras", "c.onnx", r"--format keras writes a \.keras file, not .*c\.onnx\.$"),
        ("onnx", "folder.onnx", "--format onnx writes a .onnx file"),
        ("openvino", "weights.xml", "--format openvino writes a .xml file"),
        ("onnx", "long" * 99 + ".onnx", r"cannot be read or written \(File name too long\)"),
        ("onnx", "c.onnx", "differ from Keras's"),
        ("openvino", "c.xml", "differ from Keras's"),
    ],
)
def test_a_failed_export_changes_nothing(
    format: str,
    name: str,
    reason: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in ("folder.onnx", "weights.bin"):
        (tmp_path / folder).mkdir()
    for file in ("c.onnx", "c.xml", "c.bin"):
        (tmp_path / file).write_text("precious")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(engine, "LARGEST_DIFFERENCE", 0)
    command = ["export", "--format", format, "--model", str(trained), str(tmp_path / name)]
    assert main(command) == 1
    assert re.match(f"error: .*{reason}", capsys.readouterr().err.splitlines()[-1])
    assert sorted(tmp_path.iterdir()) == before
    assert {(tmp_path / file).read_text() for file in ("c.onnx", "c.xml", "c.bin")} == {"precious"}
