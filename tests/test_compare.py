"""Comparing recipes: nothing of test, nothing later than what is judged, only real data stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_project import enter_project

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.pipeline.presets import parameters_of
from marsclf.training.recipe import Recipe
from tools import compare
from tools.documents import COMPARISONS


@pytest.mark.parametrize("name", ["sample", "msl-v1"])
def test_compare(name, sample_dataset, tmp_path, monkeypatch) -> None:
    preset = parameters_of("laptop", {})
    enter_project(monkeypatch, tmp_path)
    dataset = dataclasses.replace(sample_dataset, name=name)
    trained = []

    def train_networks(
        recipe: Recipe, root: Path, train: pd.DataFrame, judged: pd.DataFrame, classes: int
    ) -> Recipe:
        assert classes == len(dataset.classes)
        assert "test" not in {*train["split"], *judged["split"]}
        trained.append((recipe.seed, train, judged))
        return recipe

    def judge(recipe: Recipe, root: Path, rows: pd.DataFrame, conditions: dict) -> np.ndarray:
        """Every second image is right, under each condition, and all of them with balance 0.5."""
        right = (np.arange(len(rows)) % 2 == 1) | (recipe.balance == 0.5)
        return np.tile(np.eye(25)[np.where(right, rows["label"], 0)], (len(conditions), 1, 1))

    monkeypatch.setattr(compare, "data_of", lambda _: "msl-v1")
    monkeypatch.setattr(compare, "open_dataset", lambda *_: dataset)
    monkeypatch.setattr(compare, "parameters_of", lambda _, settings: preset | settings)
    monkeypatch.setattr(compare, "train_networks", train_networks)
    monkeypatch.setattr(compare.later_sols, "judge", judge)
    alone = compare.compare("laptop", {}, 1, None)
    better = compare.compare("laptop", {"balance": 0.5}, 2, None)
    assert [seed for seed, *_ in trained] == [0, 0] + 2 * [0, 1, 0, 1]
    assert all(learned["sol"].max() < judged["sol"].min() for _, learned, judged in trained)
    assert 0 < alone["criterion"] < 1 == better["criterion"]
    for line in (alone, better):
        assert line["criterion"] == pytest.approx((line["early"] + line["late"]) / 2, abs=1e-4)
    assert alone["difference"] == ""
    assert better["difference"] == pytest.approx(1 - alone["criterion"], abs=1e-4)
    assert better["low"] <= better["difference"] <= better["high"]
    assert (paths.RESULTS / COMPARISONS).exists() is (name == "msl-v1")
    if name == "msl-v1":
        stored = pd.read_csv(paths.RESULTS / COMPARISONS)
        assert stored["settings"].tolist() == ["{}", '{"balance": 0.5}']
        assert stored["criterion"].tolist() == [alone["criterion"], better["criterion"]]


def test_a_ladder_is_not_compared() -> None:
    with pytest.raises(MarsclfError, match="ladder has several recipes"):
        compare.compare("ladder", {}, 1, None)


def test_data_without_later_sols_are_refused_before_training(sample_dataset, monkeypatch) -> None:
    small = dataclasses.replace(sample_dataset, index=sample_dataset.index.assign(sol=3))
    monkeypatch.setattr(compare, "open_dataset", lambda *_: small)
    monkeypatch.setattr(compare, "train_networks", lambda *_: pytest.fail("it trains"))
    with pytest.raises(MarsclfError, match="no class with images on the earlier and the later"):
        compare.compare("smoke", {}, 1, None)
