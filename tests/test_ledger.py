"""The ledger of test scores: lines are added, none is lost, and no score goes unwritten."""

import csv
import hashlib
from pathlib import Path

import pytest

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger

RESULT = {
    "commit": "c" * 40,
    "preset": "laptop",
    "seed": 3,
    "settings": {"seed": 3},
    "parameters": {"seed": 3, "rate": 0.1},
    "splits": {
        "test": {"accuracy": 0.5, "macro_f1": 0.25, "ece": 0.125, "burst": {"accuracy": 0.75}}
    },
}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_every_score_is_a_line(results: Path, tmp_path: Path) -> None:
    assert ledger.scored() == set()
    digests = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "predictions.csv").write_bytes(content)
        ledger.append(RESULT, tmp_path / "predictions.csv")
        digests.append(hashlib.sha256(content).hexdigest())
    with (results / ledger.NAME).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["predictions_sha256"] for row in rows] == digests
    assert ledger.scored() == set(digests)
    first = rows[0]
    assert (first["preset"], first["seed"], first["settings"]) == ("laptop", "3", '{"seed": 3}')
    assert (first["accuracy"], first["macro_f1"], first["ece"]) == ("0.5", "0.25", "0.125")


def test_seeds_of_one_recipe(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.csv"
    predictions.touch()

    def score(seed: int, rate: float, accuracy: float) -> dict:
        test = RESULT["splits"]["test"] | {"accuracy": accuracy}
        parameters = {"rate": rate, "seed": seed}
        result = RESULT | {"seed": seed, "parameters": parameters, "splits": {"test": test}}
        ledger.append(result, predictions)
        return result

    def accuracies(result: dict) -> dict[str, float]:
        return {seed: figures["accuracy"] for seed, figures in ledger.seeds(result).items()}

    assert accuracies(RESULT) == {"3": 0.5}
    first = score(0, 0.1, 0.5)
    for seed, rate, accuracy in ((1, 0.1, 0.6), (0, 0.2, 0.7), (0, 0.1, 0.9), (1, 0.1, 0.8)):
        last = score(seed, rate, accuracy)
    assert accuracies(first) == {"0": 0.5, "1": 0.8}  # not the 0.9 of a later run
    assert accuracies(last) == {"0": 0.9, "1": 0.8}
    assert ledger.seeds(last)["0"]["burst_accuracy"] == 0.75


def test_a_ledger_that_cannot_be_written(results: Path, tmp_path: Path) -> None:
    (results / ledger.NAME).mkdir(parents=True)
    (tmp_path / "predictions.csv").touch()
    with pytest.raises(MarsclfError, match=r"cannot be entered in .*test_ledger\.csv"):
        ledger.append(RESULT, tmp_path / "predictions.csv")
