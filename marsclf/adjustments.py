"""Adjustments of probabilities that need no training: other class frequencies, and the camera.

Published is what they would have done in validation, counted from stored predictions: frequencies
and cameras of training are known, of validation only the images are, and test is left out.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import data, ledger, metrics
from marsclf.errors import MarsclfError
from marsclf.run import commit

NAME = "adjustments.json"
# Images that are added to every class, and to every camera of every class.
CLASS_PSEUDO_COUNTS = (0, 5, 20)
CAMERA_PSEUDO_COUNTS = (1, 20, 100)
# EM ends when no prior changes by more, or after so many rounds.
CHANGE, ROUNDS = 1e-8, 10_000


def with_priors(
    probabilities: np.ndarray, source_priors: np.ndarray, target_priors: np.ndarray
) -> np.ndarray:
    """Return the probabilities for images whose classes come with other frequencies.

    Bayes' rule, as equation 4 of Saerens, Latinne and Decaestecker 2002: each class is weighted
    by its target prior over its source prior, and the sum made 1 again.

    Args:
        probabilities: (n, classes), 0 to 1, for the frequencies of the source.
        source_priors: (classes,), with the sum 1; a class with 0 gets the probability 0.
        target_priors: (classes,), with the sum 1.

    Raises MarsclfError where every class of an image comes to 0.
    """
    known = source_priors > 0
    weights = np.divide(target_priors, source_priors, out=np.zeros(known.shape), where=known)
    return _normalised(probabilities * weights)


def em_priors(
    probabilities: np.ndarray, source_priors: np.ndarray, pseudo_count: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the class frequencies of unlabelled images; return them and the new probabilities.

    Expectation-maximisation (equation 9 of Saerens, Latinne and Decaestecker 2002): probabilities
    for the priors so far, their mean as the next priors, and so on. It ends at the priors under
    which the images are likeliest, or, with a pseudo-count, likeliest times a Dirichlet prior.

    Args:
        probabilities: (n, classes), 0 to 1, calibrated, for the frequencies of the source.
        source_priors: (classes,), with the sum 1; a class with 0 stays out.
        pseudo_count: images that are added to each class, which keep rare ones alive.

    Returns:
        priors (classes,) and probabilities (n, classes), both with the sum 1.

    Raises MarsclfError where all classes of an image stay out.
    """
    added = pseudo_count * (source_priors > 0)
    priors = source_priors
    for _ in range(ROUNDS):
        expected = with_priors(probabilities, source_priors, priors).sum(axis=0) + added
        before, priors = priors, expected / expected.sum()
        if np.abs(priors - before).max() <= CHANGE:
            break
    return priors, with_priors(probabilities, source_priors, priors)


def bbse_priors(
    source_probabilities: np.ndarray, source_labels: np.ndarray, target_probabilities: np.ndarray
) -> np.ndarray:
    """Return the class frequencies (classes,) of unlabelled images, from what is said of them.

    Black box shift estimation (Lipton, Wang and Smola 2018), with mean probabilities in place of
    counted answers: the mean answer to the target's images is the sum over the classes of their
    frequency times the mean answer to the source's images of that class. Solved by least squares;
    what comes out below 0 is set to 0 and the sum made 1. It asks for no calibration, but for
    answers to the images of a class that are alike in source and target.

    Args:
        source_probabilities: (n, classes), 0 to 1.
        source_labels: class ids (n,); a class without an image gets the frequency 0.
        target_probabilities: (m, classes), 0 to 1.
    """
    present = np.unique(source_labels)
    answers = [source_probabilities[source_labels == label].mean(axis=0) for label in present]
    solved, *_ = np.linalg.lstsq(np.transpose(answers), target_probabilities.mean(axis=0))
    priors = np.zeros(source_probabilities.shape[1])
    priors[present] = np.maximum(solved, 0)
    return priors / priors.sum()


