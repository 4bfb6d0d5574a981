"""Pooling and temperature, against their formulas, and that the fitted temperature is the best."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from marsclf.evaluation.calibration import fit_temperature, pool, with_temperature


def drawn(temperature: float, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(logits), and softmax(logits * temperature)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (count, 5))
    labels = np.array([rng.choice(5, p=row) for row in softmax(logits, axis=1)])
    return softmax(logits * temperature, axis=1), labels


def test_pooled_predictions_are_the_geometric_mean() -> None:
    several = np.array([[[0.8, 0.1, 0.1], [1.0, 0.0, 0.0]], [[0.2, 0.4, 0.4], [1.0, 0.0, 0.0]]])
    roots = np.sqrt([0.16, 0.04, 0.04])
    np.testing.assert_allclose(pool(several), [roots / roots.sum(), [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(pool(several.swapaxes(0, 1), axis=1), pool(several))
    np.testing.assert_allclose(pool(several[:1]), several[0], atol=1e-6)


def test_temperature_is_that_of_a_softmax() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    for temperature in (0.5, 1.0, 3.0):
        found = with_temperature(softmax(logits, axis=1), temperature)
        np.testing.assert_allclose(found, softmax(logits / temperature, axis=1))
    certain = with_temperature(np.array([[1.0, 0.0]]), 0.5)
    np.testing.assert_allclose(certain, [[1, 0]], atol=1e-9)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.08)


def test_no_other_temperature_has_a_lower_loss() -> None:
    probabilities, labels = drawn(0.6, 300)
    weights = np.where(labels == 1, 5.0, 1.0)
    found = fit_temperature(probabilities, labels, weights)
    assert found != fit_temperature(probabilities, labels)

    def loss(temperature: float) -> float:
        return log_loss(labels, with_temperature(probabilities, temperature), sample_weight=weights)

    assert loss(found) < min(loss(found * 1.05), loss(found / 1.05))
