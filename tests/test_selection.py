"""Selection: nothing of test, nothing later than what is judged, all classes and sols alike."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score

from marsclf.training import later_sols as selection


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


def test_log_loss_is_that_of_the_best_temperature_with_classes_alike() -> None:
    rng = np.random.default_rng(1)
    of_5 = rng.uniform(0.1, 0.9, 8000)
    labels = np.where(rng.random(8000) < of_5, 5, 2)
    kept = (labels == 2) | (rng.random(8000) < 0.2)  # few of one class, which count as much
    of_5, labels = of_5[kept], labels[kept]
    true = np.zeros((len(labels), 25))
    true[:, 2], true[:, 5] = 1 - of_5, of_5
    bold = true**3 / (true**3).sum(axis=1, keepdims=True)  # said with a temperature of 1/3
    logs = np.log(true[np.arange(len(labels)), labels])
    expected = -np.mean([logs[labels == label].mean() for label in (2, 5)])
    for said in (true, bold):
        found = selection.log_loss(np.stack([said] * 2), labels)
        assert found == pytest.approx(expected, rel=0.02)


def test_images_are_judged_under_each_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(members: list, root: Path, rows: pd.DataFrame, cache: Path, condition: object):
        assert (members, root) == (["one"], Path("images"))
        return np.full((len(rows), 25), condition.zoom)

    monkeypatch.setattr(selection.recipe, "predict", predict)
    found = selection.judge(["one"], Path("images"), make_index([("val", 1, 0)] * 3))
    zooms = [condition.zoom for condition in selection.CONDITIONS.values()]
    assert found.shape == (len(zooms), 3, 25)
    assert found[:, 0, 0].tolist() == zooms
