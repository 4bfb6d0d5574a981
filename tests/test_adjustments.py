"""Adjusted probabilities, against cases worked by hand and against what was simulated."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score
from tiny_project import write_predictions

from marsclf import adjustments, metrics
from marsclf.adjustments import bbse_priors, em_priors, with_camera, with_priors
from marsclf.errors import MarsclfError

UNIFORM = np.full(4, 0.25)
TARGET = np.array([0.6, 0.3, 0.1, 0.0])


def simulated(count: int = 4000) -> np.ndarray:
    """Exact probabilities, for equal priors, of images that come with the priors TARGET.

    An image is one number, drawn from a normal distribution about its class's id.
    """
    rng = np.random.default_rng(0)
    labels = rng.choice(4, count, p=TARGET)
    densities = np.exp(-(((rng.normal(labels, 0.7)[:, None] - np.arange(4)) / 0.7) ** 2) / 2)
    return densities / densities.sum(axis=1, keepdims=True)


def log_likelihood(probabilities: np.ndarray, priors: np.ndarray) -> float:
    """Of the images under `priors`, but for what does not depend on these."""
    return float(np.log(probabilities @ (priors / 0.25)).sum())


def test_priors_worked_by_hand() -> None:
    source, target = np.array([0.25, 0.75, 0.0]), np.array([0.5, 0.5, 0.0])
    probabilities = np.array([[0.2, 0.8, 0.0], [0.25, 0.25, 0.5]])
    # The weights are 2, 2/3 and, for the class that the source lacks, 0.
    expected = [[3 / 7, 4 / 7, 0], [3 / 4, 1 / 4, 0]]
    np.testing.assert_allclose(with_priors(probabilities, source, target), expected)
    with pytest.raises(MarsclfError, match="No class is left for image 1 "):
        with_priors(np.array([[1.0, 0, 0], [0, 0, 1.0]]), source, target)


def test_em_recovers_the_priors_of_the_target() -> None:
    probabilities = simulated()
    priors, adjusted = em_priors(probabilities, UNIFORM)
    np.testing.assert_allclose(priors, TARGET, atol=0.03)
    assert log_likelihood(probabilities, priors) > log_likelihood(probabilities, TARGET)
    assert log_likelihood(probabilities, TARGET) > log_likelihood(probabilities, UNIFORM) + 100
    # Where it ends, the mean of the new probabilities is the new priors.
    np.testing.assert_allclose(adjusted, with_priors(probabilities, UNIFORM, priors))
    np.testing.assert_allclose(adjusted.mean(axis=0), priors, atol=1e-7)


def test_pseudo_counts_keep_a_class_alive() -> None:
    probabilities = simulated(400)
    without, _ = em_priors(probabilities, UNIFORM)
    few, _ = em_priors(probabilities, UNIFORM, 20)
    many, _ = em_priors(probabilities, UNIFORM, 1e9)
    assert without[3] < 0.005
    assert few[3] >= 20 / 480
    np.testing.assert_allclose(many, UNIFORM, atol=1e-6)


def test_em_leaves_a_class_out_that_the_source_lacks() -> None:
    source = np.array([1 / 3, 1 / 3, 1 / 3, 0])
    for pseudo_count in (0, 20):
        priors, adjusted = em_priors(simulated(400), source, pseudo_count)
        assert priors[3] == 0 and (adjusted[:, 3] == 0).all()
        assert priors.sum() == pytest.approx(1)


def test_bbse_recovers_the_priors_of_an_exact_mixture() -> None:
    answers = np.array([[0.7, 0.2, 0.1, 0], [0.3, 0.6, 0.1, 0], [0, 0.3, 0.7, 0]])
    # More images of one class than of another, about their mean: neither must matter.
    labels = np.repeat([0, 1, 2], [2, 20, 4])
    spread = np.where(np.arange(26) % 2, 0.05, -0.05)[:, None] * [1, -1, 0, 0]
    mean = np.array([0.5, 0.1, 0.4]) @ answers
    priors = bbse_priors(answers[labels] + spread, labels, np.stack([mean * 0.5, mean * 1.5]))
    np.testing.assert_allclose(priors, [0.5, 0.1, 0.4, 0], atol=1e-9)
    # Surer of class 0 than any image of it in the source: class 1 would come out below 0.
    priors = bbse_priors(answers[labels] + spread, labels, np.array([[0.8, 0.1, 0.1, 0]]))
    assert priors[1] == 0 and (priors >= 0).all()
    assert priors.sum() == pytest.approx(1)


def test_the_camera_worked_by_hand() -> None:
    labels, cameras = np.array([0, 0, 0, 0, 1, 1]), np.array(["MH", "MH", "MH", "ML", "ML", "ML"])
    alike = np.full((2, 2), 0.5)
    found = with_camera(alike, np.array(["MH", "ML"]), labels, cameras, 1)
    # With one image more of each: MH took 4 of 6 and 1 of 4, ML 2 of 6 and 3 of 4.
    np.testing.assert_allclose(found[:, 0], [8 / 11, 4 / 13])
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # A camera that the source lacks: 1 of 7 and 1 of 5.
    found = with_camera(np.array([[0.7, 0.3]]), np.array(["MR"]), labels, cameras, 1)
    np.testing.assert_allclose(found, [[0.625, 0.375]])
    found = with_camera(alike, np.array(["MH", "ML"]), labels, cameras, 1e9)
    np.testing.assert_allclose(found, alike, atol=1e-6)


@pytest.fixture
def predictions(tmp_path: Path) -> pd.DataFrame:
    write_predictions(tmp_path / "predictions.csv")
    return metrics.read_predictions(tmp_path / "predictions.csv")


def test_scores_agree_with_scikit_learn(predictions: pd.DataFrame) -> None:
    val = predictions[predictions["split"] == "val"]
    labels, burst = val["label"], metrics.burst_consensus(val)
    found, present = adjustments.scores(predictions), np.unique(val["label"])
    for name, predicted in {
        "nothing": val["predicted"],
        "one answer a burst": burst["predicted"],
    }.items():
        averaged = {"labels": present, "average": "macro", "zero_division": 0}
        assert found[name] == {
            "accuracy": pytest.approx(accuracy_score(labels, predicted), abs=1e-6),
            "mean_recall": pytest.approx(recall_score(labels, predicted, **averaged), abs=1e-6),
            "macro_f1": pytest.approx(f1_score(labels, predicted, **averaged), abs=1e-6),
        }


def test_scores_learn_from_train_are_of_val_and_leave_test_out(predictions: pd.DataFrame) -> None:
    def changed(split: str) -> dict:
        table = predictions.copy()
        rows = table["split"] == split
        table.loc[rows, "label"] = (table.loc[rows, "label"] + 1) % 25
        table.loc[rows, metrics.PROBABILITY_COLUMNS] = np.eye(25)[3]
        return adjustments.scores(table)

    def moved(split: str) -> set[str]:
        return {name for name, numbers in changed(split).items() if numbers != found[name]}

    found = adjustments.scores(predictions)
    assert moved("test") == set()
    assert moved("train") and "nothing" not in moved("train")
    table = predictions[predictions["split"] != "test"]
    assert adjustments.scores(table) == found
    val = predictions["split"] == "val"
    table = predictions.assign(label=predictions["label"].where(~val, 3))
    assert adjustments.scores(table)["nothing"] != found["nothing"]


def test_each_adjustment_changes_the_answer_that_it_should() -> None:
    """In train MAHLI takes the wheels; val shows wheels alone, and one of 40 is taken for horizon.

    So frequencies and cameras put that one right; the wheel is by itself in its burst, which leaves
    it wrong.
    """

    def rows(split: str, camera: str, label: int, of_wheel: float, count: int) -> list[dict]:
        shares = {8: 0.001, 9: 0.999 - of_wheel, 24: of_wheel}
        probabilities = dict.fromkeys(metrics.PROBABILITY_COLUMNS, 0.0)
        probabilities |= {f"p_{label:02d}": share for label, share in shares.items()}
        row = {"split": split, "label": label, "predicted": max(shares, key=shares.get)}
        path = f"{camera}{round(100 * of_wheel):06d}0000000000E01_DRCL.JPG"
        return [row | {"path": f"{sol:04d}{path}"} | probabilities for sol in range(count)]

    table = rows("train", "MH", 24, 0.9, 200) + rows("train", "ML", 9, 0.1, 400)
    table += rows("train", "MR", 8, 0.4, 4)
    table += rows("val", "MH", 24, 0.95, 39) + rows("val", "MH", 24, 0.45, 1)
    accuracies = {
        name: numbers["accuracy"]
        for name, numbers in adjustments.scores(pd.DataFrame(table)).items()
    }
    wrong = {name: accuracy for name, accuracy in accuracies.items() if accuracy < 1}
    assert wrong == {"nothing": 39 / 40, "one answer a burst": 39 / 40}
    assert len(accuracies) == 9
