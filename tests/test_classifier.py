"""The classifier file is safe to read, and a classifier predicts the same however it is called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save
from tiny_project import CLASSES

from marsclf import paths
from marsclf.classify import classifier as module
from marsclf.classify import classifier_file
from marsclf.classify.classifier import Classifier, load_classifier
from marsclf.classify.classifier_file import save_classifier
from marsclf.classify.table import COLUMNS
from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1
from marsclf.data.open import load_dataset
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.images.views import Condition, fit_view
from marsclf.networks.backbones import build_backbone
from marsclf.training.stages import build_head, join

HEAD = ("head_hidden", "probabilities")
METADATA = {
    "format": "marsclf-classifier",
    "version": 1,
    "backbone": "EfficientNetLite0",
    "image_size": 64,
    "head_hidden": 0,
    "first_learning_block": None,
    "classes": list(MSL_V1.classes),
    "zooms": [1.0],
    "calibration": {"kind": "temperature", "temperature": 1.0},
    "training": {},
}


@pytest.fixture(scope="module")
def files(sample_dataset: Dataset) -> list[str]:
    return [str(sample_dataset.root / path) for path in sample_dataset.index["path"][::20]]


def test_the_file_holds_what_training_changed(classifier_path: Path) -> None:
    weights, metadata, _ = classifier_file.read(classifier_path)
    head = {f"{layer}/{part}" for layer in HEAD for part in ("kernel", "bias")}
    assert set(weights) == head | {"top_conv/kernel"}
    assert (metadata["image_size"], metadata["head_hidden"]) == (64, 16)
    original = build_backbone("EfficientNetLite0", 64).get_layer("top_conv").kernel
    np.testing.assert_allclose(weights["top_conv/kernel"], original * 1.01, rtol=1e-3, atol=1e-6)


def test_a_loaded_classifier_is_the_model_that_was_saved(
    small_model: keras.Model, classifier: Classifier, files: list[str]
) -> None:
    views = np.stack([fit_view(read_rgb(path), 64) for path in files])
    expected = small_model.predict(views, verbose=0)
    np.testing.assert_allclose(classifier.engine(views), expected, atol=1e-3)
    table = classifier.predict(files)
    assert table["predicted"].tolist() == [CLASSES[i] for i in expected.argmax(axis=1)]
    assert set(table["runner_up"]) <= set(classifier.classes) == set(CLASSES)


def test_a_linear_head(tmp_path: Path) -> None:
    model = join(build_backbone("EfficientNetLite0", 32), build_head(1280, 0, 0.2, 2))
    path, options = tmp_path / "c.safetensors", {"backbone": "EfficientNetLite0", "training": {}}
    options["classes"] = ["rock", "sand"]
    save_classifier(model, path, **options)
    weights, metadata, digest = classifier_file.read(path)
    assert metadata["head_hidden"] == 0
    view = np.full((1, 32, 32, 3), 90, np.uint8)
    found = classifier_file.build_network(path, weights, metadata)[0](view)
    np.testing.assert_allclose(found, model(view), atol=1e-3)
    scale = model.get_layer("top_bn").gamma
    scale.assign(scale + 1)
    with pytest.raises(MarsclfError, match="top_bn/gamma have changed, but BatchNorm must be"):
        save_classifier(model, path, **options)
    model.layers[-1].bias.assign([1e6, np.nan])
    with pytest.raises(MarsclfError, match="too large for float16, or not finite"):
        save_classifier(model, path, **options)
    assert classifier_file.read(path)[2] == digest and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for missing in (tmp_path / "gone", tmp_path, tmp_path / "pipe"):
        with pytest.raises(MarsclfError, match=r"cannot be read \(.+\)\.$"):
            load_classifier(missing, tmp_path)


def content(metadata: object = METADATA, **tensors: np.ndarray) -> bytes:
    """Return a file of a linear head with other metadata or tensors."""
    weights = {"probabilities/kernel": np.zeros((1280, 25)), "probabilities/bias": np.zeros(25)}
    weights = {name: weight.astype(np.float16) for name, weight in weights.items()} | tensors
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return save(weights, {classifier_file.METADATA: text})


def changed(**changes: object) -> bytes:
    return content(METADATA | changes)


BIAS = "probabilities/bias"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (changed(format="other"), "header does not describe a marsclf-classifier"),
        (changed(image_size=10**6), "image_size is 1000000"),
        (changed(zooms=[1.0, 1e9]), "zooms are"),
        (changed(classes=["a"]), "classes is"),
        (changed(classes=["a", ["b"]]), "classes is"),
        (changed(classes=["a", "\x1b[2J"]), "classes is"),
        (changed(classes=["a", "b"]), "do not fit EfficientNetLite0"),
        (changed(backbone=["EfficientNetLite0"]), "backbone is"),
        (changed(calibration={"kind": "temperature", "temperature": 0}), "temperature is 0"),
        (changed(first_learning_block="top"), "weights 'top_conv/kernel' are missing"),
        (changed(backbone="ResNet"), "There is no backbone 'ResNet'"),
        (content("[" * 100_000), "is not a classifier file"),
        (b"", "is not a classifier file"),
        (save({"a": np.zeros(3)}), "is not a classifier file"),
        (content()[:-10], "is not a classifier file"),
        (content(**{BIAS: np.zeros(9, np.float16)}), "do not fit EfficientNetLite0"),
        (content(**{"other/kernel": np.zeros(3, np.float16)}), "weights 'other/kernel' are"),
        (content(**{BIAS: np.full(25, np.inf, np.float16)}), "not finite"),
        (content(**{"familiarity/bias": np.zeros(1, np.float16)}), "familiarity/kernel' are"),
    ],
)
def test_a_file_is_checked_completely(made: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(made)
    with pytest.raises(MarsclfError, match=reason) as error:
        load_classifier(path, tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_the_table(classifier: Classifier, files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "0830mr0036510000500684e01_drcl.jpg"
    broken.write_bytes(b"no image")
    table = classifier.predict([files[0], broken, *files[1:3]], threshold=0.05)
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert table["path"].tolist() == [files[0], str(broken), *files[1:3]]
    bad = table.iloc[1]
    assert (bad["sol"], bad["camera"]) == (830, "MR") and bad["error"]
    assert bad[["predicted", "confidence", "runner_up", "uncertain"]].isna().all()
    assert table[["familiarity", "unfamiliar"]].isna().all(axis=None)  # the file has no such unit
    good = table.drop(index=1)
    assert good["error"].isna().all() and good["sol"].notna().all()
    assert (good["confidence"] >= good["runner_up_confidence"]).all()
    assert (good["uncertain"] == (good["confidence"] < 0.05)).all()
    assert (good["predicted"] != good["runner_up"]).all()


def test_predictions_at_all_zooms_are_pooled_and_calibrated(
    classifier: Classifier, small_model: keras.Model, files: list[str], tmp_path: Path
) -> None:
    path, zooms = tmp_path / "c.safetensors", [1.0, 0.5]
    options = {"backbone": "EfficientNetLite0", "training": {}, "temperature": 0.5}
    options["classes"] = CLASSES
    save_classifier(small_model, path, zooms=zooms, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_predictor", lambda *_, name: classifier.engine)
        table = load_classifier(path, tmp_path).predict(files[:3])
    for number, file in enumerate(files[:3]):
        views = [fit_view(read_rgb(file), 64, Condition(zoom=zoom)) for zoom in zooms]
        logits = np.log(classifier.engine(np.stack(views)).astype(np.float64)).mean(axis=0) / 0.5
        expected = np.exp(logits) / np.exp(logits).sum()
        assert table["predicted"][number] == CLASSES[expected.argmax()]
        found = table.loc[number, ["runner_up_confidence", "confidence"]].astype(float)
        np.testing.assert_allclose(found, np.sort(expected)[-2:], atol=2e-6)


def test_a_prediction_does_not_depend_on_the_other_images(
    classifier: Classifier, files: list[str]
) -> None:
    together = classifier.predict(files)
    backwards = classifier.predict(files[::-1])[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(together, backwards, check_exact=True)
    alone = classifier.predict(files[5]).set_index(pd.Index([5]))
    pd.testing.assert_frame_equal(alone, together.iloc[[5]], check_exact=True)


def test_paths_folders_patterns_and_arrays(
    classifier: Classifier, files: list[str], tmp_path: Path
) -> None:
    for number, path in enumerate(files[:3]):
        shutil.copy(path, tmp_path / f"{number}.jpg")
    table = classifier.predict(tmp_path)
    assert table["path"].tolist() == [str(tmp_path / f"{number}.jpg") for number in range(3)]
    assert table["sol"].isna().all()
    pd.testing.assert_frame_equal(table, classifier.predict(str(tmp_path / "*.jpg")))
    arrays = [read_rgb(path) for path in files[:3]]
    columns = ["predicted", "confidence", "runner_up", "uncertain"]
    assert classifier.predict(arrays)["path"].isna().all()
    pd.testing.assert_frame_equal(classifier.predict(arrays)[columns], table[columns])
    pd.testing.assert_frame_equal(classifier.predict(arrays[0])[columns], table[columns][:1])
    stack = np.stack([fit_view(image, 80) for image in arrays])
    assert len(classifier.predict(stack)) == 3
    gray = stack[0, ..., 0]
    assert classifier.predict(gray).equals(classifier.predict(np.dstack([gray] * 3)))
    assert classifier.predict([]).dtypes.astype(str).to_dict() == COLUMNS


def test_arrays_and_thresholds_that_cannot_be_used(classifier: Classifier) -> None:
    for shape, dtype in (((8, 8, 3), float), ((8, 8, 4), np.uint8), ((0, 8, 3), np.uint8)):
        with pytest.raises(MarsclfError, match=r"uint8 array \(height, width\).*, not"):
            classifier.predict([np.zeros(shape, dtype)])
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(MarsclfError, match="must be between 0 and 1"):
            classifier.predict([], threshold)


def test_packages_are_loaded_only_when_needed(
    classifier: Classifier, classifier_path: Path, prepared: Path, files: list[str]
) -> None:
    code = (
        "import sys, marsclf; print({'keras', 'numpy'} & {*sys.modules})\n"
        "from pathlib import Path\n"
        "classifier = marsclf.load_classifier(sys.argv[1], Path(sys.argv[2]))\n"
        "table = classifier.predict(sys.argv[3])\n"
        "print({'keras', 'tensorflow'} & {*sys.modules}, *table['confidence'])"
    )
    command = [sys.executable, "-c", code, str(classifier_path), str(prepared), files[0]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    confidence = classifier.predict(files[0])["confidence"].iloc[0]
    assert printed == f"set()\nset() {confidence}\n"


@pytest.mark.parametrize("labels", paths.CLASSIFIERS)
def test_the_published_classifiers_are_small_and_of_the_real_images(labels: str) -> None:
    file = paths.CLASSIFIERS[labels]
    assert file.stat().st_size <= 8_000_000
    _, metadata, _ = classifier_file.read(file)
    assert metadata["training"]["dataset"] == {"parts": "msl-v1", "content": "msl-v2.1"}[labels]


@pytest.mark.realdata
def test_the_published_classifier_knows_what_it_learned_from(real_data_dir, prepared) -> None:
    rows = load_dataset(real_data_dir).index[::200]
    classifier = load_classifier(cache=prepared)
    table = classifier.predict([real_data_dir / path for path in rows["path"]])
    assert table["error"].isna().all()
    assert (table["predicted"].to_numpy() == rows["class_name"].to_numpy()).mean() > 0.9
