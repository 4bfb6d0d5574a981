"""Comparing recipes on later sols, without the test split.

The test images are later than the training images: the same parts reappear at other scales,
rotated, from the side, overexposed, and with other frequencies. Each fold therefore trains on early
sols of train and validation and evaluates on later ones, under several conditions and with equal
class weights. MAHLI's ground and horizons count once more: it photographs ground from above only on
later sols, and a slope in the sun looks like a horizon.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf.evaluation.calibration import fit_temperature, with_temperature
from marsclf.images.views import Condition
from marsclf.training.sampling import class_weights, spread_over_groups
from marsclf.training.train import predict

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
# The temperature of a run is fitted under those above; recipes are compared under all of these.
COMPARED = CONDITIONS | {
    "from the side": Condition(tilt=40),
    "turned 90, from the side": Condition(turn=90, tilt=40),
    "overexposed": Condition(gain=2.5),
}


def fold(index: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows to train on and the rows to evaluate on; neither includes test images."""
    train_until, judge_until = FOLDS[name]
    usable = index[index["split"] != "test"].sort_values(["sol", "path"])
    train = usable[usable["sol"] <= train_until]
    later = usable[(usable["sol"] > train_until) & (usable["sol"] <= judge_until)]
    return train, spread_over_groups(later[later["label"].isin(train["label"])])


def judge(
    networks: list, root: Path, rows: pd.DataFrame, conditions: Mapping[str, Condition] = CONDITIONS
) -> np.ndarray:
    """Return the probabilities by TrainedNetworks (conditions, rows, classes)."""
    return np.stack([predict(networks, root, rows, how) for how in conditions.values()])


def criterion(right: np.ndarray, judged: pd.DataFrame) -> dict[str, float]:
    """Return "criterion", and the mean class recall under each condition by its name.

    `right` is whether each image of `judged`, the rows of `fold`, was right under each of COMPARED,
    or how often (conditions, rows).
    """
    recalls = [right[:, judged["label"] == label].mean(axis=1) for label in set(judged["label"])]
    weights, members = _parts(judged)
    of_parts = [right[:, rows].mean() for rows in members]
    named = dict(zip(COMPARED, np.mean(recalls, axis=0).tolist(), strict=True))
    return {"criterion": float(weights @ of_parts)} | named


def difference(
    rights: Sequence[np.ndarray], others: Sequence[np.ndarray], judged: Sequence[pd.DataFrame]
) -> tuple[float, np.ndarray]:
    """Return how much higher the criterion of `rights` is than that of `others`, over all folds.

    The arguments have one item for each fold, as `criterion` takes them. The second value is the
    95 % interval [low, high] of a paired cluster bootstrap (evaluation.metrics): complete sols are
    resampled, 2,000 times, and both recipes are judged on the same ones.
    """
    sols = np.unique(np.concatenate([rows["sol"] for rows in judged]))
    draws = np.random.default_rng(0).integers(len(sols), size=(2000, len(sols)))
    times = [np.bincount(draw, minlength=len(sols)) for draw in [np.arange(len(sols)), *draws]]
    parts = []  # weight, gains by sol, images by sol
    for right, other, rows in zip(rights, others, judged, strict=True):
        gains, place = right.mean(axis=0) - other.mean(axis=0), np.searchsorted(sols, rows["sol"])
        for weight, of in zip(*_parts(rows), strict=True):
            sums = (np.bincount(place[of], each, len(sols)) for each in (gains[of], None))
            parts.append((weight, *sums))
    weights, gains, images = map(np.array, zip(*parts, strict=True))
    gains, images = times @ gains.T, times @ images.T  # (1 + draws, parts)
    weights = weights * (images > 0)
    means = (weights * gains / np.maximum(images, 1)).sum(axis=1) / weights.sum(axis=1)
    return float(means[0]), np.percentile(means[1:], [2.5, 97.5])


def _parts(judged: pd.DataFrame) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the weights of the parts of the criterion, in sum 1, and which rows each averages.

    These are the classes and, with the weight of one more condition, the two of MAHLI.
    """
    members = [(judged["label"] == label).to_numpy() for label in np.unique(judged["label"])]
    weights = np.full(len(members), len(COMPARED) / len(members))
    names = judged["class_name"].where(judged["camera"] == "MH")
    mahli = [(names == name).to_numpy() for name in ("ground", "horizon")]
    if all(rows.any() for rows in mahli):
        members, weights = members + mahli, np.append(weights, [0.5, 0.5])
    return weights / weights.sum(), members


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log loss in nats, at the best temperature and with classes weighted equally.

    It distinguishes recipes that get the same images right: the recall of a class with few images
    moves in large steps. `probabilities` are those of `judge`; `labels` are class ids (rows,).
    """
    rows, labels = np.concatenate(probabilities), np.tile(labels, len(probabilities))
    weights = class_weights(labels)
    calibrated = with_temperature(rows, fit_temperature(rows, labels, weights))
    return float(-np.average(np.log(calibrated[np.arange(len(labels)), labels]), weights=weights))
