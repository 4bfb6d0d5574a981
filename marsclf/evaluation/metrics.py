"""Metrics of stored predictions: `predictions` is always a table from `read_predictions`.

`classes` are the names of its classes, by id.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from marsclf.data.dataset import SPLITS
from marsclf.evaluation.calibration import softmax
from marsclf.evaluation.predictions import as_predictions, probabilities_of

# The PDS Image Atlas shows a content label from this confidence up (Wagstaff et al. 2018).
THRESHOLD = 0.9
RESAMPLES = 2000  # of the bootstrap
BINS = 15  # of the calibration


def measure(predictions: pd.DataFrame) -> dict[str, dict]:
    """Return `summarize` of each split there is, with that of its `burst_consensus` as "burst"."""
    of = {split: predictions[predictions["split"] == split] for split in SPLITS}
    return {
        split: summarize(rows) | {"burst": summarize(burst_consensus(rows))}
        for split, rows in of.items()
        if len(rows)
    }


def summarize(predictions: pd.DataFrame) -> dict[str, object]:
    """Return the metrics of one split: fractions in 0 to 1, rounded to six digits.

    `ece` is the mean gap between confidence and accuracy over the bins of `calibration_bins`
    (Guo et al. 2017). `accuracy_at_0.9` is None if no confidence reaches 0.9.
    """
    labels, confidence = predictions["label"].to_numpy(), predictions["confidence"].to_numpy()
    probabilities = probabilities_of(predictions)
    correct, covered = labels == predictions["predicted"].to_numpy(), confidence >= THRESHOLD
    bins = calibration_bins(confidence, correct)
    classes = per_class(predictions, range(probabilities.shape[1]))
    # Of two equal probabilities the lower class id ranks first, as with argmax.
    top3 = np.argsort(-probabilities, axis=1, kind="stable")[:, :3]
    of_label = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1)
    gaps = (bins["accuracy"] - bins["confidence"]).abs() * bins["count"]
    summary = {
        "accuracy": correct.mean(),
        "accuracy_ci95": bootstrap_over_groups(correct, predictions["group"]),
        "macro_f1": classes.loc[classes["support"] > 0, "f1"].mean(),
        "top3": (top3 == labels[:, None]).any(axis=1).mean(),
        "nll": -np.log(of_label).mean(),
        "ece": gaps.sum() / len(labels),
        "coverage_at_0.9": covered.mean(),
        "accuracy_at_0.9": correct[covered].mean() if covered.any() else None,
    }
    rounded = {k: None if v is None else np.round(v, 6).tolist() for k, v in summary.items()}
    return {"n": len(predictions)} | rounded


def burst_consensus(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions with one prediction per burst, that is for images of one sequence.

    It is the normalized geometric mean of the probabilities of the burst's images.
    """
    bursts = predictions.groupby("sequence").ngroup().to_numpy()
    logs = np.log(np.maximum(probabilities_of(predictions), 1e-7))
    means = pd.DataFrame(logs).groupby(bursts).transform("mean").to_numpy()
    return as_predictions(predictions, softmax(means))


def bootstrap_over_groups(
    correct: np.ndarray, groups: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """Return the 95 % interval [low, high], (2,), of the accuracy from resampling complete groups.

    Images of one group, such as a sol, are not independent, so it is the unit that is drawn: the
    percentile interval of a cluster bootstrap (Efron and Tibshirani 1993, chapters 8 and 13).
    `correct` tells which images are right, (n,), and `groups` are theirs. For several accuracies,
    `counted` tells the images of each, (n, k), at least one; then `correct` may be (n, k) too, and
    the intervals are (2, k).
    """
    number = np.unique(groups, return_inverse=True)[1]
    every = np.ones((len(number), 1)) if counted is None else counted.astype(float)
    right = correct.reshape(len(number), -1) * every
    hits, images = (pd.DataFrame(each).groupby(number).sum().to_numpy() for each in (right, every))
    # RandomState, because NumPy promises that its stream never changes; default_rng's may.
    random, accuracies = np.random.RandomState(0), []
    for _ in range(RESAMPLES):  # one at a time: there may be as many groups as images
        drawn = random.randint(len(images), size=len(images), dtype="i8")
        times = np.bincount(drawn, minlength=len(images))
        of = times @ images
        accuracies.append(np.where(of > 0, times @ hits / np.maximum(of, 1), np.nan))
    interval = np.nanpercentile(accuracies, [2.5, 97.5], axis=0)
    return interval[:, 0] if counted is None else interval


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Return count, mean accuracy and mean confidence (NaN if empty) of 15 equal-width bins.

    Bin m of M holds the confidences in ((m - 1) / M, m / M] (Guo et al. 2017).
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = pd.DataFrame({"accuracy": correct.astype(float), "confidence": confidence})
    table = rows.groupby(number).mean().reindex(range(BINS))
    return table.assign(count=np.bincount(number, minlength=BINS))


def confusion_matrix(predictions: pd.DataFrame) -> np.ndarray:
    """Return counts (classes, classes): true classes by row, predicted classes by column."""
    number = probabilities_of(predictions).shape[1]
    cells = predictions["label"].to_numpy() * number + predictions["predicted"].to_numpy()
    return np.bincount(cells, minlength=number**2).reshape(number, number)


def per_class(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return one row per class, by id: class_name, support, errors, recall, precision, f1.

    Recall is NaN for a class without images; precision and F1 are 0 for one never predicted.
    """
    counts = confusion_matrix(predictions)
    support, predicted, hits = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    table = pd.DataFrame({"class_name": classes, "support": support, "errors": support - hits})
    return table.assign(
        recall=np.where(support > 0, hits / np.maximum(support, 1), np.nan),
        precision=hits / np.maximum(predicted, 1),
        f1=2 * hits / np.maximum(support + predicted, 1),
    ).rename_axis("label")


def errors(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return the wrong rows: sol, camera, sequence, true, said (names), confidence, of_true, path.

    `said` is the predicted class; `of_true` is the probability of the true class. Sol and camera
    are there if known.
    """
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    labels, names = wrong["label"].to_numpy(), np.array(classes)
    return wrong.filter(["sol", "camera", "sequence"]).assign(
        true=names[labels],
        said=names[wrong["predicted"].to_numpy()],
        confidence=wrong["confidence"],
        of_true=probabilities_of(wrong)[np.arange(len(wrong)), labels],
        path=wrong["path"],
    )
