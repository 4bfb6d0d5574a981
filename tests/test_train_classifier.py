"""The library's classifiers learn from all labels, and promise what unseen images showed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from tiny_project import enter_project

from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import read_predictions
from marsclf.pipeline.presets import parameters_of
from marsclf.training import cross_validation
from marsclf.training.familiarity import blank_frames
from tools import results, train_classifier

QUICK = {"image_size": 32, "head_epochs": 1, "head_hidden": 8, "finetune_epochs": 0, "views": 1}
QUICK |= {"views_rare": 1, "augmentation": {}}


def test_train_classifier(
    sample_dataset: Dataset, eager: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = parameters_of("laptop", QUICK)
    enter_project(monkeypatch, tmp_path)
    monkeypatch.setattr(cross_validation, "FOLDS", 2)
    monkeypatch.setattr(train_classifier, "BLANK_FRAMES", 60)
    monkeypatch.setattr(train_classifier, "parameters_of", lambda _: parameters)
    monkeypatch.setattr(train_classifier, "data_of", lambda _: "msl-v1")
    trained = []
    whole = cross_validation.train_network

    def train_network(recipe: object, root: Path, rows: pd.DataFrame, *rest: object) -> object:
        trained.append(rows)
        return whole(recipe, root, rows, *rest)

    for module in (cross_validation, train_classifier):
        monkeypatch.setattr(module, "train_network", train_network)
    monkeypatch.setattr(train_classifier, "open_dataset", lambda *_: sample_dataset)
    with pytest.raises(MarsclfError, match="not by laptop from sample"):
        train_classifier.train_classifier("laptop", None, None)
    assert not paths.RESULTS.exists()

    dataset = replace(sample_dataset, name="msl-v1", index=sample_dataset.index.iloc[::6])
    kinds = dataset.index["class_name"].where(dataset.index["label"] > 8, "Artifact")
    outside = replace(dataset, name="msl-v2.1", index=dataset.index.assign(class_name=kinds))
    both = {"msl-v1": dataset, "msl-v2.1": outside}
    monkeypatch.setattr(train_classifier, "open_dataset", lambda _, wanted: both[wanted])
    train_classifier.train_classifier("laptop", None, None)
    *folds, everything = trained
    sols = {*dataset.index["sol"] // 25}
    one, other = (sols - {*rows["sol"] // 25} for rows in folds)  # what each fold held out
    assert one | other == sols and not one & other and len(everything) == len(dataset.index)
    assert results.find_classifier_faults("parts") == []
    folder = paths.RESULTS / "classifiers" / "parts"
    record = json.loads((folder / "metrics.json").read_text())
    promised, told = record["out_of_fold"], pd.read_csv(folder / "familiarity.csv.gz")
    assert told["known"].sum() == len(dataset.index)
    assert (~told["known"]).sum() == (kinds == "Artifact").sum()
    auroc = roc_auc_score(told["known"], told["familiarity"])
    assert record["familiarity"]["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert (paths.FIGURES / "parts" / "familiarity.png").is_file()
    stored = read_predictions(folder / "predictions.csv.gz")
    assert promised["n"] == len(dataset.index) == len(stored)
    right = (stored["label"] == stored["predicted"]).mean()
    assert promised["accuracy"] == pytest.approx(right, abs=1e-6)
    images = [blank_frames(32, 10)[number] for number in range(10)]
    known = [dataset.root / path for path in dataset.index["path"]]
    table = load_classifier("parts", paths.CACHE).predict([*known, *images])
    assert {*table["predicted"]} <= {*dataset.classes}
    assert table["unfamiliar"][-10:].all() and not table["unfamiliar"][:-10].all()


def test_folds_keep_neighboring_sols_together_and_are_of_similar_size() -> None:
    sols = np.random.default_rng(0).integers(0, 1000, 3000)
    folds = cross_validation.fold_of(pd.DataFrame({"sol": sols}))
    assert pd.Series(folds).groupby(sols // 25).nunique().eq(1).all()
    assert np.ptp(np.bincount(folds)) < 60
    groups = pd.DataFrame({"group": ["a", "b", "a"]})
    assert cross_validation.fold_of(groups).tolist() == [0, 1, 0]
    with pytest.raises(MarsclfError, match="one group"):
        cross_validation.fold_of(groups[::2])
