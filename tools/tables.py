"""The values of the documents' tables, from results/; templates/ holds the tables themselves."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import class_names, read_predictions
from marsclf.pipeline import machine
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDERS, parameters_of
from tools.results import CLASSIFIERS, Result, read_json

MAX_BURSTS, MAX_CONFUSIONS = 15, 8  # rows of their tables
COMPARISONS = "comparisons.csv"  # recipes on later sols, see tools.compare
SELECTION = "selection.csv"  # those of an earlier criterion and one seed; a frozen record


class NotMeasured(Exception):
    """A results file does not exist yet; the text says which command creates it."""


def _stored(name: str, remedy: str) -> dict:
    if not (paths.RESULTS / name).is_file():
        raise NotMeasured(remedy)
    return read_json(paths.RESULTS / name, f"make it with {remedy}")


def _default_run(published: dict[str, Result]) -> Result:
    if DEFAULT_PRESET not in published:
        raise NotMeasured("`make run` and `make publish`")
    return published[DEFAULT_PRESET]


def _seeds(record: dict) -> dict:
    """Return the seeds with which a run's recipe was scored, and lists of their test metrics."""
    seeds = ledger.seeds(record)
    names = sorted(seeds, key=int)
    return {"names": names} | pd.DataFrame([seeds[name] for name in names]).to_dict("list")


def _result_values(published: dict[str, Result]) -> dict:
    records = {preset: result.record for preset, result in published.items()}
    runs = {name: record for name, record in records.items() if "splits" in record}
    return {
        "run": _default_run(published).record,
        "runs": runs,
        "seeds": {name: _seeds(run) for name, run in runs.items() if "test" in run["splits"]},
        "ladders": {preset: records[preset] for preset in LADDERS if preset in records},
        "others": _stored("published.json", "`git checkout results/published.json`"),
    }


def _classifier_values(_: dict) -> dict:
    files = sorted((paths.RESULTS / CLASSIFIERS).glob("*/metrics.json"))
    if not files:
        raise NotMeasured("`make classifier`")
    return {"classifiers": {f.parent.name: read_json(f, "`make classifier`") for f in files}}


def _rows_of(make: Callable[[pd.DataFrame, tuple], pd.DataFrame]) -> Callable[[dict], dict]:
    """Return a function to the rows that `make` computes from the default preset's test images.

    `make` gets their predictions, and the names of the classes.
    """

    def values(published: dict[str, Result]) -> dict:
        run = _default_run(published)
        predictions = read_predictions(run.predictions["predictions"])
        test, classes = predictions.query("split == 'test'"), class_names(run.record, predictions)
        return {"rows": make(test, classes).to_dict("records")}

    return values


def _bursts(test: pd.DataFrame, classes: tuple) -> pd.DataFrame:
    return metrics.by_eye(metrics.errors_by_burst(test, classes).head(MAX_BURSTS))


def _confusions(test: pd.DataFrame, classes: tuple) -> pd.DataFrame:
    return metrics.commonest_confusions(test, classes).head(MAX_CONFUSIONS)


def _verdicts(test: pd.DataFrame, classes: tuple) -> pd.DataFrame:
    errors = metrics.by_eye(metrics.errors(test, classes))
    errors["burst"] = errors["sequence"] + errors["true"]
    counted = errors.groupby("verdict").agg(errors=("path", "count"), bursts=("burst", "nunique"))
    counted["share"] = counted["errors"] / len(errors)
    return counted.sort_values("errors", ascending=False, kind="stable").reset_index()


def _comparison_values(name: str) -> Callable[[dict], dict]:
    """Return a function to the values of the table of a file of recipes, the best first."""

    def values(_: dict) -> dict:
        if not (paths.RESULTS / name).is_file():
            raise NotMeasured("`make compare`")
        table = pd.read_csv(paths.RESULTS / name).sort_values("criterion", ascending=False)
        first, last = table.columns.get_loc("criterion"), table.columns.get_loc("log loss")
        rows = table.to_dict("records")
        for row in rows:
            settings = json.loads(row["settings"])
            row["changes"] = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
        return {"shares": list(table.columns[first:last]), "rows": rows}

    return values


