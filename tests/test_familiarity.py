"""The unit that tells images of the classes from others, and what `predict` makes of it."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_project import CLASSES

from marsclf.classify import predict
from marsclf.classify.classifier import load_classifier
from marsclf.classify.classifier_file import save_classifier
from marsclf.classify.table import COLUMNS
from marsclf.cli import main
from marsclf.data.dataset import Dataset
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view
from marsclf.networks import engine
from marsclf.training.familiarity import PENALTY, blank_frames, features_model, fit_familiarity


def test_the_unit_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    known, outside = random.normal(3, 2, (400, 5)), random.normal(2.5, 1, (90, 5))
    known[:, 4] = outside[:, 4] = 7  # a channel that says nothing
    (weights, bias), held_out = fit_familiarity(known, outside, np.arange(490) // 4, flagged=0.1)
    features, target = np.concatenate([known, outside]), np.arange(490) < 400
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / PENALTY, class_weight="balanced", tol=1e-10)
    model.fit(scaler.transform(features), target)
    expected = model.decision_function(scaler.transform(features))
    found = features @ weights + bias
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-5)
    assert weights[4] == 0
    assert (held_out[:400] < 0.5).mean() == 0.1
    assert (found[:400] < 0).mean() == pytest.approx(0.1, abs=0.02)


def test_a_group_does_not_vouch_for_its_own_images() -> None:
    """Each group has its own channel, so units that know only the others find it unfamiliar."""
    known, outside = np.eye(5)[np.arange(40) % 5], np.zeros((40, 5))
    (weights, bias), held_out = fit_familiarity(known, outside, np.arange(80) % 5, flagged=0.5)
    assert np.median(held_out[:40]) == 0.5
    assert np.all(known @ weights + bias > 0.2)


def test_blank_frames_are_flagged(
    small_model: keras.Model,
    sample_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine, "gpu_capability", lambda: (8, 0))  # Keras predicts: no export
    network, rows = features_model(small_model), sample_dataset.index[::4]
    known = np.stack([fit_view(read_rgb(sample_dataset.root / path), 64) for path in rows["path"]])
    known, outside = (network.predict(x, verbose=0) for x in (known, blank_frames(64, 100)))
    unit, _ = fit_familiarity(known, outside, [*rows["group"], *range(-100, 0)])
    file = tmp_path / "c.safetensors"
    options = {"backbone": "EfficientNetLite0", "training": {}, "familiarity": unit}
    options |= {"classes": CLASSES, "zooms": [1.0, 0.5], "temperature": 0.5}
    save_classifier(small_model, file, **options)
    loaded, random = load_classifier(file, tmp_path), np.random.default_rng(0)
    shade = np.add.outer(np.arange(90), np.arange(120))
    frames = [np.full((64, 64, 3), color) for color in ((0,) * 3, (255,) * 3, (40, 90, 30))]
    frames += [np.full((100, 120), value) for value in (12, 128, 200)]
    frames += [shade, 255 - shade]
    frames += [random.integers(low, low + 6, (80, 80)) for low in (0, 250)]
    blank = tmp_path / "blank"
    blank.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(np.uint8(frame)).save(blank / f"{number}.png")
    images = [sample_dataset.root / path for path in sample_dataset.index["path"][1::20]]
    table = loaded.predict([blank, *images])
    assert table["unfamiliar"][:10].all() and table["unfamiliar"][10:].mean() < 0.1
    assert ((table["familiarity"] < 0.5) == table["unfamiliar"]).all()
    assert loaded.network().output_shape == (None, len(CLASSES))  # as Grad-CAM needs it
    monkeypatch.setattr(predict, "load_classifier", lambda _: loaded)
    output = tmp_path / "t.parquet"
    assert main(["predict", str(blank), "--model", str(file), "--output", str(output)]) == 0
    assert "10 are unfamiliar" in capsys.readouterr().err
    pd.testing.assert_frame_equal(pd.read_parquet(output).astype(COLUMNS), table[:10])
