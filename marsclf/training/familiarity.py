"""Familiarity: whether an image resembles those that the classes were learned from.

One logistic unit on the means of the maps of block 5, trained with images of the classes against
images of none of them. Fine-tuning from block 6 up leaves these means as ImageNet formed them, so
an image on which the network was trained looks no more familiar than a new one.
"""

from typing import NamedTuple

import numpy as np

from marsclf.images.views import fit_view
from marsclf.networks.pinned import keras

BLOCK = "block5"
PENALTY = 100.0  # the loss includes half of it times the squared weights of scaled features
FOLDS = 5


class Familiarity(NamedTuple):
    """The unit: sigmoid(features @ weights + bias); an image below 0.5 is unfamiliar."""

    weights: np.ndarray  # (width,)
    bias: float


def features_model(network: keras.Model) -> keras.Model:
    """Return the part of a network, images to probabilities, that gives the features (n, width)."""
    return keras.Model(network.input, keras.layers.GlobalAveragePooling2D()(_maps(network)))


def with_familiarity(network: keras.Model, unit: Familiarity | None = None) -> keras.Model:
    """Return a network, images to probabilities, with the familiarity as one more output column.

    The result shares the network's weights. Without `unit`, that of the result is untrained.
    """
    layers = keras.layers
    # Before the mean, not after it: OpenVINO is slow at a product with a single column.
    layer = layers.Conv2D(1, 1, name="familiarity")
    logit = layers.GlobalAveragePooling2D()(layer(_maps(network)))
    outputs = [network.output, layers.Activation("sigmoid")(logit)]
    if unit:
        layer.set_weights([unit.weights.reshape(1, 1, -1, 1), np.array([unit.bias])])
    return keras.Model(network.input, layers.Concatenate()(outputs))


def _maps(network: keras.Model) -> keras.KerasTensor:
    return [layer for layer in network.layers if layer.name.startswith(BLOCK)][-1].output


def blank_frames(size: int, number: int, seed: int = 0) -> np.ndarray:
    """Return generated frames without a scene, uint8 (number, size, size, 3).

    Of one color or shaded, often saturated or dark, with and without noise; half of them gray, and
    a third as coarse as the rover's thumbnails.
    """
    random, frames = np.random.default_rng(seed), []
    for each in range(number):
        side, colors = random.choice([64, size, size]), 1 if each % 2 else 3
        slopes = random.normal(0, random.choice([0, 0.3, 1]), 2) * 128 / side
        y, x = np.mgrid[:side, :side] - side / 2
        frame = random.uniform(-60, 315, colors) + (slopes[0] * x + slopes[1] * y)[..., np.newaxis]
        noise = random.choice([0, 1, 4, 16]) * random.standard_normal((side, side, colors))
        frame = np.clip(np.broadcast_to(frame + noise, (side, side, 3)), 0, 255)
        frames.append(fit_view(frame.astype(np.uint8), size))
    return np.stack(frames)


def fit_familiarity(
    known: np.ndarray, outside: np.ndarray, groups: np.ndarray, flagged: float = 0.03
) -> tuple[Familiarity, np.ndarray]:
    """Fit the unit with features of images of the classes (n, width) and of others (m, width).

    Both kinds count equally. Also returns the familiarity (n + m,) by five units, each fitted
    without the groups that it judges, the sol or scene of each image (n + m,). The bias is such
    that these units find the share `flagged` (0 to 1) of the known images unfamiliar.
    """
    features = np.concatenate([known, outside]).astype(np.float64)
    is_known = np.arange(len(features)) < len(known)
    number = np.unique(groups, return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(number.max() + 1)[number] % FOLDS
    logits = np.empty(len(features))
    for each in np.unique(fold):
        weights, bias = _fit(features[fold != each], is_known[fold != each])
        logits[fold == each] = features[fold == each] @ weights + bias
    weights, bias = _fit(features, is_known)
    shift = np.quantile(logits[is_known], flagged)
    return Familiarity(weights, bias - shift), 1 / (1 + np.exp(shift - logits))


def _fit(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights and bias of the penalized logistic regression, by Newton's method."""
    counts = np.where(target, target.sum(), (~target).sum())
    mean, spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    inputs = np.column_stack([(features - mean) / spread, np.ones(len(features))])
    penalty = np.append(np.full(len(mean), PENALTY), 0.0)
    solution = np.zeros(len(penalty))
    for _ in range(30):
        output = 1 / (1 + np.exp(-np.clip(inputs @ solution, -500, 500)))
        share = len(features) / (2 * counts)
        gradient = inputs.T @ (share * (output - target)) + penalty * solution
        curvature = (inputs.T * (share * output * (1 - output))) @ inputs + np.diag(penalty)
        solution -= (step := np.linalg.solve(curvature, gradient))
        if np.abs(step).max() < 1e-9:
            break
    weights = solution[:-1] / spread
    return weights, solution[-1] - mean @ weights