def _rank_values(published: dict[str, Result]) -> dict:
    """Return the recipes that have both a comparison and test scores, by rising criterion."""
    rows = pd.read_csv(paths.RESULTS / "ranked_recipes.csv")
    criteria = pd.read_csv(paths.RESULTS / SELECTION).set_index("time")["criterion"]
    rows["criterion"] = rows["compared"].map(criteria)
    own = ledger.recipe_digest(_default_run(published).record)
    lines = [row for row in ledger.rows() if row["dataset"] == "msl-v1"]
    rows["accuracies"] = [
        _seeds(_default_run(published).record)["accuracy"]
        if recipe == own
        else [*{r["seed"]: float(r["accuracy"]) for r in lines if r["recipe"] == recipe}.values()]
        for recipe in rows["recipe"]
    ]
    return {"rows": rows.sort_values("criterion").to_dict("records")}


def _bench_values(published: dict[str, Result]) -> dict:
    bench = _stored("bench.json", "`make bench`")
    recipe = ledger.recipe_digest(_default_run(published).record)
    return {"bench": bench, "is_outdated": bench["recipe"] != recipe}


def _b7_gpu_values(published: dict[str, Result]) -> dict:
    """Return what B7 costs on a GPU, or without a measurement what a T4 needs, computed."""
    try:
        cost = _stored("b7_gpu_cost.json", "`make gpu-cost` on a machine with a GPU")
    except NotMeasured as remedy:
        index = read_predictions(_default_run(published).predictions["predictions"])
        work = machine.multiplications(parameters_of("b7"), index)
        return {"remedy": remedy, "work": work, "t4_speed": machine.T4_SPEED}
    speeds: dict[tuple, list[dict]] = {}
    for record in cost["speeds"]:
        of = record["stage"], record["pixels"], record["precision"]
        speeds.setdefault(of, []).append(record)
    batches = list(dict.fromkeys(record["batch"] for record in cost["speeds"]))
    return {"remedy": None, "cost": cost, "speeds": speeds, "batches": batches}


VALUES: dict[str, Callable[[dict[str, Result]], dict]] = {
    **dict.fromkeys(("headline", "results", "runs", "seeds", "ladder"), _result_values),
    **dict.fromkeys(("costs", "first", "archive"), _bench_values),
    **dict.fromkeys(("classifiers", "familiarity"), _classifier_values),
    "classes": _rows_of(lambda *test: metrics.per_class(*test).query("support > 0")),
    "bursts": _rows_of(_bursts),
    "verdicts": _rows_of(_verdicts),
    "confusions": _rows_of(_confusions),
    "drift": _rows_of(lambda test, _: metrics.calibration_over_sols(test)),
    "selection": _comparison_values(SELECTION),
    "comparisons": _comparison_values(COMPARISONS),
    "ranks": _rank_values,
    "b7": lambda _: {"cost": _stored("b7_cost.json", "`make gpu-cost`")},
    "b7-gpu": _b7_gpu_values,
}


def _number(value: float | None, form: str) -> str:
    """Format a number as in "{:.1%}"; a dash where it is missing."""
    return "–" if value is None or np.isnan(value) else form.format(value)


def _mean(values: list[float], form: str) -> str:
    """Format the mean of numbers, and their standard deviation where there are several."""
    deviation = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + deviation


def _machine(hardware: dict) -> str:
    cores = "1 core" if hardware["cores"] == 1 else f"{hardware['cores']} cores"
    return f"{cores} of {hardware['cpu']}, {hardware['gpu'] or 'no GPU'}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} minutes"


FILTERS = {"number": _number, "mean": _mean, "machine": _machine, "duration": _duration}
