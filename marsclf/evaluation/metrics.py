"""Stored predictions, and every number that is computed from them.

A prediction file is a CSV (or .csv.gz) with the columns split, path, label, predicted,
confidence, p_00 ... p_24, one row an image. Probabilities have four significant digits, and all
numbers are computed from the file as it is stored, so anyone can recompute them exactly.
"""

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import PROBABILITY_COLUMNS, as_predictions, product_ids

# The PDS Image Atlas shows a content label from this confidence up (Wagstaff et al. 2018).
THRESHOLD = 0.9
RESAMPLES = 2000
# What the errors of test look like by eye, of the real data.
VERDICTS, NOT_LOOKED_AT = "test_by_eye.csv", "not looked at"
BINS = 15  # of the calibration
PERIODS = 4  # that the sols of a split are cut into


def burst_consensus(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions with one answer a burst: same sol, camera and sequence.

    The normalised geometric mean of the burst's probabilities: the rover took these images within
    minutes of one another, of one thing.
    """
    ids = product_ids(predictions)
    bursts = ids.groupby(["sol", "camera", "sequence"]).ngroup().to_numpy()
    logs = np.log(np.maximum(predictions[PROBABILITY_COLUMNS].to_numpy(), 1e-7))
    means = pd.DataFrame(logs).groupby(bursts).transform("mean").to_numpy()
    shares = np.exp(means)
    return as_predictions(predictions, shares / shares.sum(axis=1, keepdims=True))


def summarize(predictions: pd.DataFrame) -> dict[str, object]:
    """Return the numbers of one split, shares in 0 to 1, rounded to six digits."""
    labels = predictions["label"].to_numpy()
    correct = (predictions["predicted"] == predictions["label"]).to_numpy()
    confidence = predictions["confidence"].to_numpy()
    probabilities = predictions[PROBABILITY_COLUMNS].to_numpy()
    of_label = probabilities[np.arange(len(labels)), labels]
    classes = per_class(predictions)
    covered = confidence >= THRESHOLD
    # Of two equal probabilities the lower class id ranks first, as with argmax.
    order = np.argsort(-probabilities, axis=1, kind="stable")
    summary = {
        "accuracy": correct.mean(),
        "accuracy_ci95": bootstrap_over_sols(correct, product_ids(predictions)["sol"].to_numpy()),
        "macro_f1": classes.loc[classes["support"] > 0, "f1"].mean(),
        "top3": (order[:, :3] == labels[:, None]).any(axis=1).mean(),
        "nll": -np.log(np.clip(of_label, 1e-7, 1)).mean(),
        "ece": expected_calibration_error(confidence, correct),
        "coverage_at_0.9": covered.mean(),
        "accuracy_at_0.9": correct[covered].mean() if covered.any() else None,
    }
    return {"n": len(predictions)} | {
        name: None if value is None else np.round(value, 6).tolist()
        for name, value in summary.items()
    }


def bootstrap_over_sols(correct: np.ndarray, sols: np.ndarray) -> np.ndarray:
    """Return the 95 % interval [low, high] of the accuracy, by resampling whole sols.

    Images of one sol come in bursts and are not independent, so the sol is the unit that is drawn:
    the percentile interval of a cluster bootstrap (Efron and Tibshirani 1993, chapters 8 and 13).
    """
    _, sol_number = np.unique(sols, return_inverse=True)
    right, images = np.bincount(sol_number, weights=correct), np.bincount(sol_number)
    # RandomState, because NumPy promises that its stream never changes; default_rng's may.
    draws = np.random.RandomState(0).randint(
        len(images), size=(RESAMPLES, len(images)), dtype=np.int64
    )
    return np.percentile(right[draws].sum(axis=1) / images[draws].sum(axis=1), [2.5, 97.5])


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Return count, accuracy and confidence (means; NaN where empty) of 15 equal-width bins.

    Bin m of M holds the confidences in ((m - 1) / M, m / M] (Guo et al. 2017).
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = pd.DataFrame({"bin": number, "accuracy": correct, "confidence": confidence})
    table = rows.astype({"accuracy": float}).groupby("bin").mean().reindex(range(BINS))
    return table.assign(count=np.bincount(number, minlength=BINS))


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over 15 bins (Guo et al. 2017)."""
    table = calibration_bins(confidence, correct)
    gaps = (table["accuracy"] - table["confidence"]).abs() * table["count"]
    return float(gaps.sum() / len(confidence))


def confusion_matrix(predictions: pd.DataFrame) -> np.ndarray:
    """Return counts (25, 25), true class by row and predicted class by column."""
    counts = np.zeros((data.NUM_CLASSES, data.NUM_CLASSES), dtype=np.int64)
    np.add.at(counts, (predictions["label"].to_numpy(), predictions["predicted"].to_numpy()), 1)
    return counts


def per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row a class, by id: class_name, support, errors, recall, precision, f1.

    Recall is NaN for a class without a case; precision and F1 are 0 where 0 / 0 (no such guess).
    """
    counts = confusion_matrix(predictions)
    support, guesses, hits = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    return pd.DataFrame(
        {
            "class_name": data.CLASS_NAMES,
            "support": support,
            "errors": support - hits,
            "recall": np.where(support > 0, hits / np.maximum(support, 1), np.nan),
            "precision": hits / np.maximum(guesses, 1),
            "f1": 2 * hits / np.maximum(support + guesses, 1),
        }
    ).rename_axis("label")


def errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong rows: sol, camera, sequence, true, said (names), confidence, of_true, path.

    `of_true` is the probability of the true class.
    """
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    table = product_ids(predictions).loc[wrong.index, ["sol", "camera", "sequence"]]
    for name, column in {"true": "label", "said": "predicted"}.items():
        table[name] = [data.CLASS_NAMES[label] for label in wrong[column]]
    probabilities = wrong[PROBABILITY_COLUMNS].to_numpy()
    of_true = probabilities[np.arange(len(wrong)), wrong["label"].to_numpy()]
    return table.assign(confidence=wrong["confidence"], of_true=of_true, path=wrong["path"])


def errors_by_burst(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each burst, true class and wrong answer, the most errors first.

    Columns as of `errors`, confidence and of_true averaged, and `errors`, how many.
    """
    table = errors(predictions).groupby(["sol", "camera", "sequence", "true", "said"])
    counted = table.agg(
        errors=("path", "count"), confidence=("confidence", "mean"), of_true=("of_true", "mean")
    ).reset_index()
    return counted.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def by_eye(mistakes: pd.DataFrame) -> pd.DataFrame:
    """Return `errors` or `errors_by_burst` with the columns verdict and note.

    They are what a person said who looked at the images of the real data, one line a burst and true
    class in results/test_by_eye.csv. What nobody has looked at says so; labels stay.
    """
    columns = ["sequence", "true", "verdict", "note"]
    path = paths.RESULTS / VERDICTS
    said = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame(columns=columns)
    table = mistakes.merge(said[columns], how="left", on=columns[:2])
    return table.fillna({"verdict": NOT_LOOKED_AT, "note": ""})


def calibration_over_sols(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each of four periods with equally many sols.

    Columns: first_sol, last_sol, images, accuracy, confidence (mean) and ece.
    """
    sols = product_ids(predictions)["sol"].to_numpy()
    rows = []
    for part in np.array_split(np.unique(sols), PERIODS):
        chosen = predictions[(sols >= part[0]) & (sols <= part[-1])]
        correct = (chosen["label"] == chosen["predicted"]).to_numpy()
        confidence = chosen["confidence"].to_numpy()
        error = expected_calibration_error(confidence, correct)
        numbers = [len(chosen), correct.mean(), confidence.mean(), error]
        rows.append([part[0], part[-1], *numbers])
    names = ["first_sol", "last_sol", "images", "accuracy", "confidence", "ece"]
    return pd.DataFrame(rows, columns=names)


def commonest_confusions(predictions: pd.DataFrame, limit: int | None = 12) -> pd.DataFrame:
    """Return the `limit` commonest errors (None: all): true, predicted (names), count, share.

    `share` is of the true class's images, 0 to 1.
    """
    counts = confusion_matrix(predictions)
    wrong = counts - np.diag(np.diag(counts))
    true, predicted = np.nonzero(wrong)
    table = pd.DataFrame(
        {
            "true": [data.CLASS_NAMES[label] for label in true],
            "predicted": [data.CLASS_NAMES[label] for label in predicted],
            "count": wrong[true, predicted],
            "share": wrong[true, predicted] / counts.sum(axis=1)[true],
        }
    )
    # A stable sort leaves equal counts in the order of the class ids.
    return table.sort_values("count", ascending=False, kind="stable", ignore_index=True)[:limit]


def measure(predictions: pd.DataFrame) -> dict[str, dict]:
    """Return the numbers of each split, from predictions as they are stored.

    Those under "burst" are of one answer a burst (see `burst_consensus`). Raises
    MarsclfError where a split has no image.
    """
    splits = {split: predictions[predictions["split"] == split] for split in data.SPLITS}
    for split, rows in splits.items():
        if rows.empty:
            raise MarsclfError(f"The predictions hold no image of the {split} split.")
    return {
        split: summarize(rows) | {"burst": summarize(burst_consensus(rows))}
        for split, rows in splits.items()
    }
