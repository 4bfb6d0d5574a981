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
from marsclf.training import later_sols
from marsclf.training.recipe import Recipe
from marsclf.training.train import train_networks
from tools.command import make_main
from tools.documents import COMPARISONS, store


def compare(preset: str, settings: dict, seeds: int, data_dir: Path | None) -> dict:
    """Train a changed recipe on early sols and evaluate it on later ones, without the test split.

    The unchanged preset is trained and evaluated in the same way. With the real data set, this also
    adds a line to results/comparisons.csv and updates the documents. The best epoch is chosen on
    random views of the images that are evaluated, so the figures are optimistic; as every recipe
    has this advantage, they still rank recipes.
    """
    if preset in LADDERS:
        raise MarsclfError(f"{preset} has several recipes: `make run PRESET={preset}` runs them.")
    recipe, unchanged = (Recipe(**parameters_of(preset, changes)) for changes in (settings, {}))
    dataset = open_dataset(data_dir, data_of(preset))
    if "sol" not in dataset.index:
        reason = "The names of its images tell no sol, so there are no later sols to evaluate on"
        raise MarsclfError(f"{dataset.root}: {reason}; use a data set with Curiosity's names.")
    started = time.monotonic()
    folds = {name: later_sols.fold(dataset.index, name) for name in later_sols.FOLDS}
    judged = [rows for _, rows in folds.values()]
    if any(rows.empty for rows in judged):
        reason = "has no class with images on the earlier and the later sols that are compared"
        raise MarsclfError(f"The data set in {dataset.root} {reason}: use the complete one.")
    rights, losses = evaluate(recipe, dataset, folds, seeds)
    gain = low = high = ""
    if settings:
        others, _ = evaluate(unchanged, dataset, folds, seeds)
        gain, (low, high) = later_sols.difference(rights, others, judged)
        print(f"difference {gain:+.2%} ({low:+.2%} to {high:+.2%})")
    scores = pd.DataFrame(map(later_sols.criterion, rights, judged), index=list(folds))
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    line |= {"preset": preset, "settings": json.dumps(settings), "seeds": seeds}
    line |= {"difference": gain, "low": low, "high": high}
    line |= scores.mean().to_dict() | scores["criterion"].to_dict()
    line |= {"log loss": np.mean(losses), "wall_s": time.monotonic() - started}
    line = {k: v if isinstance(v, str | int) else round(float(v), 4) for k, v in line.items()}
    print(f"criterion {line['criterion']:.4f}, log loss {line['log loss']:.4f}")
    store(line, paths.RESULTS / COMPARISONS, dataset)
    return line


def evaluate(recipe: Recipe, dataset: Dataset, folds: dict, seeds: int) -> tuple[list, list]:
    """Train a recipe with several seeds on each of `later_sols.FOLDS` and evaluate it.

    Returns how often each image of a fold was right under each condition, an array (conditions,
    images) for each fold, and the log loss of each network.
    """
    rights, losses = [], []
    for name, (train, judged) in folds.items():
        labels, right = judged["label"].to_numpy(), []
        for seed in range(recipe.seed, recipe.seed + seeds):
            data = dataset.root, train, judged, len(dataset.classes)
            networks = train_networks(replace(recipe, seed=seed), *data)
            probabilities = later_sols.judge(networks, dataset.root, judged, later_sols.COMPARED)
            right.append(probabilities.argmax(axis=-1) == labels)
            losses.append(later_sols.log_loss(probabilities, labels))
            score = later_sols.criterion(right[-1], judged)["criterion"]
            print(f"{name}, seed {seed}: {score:.4f}, log loss {losses[-1]:.4f}", flush=True)
        rights.append(np.mean(right, axis=0))
    return rights, losses


main = make_main(compare, "preset", "set", "seeds", "data_dir")

if __name__ == "__main__":
    sys.exit(main())
