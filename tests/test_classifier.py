"""The classifier file holds numbers alone, and a classifier says the same however it is asked."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import marsclf
from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.classify.classifier import Classifier, load_classifier
from marsclf.classify.classifier_network import save_classifier
from marsclf.classify.table import COLUMNS, sol_and_camera
from marsclf.data.msl import CLASS_NAMES, MSL_V1_DIGEST, Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool
from marsclf.evaluation.predictions import read_predictions
from marsclf.images.decode import read_rgb
from marsclf.images.views import Condition, fit_view
from marsclf.networks.backbones import build_backbone
from marsclf.pipeline.presets import DEFAULT_PRESET
from marsclf.training.stages import build_head, join


@pytest.fixture(scope="module")
def files(sample_dataset: Dataset) -> list[str]:
    return [str(sample_dataset.root / path) for path in sample_dataset.index["path"][::20]]


def rewritten(source: Path, target: Path, **changes: bytes | None) -> Path:
    """Copy a classifier file with some of its parts replaced, added or (None) left out."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in (parts | changes).items():
            if content is not None:
                archive.writestr(name, content)
    return target


def array(values: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, **options)
    return stream.getvalue()


def test_the_file_holds_what_differs_and_gives_it_back(classifier_path: Path) -> None:
    weights, metadata, _ = classifier_file.read(classifier_path)
    head = {f"{layer}/{part}" for layer in ("head_hidden", "probabilities") for part in KINDS}
    assert set(weights) == head | {"top_conv/kernel"}
    assert metadata["first_learning_block"] == "top"
    assert (metadata["image_size"], metadata["head_hidden"]) == (64, 16)
    original = build_backbone("EfficientNetLite0", 64).get_layer("top_conv").kernel
    np.testing.assert_allclose(weights["top_conv/kernel"], original * 1.01, rtol=1e-3, atol=1e-6)


KINDS = ("kernel", "bias")


def test_equal_content_gives_equal_files(classifier_path: Path, tmp_path: Path) -> None:
    weights, metadata, digest = classifier_file.read(classifier_path)
    classifier_file.write(tmp_path / "again.npz", weights, metadata)
    assert classifier_file.read(tmp_path / "again.npz")[2] == digest
    with np.load(classifier_path, allow_pickle=False) as loaded:  # it is what its suffix says
        assert loaded["top_conv/kernel"].dtype == np.float16


def test_a_loaded_classifier_is_the_model_that_was_saved(
    small_model: keras.Model, classifier: Classifier, files: list[str]
) -> None:
    views = np.stack([fit_view(read_rgb(path), 64) for path in files])
    expected = small_model.predict(views, verbose=0)
    np.testing.assert_allclose(classifier.engine(views), expected, atol=1e-3)
    table = classifier.predict(files)
    assert table["predicted"].tolist() == [CLASS_NAMES[i] for i in expected.argmax(axis=1)]


def test_a_linear_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "marsclf.classify.classifier.make_predictor", lambda model, _, name: model.predict_on_batch
    )
    model = join(build_backbone("EfficientNetLite0", 32), build_head(1280, 0, 0.2))
    save_classifier(model, tmp_path / "c.npz", backbone="EfficientNetLite0", training={})
    metadata = classifier_file.read(tmp_path / "c.npz")[1]
    assert (metadata["head_hidden"], metadata["first_learning_block"]) == (0, None)
    view = np.full((1, 32, 32, 3), 90, np.uint8)
    found = load_classifier(tmp_path / "c.npz", tmp_path).engine(view)
    np.testing.assert_allclose(found, model.predict_on_batch(view), atol=1e-3)


