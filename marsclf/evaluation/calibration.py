"""Pooling of several predictions, and the temperature that calibrates their confidence."""

import numpy as np

TEMPERATURES = np.geomspace(0.1, 10, 461)  # each 1 % above the one before


def pool(probabilities: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the normalized geometric mean of probabilities along an axis other than the last.

    It is the mean of the logits: predictions that agree keep their confidence, and one that rules
    a class out outweighs the others more than in the arithmetic mean.
    """
    return softmax(np.log(np.maximum(probabilities, 1e-7)).mean(axis=axis))


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(logits / temperature), given softmax(logits) of shape (..., classes).

    A temperature below 1 raises the confidence, one above 1 lowers it; the class order stays.
    """
    return softmax(np.log(np.maximum(probabilities, 1e-12)) / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities from logits, both of shape (..., classes)."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fit_temperature(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Return the temperature with the lowest mean log loss (Guo et al. 2017).

    `probabilities` have the shape (n, classes); class ids and `weights` (None: equal) are (n,).
    """
    rows, losses = np.arange(len(labels)), []
    for temperature in TEMPERATURES:
        of_label = with_temperature(probabilities, temperature)[rows, labels]
        losses.append(-np.average(np.log(of_label), weights=weights))
    return float(TEMPERATURES[np.argmin(losses)])
