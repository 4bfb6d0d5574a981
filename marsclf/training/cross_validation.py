"""Cross-validation: predictions for labeled images by networks that did not learn from them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf.errors import MarsclfError
from marsclf.networks.pinned import keras
from marsclf.training.recipe import Recipe
from marsclf.training.train import TrainedNetwork, train_network

FOLDS = 5
SOLS_TOGETHER = 25  # at one place the rover photographs the same rocks for days


def fold_of(rows: pd.DataFrame) -> np.ndarray:
    """Return the fold of each image, 0 to 4, with about equally many images in each.

    Images of 25 consecutive sols stay together, without sols those of a group. Raises MarsclfError
    if these are fewer than two.
    """
    units = rows["sol"] // SOLS_TOGETHER if "sol" in rows else rows["group"]
    sizes = units.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    if len(sizes) < 2:
        raise MarsclfError("The images are one group: cross-validation needs two or more.")
    totals, places = np.zeros(min(FOLDS, len(sizes)), dtype=int), {}
    for unit, size in sizes.items():  # the largest first, each to the smallest fold
        places[unit] = totals.argmin()
        totals[places[unit]] += size
    return units.map(places).to_numpy()


def train_folds(
    recipe: Recipe, root: Path, rows: pd.DataFrame, classes: int
) -> Iterator[tuple[TrainedNetwork, np.ndarray]]:
    """Yield, for each fold, which images it holds, and a network trained on all others.

    The network has the weights of its last epoch, since no images are left to choose one by.
    """
    folds = fold_of(rows)
    for fold in range(folds.max() + 1):
        keras.utils.clear_session()
        held_out = folds == fold
        yield train_network(recipe, root, rows[~held_out], None, classes), held_out
