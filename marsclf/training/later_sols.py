"""Choosing a recipe without the test split: how it does on sols later than those it learnt from.

Test differs from train in time: the same parts come back at other scales, turned, over-exposed, and
with other frequencies. So each fold learns from early sols of train and validation and is judged on
later ones, which are shown under conditions changed on purpose, all classes alike.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from marsclf.evaluation.calibration import fit_temperature, with_temperature
from marsclf.images.views import Condition
from marsclf.paths import CACHE
from marsclf.training import recipe
from marsclf.training.recipe import Learnt
from marsclf.training.stages import class_weights

# The last sol to learn from and the last to be judged on; the second is the data set's own split.
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
IMAGES_A_CLASS = 40


def fold(index: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows to learn from and those to be judged on; no row of test is in either."""
    learnt_until, judged_until = FOLDS[name]
    usable = index[index["split"] != "test"].sort_values(["sol", "path"])
    train = usable[usable["sol"] <= learnt_until]
    later = usable[(usable["sol"] > learnt_until) & (usable["sol"] <= judged_until)]
    known = later[later["label"].isin(train["label"])]
    return train, spread_over_sols(known)


def spread_over_sols(rows: pd.DataFrame) -> pd.DataFrame:
    """Return at most IMAGES_A_CLASS rows a class, from as many of its sols as possible."""
    order = rows.sample(frac=1, random_state=0)
    turn = order.groupby(["label", "sol"]).cumcount()
    order = order.assign(turn=turn).sort_values("turn", kind="stable").drop(columns="turn")
    return order.groupby("label").head(IMAGES_A_CLASS).sort_values(["sol", "path"])


def judge(members: list[Learnt], root: Path, rows: pd.DataFrame, cache: Path = CACHE) -> np.ndarray:
    """Return the probabilities that networks give under each condition, (conditions, rows, 25)."""
    return np.stack(
        [recipe.predict(members, root, rows, cache, condition) for condition in CONDITIONS.values()]
    )


def criterion(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean class recall, over all conditions and under each.

    Args:
        probabilities: (conditions, rows, 25), as from `judge`.
        labels: 0-24, (rows,).
    """
    right = probabilities.argmax(axis=-1) == labels
    recalls = [right[:, labels == label].mean(axis=1) for label in np.unique(labels)]
    by_condition = np.mean(recalls, axis=0)
    named = dict(zip(CONDITIONS, by_condition.tolist(), strict=True))
    return {"criterion": float(by_condition.mean())} | named


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log loss at the temperature that suits best, nats, the classes alike.

    It takes what `criterion` takes and tells recipes apart that get the same images right: recalls
    of classes with few images move in steps of a point.
    """
    rows, labels = np.concatenate(probabilities), np.tile(labels, len(probabilities))
    weights = class_weights(labels, 1.0)
    calibrated = with_temperature(rows, fit_temperature(rows, labels, weights))
    return float(-np.average(np.log(calibrated[np.arange(len(labels)), labels]), weights=weights))
