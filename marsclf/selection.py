"""Choosing a recipe without the test split: how it does on sols later than those it learnt from.

Test differs from train in time: the same parts come back at other scales, turned, over-exposed, and
with other frequencies. So each fold learns from early sols of train and validation and is judged on
later ones, which are shown under conditions changed on purpose, all classes alike.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import data, paths, recipe
from marsclf.calibration import fit_temperature, with_temperature
from marsclf.images import Condition
from marsclf.ledger import SELECTION, append_row
from marsclf.paths import CACHE
from marsclf.presets import parameters_of
from marsclf.publish import rewrite_tables
from marsclf.recipe import Learnt, Recipe
from marsclf.run import commit
from marsclf.training import class_weights

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


def compare(preset: str, settings: dict[str, object], data_dir: str | Path | None) -> dict:
    """Train a preset's recipe on each fold, print its criterion and, for the real data, store it.

    A line is added to results/selection.csv. The best epoch is chosen on random views of the very
    images that are judged, for every recipe alike: the figures compare recipes and promise nothing.
    Self-training takes these images, as they are, for its unlabelled ones.
    """
    parameters = parameters_of(preset, settings)
    members = Recipe.of(parameters).members(parameters["ensemble"])
    dataset = data.open_dataset(data_dir)
    started, by_fold, by_condition, losses = time.monotonic(), {}, [], []
    for name in FOLDS:
        train, judged = fold(dataset.index, name)
        folder = paths.RUNS / "compare" / name
        learnt = recipe.learn_all(members, dataset.root, train, judged, judged, folder)
        probabilities = judge(learnt, dataset.root, judged)
        labels = judged["label"].to_numpy()
        found = criterion(probabilities, labels)
        losses.append(log_loss(probabilities, labels))
        by_fold[name] = found.pop("criterion")
        by_condition.append(list(found.values()))
        print(f"{name}: {by_fold[name]:.4f}, log loss {losses[-1]:.4f}", flush=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "preset": preset,
        "settings": json.dumps(settings),
        "criterion": np.mean(list(by_fold.values())),
        **by_fold,
        **dict(zip(CONDITIONS, np.mean(by_condition, axis=0), strict=True)),
        "log loss": np.mean(losses),
        "wall_s": time.monotonic() - started,
    }
    line = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in line.items()}
    print(
        f"criterion {line['criterion']:.4f}, log loss {line['log loss']:.4f}, "
        f"{line['wall_s']:.0f} s"
    )
    if dataset.name == "msl-v1":
        append_row(paths.RESULTS / SELECTION, line)
        rewrite_tables()
        print(f"Added to {paths.RESULTS / SELECTION} and to the tables of the documents.")
    else:
        print(f"{data.SAMPLE_NOTICE} Nothing was stored.")
    return line
