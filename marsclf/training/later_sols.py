"""Comparing recipes on later sols, without the test split.

The test images are later than the training images: the same parts reappear at other scales,
rotated, overexposed, and with other frequencies. Each fold therefore trains on early sols of train
and validation and evaluates on later ones, under several conditions and with equal class weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from marsclf.evaluation.calibration import fit_temperature, with_temperature
from marsclf.images.views import Condition
from marsclf.training.sampling import class_weights, spread_over_groups

if TYPE_CHECKING:  # TensorFlow takes seconds to load
    from marsclf.training.train import TrainedNetwork

# The last sol to train on and the last to evaluate on; "late" is the data set's own split.
FOLDS = {"early": (150, 320), "late": (181, 564)}
CONDITIONS = {
    "as it is": Condition(),
    "zoomed in": Condition(zoom=1.8),
    "far in": Condition(zoom=2.6),
    "zoomed out": Condition(zoom=0.5),
    "turned 90": Condition(turn=90),
    "turned 180": Condition(turn=180),
    "bright": Condition(gain=1.6),
    "grey": Condition(grey=True),
}


def fold(index: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows to train on and the rows to evaluate on; neither includes test images."""
    train_until, judge_until = FOLDS[name]
    usable = index[index["split"] != "test"].sort_values(["sol", "path"])
    train = usable[usable["sol"] <= train_until]
    later = usable[(usable["sol"] > train_until) & (usable["sol"] <= judge_until)]
    return train, spread_over_groups(later[later["label"].isin(train["label"])])


def judge(networks: "list[TrainedNetwork]", root: Path, rows: pd.DataFrame) -> np.ndarray:
    """Return the probabilities under each condition, (conditions, rows, classes)."""
    from marsclf.training.train import predict

    return np.stack([predict(networks, root, rows, how) for how in CONDITIONS.values()])


def criterion(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean class recall: "criterion" over all conditions, and under each by its name.

    `probabilities` are those of `judge`; `labels` are class ids (rows,).
    """
    right = probabilities.argmax(axis=-1) == labels
    recalls = [right[:, labels == label].mean(axis=1) for label in np.unique(labels)]
    by_condition = np.mean(recalls, axis=0)
    named = dict(zip(CONDITIONS, by_condition.tolist(), strict=True))
    return {"criterion": float(by_condition.mean())} | named


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log loss in nats, at the best temperature and with classes weighted equally.

    It distinguishes recipes that get the same images right: the recall of a class with few images
    moves in large steps. The arguments are those of `criterion`.
    """
    rows, labels = np.concatenate(probabilities), np.tile(labels, len(probabilities))
    weights = class_weights(labels)
    calibrated = with_temperature(rows, fit_temperature(rows, labels, weights))
    return float(-np.average(np.log(calibrated[np.arange(len(labels)), labels]), weights=weights))
