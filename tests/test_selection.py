"""Selection: nothing of test, nothing later than what is judged, all classes and sols alike."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score

from marsclf import selection
from marsclf.data import Dataset
from marsclf.images import decode_rgb, fit_view
from marsclf.recipe import Network


def make_index(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    index = pd.DataFrame(rows, columns=["split", "sol", "label"])
    return index.assign(path=[f"{i:04d}.jpg" for i in range(len(rows))])


def test_a_fold_learns_from_earlier_sols_and_never_sees_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "FOLDS", {"one": (10, 20)})
    index = make_index(
        [("train", 3, 0), ("train", 10, 1), ("train", 11, 0), ("val", 20, 1), ("val", 21, 0)]
        + [("val", 15, 2), ("test", 5, 0), ("test", 12, 1)]
    )
    train, judged = selection.fold(index, "one")
    assert train["path"].tolist() == ["0000.jpg", "0001.jpg"]
    assert judged["path"].tolist() == ["0002.jpg", "0003.jpg"]  # class 2 was never learnt


def test_judged_images_come_from_many_sols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "IMAGES_A_CLASS", 6)
    index = make_index([("val", 1, 0)] * 50 + [("val", 2, 0)] * 2 + [("val", 3, 0)] * 9)
    index = pd.concat([index, make_index([("val", 1, 4)] * 3)], ignore_index=True)
    found = selection.spread_over_sols(index)
    counts = found.groupby(["label", "sol"]).size().to_dict()
    assert counts == {(0, 1): 2, (0, 2): 2, (0, 3): 2, (4, 1): 3}
    pd.testing.assert_frame_equal(found, selection.spread_over_sols(index))


def test_the_criterion_is_the_mean_of_the_class_recalls() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([2, 5, 7, 20], 60, p=[0.7, 0.1, 0.1, 0.1])
    probabilities = rng.dirichlet(np.full(25, 0.3), (len(selection.CONDITIONS), 60))
    probabilities[:, np.arange(60), labels] += rng.random((len(selection.CONDITIONS), 60))
    found = selection.criterion(probabilities, labels)
    present = np.unique(labels)
    expected = [
        recall_score(labels, p.argmax(axis=1), labels=present, average="macro")
        for p in probabilities
    ]
    assert list(found) == ["criterion", *selection.CONDITIONS]
    assert list(found.values())[1:] == pytest.approx(expected)
    assert found["criterion"] == pytest.approx(np.mean(expected))


def test_what_is_judged_is_seen_under_each_condition(
    sample_dataset: Dataset, tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    pixels = keras.Input((16, 16, 3))
    frozen = keras.Model(pixels, keras.layers.Conv2D(4, 3, strides=2)(pixels))
    features = keras.Input(frozen.output_shape[1:])
    flat = keras.layers.Flatten()(features)
    classifier = keras.Model(features, keras.layers.Dense(25, "softmax")(flat))
    rows = sample_dataset.index.head(5)
    network = Network(frozen, frozen, None)
    found = selection.judge(network, classifier, sample_dataset.root, rows, tmp_path)
    assert found.shape == (8, 5, 25)
    images = [decode_rgb(sample_dataset.root / path) for path in rows["path"]]
    for probabilities, condition in zip(found, selection.CONDITIONS.values(), strict=True):
        views = np.stack([fit_view(image, 16, condition) for image in images])
        expected = classifier.predict_on_batch(frozen.predict_on_batch(views))
        np.testing.assert_allclose(probabilities, expected, atol=1e-3)