def with_camera(
    probabilities: np.ndarray,
    cameras: np.ndarray,
    source_labels: np.ndarray,
    source_cameras: np.ndarray,
    pseudo_count: float,
) -> np.ndarray:
    """Return the probabilities (n, classes) once the camera is known, too.

    Bayes' rule with the camera as evidence that tells nothing of the image but its class:
    p(class | image, camera) is p(class | image) times p(camera | class), made to sum to 1. The
    second is the camera's share of the class's images in the source.

    Args:
        probabilities: (n, classes), 0 to 1.
        cameras: the name of each image's camera (n,).
        source_labels: class ids (m,).
        source_cameras: names (m,).
        pseudo_count: images, more than 0, that are added to each camera in each class, because a
            camera that has never shown a class may do so yet.
    """
    names = np.unique([*source_cameras, *cameras])
    counts = np.full((probabilities.shape[1], len(names)), float(pseudo_count))
    np.add.at(counts, (source_labels, np.searchsorted(names, source_cameras)), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return _normalised(probabilities * shares[:, np.searchsorted(names, cameras)].T)


def scores(predictions: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return accuracy, mean_recall and macro_f1 in validation, for each adjustment by its name.

    The means are over the classes that validation shows; all numbers lie in 0 to 1 and have six
    digits. Training drew all classes alike, so the priors that the predictions were made for are
    equal for the classes that it shows and 0 for the others. Rows of test are not looked at.
    """
    train, val = (predictions[predictions["split"] == split] for split in ("train", "val"))
    labels = train["label"].to_numpy()
    of_train, of_val = (rows[metrics.PROBABILITY_COLUMNS].to_numpy() for rows in (train, val))
    cameras_of_train, cameras_of_val = (
        metrics.product_ids(rows)["camera"].to_numpy(str) for rows in (train, val)
    )
    shown = np.bincount(labels, minlength=data.NUM_CLASSES) > 0
    source = shown / shown.sum()
    adjusted = {"nothing": of_val}
    for count in CLASS_PSEUDO_COUNTS:
        name = "class frequencies by EM" + (f", pseudo-count {count}" if count else "")
        _, adjusted[name] = em_priors(of_val, source, count)
    priors = bbse_priors(of_train, labels, of_val)
    adjusted["class frequencies by BBSE"] = with_priors(of_val, source, priors)
    for count in CAMERA_PSEUDO_COUNTS:
        adjusted[f"camera, pseudo-count {count}"] = with_camera(
            of_val, cameras_of_val, labels, cameras_of_train, count
        )
    tables = {name: metrics.as_predictions(val, found) for name, found in adjusted.items()}
    tables["one answer a burst"] = metrics.burst_consensus(val)
    return {name: _score(table) for name, table in tables.items()}


def measure(run: dict, predictions_file: Path) -> dict[str, object]:
    """Return the scores of a run's predictions and what they are of: all that can be recomputed.

    `run` is the run's metrics. Raises MarsclfError for a file that is none of predictions.
    """
    predictions = metrics.read_predictions(predictions_file)
    return {
        "run": {name: run[name] for name in ("preset", "seed", "commit")},
        "predictions_sha256": ledger.digest_of(predictions_file),
        "images": int((predictions["split"] == "val").sum()),
        "scores": scores(predictions),
    }


def record(run: dict, predictions_file: Path) -> dict[str, object]:
    """Return what `measure` does with the time and the commit of this code, for results/."""
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    return about | measure(run, predictions_file)


def _score(table: pd.DataFrame) -> dict[str, float]:
    classes = metrics.per_class(table)
    present = classes[classes["support"] > 0]
    found = {
        "accuracy": (table["predicted"] == table["label"]).mean(),
        "mean_recall": present["recall"].mean(),
        "macro_f1": present["f1"].mean(),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def _normalised(weights: np.ndarray) -> np.ndarray:
    sums = weights.sum(axis=1, keepdims=True)
    if (sums == 0).any():
        row = int(np.argmin(sums))
        raise MarsclfError(
            f"No class is left for image {row} (counted from 0): its probability is all of classes "
            "that cannot occur. Are these the predictions of a network?"
        )
    return weights / sums
