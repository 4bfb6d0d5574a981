"""The ledger of test scores: no score goes unrecorded, none is recorded twice, no line is lost."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from tiny_project import write_predictions

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import read_predictions, run_record
from tools.documents import seeds

RECORD = {
    "dataset": "msl-v1",
    "commit": "c" * 40,
    "preset": "laptop",
    "seed": 3,
    "settings": {"seed": 3},
    "parameters": {"seed": 3, "rate": 0.1},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def make_run(folder: Path, images_per_split: int = 40, **record: object) -> Path:
    write_predictions(folder / "predictions.csv", images_per_split)
    (folder / "training.json").write_text(json.dumps(RECORD | record))
    return folder / "predictions.csv"


def test_predictions_are_entered_once(results: Path, tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", 50)
    zipped = make_run(tmp_path / "c").with_suffix(".csv.gz")
    zipped.write_bytes(gzip.compress(first.read_bytes()))
    for predictions in (first, second, first, zipped):
        assert ledger.score(predictions) == metrics.measure(read_predictions(predictions))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    rows = ledger.rows()
    assert [row["predictions_sha256"] for row in rows] == digests
    ledger.score(make_run(tmp_path / "a", parameters={"rate": 0.2}))  # equal, of another recipe
    assert [row["predictions_sha256"] for row in ledger.rows()] == [*digests, digests[0]]
    test = metrics.measure(read_predictions(first))["test"]
    expected = {"dataset": "msl-v1", "preset": "laptop", "seed": "3", "settings": '{"seed": 3}'}
    expected |= {name: str(test[name]) for name in ("accuracy", "macro_f1", "ece")}
    expected |= {"burst_accuracy": str(test["burst"]["accuracy"])}
    assert rows[0].items() >= expected.items()


def test_each_data_set_has_lines_and_seeds_of_its_own(results: Path, tmp_path: Path) -> None:
    ledger.score(make_run(tmp_path / "a"))
    other = make_run(tmp_path / "b", 50, dataset="msl-v2.1", seed=4)
    splits = ledger.score(other)
    assert [row["dataset"] for row in ledger.rows()] == ["msl-v1", "msl-v2.1"]
    assert seeds(RECORD | {"splits": splits}).index.tolist() == [3]
    text = other.read_text()
    other.write_text("".join(row for row in text.splitlines(True) if row[:5] != "test,"))
    assert list(ledger.score(other)) == ["train", "val"]
    for dataset in ("sample", "custom", None):
        assert ledger.score(make_run(tmp_path, 60, dataset=dataset))["test"]["n"] == 60
    assert len(ledger.rows()) == 2


def test_no_figure_without_a_line(results: Path, tmp_path: Path) -> None:
    predictions = make_run(tmp_path)
    results.symlink_to(tmp_path / "no" / "disk")
    with pytest.raises(MarsclfError, match=r"cannot be entered in .*test_ledger\.csv"):
        ledger.score(predictions)
    results.unlink()
    (results / ledger.NAME).mkdir(parents=True)
    with pytest.raises(MarsclfError, match=r"test_ledger\.csv cannot be read"):
        ledger.score(predictions)
    (results / ledger.NAME).rmdir()
    (tmp_path / "training.json").unlink()
    (tmp_path / "metrics.json").write_text("{")  # read where there is no training.json
    with pytest.raises(MarsclfError, match=r"metrics\.json cannot be read as a run"):
        ledger.score(predictions)
    assert ledger.rows() == []


def test_seeds_of_one_recipe(results: Path) -> None:
    def enter(seed: int, rate: float, accuracy: float) -> dict:
        test = {"accuracy": accuracy, "macro_f1": 0.2, "ece": 0.1, "burst": {"accuracy": 0.75}}
        result = RECORD | {"seed": seed, "parameters": {"rate": rate, "seed": seed}}
        row = {"seed": seed, "recipe": ledger.recipe_digest(result), "dataset": "msl-v1"}
        row |= {"burst_accuracy": 0.75}
        ledger.append_row(results / ledger.NAME, row | {k: test[k] for k in ledger.FIGURES})
        return result | {"splits": {"test": test}}

    first = enter(0, 0.1, 0.5)
    for seed, rate, accuracy in ((1, 0.1, 0.6), (0, 0.2, 0.7), (0, 0.1, 0.9), (1, 0.1, 0.8)):
        last = enter(seed, rate, accuracy)
    assert seeds(first)["accuracy"].to_dict() == {0: 0.5, 1: 0.8}  # not the 0.9 of a later run
    assert seeds(last)["accuracy"].to_dict() == {0: 0.9, 1: 0.8}
    assert seeds(last).loc[0, "burst_accuracy"] == 0.75


@pytest.mark.parametrize("folder", sorted(paths.RESULTS.glob("laptop*")), ids=str)
def test_published_recipes_are_recomputed(folder: Path) -> None:
    result = run_record(folder / "predictions.csv.gz")
    digest = ledger.digest_of(folder / "predictions.csv.gz")
    recipes = {row["recipe"] for row in ledger.rows() if row["predictions_sha256"] == digest}
    assert ledger.recipe_digest(result) in recipes
