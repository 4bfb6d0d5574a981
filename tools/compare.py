"""Evaluate a recipe on later sols, without the test split: python -m tools.compare --set a=b."""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation.ledger import SELECTION
from marsclf.pipeline.presets import LADDERS, data_of, parameters_of
from marsclf.provenance import commit
from marsclf.training.later_sols import CONDITIONS, FOLDS, criterion, fold, judge, log_loss
from marsclf.training.recipe import Recipe
from marsclf.training.train import pseudo_labels, train_networks
from tools.command import make_main
from tools.documents import store


def compare(preset: str, settings: dict[str, object], data_dir: str | Path | None) -> dict:
    """Train a changed recipe on early sols and evaluate it on later ones, without the test split.

    With the real data set, also adds a line to results/selection.csv and updates the documents. The
    best epoch is chosen on random views of the images that are evaluated, so the figures are
    optimistic; as every recipe has this advantage, they still rank recipes.
    """
    if preset in LADDERS:
        raise MarsclfError(
            f"{preset} has several recipes; `make run PRESET={preset}` compares them."
        )
    recipe = Recipe(**parameters_of(preset, settings))
    dataset = open_dataset(data_dir, data_of(preset))
    if "sol" not in dataset.index:
        reason = "The names of its images tell no sol, so there are no later sols to evaluate on"
        raise MarsclfError(f"{dataset.root}: {reason}; use a data set with Curiosity's names.")
    started, by_fold, by_condition, losses = time.monotonic(), {}, [], []
    folds = {name: fold(dataset.index, name) for name in FOLDS}
    if any(judged.empty for _, judged in folds.values()):
        reason = "has no class with images on the earlier and the later sols that are compared"
        raise MarsclfError(f"The data set in {dataset.root} {reason}: use the complete one.")
    classes = len(dataset.classes)
    for name, (train, judged) in folds.items():
        networks = train_networks(recipe, dataset.root, train, judged, classes)
        if recipe.self_training:
            guessed = pseudo_labels(networks, dataset.root, judged, recipe.self_training)
            train = pd.concat([train, guessed])
            networks = train_networks(recipe, dataset.root, train, judged, classes)
        probabilities, labels = judge(networks, dataset.root, judged), judged["label"].to_numpy()
        by_fold[name], *recalls = criterion(probabilities, labels).values()
        by_condition.append(recalls)
        losses.append(log_loss(probabilities, labels))
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
    line = {k: v if isinstance(v, str) else round(float(v), 4) for k, v in line.items()}
    print(f"criterion {line['criterion']:.4f}, log loss {line['log loss']:.4f}")
    store(line, paths.RESULTS / SELECTION, dataset)
    return line


main = make_main(compare, "preset", "set", "data_dir")

if __name__ == "__main__":
    sys.exit(main())
