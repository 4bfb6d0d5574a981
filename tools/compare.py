"""How a recipe does on later sols, without the test split: python -m tools.compare."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.open import open_dataset
from marsclf.evaluation.ledger import SELECTION, append_row
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit
from marsclf.training import recipe
from marsclf.training.later_sols import CONDITIONS, FOLDS, criterion, fold, judge, log_loss
from marsclf.training.recipe import Recipe
from tools.publish import rewrite_tables


def compare(preset: str, settings: dict[str, object], data_dir: str | Path | None) -> dict:
    """Train a preset's recipe on each fold, print its criterion and, for the real data, store it.

    A line is added to results/selection.csv. The best epoch is chosen on random views of the very
    images that are judged, for every recipe alike: the figures compare recipes and promise nothing.
    Self-training takes these images, as they are, for its unlabelled ones.
    """
    parameters = parameters_of(preset, settings)
    members = Recipe.of(parameters).members(parameters["ensemble"])
    dataset = open_dataset(data_dir)
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
