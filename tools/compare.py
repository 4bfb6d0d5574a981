"""Evaluate a recipe on later sols, without the test split: python -m tools.compare --set a=b."""

import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.pipeline.presets import LADDERS, data_of, parameters_of
from marsclf.provenance import commit
from marsclf.training.later_sols import (
    COMPARED,
    FOLDS,
    criterion,
    difference,
    fold,
    judge,
    log_loss,
)
from marsclf.training.recipe import Recipe
from marsclf.training.train import train_networks
from tools.command import make_main
from tools.documents import store
from tools.documents import COMPARISONS


def compare(
    preset: str, settings: dict[str, object], seeds: int, data_dir: str | Path | None
) -> dict:
    """Train a changed recipe on early sols and evaluate it on later ones, without the test split.

    The unchanged preset is trained and evaluated in the same way. With the real data set, this also
    adds a line to results/comparisons.csv and updates the documents. The best epoch is chosen on
    random views of the images that are evaluated, so the figures are optimistic; as every recipe
    has this advantage, they still rank recipes.
    """
    if preset in LADDERS:
        raise MarsclfError(
            f"{preset} has several recipes; `make run PRESET={preset}` compares them."
        )
    recipes = [Recipe(**parameters_of(preset, settings)), Recipe(**parameters_of(preset, {}))]
    dataset = open_dataset(data_dir, data_of(preset))
    if "sol" not in dataset.index:
        reason = "The names of its images tell no sol, so there are no later sols to evaluate on"
        raise MarsclfError(f"{dataset.root}: {reason}; use a data set with Curiosity's names.")
    started = time.monotonic()
    folds = {name: fold(dataset.index, name) for name in FOLDS}
    if any(judged.empty for _, judged in folds.values()):
        reason = "has no class with images on the earlier and the later sols that are compared"
        raise MarsclfError(f"The data set in {dataset.root} {reason}: use the complete one.")
    judged = [rows for _, rows in folds.values()]
    found = [
        [evaluate(recipe, dataset, *folds[name], seeds, name) for name in FOLDS]
        for recipe in (recipes if settings else recipes[:1])
    ]
    rights, losses = zip(*found[0], strict=True)
    scores = [criterion(right, rows) for right, rows in zip(rights, judged, strict=True)]
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    line |= {"preset": preset, "settings": json.dumps(settings), "seeds": seeds}
    line |= dict.fromkeys(["difference", "low", "high"], "")
    line |= pd.DataFrame(scores).mean().to_dict()
    line |= {name: score["criterion"] for name, score in zip(FOLDS, scores, strict=True)}
    line |= {"log loss": np.mean(losses), "wall_s": time.monotonic() - started}
    if settings:
        gain, interval = difference(rights, [right for right, _ in found[1]], judged)
        line |= {"difference": gain, "low": interval[0], "high": interval[1]}
        print(f"difference {gain:+.2%} ({interval[0]:+.2%} to {interval[1]:+.2%})")
    line = {k: v if isinstance(v, str | int) else round(float(v), 4) for k, v in line.items()}
    print(f"criterion {line['criterion']:.4f}, log loss {line['log loss']:.4f}")
    store(line, paths.RESULTS / COMPARISONS, dataset)
    return line


def evaluate(
    recipe: Recipe,
    dataset: Dataset,
    train: pd.DataFrame,
    judged: pd.DataFrame,
    seeds: int,
    name: str,
) -> tuple[np.ndarray, float]:
    """Train a recipe on `train` with several seeds and evaluate it on `judged`.

    Returns how often each image was right under each condition (conditions, judged), 0 to 1, and
    the mean log loss.
    """
    labels, right, losses = judged["label"].to_numpy(), [], []
    for seed in range(recipe.seed, recipe.seed + seeds):
        data = dataset.root, train, judged, len(dataset.classes)
        networks = train_networks(replace(recipe, seed=seed), *data)
        probabilities = judge(networks, dataset.root, judged, COMPARED)
        right.append(probabilities.argmax(axis=-1) == labels)
        losses.append(log_loss(probabilities, labels))
        score = criterion(right[-1], judged)["criterion"]
        print(f"{name}, seed {seed}: {score:.4f}, log loss {losses[-1]:.4f}", flush=True)
    return np.mean(right, axis=0), float(np.mean(losses))


main = make_main(compare, "preset", "set", "seeds", "data_dir")

if __name__ == "__main__":
    sys.exit(main())
