"""Comparing recipes on later sols: what is trained, printed and stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_project import enter_project, make_project

from marsclf import paths
from marsclf.data.msl import Dataset
from marsclf.training import later_sols as selection
from marsclf.training.later_sols import FOLDS


def test_compare_on_sample_data_stores_nothing(
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter_project(monkeypatch, make_project(tmp_path))
    learnt_from = []

    def learn_all(
        recipes: list,
        root: Path,
        train: pd.DataFrame,
        judged: pd.DataFrame,
        unlabelled: pd.DataFrame,
        folder: Path,
    ) -> list[np.ndarray]:
        assert not set(train["path"]) & set(judged["path"])
        assert unlabelled["path"].tolist() == judged["path"].tolist()
        learnt_from.append(int(train["sol"].max()))
        return [judged["label"].to_numpy() for _ in recipes]

    def predict(members: list[np.ndarray], *_: object) -> np.ndarray:
        (labels,) = members
        return np.eye(25)[np.where(np.arange(len(labels)) % 2, labels, 0)]

    monkeypatch.setattr(selection, "parameters_of", lambda *_: {"ensemble": []})
    monkeypatch.setattr(selection.Recipe, "of", lambda _: selection.Recipe)
    monkeypatch.setattr(selection.Recipe, "members", lambda _: ["one"])
    monkeypatch.setattr(selection.recipe, "learn_all", learn_all)
    monkeypatch.setattr(selection.recipe, "predict", predict)
    line = selection.compare("laptop", {}, sample_dir)
    assert all(last <= until for last, (until, _) in zip(learnt_from, FOLDS.values(), strict=True))
    assert 0 < line["criterion"] < 1
    assert line["criterion"] == pytest.approx((line["early"] + line["late"]) / 2, abs=1e-4)
    assert not (paths.RESULTS / selection.SELECTION).exists()
    assert "SAMPLE DATA" in capsys.readouterr().out


def test_compare_on_the_real_data_adds_a_line(
    tmp_path: Path, sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_project(monkeypatch, make_project(tmp_path))
    real = dataclasses.replace(sample_dataset, name="msl-v1")
    monkeypatch.setattr(selection.data, "open_dataset", lambda _: real)
    monkeypatch.setattr(selection, "parameters_of", lambda *_: {"ensemble": []})
    monkeypatch.setattr(selection.Recipe, "of", lambda _: selection.Recipe)
    monkeypatch.setattr(selection.Recipe, "members", lambda _: ["one"])
    monkeypatch.setattr(selection.recipe, "learn_all", lambda *_: [None])
    ground = np.eye(25)[8]
    monkeypatch.setattr(selection.recipe, "predict", lambda *a: np.tile(ground, (len(a[2]), 1)))
    rewritten = []
    monkeypatch.setattr(selection, "rewrite_tables", lambda: rewritten.append(True))
    lines = [selection.compare("laptop", {"seed": seed}, None) for seed in (0, 1)]
    assert len(rewritten) == 2
    stored = pd.read_csv(paths.RESULTS / selection.SELECTION)
    assert stored["settings"].tolist() == ['{"seed": 0}', '{"seed": 1}']
    assert stored["criterion"].tolist() == [line["criterion"] for line in lines]
