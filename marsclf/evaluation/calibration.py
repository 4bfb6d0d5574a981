"""Confidence that can be believed: one answer of several, and a temperature for it."""

import numpy as np

TEMPERATURES = np.geomspace(0.1, 10, 461)  # each 1 % above the one before


def pool(probabilities: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return one answer of several: the normalised geometric mean along an axis, not the last.

    That is the mean of the logits. Two answers that agree stay as sure as they are, where the mean
    of the probabilities doubts with whichever doubts more.
    """
    logs = np.log(np.maximum(probabilities, 1e-7)).mean(axis=axis)
    shares = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(logits / temperature), from softmax(logits) (..., classes).

    Below 1 it makes every answer surer, above 1 less sure; the order of the classes stays.
    """
    logits = np.log(np.maximum(probabilities, 1e-12)) / temperature
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def fit_temperature(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Return the temperature with the least weighted mean log loss (Guo et al. 2017).

    Args:
        probabilities: (n, classes).
        labels: 0-24 (n,).
        weights: how much each row counts (n,); without them all alike.
    """
    of_labels = [
        np.log(with_temperature(probabilities, t)[np.arange(len(labels)), labels])
        for t in TEMPERATURES
    ]
    losses = [-np.average(logs, weights=weights) for logs in of_labels]
    return float(TEMPERATURES[np.argmin(losses)])
