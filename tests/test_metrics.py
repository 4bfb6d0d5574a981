"""The metrics and the predictions file, against scikit-learn and cases worked by hand."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from sklearn.metrics import precision_recall_fscore_support as sklearn_scores

from marsclf.data.msl import MSL_V1
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import (
    class_names,
    probabilities_of,
    read_predictions,
    write_predictions,
)


def stored(path: Path, sols: list[int], labels, probabilities) -> pd.DataFrame:
    """Predictions of one burst per sol, written and read again."""
    names = [f"{sol:04d}MR000010{n:03d}0500684E01_DRCL.JPG" for n, sol in enumerate(sols)]
    rows = pd.DataFrame({"split": "test", "path": names, "label": labels})
    write_predictions(path, rows, np.asarray(probabilities))
    return read_predictions(path)


def spread(label: int, probability: float, rest: int) -> np.ndarray:
    """Give `probability` to `label` and what is left to `rest`."""
    row = np.zeros(25)
    row[label], row[rest] = probability, 1 - probability
    return row


@pytest.fixture
def four(tmp_path: Path) -> pd.DataFrame:
    """Two sols; right, right, wrong, wrong, with confidence 0.95, 0.9, 0.6 and 1."""
    rows = [spread(8, 0.95, 9), spread(8, 0.9, 24), spread(9, 0.6, 8), spread(7, 1, 5)]
    return stored(tmp_path / "predictions.csv", [600, 600, 700, 700], [8, 8, 8, 6], rows)


@pytest.fixture
def many(tmp_path: Path) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 3, 7, 8, 9, 24], 600)
    logits = rng.normal(size=(600, 25))
    logits[np.arange(600), labels] += rng.normal(2, 2, 600)
    sols = np.sort(rng.integers(600, 650, 600)).tolist()
    return stored(tmp_path / "many.csv.gz", sols, labels, softmax(logits, axis=1))


def test_summary_worked_by_hand(four: pd.DataFrame) -> None:
    summary = metrics.summarize(four)
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "n": 4,
        "accuracy": 0.5,
        # Each resample draws two of the sols with 2 of 2 and 0 of 2 right.
        "accuracy_ci95": [0, 1],
        # Ground: recall 2/3 and precision 1, F1 0.8. Drt front: 0. No other class is present.
        "macro_f1": 0.4,
        # In the row of drt front all probabilities but one are 0: ids 0 and 1 rank before it.
        "top3": 0.75,
        "nll": pytest.approx(-np.log([0.95, 0.9, 0.4, 1e-7]).mean(), abs=1e-6),
        # The bins (13/15, 14/15], (14/15, 1] and (8/15, 9/15] hold 0.9; 0.95 and 1; 0.6.
        "ece": pytest.approx((0.1 + 2 * abs(0.5 - 0.975) + 0.6) / 4),
        "coverage_at_0.9": 0.75,
        "accuracy_at_0.9": pytest.approx(2 / 3, abs=1e-6),
    }
    unsure = metrics.summarize(four[four["confidence"] < 0.9])
    assert (unsure["coverage_at_0.9"], unsure["accuracy_at_0.9"]) == (0, None)


def test_metrics_agree_with_scikit_learn(many: pd.DataFrame) -> None:
    labels, predicted, classes = many["label"], many["predicted"], np.arange(25)
    probabilities = probabilities_of(many)
    exact = probabilities / probabilities.sum(axis=1, keepdims=True)
    top3 = top_k_accuracy_score(labels, probabilities, k=3, labels=classes)
    summary = metrics.summarize(many)
    assert summary["top3"] == pytest.approx(top3, abs=1e-6)
    assert summary["nll"] == pytest.approx(log_loss(labels, exact, labels=classes), abs=5e-4)
    matrix = confusion_matrix(labels, predicted, labels=classes)
    np.testing.assert_array_equal(metrics.confusion_matrix(many), matrix)
    scores = sklearn_scores(labels, predicted, labels=classes, zero_division=0)
    table = metrics.per_class(many, MSL_V1.classes)
    for name, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        np.testing.assert_allclose(table[name].fillna(0), expected)
    assert table["recall"].isna().equals(table["support"] == 0)
    assert table["errors"].sum() == (labels != predicted).sum()
    assert summary["macro_f1"] == pytest.approx(scores[2][scores[3] > 0].mean(), abs=1e-6)
    assert metrics.summarize(many.sample(frac=1, random_state=3)) == summary


def test_only_splits_with_images_are_measured(four: pd.DataFrame) -> None:
    assert list(metrics.measure(four)) == ["test"]
    both = pd.concat([four, four.assign(split="train")])
    assert list(metrics.measure(both)) == ["train", "test"]


def test_interval_of_bursts_is_wider_than_of_single_images() -> None:
    correct = np.repeat(np.arange(40) % 2 == 0, 10)
    for units, number in ((np.repeat(np.arange(40), 10), 40), (np.arange(400), 400)):
        low, high = metrics.bootstrap_over_groups(correct, units)
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(number), rel=0.1)


def test_several_intervals_at_once_are_those_of_each_alone() -> None:
    random = np.random.default_rng(0)
    correct, groups = random.random(80) < 0.7, np.arange(80) // 4
    counted = random.random((80, 3)) < 0.8
    counted[:, 1] = True
    found = metrics.bootstrap_over_groups(correct, groups, counted)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[:, 1], metrics.bootstrap_over_groups(correct, groups))
    shares = metrics.bootstrap_over_groups(counted, groups, np.ones_like(counted))
    np.testing.assert_allclose(shares[:, 0], metrics.bootstrap_over_groups(counted[:, 0], groups))


def test_calibration_bins_hold_their_upper_end() -> None:
    confidence = np.array([0.0, 1 / 15, 0.2, 0.2001, 1.0])
    counts = metrics.calibration_bins(confidence, np.ones(5, bool))["count"]
    assert counts[counts > 0].to_dict() == {0: 2, 2: 1, 3: 1, 14: 1}


def test_one_prediction_per_burst(tmp_path: Path) -> None:
    rows = [spread(8, 0.9, 9), spread(9, 0.6, 8), spread(9, 0.6, 8), spread(24, 0.8, 8)]
    stored(tmp_path / "p.csv", [600] * 4, [8] * 4, rows)
    # Images 0 and 1 share sol, camera and sequence; 2 is of another camera, 3 of another sequence.
    text = (tmp_path / "p.csv").read_text().replace("MR000010002", "ML000010002")
    (tmp_path / "p.csv").write_text(text.replace("MR000010003", "MR000011003"))
    table = read_predictions(tmp_path / "p.csv")
    found = metrics.burst_consensus(table)
    # sqrt(0.9 * 0.4) = 0.6 and sqrt(0.1 * 0.6) = 0.245: the first is 0.710 of their sum.
    assert found["predicted"].tolist() == [8, 8, 9, 24]
    assert found["confidence"].tolist() == pytest.approx([0.7101, 0.7101, 0.6, 0.8], abs=1e-4)
    columns = ["split", "path", "label", "group", "sequence", "sol", "camera"]
    pd.testing.assert_frame_equal(found[columns], table[columns])


def test_errors(tmp_path: Path) -> None:
    rows = [spread(24, 0.8, 8), spread(9, 0.9, 8), spread(8, 0.6, 9), spread(9, 0.7, 8)]
    table = stored(tmp_path / "p.csv", [500, 600, 600, 600], [8] * 4, rows)
    found = metrics.errors(table, MSL_V1.classes)
    assert found["path"].tolist() == table["path"].iloc[[0, 1, 3]].tolist()
    assert found["said"].tolist() == ["wheel", "horizon", "horizon"]
    assert found["of_true"].tolist() == pytest.approx([0.2, 0.1, 0.3])
    columns = ["sol", "camera", "sequence", "true"]
    assert found[columns].iloc[0].tolist() == [500, "MR", "0500MR000010", "ground"]


@pytest.mark.parametrize("number", [2, 40])
def test_predictions_of_other_classes_and_names(tmp_path: Path, number: int) -> None:
    path, rng = tmp_path / "own.csv", np.random.default_rng(0)
    rows = pd.DataFrame({"split": "val", "path": [f"a/{n}.png" for n in range(60)]})
    rows["label"] = rng.integers(number, size=60)
    rows["group"], rows["sequence"] = ["NA"] * 30 + ["007"] * 30, [str(n // 2) for n in range(60)]
    probabilities = rng.dirichlet(np.full(number, 0.2), 60)
    write_predictions(path, rows, probabilities)
    assert path.read_text().partition("\n")[0] == ",".join(
        ["split", "path", "label", "predicted", "confidence", "group", "sequence"]
        + [f"p_{label:02d}" for label in range(number)]
    )
    found = read_predictions(path)
    pd.testing.assert_frame_equal(found[list(rows)], rows)
    np.testing.assert_allclose(probabilities_of(found), probabilities, rtol=6e-4)
    right = (probabilities.argmax(axis=1) == rows["label"]).to_numpy()
    # Each resample draws two of the two groups.
    ends = sorted([right[:30].mean(), right[30:].mean()])
    measured = metrics.measure(found)["val"]
    np.testing.assert_allclose(measured["accuracy_ci95"], ends, atol=1e-6)
    names = class_names({"classes": [f"c{n}" for n in range(number)]}, found)
    assert len(metrics.per_class(found, names)) == number


def test_names_of_classes(four: pd.DataFrame) -> None:
    assert class_names({}, four) == MSL_V1.classes  # as in records published before
    with pytest.raises(MarsclfError, match="names 2 classes, but its predictions have 25"):
        class_names({"classes": ["rock", "sand"]}, four)


def test_stored_predictions_agree_with_their_four_digits(tmp_path: Path) -> None:
    # 0.500049 and 0.499951 differ, but are both written as 0.5: then the lower id wins.
    even = np.full(25, 1 / 25)
    rows = [spread(9, 0.500049, 8), even, even, even]
    predictions = stored(tmp_path / "p.csv", [600] * 4, [9, 2, 3, 24], rows)
    assert predictions["p_09"][0] == 0.5
    assert predictions["predicted"].tolist() == [8, 0, 0, 0]
    assert predictions["confidence"].tolist() == [0.5, 0.04, 0.04, 0.04]
    assert metrics.summarize(predictions)["top3"] == 0.5


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", 25), ("label", "ground"), ("p_08", ""), ("p_10", 0.3), ("p_10", -0.001)]
    + [("predicted", 8), ("confidence", 0.7), ("split", "all"), ("path", ""), ("group", "")],
)
def test_a_faulty_row(tmp_path: Path, four: pd.DataFrame, column: str, value: object) -> None:
    table = four.astype(object)
    table.loc[2, column] = value
    table.to_csv(tmp_path / "faulty.csv", index=False)
    with pytest.raises(MarsclfError, match=r"faulty\.csv, line 4 is not a valid prediction"):
        read_predictions(tmp_path / "faulty.csv")


def test_a_faulty_file(tmp_path: Path, four: pd.DataFrame) -> None:
    four.drop(columns=["label", "p_08"]).to_csv(tmp_path / "lacking.csv", index=False)
    four.drop(columns="group").to_csv(tmp_path / "half.csv", index=False)
    four.iloc[:0].to_csv(tmp_path / "rows.csv", index=False)
    zipped = gzip.compress((tmp_path / "predictions.csv").read_bytes())
    (tmp_path / "cut.csv.gz").write_bytes(zipped[: len(zipped) // 2])
    for name, fault in {
        "absent.csv": "no predictions file",
        "lacking.csv": "lacks the columns label, p_08",
        "half.csv": "lacks the columns group",
        "rows.csv": "holds no predictions",
        "cut.csv.gz": "cannot be read",
    }.items():
        with pytest.raises(MarsclfError, match=fault):
            read_predictions(tmp_path / name)
