"""Choosing a recipe without the test split: how it does on sols later than those it learnt from.

Test differs from train in time: the same parts come back at other scales, turned, over-exposed, and
with other frequencies. So each fold learns from early sols of train and validation and is judged on
later ones, which are shown under conditions changed on purpose, all classes alike.
"""

from pathlib import Path

import keras
import numpy as np
import pandas as pd

from marsclf.features import embed_images
from marsclf.images import Condition
from marsclf.paths import CACHE
from marsclf.recipe import Network

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


def judge(
    network: Network, classifier: keras.Model, root: Path, rows: pd.DataFrame, cache: Path = CACHE
) -> np.ndarray:
    """Return the probabilities under each condition, (conditions, rows, 25)."""
    return np.stack(
        [
            classifier.predict(
                embed_images(root, rows, network.frozen, cache, condition).read(), verbose=0
            )
            for condition in CONDITIONS.values()
        ]
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
