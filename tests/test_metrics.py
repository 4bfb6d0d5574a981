"""The numbers, against scikit-learn and against cases worked by hand."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import precision_recall_fscore_support as sklearn_scores

from marsclf.cli import _parser
from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import (
    PROBABILITY_COLUMNS,
    about,
    product_ids,
    read_predictions,
    write_predictions,
)


def product(sol: int, number: int = 0) -> str:
    return f"calibrated/{sol:04d}MR000010{number:03d}0500684E01_DRCL.JPG"


def make_predictions(
    folder: Path, sols: list[int], labels: list[int], probabilities
) -> pd.DataFrame:
    rows = pd.DataFrame(
        {"split": "test", "path": [product(s, n) for n, s in enumerate(sols)], "label": labels}
    )
    write_predictions(folder / "predictions.csv", rows, np.asarray(probabilities))
    return read_predictions(folder / "predictions.csv")


def spread(label: int, probability: float, rest: int) -> np.ndarray:
    """Give `probability` to `label` and what is left to `rest`."""
    row = np.zeros(data.NUM_CLASSES)
    row[label], row[rest] = probability, 1 - probability
    return row


@pytest.fixture
def four(tmp_path: Path) -> pd.DataFrame:
    """Two sols; right, right, wrong, wrong, with confidence 0.95, 0.9, 0.6 and 1."""
    rows = [spread(8, 0.95, 9), spread(8, 0.9, 24), spread(9, 0.6, 8), spread(7, 1, 5)]
    return make_predictions(tmp_path, [600, 600, 700, 700], [8, 8, 8, 6], rows)


@pytest.fixture
def random_predictions(tmp_path: Path) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 3, 7, 8, 9, 24], 600)
    logits = rng.normal(size=(600, data.NUM_CLASSES))
    logits[np.arange(600), labels] += rng.normal(2, 2, 600)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sols = np.sort(rng.integers(600, 650, 600)).tolist()
    rows = pd.DataFrame({"split": "test", "label": labels})
    rows["path"] = [
        f"calibrated/{s:04d}MH{n:06d}0000500684I01_DRCL.JPG" for n, s in enumerate(sols)
    ]
    write_predictions(tmp_path / "p.csv.gz", rows, probabilities)
    return read_predictions(tmp_path / "p.csv.gz")


def test_summary_worked_by_hand(four: pd.DataFrame) -> None:
    summary = metrics.summarize(four)
    assert list(summary) == [
        *("n", "accuracy", "accuracy_ci95", "macro_f1", "top3", "nll", "ece"),
        *("coverage_at_0.9", "accuracy_at_0.9"),
    ]
    assert summary["n"] == 4
    assert summary["accuracy"] == 0.5
    # Each resample draws two of the sols with 2 of 2 and 0 of 2 right.
    assert summary["accuracy_ci95"] == [0, 1]
    # Ground: 2 of 3 found, both answers right: 0.8. drt front: 0. No other class is present.
    assert summary["macro_f1"] == 0.4
    # Of drt front's row all probabilities but one are 0: the ids 0 and 1 tie before it for top 3.
    assert summary["top3"] == 0.75
    expected = -np.log([0.95, 0.9, 0.4, 1e-7]).mean()
    assert summary["nll"] == pytest.approx(expected, abs=1e-6)
    # The bins (13/15, 14/15], (14/15, 1] and (8/15, 9/15] hold 0.9; 0.95 and 1; 0.6.
    assert summary["ece"] == pytest.approx((0.1 + 2 * abs(0.5 - 0.975) + 0.6) / 4)
    assert summary["coverage_at_0.9"] == 0.75
    assert summary["accuracy_at_0.9"] == pytest.approx(2 / 3, abs=1e-6)
    assert json.loads(json.dumps(summary)) == summary


def test_summary_agrees_with_scikit_learn(random_predictions: pd.DataFrame) -> None:
    labels, predicted = random_predictions["label"], random_predictions["predicted"]
    probabilities = random_predictions[PROBABILITY_COLUMNS].to_numpy()
    classes = np.arange(data.NUM_CLASSES)
    summary = metrics.summarize(random_predictions)
    f1 = f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    assert summary["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert summary["macro_f1"] == pytest.approx(f1, abs=1e-6)
    top3 = top_k_accuracy_score(labels, probabilities, k=3, labels=classes)
    assert summary["top3"] == pytest.approx(top3, abs=1e-6)
    exact = probabilities / probabilities.sum(axis=1, keepdims=True)
    nll = log_loss(labels, exact, labels=classes)
    assert summary["nll"] == pytest.approx(nll, abs=5e-4)  # scikit-learn wants sums of just 1
    expected = sklearn_confusion_matrix(labels, predicted, labels=classes)
    assert (metrics.confusion_matrix(random_predictions) == expected).all()


def test_table_per_class_agrees_with_scikit_learn(random_predictions: pd.DataFrame) -> None:
    labels, predicted = random_predictions["label"], random_predictions["predicted"]
    precision, recall, f1, support = sklearn_scores(
        labels, predicted, labels=np.arange(data.NUM_CLASSES), zero_division=0
    )
    table = metrics.per_class(random_predictions)
    np.testing.assert_allclose(table["precision"], precision)
    np.testing.assert_allclose(table["f1"], f1)
    np.testing.assert_array_equal(table["support"], support)
    np.testing.assert_allclose(table["recall"], np.where(support > 0, recall, np.nan))
    assert table["errors"].sum() == (labels != predicted).sum()


def test_commonest_confusions(four: pd.DataFrame) -> None:
    table = metrics.commonest_confusions(pd.concat([four, four.iloc[[2]]]))
    assert table.loc[0].to_dict() == {
        "true": "ground",
        "predicted": "horizon",
        "count": 2,
        "share": 0.5,
    }
    assert table["count"].tolist() == [2, 1]
    assert len(metrics.commonest_confusions(four, limit=1)) == 1


def test_interval_is_degenerate_with_one_sol() -> None:
    correct = np.array([True, False, True, True])
    low, high = metrics.bootstrap_over_sols(correct, np.full(4, 830))
    assert low == high == 0.75


def test_interval_of_bursts_is_wider_than_of_single_images() -> None:
    correct = np.repeat(np.arange(40) % 2 == 0, 10)
    by_sol = metrics.bootstrap_over_sols(correct, np.repeat(np.arange(40), 10))
    by_image = metrics.bootstrap_over_sols(correct, np.arange(400))
    assert np.diff(by_sol)[0] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.1)
    assert np.diff(by_image)[0] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(400), rel=0.1)


def test_interval_is_the_same_every_time_and_in_every_row_order(
    random_predictions: pd.DataFrame,
) -> None:
    shuffled = random_predictions.sample(frac=1, random_state=3)
    assert metrics.summarize(shuffled) == metrics.summarize(random_predictions)


def test_calibration_bins_hold_their_upper_end() -> None:
    confidence = np.array([0.0, 1 / 15, 0.2, 0.2001, 1.0])
    counts = metrics.calibration_bins(confidence, np.ones(5, bool))["count"]
    assert counts[counts > 0].to_dict() == {0: 2, 2: 1, 3: 1, 14: 1}


def test_calibration_error_worked_by_hand() -> None:
    # 10 answers at 0.8 with 6 right, 10 at 0.3 with 3 right: (10 * 0.2 + 10 * 0) / 20.
    confidence = np.repeat([0.8, 0.3], 10)
    correct = np.concatenate([np.arange(10) < 6, np.arange(10) < 3])
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(0.1)


def test_nothing_covered_gives_no_accuracy(tmp_path: Path) -> None:
    predictions = make_predictions(tmp_path, [600], [8], [spread(8, 0.6, 9)])
    summary = metrics.summarize(predictions)
    assert summary["coverage_at_0.9"] == 0
    assert summary["accuracy_at_0.9"] is None


def test_ties_go_to_the_lower_class_id(tmp_path: Path) -> None:
    even = np.full((4, data.NUM_CLASSES), 1 / data.NUM_CLASSES)
    predictions = make_predictions(tmp_path, [600] * 4, [0, 2, 3, 24], even)
    assert predictions["predicted"].tolist() == [0] * 4
    assert metrics.summarize(predictions)["top3"] == 0.5


def test_predictions_are_stored_with_four_digits_and_agree_with_themselves(tmp_path: Path) -> None:
    # 0.500049 and 0.499951 differ, but are written as 0.5 and 0.5: then the lower id is likelier.
    row = spread(9, 0.500049, 8)
    predictions = make_predictions(tmp_path, [600], [9], [row])
    assert predictions.loc[0, "p_09"] == 0.5
    assert predictions.loc[0, "predicted"] == 8
    assert predictions.loc[0, "confidence"] == 0.5


def test_zipped_predictions_read_back_the_same(tmp_path: Path, four: pd.DataFrame) -> None:
    zipped = tmp_path / "predictions.csv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "predictions.csv").read_bytes()))
    pd.testing.assert_frame_equal(read_predictions(zipped), four)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("label", 25, "line 4: the label is not a class id from 0 to 24"),
        ("label", -1, "line 4: the label is not a class id"),
        ("label", "ground", "line 4: a number is missing or is not a number"),
        ("p_08", "", "line 4: a number is missing or is not a number"),
        ("p_10", 0.3, "line 4: the probabilities do not lie in 0 to 1 with the sum 1"),
        ("predicted", 8, "line 4: predicted and confidence do not belong"),
        ("confidence", 0.7, "line 4: predicted and confidence do not belong"),
        ("split", "all", "line 4: the split is none of train, val and test"),
        ("path", "", "line 4: the path is missing"),
    ],
)
def test_faulty_rows_are_named(
    tmp_path: Path, four: pd.DataFrame, column: str, value: object, reason: str
) -> None:
    table = four.astype(object)
    table.loc[2, column] = value
    table.to_csv(tmp_path / "faulty.csv", index=False)
    with pytest.raises(MarsclfError, match=reason):
        read_predictions(tmp_path / "faulty.csv")


def test_faulty_files_are_named(tmp_path: Path, four: pd.DataFrame) -> None:
    with pytest.raises(MarsclfError, match="no prediction file"):
        read_predictions(tmp_path / "absent.csv")
    four.drop(columns=["label", "p_24"]).to_csv(tmp_path / "lacking.csv", index=False)
    with pytest.raises(MarsclfError, match="lacks the columns label, p_24"):
        read_predictions(tmp_path / "lacking.csv")
    four.iloc[:0].to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(MarsclfError, match="holds no predictions"):
        read_predictions(tmp_path / "rows.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(MarsclfError, match="cannot be read"):
        read_predictions(tmp_path / "empty.csv")
    whole = gzip.compress((tmp_path / "predictions.csv").read_bytes())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MarsclfError, match="cannot be read"):
        read_predictions(tmp_path / "cut.csv.gz")


def test_data_set_is_named_by_the_file_beside(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.csv"
    assert about(predictions) == {}
    (tmp_path / "metrics.json").write_text('{"dataset": "msl-v1"}')
    assert about(predictions)["dataset"] == "msl-v1"
    (tmp_path / "training.json").write_text('{"dataset": "sample"}')
    assert about(predictions)["dataset"] == "sample"


def test_a_burst_gives_one_answer(tmp_path: Path) -> None:
    rows = [spread(8, 0.9, 9), spread(9, 0.6, 8), spread(9, 0.6, 8), spread(24, 0.8, 8)]
    table = make_predictions(tmp_path, [600] * 4, [8] * 4, rows)
    paths = [product(600, n) for n in range(4)]
    # Images 0 and 1 share sol, camera and sequence; 2 is of another camera, 3 of another sequence.
    paths[2], paths[3] = paths[2].replace("MR", "ML"), paths[3].replace("MR000010", "MR000011")
    found = metrics.burst_consensus(table.assign(path=paths))
    # sqrt(0.9 * 0.4) = 0.6 against sqrt(0.1 * 0.6) = 0.245, of which the first is 0.710.
    assert found["predicted"].tolist() == [8, 8, 9, 24]
    assert found["confidence"].tolist() == pytest.approx([0.7101, 0.7101, 0.6, 0.8], abs=1e-4)
    assert found[["split", "path", "label"]].equals(
        table.assign(path=paths)[["split", "path", "label"]]
    )
    assert metrics.summarize(found)["accuracy"] == 0.5


def test_errors_by_burst(tmp_path: Path) -> None:
    rows = [spread(24, 0.8, 8), spread(9, 0.9, 8), spread(8, 0.6, 9), spread(9, 0.7, 8)]
    table = make_predictions(tmp_path, [500, 600, 600, 600], [8] * 4, rows)
    single = metrics.errors(table)
    assert single["path"].tolist() == table["path"].iloc[[0, 1, 3]].tolist()
    assert single["of_true"].tolist() == pytest.approx([0.2, 0.1, 0.3])
    first, second = metrics.errors_by_burst(table).to_dict("records")
    assert (first["sol"], first["true"], first["said"]) == (600, "ground", "horizon")
    assert (first["errors"], second["errors"]) == (2, 1)
    assert (first["confidence"], first["of_true"]) == pytest.approx((0.8, 0.2))
    assert (second["sol"], second["camera"], second["said"]) == (500, "MR", "wheel")
    assert metrics.errors_by_burst(table[table["predicted"] == 8]).empty


def test_verdicts_by_eye_stand_beside_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [spread(24, 0.8, 8), spread(9, 0.9, 8), spread(9, 0.7, 8)]
    table = make_predictions(tmp_path, [500, 600, 600], [8, 8, 24], rows)
    monkeypatch.setattr(metrics.paths, "RESULTS", tmp_path)
    nobody = metrics.by_eye(metrics.errors(table))
    assert nobody["verdict"].tolist() == ["not looked at"] * 3
    (tmp_path / "test_by_eye.csv").write_text(
        'sequence,true,verdict,note\n0600MR000010,ground,plain mistake,"rocks, and soil"\n'
    )
    for mistakes in (metrics.errors(table), metrics.errors_by_burst(table)):
        found = metrics.by_eye(mistakes)
        assert len(found) == len(mistakes) == 3
        looked = found[found["verdict"] != "not looked at"]
        assert looked[["sol", "true", "note"]].values.tolist() == [
            [600, "ground", "rocks, and soil"]  # of that burst, not what else it holds
        ]


def test_published_verdicts_are_of_test_images() -> None:
    verdicts = pd.read_csv(metrics.paths.RESULTS / metrics.VERDICTS)
    kinds = {"plain mistake", "two right answers", "hard to tell"}
    assert set(verdicts["verdict"]) == kinds and verdicts["note"].str.len().min() > 5
    assert not verdicts.duplicated(["sequence", "true"]).any()
    stored = metrics.paths.RESULTS / "laptop" / "predictions.csv.gz"
    test = read_predictions(stored).query("split == 'test'")
    names = test["label"].map(dict(enumerate(data.CLASS_NAMES)))
    there = set(zip(product_ids(test)["sequence"], names, strict=True))
    assert set(zip(verdicts["sequence"], verdicts["true"], strict=True)) <= there


def test_the_threshold_is_that_of_the_names_and_of_the_command(four: pd.DataFrame) -> None:
    assert {"coverage_at_0.9", "accuracy_at_0.9"} < metrics.summarize(four).keys()
    assert metrics.THRESHOLD == 0.9
    assert _parser().parse_args(["predict", "image.jpg"]).threshold == metrics.THRESHOLD


def test_calibration_over_sols(four: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERIODS", 2)
    found = metrics.calibration_over_sols(four).to_dict("records")
    assert [(row["first_sol"], row["last_sol"], row["images"]) for row in found] == [
        (600, 600, 2),
        (700, 700, 2),
    ]
    assert [row["accuracy"] for row in found] == [1, 0]
    # Gaps: 0.05 and 0.1 (two bins of one image); 0.6 and 1.
    assert [row["ece"] for row in found] == pytest.approx([0.075, 0.8])
