"""Comparing recipes: nothing of test, nothing later than what is judged, only real data stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_project import enter_project

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.evaluation.ledger import SELECTION
from marsclf.pipeline.presets import parameters_of
from marsclf.training.later_sols import FOLDS
from marsclf.training.recipe import Recipe
from tools import compare


@pytest.mark.parametrize("name", ["sample", "msl-v1"])
def test_compare(name, sample_dataset, tmp_path, monkeypatch) -> None:
    preset = parameters_of("laptop", {"self_training": 0.5})
    enter_project(monkeypatch, tmp_path)
    dataset = dataclasses.replace(sample_dataset, name=name)
    trained = []

    def train_networks(
        recipe: Recipe, root: Path, train: pd.DataFrame, judged: pd.DataFrame, classes: int
    ) -> int:
        assert classes == len(dataset.classes)
        assert "test" not in {*train["split"], *judged["split"]}
        trained.append((recipe.seed, train))
        return len(trained)

    def judge(networks: int, root: Path, rows: pd.DataFrame) -> np.ndarray:
        """Every second image is right, under each condition; the last networks count."""
        assert networks == len(trained)
        labels = np.where(np.arange(len(rows)) % 2, rows["label"], 0)
        return np.tile(np.eye(25)[labels], (8, 1, 1))

    monkeypatch.setattr(compare, "data_of", lambda _: "msl-v1")
    monkeypatch.setattr(compare, "open_dataset", lambda *_: dataset)
    monkeypatch.setattr(compare, "parameters_of", lambda _, settings: preset | settings)
    monkeypatch.setattr(compare, "train_networks", train_networks)
    monkeypatch.setattr(compare, "pseudo_labels", lambda networks, root, rows, share: rows[:3])
    monkeypatch.setattr(compare, "judge", judge)
    lines = [compare.compare("laptop", {"seed": seed}, None) for seed in (0, 1)]
    assert [seed for seed, _ in trained] == [0] * 4 + [1] * 4
    for until, (_, first), (_, again) in zip(
        [until for until, _ in FOLDS.values()] * 2, trained[::2], trained[1::2], strict=True
    ):
        assert first["sol"].max() <= until < again["sol"].max()
        assert len(again) == len(first) + 3  # self-training adds pseudo-labels of judged images
    for line in lines:
        assert 0 < line["criterion"] < 1
        assert line["criterion"] == pytest.approx((line["early"] + line["late"]) / 2, abs=1e-4)
    assert (paths.RESULTS / SELECTION).exists() is (name == "msl-v1")
    if name == "msl-v1":
        stored = pd.read_csv(paths.RESULTS / SELECTION)
        assert stored["settings"].tolist() == ['{"seed": 0}', '{"seed": 1}']
        assert stored["criterion"].tolist() == [line["criterion"] for line in lines]
        # New rows must fit the file of the repository.
        assert list(stored) == list(pd.read_csv(Path(__file__).parents[1] / "results" / SELECTION))


def test_a_ladder_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MarsclfError, match="ladder has several recipes"):
        compare.compare("ladder", {}, None)
    assert compare.main(["--preset", "laptop", "--set", "epochs"]) == 1
    assert capsys.readouterr().err.startswith("error: A setting")


def test_data_without_later_sols_are_refused_before_training(sample_dataset, monkeypatch) -> None:
    small = dataclasses.replace(sample_dataset, index=sample_dataset.index.assign(sol=3))
    monkeypatch.setattr(compare, "open_dataset", lambda *_: small)
    monkeypatch.setattr(compare, "train_networks", lambda *_: pytest.fail("it trains"))
    with pytest.raises(MarsclfError, match="no class with images on the earlier and the later"):
        compare.compare("smoke", {}, None)
