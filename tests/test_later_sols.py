"""Judging on later sols: never on the test split, under every condition, all classes equally."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, recall_score

from marsclf.training import later_sols, sampling
from marsclf.training.later_sols import COMPARED, FOLDS


def make_index(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    index = pd.DataFrame(rows, columns=["split", "sol", "label"])
    paths = [f"{i:04d}.jpg" for i in range(len(rows))]
    return index.assign(path=paths, group=index["sol"].astype(str))


def test_a_fold_trains_on_earlier_sols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FOLDS, "one", (10, 20))
    index = make_index(
        [("train", 3, 0), ("train", 10, 1), ("train", 11, 0), ("val", 20, 1), ("val", 21, 0)]
        + [("val", 15, 2), ("test", 5, 0), ("test", 12, 1)]
    )
    train, judged = later_sols.fold(index, "one")
    assert train["path"].tolist() == ["0000.jpg", "0001.jpg"]
    assert judged["path"].tolist() == ["0002.jpg", "0003.jpg"]  # class 2 is not in training


def test_judged_images_come_from_many_sols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "IMAGES_PER_CLASS", 6)
    sols = [("val", 1, 0)] * 50 + [("val", 2, 0)] * 2 + [("val", 3, 0)] * 9 + [("val", 1, 4)] * 3
    found = sampling.spread_over_groups(make_index(sols))
    counts = found.groupby(["label", "sol"]).size().to_dict()
    assert counts == {(0, 1): 2, (0, 2): 2, (0, 3): 2, (4, 1): 3}
    pd.testing.assert_frame_equal(found, sampling.spread_over_groups(make_index(sols)))


@pytest.fixture
def judged() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = pd.DataFrame({"label": rng.choice([2, 8, 9, 20], 90, p=[0.6, 0.2, 0.1, 0.1])})
    index["class_name"] = index["label"].map({2: "drill", 8: "ground", 9: "horizon", 20: "inlet"})
    return index.assign(camera=rng.choice(["MH", "ML"], 90), sol=rng.integers(200, 215, 90))


def test_the_criterion_is_the_mean_recall_of_the_classes(judged: pd.DataFrame) -> None:
    """Ground and horizon of MAHLI count as one more condition."""
    rng, labels = np.random.default_rng(0), judged["label"].to_numpy()
    predicted = np.where(rng.random((len(COMPARED), 90)) < 0.7, labels, 2)
    found = later_sols.criterion(predicted == labels, judged)
    expected = [recall_score(labels, each, average="macro") for each in predicted]
    assert list(found) == ["criterion", *COMPARED]
    assert list(found.values())[1:] == pytest.approx(expected)
    mahli = judged["camera"].eq("MH") & judged["label"].isin([8, 9])
    of_mahli = np.tile(labels[mahli], len(COMPARED)), predicted[:, mahli].ravel()
    one = recall_score(*of_mahli, labels=[8, 9], average="macro")
    assert found["criterion"] == pytest.approx(np.mean([*expected, one]))
    other = judged["camera"] != "MH"
    alone = later_sols.criterion((predicted == labels)[:, other], judged[other])
    assert alone["criterion"] == pytest.approx(np.mean([*alone.values()][1:]))


def test_a_difference_is_that_of_the_criteria_and_its_interval_follows_the_sols(
    judged: pd.DataFrame,
) -> None:
    rng, folds = np.random.default_rng(1), [judged, judged[::2]]
    first, second = ([rng.random((len(COMPARED), len(f))) < 0.7 for f in folds] for _ in "ab")
    found, (low, high) = later_sols.difference(first, second, folds)

    def criterion(right: np.ndarray, rows: pd.DataFrame) -> float:
        return later_sols.criterion(right, rows)["criterion"]

    criteria = [np.mean([*map(criterion, each, folds)]) for each in (first, second)]
    assert found == pytest.approx(criteria[0] - criteria[1])
    assert low < found < high
    assert later_sols.difference(first, first, folds)[1].tolist() == [0, 0]
    sols, by_hand = judged["sol"].unique(), []
    for _ in range(500):
        drawn = rng.choice(sols, len(sols))
        rows = np.concatenate([np.flatnonzero(judged["sol"] == sol) for sol in drawn])
        one, other = (criterion(each[0][:, rows], judged.iloc[rows]) for each in (first, second))
        by_hand.append(one - other)
    interval = later_sols.difference(first[:1], second[:1], [judged])[1]
    assert interval == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.02)
    assert np.ptp(interval) > 0.08


def test_log_loss_at_the_best_temperature_with_classes_weighted_equally() -> None:
    rng = np.random.default_rng(1)
    of_5 = rng.uniform(0.1, 0.9, 2000)
    labels = np.where(rng.random(2000) < of_5, 5, 2)
    kept = (labels == 2) | (rng.random(2000) < 0.2)  # class 5 is rare, but counts as much
    of_5, labels = of_5[kept], labels[kept]
    true = np.zeros((len(labels), 25))
    true[:, 2], true[:, 5] = 1 - of_5, of_5
    overconfident = true**3 / (true**3).sum(axis=1, keepdims=True)  # at a temperature of 1/3
    weights = 1 / np.bincount(labels)[labels]
    expected = log_loss(labels, true, labels=range(25), sample_weight=weights)
    for probabilities in (true, overconfident):
        found = later_sols.log_loss(np.stack([probabilities] * 2), labels)
        assert found == pytest.approx(expected, rel=0.05)
