"""Confidence that can be believed: a temperature, fitted where the network did not learn."""

import numpy as np

TEMPERATURES = np.geomspace(0.1, 10, 461)  # each 1 % above the one before


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
