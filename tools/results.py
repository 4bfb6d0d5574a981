"""Results of presets, as a run writes them and as they are published, and checks of both.

A run writes metrics.json and predictions.csv in runs/<preset>/, a ladder of recipes ladder.json and
for each recipe a folder with a predictions.csv. Published are the same JSON file and the compressed
predictions, all in results/<preset>/.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.classify.table import FAMILIAR
from marsclf.data.msl import PUBLISHED
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import read_predictions
from marsclf.pipeline.presets import LADDERS

# Images in the splits that are always there.
IMAGES = {"msl-v1": {"train": 3746, "val": 1640, "test": 1305}, "msl-v2.1": {"val": 300}}
CLASSIFIERS = "classifiers"  # in results/, what is promised of the library's classifiers
TOLERANCE = 1e-6  # numbers are stored with six digits


class Result(NamedTuple):
    """The result of a preset: one run, or a ladder of recipes."""

    file: Path  # metrics.json or ladder.json
    record: dict  # its content
    predictions: dict[str, Path]  # under "predictions", or the name of each recipe of the ladder


def read_run(preset: str) -> Result:
    """Return the result of the last run of a preset; raise MarsclfError if there is none."""
    folder = paths.RUNS / preset
    if preset in LADDERS:
        return _read(folder / "ladder.json", "{}/predictions.csv")
    return _read(folder / "metrics.json", "{}.csv")


def read_published() -> dict[str, Result]:
    """Return the published results by folder, in alphabetical order."""
    files = [*paths.RESULTS.glob("*/metrics.json"), *paths.RESULTS.glob("*/ladder.json")]
    return {file.parent.name: _read(file, "{}.csv.gz") for file in sorted(files)}


def _read(file: Path, pattern: str) -> Result:
    remedy = f"run `make run PRESET={file.parent.name}`"
    record = read_json(file, remedy)
    try:
        files = {name: file.parent / pattern.format(name) for name in scores(record)}
        record["parameters"], record["commit"]
    except (KeyError, TypeError, AttributeError) as error:
        raise MarsclfError(f"{file} is not the result of a run ({error!r}): {remedy}.") from error
    return Result(file, record, files)


def read_json(file: Path, remedy: str) -> dict:
    """Read a JSON file; raise MarsclfError, which ends with `remedy`, if that fails."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MarsclfError(f"There is no {file}: {remedy}.") from None
    except (OSError, ValueError) as error:
        raise MarsclfError(f"{file} cannot be read as JSON ({error}): {remedy}.") from error


def scores(record: dict) -> dict[str, dict]:
    """Return the metrics by split that a record holds, for each of its prediction files."""
    rungs = record.get("rungs", {"predictions": record})
    return {name: rung["splits"] for name, rung in rungs.items()}


def find_faults(result: Result) -> list[str]:
    """Return what is wrong with a result: its data set, or numbers unlike those recomputed."""
    record, faults = result.record, []
    dataset, wanted = record.get("dataset"), " or ".join(PUBLISHED)
    if dataset not in PUBLISHED or record.get("data_digest") != PUBLISHED[dataset].digest:
        return [f"{result.file}: its data set is {dataset!r}, not the real {wanted}"]
    for name, splits in scores(record).items():
        file = result.predictions[name]
        recomputed = metrics.measure(read_predictions(file))
        faults += [
            f"{file}: {number} images in the {split} split instead of {images}"
            for split, images in IMAGES[dataset].items()
            if (number := recomputed[split]["n"] if split in recomputed else 0) != images
        ]
        faults += _differences(result.file, splits, recomputed, name)
        scored = {row["predictions_sha256"] for row in ledger.rows()}
        if "test" in recomputed and ledger.digest_of(file) not in scored:
            faults.append(f"{file}: {ledger.NAME}, the ledger of test scores, does not list it")
    return faults


def find_classifier_faults(labels: str) -> list[str]:
    """Return how one of the library's classifiers differs from what is promised of it."""
    folder, file = paths.RESULTS / CLASSIFIERS / labels, paths.CLASSIFIERS[labels]
    try:
        record = read_json(folder / "metrics.json", "make it with `make classifier`")
        true = metrics.summarize(read_predictions(folder / "predictions.csv.gz"))
        _, metadata, _ = classifier_file.read(file)
    except MarsclfError as error:
        return [str(error)]
    own = metadata["training"] | metadata | {"temperature": metadata["calibration"]["temperature"]}
    measured = record | {"zooms": record["parameters"]["test_zooms"]}
    names = ("preset", "seed", "commit", "data_digest", "classes", "temperature", "zooms")
    faults = [
        f"{file} is not that of {folder}: its {name} is {found!r}, not {measured.get(name)!r}"
        for name in names
        if (found := own.get(name)) != measured.get(name)
    ]
    faults += _differences(folder / "metrics.json", record["out_of_fold"], true, labels)
    if familiarity := record.get("familiarity"):
        found = summarize_familiarity(pd.read_csv(folder / "familiarity.csv.gz"))
        faults += _differences(folder / "metrics.json", familiarity, found, "familiarity")
    return faults


def summarize_familiarity(table: pd.DataFrame) -> dict[str, float]:
    """Return how well familiarity tells a classifier's known images from those of no class.

    `auroc` is the probability that a known image is more familiar; the others are shares.
    """
    known, flagged = table["known"], table["familiarity"] < FAMILIAR
    rank, confident = table["familiarity"].rank(), table["confidence"] >= metrics.THRESHOLD
    numbers = {
        "auroc": (rank[known].mean() - (known.sum() + 1) / 2) / (~known).sum(),
        "known_flagged": flagged[known].mean(),
        "others_flagged": flagged[~known].mean(),
        "others_confident": confident[~known].mean(),
        "others_confident_not_flagged": (confident & ~flagged)[~known].mean(),
    }
    return {name: round(float(number), 6) for name, number in numbers.items()}


def _differences(file: Path, stored: dict, true: dict, name: str) -> list[str]:
    """Return where stored metrics differ from those recomputed."""
    trees = ({name: tree} for tree in (stored, true))
    stored, true = (pd.json_normalize(tree).to_dict("records")[0] for tree in trees)
    return [
        f"{file}: {field} is {stored.get(field)}, recomputed {true.get(field)}"
        for field in true | stored
        if not _is_same(stored.get(field), true.get(field))
    ]


def _is_same(stored: object, true: object) -> bool:
    if isinstance(stored, list) and isinstance(true, list):
        return len(stored) == len(true) and all(map(_is_same, stored, true))
    if isinstance(stored, int | float) and isinstance(true, int | float):
        return abs(stored - true) <= TOLERANCE
    return stored == true