def test_weights_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    for value in (1e6, np.nan):
        with pytest.raises(MarsclfError, match="do not fit half precision"):
            classifier_file.write(tmp_path / "c.npz", {"a/b": np.array([value])}, {})
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Unpickling this would end the tests."""

    def __reduce__(self) -> tuple:
        return sys.exit, (99,)


def keras_model_with_code(path: Path) -> None:
    layers = [keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1)]
    keras.Sequential(layers).save(path)


def test_files_that_are_not_ours_are_never_executed(tmp_path: Path, classifier_path: Path) -> None:
    evil = {"code.pkl": pickle.dumps(Payload()), "empty.npz": b"", "text.npz": b"PK\3\4 hello"}
    for name, content in evil.items():
        (tmp_path / name).write_bytes(content)
    keras_model_with_code(tmp_path / "lambda.keras")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    objects = array(np.array([Payload()], object), allow_pickle=True)
    rewritten(classifier_path, tmp_path / "objects.npz", **{"a/b.npy": objects})
    rewritten(classifier_path, tmp_path / "script.npz", **{"setup.py": b"raise SystemExit"})
    for path in tmp_path.iterdir():
        with pytest.raises(MarsclfError, match=r"is not a classifier file of marsclf \(.+\); name"):
            load_classifier(path, tmp_path)
    with pytest.raises(MarsclfError, match="cannot be read .No such file"):
        load_classifier(tmp_path / "gone.npz")
    with pytest.raises(MarsclfError, match="cannot be read .Is a directory"):
        load_classifier(tmp_path)


def edited(path: Path, **changes: object) -> bytes:
    return json.dumps(classifier_file.read(path)[1] | changes).encode()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "describes something else"),
        ({"version": 2}, "version 2 of the format, and this marsclf reads version 1"),
        ({"image_size": 10**6}, "image_size is 1000000"),
        ({"image_size": True}, "image_size is True"),
        ({"zooms": []}, "zooms are .."),
        ({"zooms": [1.0, 1e9]}, "zooms are .1.0, 1000000000.0."),
        ({"zooms": [True]}, "zooms are .True."),
        ({"zooms": [1] * 99}, "zooms are .1, 1"),
        ({"head_hidden": -1}, "head_hidden is -1"),
        ({"classes": ["a"]}, "classes are not those"),
        ({"backbone": ["EfficientNetLite0"]}, "backbone is"),
        ({"backbone": "ResNet"}, "asks for a backbone 'ResNet'"),
        ({"head_hidden": 32}, "does not fit EfficientNetLite0: it gives 'head_hidden/kernel'"),
        ({"head_hidden": 0}, "does not fit"),
        ({"calibration": {"kind": "vector"}}, "calibration is .*vector"),
        ({"calibration": {"kind": "temperature", "temperature": 0}}, "temperature is 0"),
        ({"calibration": {"kind": "temperature", "temperature": float("nan")}}, "is nan"),
        ({"training": None}, "does not tell what it was trained on"),
    ],
)
def test_metadata_are_checked(
    classifier_path: Path, tmp_path: Path, changes: dict, reason: str
) -> None:
    content = {classifier_file.METADATA: edited(classifier_path, **changes)}
    path = rewritten(classifier_path, tmp_path / "c.npz", **content)
    with pytest.raises(MarsclfError, match=reason):
        load_classifier(path, tmp_path)


def huge_header() -> bytes:
    return array(np.zeros(4, np.float16)).replace(b"(4,), }", b"(4000000000000,), }")[:128]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("probabilities/bias.npy", None, "lacks probabilities/bias"),
        ("probabilities/bias.npy", array(np.zeros(9, np.float16)), "does not fit"),
        ("probabilities/bias.npy", array(np.zeros(25, np.float32)), "half-precision"),
        ("probabilities/bias.npy", array(np.full(25, np.inf, np.float16)), "not finite"),
        ("probabilities/bias.npy", huge_header(), "not as large as it says|damaged|truncated"),
        ("probabilities/bias.npy", b"\x93NUMPY\x03\x00", "unknown version"),
        ("no_layer/kernel.npy", array(np.zeros(3, np.float16)), "gives 'no_layer/kernel'"),
        (classifier_file.METADATA, b"[1]", "describes something else"),
        (classifier_file.METADATA, b"\xff", "is not a classifier file"),
        (classifier_file.METADATA, b"[" * 100_000, "is not a classifier file"),
        (classifier_file.METADATA, b" " * 200_000, "enormous"),
    ],
)
def test_arrays_are_checked(
    classifier_path: Path, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = rewritten(classifier_path, tmp_path / "c.npz", **{name: content})
    with pytest.raises(MarsclfError, match=reason):
        load_classifier(path, tmp_path)


def test_a_bomb_is_not_unpacked(classifier_path: Path, tmp_path: Path) -> None:
    path = rewritten(classifier_path, tmp_path / "c.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.npy", bytes(classifier_file.MAX_BYTES))
    with pytest.raises(MarsclfError, match="unpacked it has more than 300,000,000 bytes"):
        classifier_file.read(path)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_files(tmp_path: Path, place: int, value: int, cut: bool) -> None:
    path = tmp_path / "c.npz"
    classifier_file.write(path, {"a/b": np.arange(3.0)}, METADATA)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content[: place % len(content)] if cut else content)
    try:
        weights, metadata, _ = classifier_file.read(path)
    except MarsclfError as error:
        assert "\n" not in str(error)
    else:
        assert metadata["image_size"] == 64
        assert all(weight.dtype == np.float32 for weight in weights.values())


METADATA = {
    "backbone": "EfficientNetLite0",
    "image_size": 64,
    "head_hidden": 0,
    "classes": list(CLASS_NAMES),
    "zooms": [1.0],
    "calibration": {"kind": "temperature", "temperature": 1.0},
    "training": {},
}


def test_the_table(classifier: Classifier, files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "0830MR0036510000500684E01_DRCL.JPG"
    broken.write_bytes(b"no image")
    table = classifier.predict([files[0], broken, *files[1:3]], threshold=0.05)
    assert list(table.columns) == list(COLUMNS)
    assert table.dtypes.astype(str).tolist() == list(COLUMNS.values())
    assert table["path"].tolist() == [files[0], str(broken), *files[1:3]]
    bad = table.iloc[1]
    assert (bad["sol"], bad["camera"]) == (830, "MR")
    assert bad["error"] == "it is not a JPEG, PNG or TIFF image"
    assert bad[["predicted", "confidence", "runner_up", "uncertain"]].isna().all()
    good = table.drop(index=1)
    assert good["error"].isna().all() and good["sol"].notna().all()
    assert (good["confidence"] >= good["runner_up_confidence"]).all()
    assert (good["uncertain"] == (good["confidence"] < 0.05)).all()
    assert (good["predicted"] != good["runner_up"]).all()


def test_confidence_is_calibrated(classifier: Classifier, files: list[str]) -> None:
    view = fit_view(read_rgb(files[0]), 64)
    raw = classifier.engine(view[np.newaxis])[0].astype(np.float64)
    expected = raw**2 / (raw**2).sum()  # the temperature is a half
    row = classifier.predict(files[0]).iloc[0]
    assert row["confidence"] == pytest.approx(expected.max(), abs=1e-6)
    assert row["runner_up_confidence"] == pytest.approx(np.sort(expected)[-2], abs=1e-6)
    assert classifier.calibrate(raw).sum() == pytest.approx(1)
    extreme = np.zeros(25, np.float32)
    extreme[3] = 1
    assert classifier.calibrate(extreme)[3] == pytest.approx(1)


def test_the_answers_at_all_zooms_are_pooled(
    small_model: keras.Model,
    classifier: Classifier,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "marsclf.classify.classifier.make_predictor", lambda *_, name: classifier.engine
    )
    path, zooms = tmp_path / "c.npz", [1.0, 0.5]
    save_classifier(small_model, path, backbone="EfficientNetLite0", training={}, zooms=zooms)
    classifier = load_classifier(path, tmp_path)
    images = [read_rgb(file) for file in files[:3]]
    looks = [[fit_view(image, 64, Condition(zoom=zoom)) for image in images] for zoom in zooms]
    answers = pool(np.stack([classifier.engine(np.stack(views)) for views in looks]))
    table = classifier.predict(files[:3])
    assert table["confidence"].tolist() == pytest.approx(answers.max(axis=1).tolist(), abs=2e-6)
    assert table["predicted"].tolist() == [CLASS_NAMES[i] for i in answers.argmax(axis=1)]
    once = classifier.engine(np.stack(looks[0]))
    assert not np.allclose(answers, once, atol=1e-4)


def test_an_image_is_judged_alone(classifier: Classifier, files: list[str]) -> None:
    together = classifier.predict(files)
    backwards = classifier.predict(files[::-1])[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(together, backwards)
    for number in (0, 5):
        alone = classifier.predict(files[number])
        pd.testing.assert_frame_equal(
            alone, together.iloc[[number]].reset_index(drop=True), check_exact=True
        )


def test_paths_folders_patterns_and_arrays(
    classifier: Classifier, files: list[str], tmp_path: Path
) -> None:
    for number, path in enumerate(files[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(Path(path).read_bytes())
    table = classifier.predict(tmp_path)
    assert table["path"].tolist() == [str(tmp_path / f"{number}.jpg") for number in range(3)]
    assert table["sol"].isna().all()
    pd.testing.assert_frame_equal(table, classifier.predict(str(tmp_path / "*.jpg")))
    arrays = [read_rgb(path) for path in files[:3]]
    assert classifier.predict(arrays)["path"].isna().all()
    columns = ["predicted", "confidence", "runner_up", "uncertain"]
    pd.testing.assert_frame_equal(classifier.predict(arrays)[columns], table[columns])
    pd.testing.assert_frame_equal(classifier.predict(arrays[0])[columns], table[columns][:1])
    stack = np.stack([fit_view(image, 80) for image in arrays])
    assert len(classifier.predict(stack)) == 3
    grey = stack[0, ..., 0]
    assert classifier.predict(grey).equals(classifier.predict(np.dstack([grey] * 3)))
    assert classifier.predict([]).dtypes.astype(str).tolist() == list(COLUMNS.values())


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8)],
)
def test_arrays_of_another_form(classifier: Classifier, image: np.ndarray) -> None:
    with pytest.raises(MarsclfError, match=r"uint8 array \(height, width\).*, not"):
        classifier.predict([image])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_confidence(classifier: Classifier, threshold: float) -> None:
    with pytest.raises(MarsclfError, match="lies between 0 and 1"):
        classifier.predict([], threshold)


def test_names_tell_sol_and_camera() -> None:
    for name in ("0830MR0036510000500684E01_DRCL.JPG", "0830mr0036510000500684e01_drcl.img"):
        assert sol_and_camera(f"/some/folder/{name}") == (830, "MR")
    assert sol_and_camera("holiday.jpg") == sol_and_camera(None) == (None, None)


def test_a_classifier_that_was_prepared_loads_no_keras(
    classifier: Classifier, classifier_path: Path, prepared: Path, files: list[str]
) -> None:
    code = (
        "import sys; from pathlib import Path; from marsclf.classifier import load_classifier\n"
        "classifier = load_classifier(sys.argv[1], Path(sys.argv[2]))\n"
        "table = classifier.predict(sys.argv[3])\n"
        "print({'keras', 'tensorflow'} & {*sys.modules}, *table['confidence'])"
    )
    command = [sys.executable, "-c", code, str(classifier_path), str(prepared), files[0]]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    confidence = classifier.predict(files[0])["confidence"].iloc[0]
    assert ended.stdout == f"set() {confidence}\n"


def test_a_prepared_network_that_is_damaged_is_exported_anew(
    classifier: Classifier,
    classifier_path: Path,
    prepared: Path,
    files: list[str],
    tmp_path: Path,
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (network,) = tmp_path.glob("networks/*/network.xml")
    network.write_text("<net>")
    found = load_classifier(classifier_path, tmp_path).predict(files[0])
    pd.testing.assert_frame_equal(found, classifier.predict(files[0]))
    assert network.read_text() != "<net>"


def test_importing_the_package_loads_no_keras() -> None:
    code = "import sys, marsclf; print({'keras', 'numpy'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"
    assert marsclf.load_classifier is load_classifier
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = marsclf.other


def test_the_published_classifier_is_small_and_of_the_real_images() -> None:
    assert paths.CLASSIFIER.stat().st_size <= 8_000_000
    _, metadata, _ = classifier_file.read(paths.CLASSIFIER)
    assert metadata["training"]["data_digest"] == MSL_V1_DIGEST


@pytest.mark.realdata
def test_the_published_classifier_is_right_on_validation(real_data_dir: Path) -> None:
    lines = (real_data_dir / "val-calibrated-shuffled.txt").read_text().splitlines()[::10]
    named = [line.split() for line in lines]
    table = load_classifier().predict([real_data_dir / path for path, _ in named])
    right = table["predicted"] == [CLASS_NAMES[int(label)] for _, label in named]
    assert right.mean() > 0.9
    assert table["error"].isna().all()


@pytest.mark.realdata
def test_the_published_classifier_gave_the_published_predictions(real_data_dir: Path) -> None:
    stored = read_predictions(paths.RESULTS / DEFAULT_PRESET / "predictions.csv.gz")
    stored = stored[stored["split"] == "val"][::10]
    table = load_classifier().predict([real_data_dir / path for path in stored["path"]])
    same = table["predicted"] == [CLASS_NAMES[label] for label in stored["predicted"]]
    assert same.mean() >= 0.99  # the file holds its weights in half precision
