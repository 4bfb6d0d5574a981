"""Metrics of stored predictions: `predictions` is always a table from `read_predictions`."""

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.msl import CLASS_NAMES, NUM_CLASSES, SPLITS
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import PROBABILITY_COLUMNS, as_predictions, product_ids

# The PDS Image Atlas shows a content label from this confidence up (Wagstaff et al. 2018).
THRESHOLD = 0.9
RESAMPLES = 2000  # of the bootstrap
BINS = 15  # of the calibration
PERIODS = 4  # of `calibration_over_sols`, at most
VERDICTS = "test_by_eye.csv"
BURST = ["sol", "camera", "sequence"]  # images that share these show one subject


def measure(predictions: pd.DataFrame) -> dict[str, dict]:
    """Return `summarize` of each split, with that of its `burst_consensus` under "burst"."""
    splits = {}
    for split in SPLITS:
        rows = predictions[predictions["split"] == split]
        if rows.empty:
            raise MarsclfError(f"The predictions hold no image of the {split} split.")
        splits[split] = summarize(rows) | {"burst": summarize(burst_consensus(rows))}
    return splits


def summarize(predictions: pd.DataFrame) -> dict[str, object]:
    """Return the metrics of one split: fractions in 0 to 1, rounded to six digits.

    `ece` is the mean gap between confidence and accuracy over the bins of `calibration_bins`
    (Guo et al. 2017). `accuracy_at_0.9` is None if no confidence reaches 0.9.
    """
    labels, confidence = predictions["label"].to_numpy(), predictions["confidence"].to_numpy()
    probabilities = predictions[PROBABILITY_COLUMNS].to_numpy()
    correct, covered = labels == predictions["predicted"].to_numpy(), confidence >= THRESHOLD
    classes, bins = per_class(predictions), calibration_bins(confidence, correct)
    # Of two equal probabilities the lower class id ranks first, as with argmax.
    top3 = np.argsort(-probabilities, axis=1, kind="stable")[:, :3]
    of_label = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1)
    gaps = (bins["accuracy"] - bins["confidence"]).abs() * bins["count"]
    summary = {
        "accuracy": correct.mean(),
        "accuracy_ci95": bootstrap_over_sols(correct, product_ids(predictions)["sol"]),
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
    """Return the predictions with one prediction per burst: same sol, camera and sequence.

    It is the normalized geometric mean of the probabilities of the burst's images.
    """
    bursts = product_ids(predictions).groupby(BURST).ngroup().to_numpy()
    logs = np.log(np.maximum(predictions[PROBABILITY_COLUMNS].to_numpy(), 1e-7))
    means = np.exp(pd.DataFrame(logs).groupby(bursts).transform("mean").to_numpy())
    return as_predictions(predictions, means / means.sum(axis=1, keepdims=True))


def bootstrap_over_sols(correct: np.ndarray, sols: np.ndarray) -> np.ndarray:
    """Return the 95 % interval [low, high] of the accuracy from resampling complete sols.

    Images of one sol come in bursts and are not independent, so the sol is the unit that is drawn:
    the percentile interval of a cluster bootstrap (Efron and Tibshirani 1993, chapters 8 and 13).
    """
    sol_number = np.unique(sols, return_inverse=True)[1]
    hits, images = np.bincount(sol_number, weights=correct), np.bincount(sol_number)
    # RandomState, because NumPy promises that its stream never changes; default_rng's may.
    draws = np.random.RandomState(0).randint(len(images), size=(RESAMPLES, len(images)), dtype="i8")
    return np.percentile(hits[draws].sum(axis=1) / images[draws].sum(axis=1), [2.5, 97.5])


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Return count, mean accuracy and mean confidence (NaN if empty) of 15 equal-width bins.

    Bin m of M holds the confidences in ((m - 1) / M, m / M] (Guo et al. 2017).
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = pd.DataFrame({"accuracy": correct.astype(float), "confidence": confidence})
    table = rows.groupby(number).mean().reindex(range(BINS))
    return table.assign(count=np.bincount(number, minlength=BINS))


def calibration_over_sols(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each of four periods, or one per sol if fewer, of equally many sols.

    Columns: first_sol, last_sol, images, accuracy, confidence (mean) and ece.
    """
    sols, rows = product_ids(predictions)["sol"].to_numpy(), []
    for period in np.array_split(np.unique(sols), min(PERIODS, len(np.unique(sols)))):
        part = predictions[np.isin(sols, period)]
        summary, confidence = summarize(part), part["confidence"].mean()
        row = {"first_sol": period[0], "last_sol": period[-1], "images": len(part)}
        row |= {"accuracy": summary["accuracy"], "confidence": confidence, "ece": summary["ece"]}
        rows.append(row)
    return pd.DataFrame(rows)


def confusion_matrix(predictions: pd.DataFrame) -> np.ndarray:
    """Return counts (25, 25): true classes by row, predicted classes by column."""
    cells = predictions["label"].to_numpy() * NUM_CLASSES + predictions["predicted"].to_numpy()
    return np.bincount(cells, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per class, by id: class_name, support, errors, recall, precision, f1.

    Recall is NaN for a class without images; precision and F1 are 0 for one never predicted.
    """
    counts = confusion_matrix(predictions)
    support, predicted, hits = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    table = pd.DataFrame({"class_name": CLASS_NAMES, "support": support, "errors": support - hits})
    return table.assign(
        recall=np.where(support > 0, hits / np.maximum(support, 1), np.nan),
        precision=hits / np.maximum(predicted, 1),
        f1=2 * hits / np.maximum(support + predicted, 1),
    ).rename_axis("label")


def commonest_confusions(predictions: pd.DataFrame, limit: int | None = 12) -> pd.DataFrame:
    """Return the `limit` commonest confusions (None: all): true, predicted (names), count, share.

    `share` is the fraction of the true class's images, 0 to 1. Equal counts are in the order of
    the class ids.
    """
    matrix, names = confusion_matrix(predictions), np.array(CLASS_NAMES)
    true, predicted = np.nonzero(matrix - np.diag(np.diag(matrix)))
    count = matrix[true, predicted]
    table = pd.DataFrame({"true": names[true], "predicted": names[predicted], "count": count})
    table["share"] = count / matrix.sum(axis=1)[true]
    return table.sort_values("count", ascending=False, kind="stable", ignore_index=True)[:limit]


def errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong rows: sol, camera, sequence, true, said (names), confidence, of_true, path.

    `said` is the predicted class; `of_true` is the probability of the true class.
    """
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    labels, names = wrong["label"].to_numpy(), np.array(CLASS_NAMES)
    return product_ids(wrong)[BURST].assign(
        true=names[labels],
        said=names[wrong["predicted"].to_numpy()],
        confidence=wrong["confidence"],
        of_true=wrong[PROBABILITY_COLUMNS].to_numpy()[np.arange(len(wrong)), labels],
        path=wrong["path"],
    )


def errors_by_burst(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per burst, true class and predicted class, the most errors first.

    Columns of `errors` without path, confidence and of_true averaged, and `errors`, their number.
    """
    groups = errors(predictions).groupby([*BURST, "true", "said"])
    means = {"confidence": ("confidence", "mean"), "of_true": ("of_true", "mean")}
    table = groups.agg(errors=("path", "count"), **means).reset_index()
    return table.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def by_eye(mistakes: pd.DataFrame) -> pd.DataFrame:
    """Return `errors` or `errors_by_burst` with the columns verdict and note.

    A person wrote both in results/test_by_eye.csv for the images of a burst and true class. Other
    rows get the verdict "not looked at".
    """
    columns = ["sequence", "true", "verdict", "note"]
    path = paths.RESULTS / VERDICTS
    reviews = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame(columns=columns)
    table = mistakes.merge(reviews[columns], how="left", on=["sequence", "true"])
    return table.fillna({"verdict": "not looked at", "note": ""})
