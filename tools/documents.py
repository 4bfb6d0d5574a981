"""The documents' tables: each is between two markers and comes from the template of its name.

The templates are in templates/; this module computes what they show from results/.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import class_names, read_predictions
from marsclf.files import replace_atomically, write_json
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDERS
from tools.results import CLASSIFIERS, Result, read_json, read_published

DOCUMENTS = ("README.md", "RESULTS.md", "MODEL_CARD.md", "docs/archive-scale.md")
MARKER = re.compile(r"<!-- ([a-z0-9-]+):(begin|end) -->")
TABLE = re.compile(r"(<!-- ([a-z0-9-]+):begin -->).*?(<!-- \2:end -->)", re.DOTALL)
COMPARISONS = "comparisons.csv"  # recipes on later sols, see tools.compare
B7_COST = "b7_gpu_cost.json"
SELECTION = "selection.csv"  # those of an earlier criterion and one seed; a frozen record


class NotMeasured(Exception):
    """A results file does not exist yet; the text says which command creates it."""


def store(measured: dict, file: Path, dataset: Dataset) -> None:
    """Store measurements of the real data in a JSON or CSV file and update the documents."""
    if dataset.name != "msl-v1":
        print(f"Nothing was stored, because the data set is {dataset.name}, not msl-v1.")
        return
    if file.suffix == ".csv":
        ledger.append_row(file, measured)
    else:
        write_json(file, measured)
    write_documents(update_documents(read_published()))
    print(f"Stored in {file} and in the documents.")


def update_documents(published: dict[str, Result]) -> dict[Path, str]:
    """Return the text of each document with its tables made from the published results."""
    files = (paths.PROJECT_ROOT / name for name in DOCUMENTS)
    return {file: _fill(file, published) for file in files if file.is_file()}


def write_documents(documents: dict[Path, str]) -> None:
    """Replace documents by those of `update_documents`."""
    for file, text in documents.items():
        with replace_atomically(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _fill(file: Path, published: dict[str, Result]) -> str:
    text = file.read_text(encoding="utf-8")
    markers = MARKER.findall(text)
    for first, second in zip_longest(markers[::2], markers[1::2]):
        name, _ = first
        if (first, second) != ((name, "begin"), (name, "end")):
            raise MarsclfError(f"{file}: no end marker follows <!-- {':'.join(first)} -->.")
        if name not in VALUES:
            raise MarsclfError(f"{file}: there is no template for <!-- {name}:begin -->.")
    return TABLE.sub(lambda table: f"{table[1]}\n{render(table[2], published)}{table[3]}", text)


def render(name: str, published: dict[str, Result]) -> str:
    """Return a table as Markdown, or what to run where its numbers are not measured."""
    try:
        return TEMPLATES.get_template(f"{name}.md").render(VALUES[name](published))
    except NotMeasured as remedy:
        return f"**Not measured**: run {remedy}.\n"
    except (KeyError, jinja2.UndefinedError) as error:
        raise MarsclfError(f"{paths.RESULTS} lacks what table {name} needs: {error}.") from error


def _stored(name: str, remedy: str) -> dict:
    if not (paths.RESULTS / name).is_file():
        raise NotMeasured(remedy)
    return read_json(paths.RESULTS / name, f"make it with {remedy}")


def _default_run(published: dict[str, Result]) -> Result:
    if DEFAULT_PRESET not in published:
        raise NotMeasured("`make run` and `make publish`")
    return published[DEFAULT_PRESET]


def seeds(record: dict) -> pd.DataFrame:
    """Return the test metrics of a run's recipe and data set, one row for each seed scored.

    Those of the run's own seed are the run's; those of another seed are from its last line.
    """
    own = ledger.figures(record["splits"]["test"])
    wanted = {"recipe": ledger.recipe_digest(record), "dataset": record["dataset"]}
    lines = [row for row in ledger.rows() if wanted.items() <= row.items()]
    found = {int(row["seed"]): {name: float(row[name]) for name in own} for row in lines}
    return pd.DataFrame.from_dict(found | {record["seed"]: own}, orient="index").sort_index()


def _result_values(published: dict[str, Result]) -> dict:
    records = {preset: result.record for preset, result in published.items()}
    runs = {name: record for name, record in records.items() if "splits" in record}
    return {
        "run": _default_run(published).record,
        "runs": runs,
        "seeds": {name: seeds(run) for name, run in runs.items() if "test" in run["splits"]},
        "ladders": {preset: records[preset] for preset in LADDERS if preset in records},
        "others": _stored("published.json", "`git checkout results/published.json`"),
    }


def _test_values(published: dict[str, Result]) -> dict:
    """Return the rows of the tables about the test images of the default preset."""
    run = _default_run(published)
    predictions = read_predictions(run.predictions["predictions"])
    test, classes = predictions.query("split == 'test'"), class_names(run.record, predictions)
    counted = metrics.per_class(test, classes).query("support > 0")
    support = counted.set_index("class_name")["support"]
    pairs = metrics.errors(test, classes).groupby(["true", "said"]).size().reset_index(name="count")
    pairs["share"] = pairs["count"] / pairs["true"].map(support)
    tables = {"classes": counted}
    tables["confusions"] = pairs.sort_values("count", ascending=False, kind="stable").head(8)
    return {name: table.to_dict("records") for name, table in tables.items()}


def _classifier_values(_: dict) -> dict:
    files = {labels: f"{CLASSIFIERS}/{labels}/metrics.json" for labels in sorted(paths.CLASSIFIERS)}
    return {"classifiers": {k: _stored(name, "`make classifier`") for k, name in files.items()}}


def _comparison_values(file_name: str, _: dict) -> dict:
    """Return the recipes in a file, the best first, and the names of the shares that it has."""
    if not (paths.RESULTS / file_name).is_file():
        raise NotMeasured("`make compare`")
    table = pd.read_csv(paths.RESULTS / file_name).sort_values("criterion", ascending=False)
    table["changes"] = [
        [f"{name} {json.dumps(value)}" for name, value in json.loads(settings).items()]
        for settings in table["settings"]
    ]
    shares = table.loc[:, "criterion":"log loss"].columns[:-1]
    return {"shares": shares.tolist(), "rows": table.to_dict("records")}


def _rank_values(_: dict) -> dict:
    """Return the recipes that have both a comparison and test scores, by rising criterion."""
    recipes = pd.read_csv(paths.RESULTS / "ranked_recipes.csv")
    criteria = pd.read_csv(paths.RESULTS / SELECTION).set_index("time")["criterion"]
    scores = pd.DataFrame(ledger.rows()).query("dataset == 'msl-v1'").astype({"accuracy": float})
    # The first score of each seed, so that no later run changes the table.
    scores = scores.drop_duplicates(["recipe", "seed"]).groupby("recipe")["accuracy"].agg(list)
    table = recipes.join(criteria, on="compared").join(scores, on="recipe")
    return {"rows": table.sort_values("criterion").to_dict("records")}


def _bench_values(published: dict[str, Result]) -> dict:
    bench = _stored("bench.json", "`make bench`")
    recipe = ledger.recipe_digest(_default_run(published).record)
    return {"bench": bench, "is_outdated": bench["recipe"] != recipe}


VALUES: dict[str, Callable[[dict[str, Result]], dict]] = {
    **dict.fromkeys(("headline", "results", "runs", "seeds", "ladder"), _result_values),
    **dict.fromkeys(("classes", "confusions"), _test_values),
    **dict.fromkeys(("costs", "first", "archive"), _bench_values),
    **dict.fromkeys(("classifiers", "familiarity"), _classifier_values),
    "selection": partial(_comparison_values, SELECTION),
    "comparisons": partial(_comparison_values, COMPARISONS),
    "ranks": _rank_values,
    "b7-gpu": lambda _: {"cost": _stored(B7_COST, "`make gpu-cost` on a machine with a GPU")},
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


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"number": _number, "mean": _mean, "machine": _machine, "duration": _duration}
