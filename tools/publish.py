"""Publishing a run of the real data in the repository, and verifying what is published.

Published are results/<preset>/ (metrics.json, predictions.csv.gz), figures/<preset>/, the tables
between two markers in the documents and, of the default preset, the classifier that the command
`predict` uses. Every number can be recomputed from the predictions. Figures of the data, which are
the same whatever the preset, are published with the default one alone.
"""

import gzip
import json
import shutil
from pathlib import Path

from marsclf import adjustments, paths
from marsclf.classify import classifier_file
from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import read_predictions
from marsclf.files import replace_atomically, write_json
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDERS, parameters_of
from tools.tables import (
    adjustments_table,
    archive_table,
    b7_cost_line,
    b7_gpu_table,
    bursts_table,
    confusions_table,
    cost_table,
    drift_table,
    first_result,
    headline,
    ladder_table,
    per_class_table,
    results_tables,
    seeds_table,
    selection_table,
    verdicts_table,
)

BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
# README.md must hold the results; any of them may hold any of the tables.
README, MODEL_CARD, RESULTS = "README.md", "MODEL_CARD.md", "RESULTS.md"
ARCHIVE = "docs/archive-scale.md"
IMAGES = {"train": 3746, "val": 1640, "test": 1305}
OF_THE_DATA = "01_"  # how the names of notebook 01's figures begin
TOLERANCE = 1e-6
MAX_BYTES = 1_000_000
MAX_CLASSIFIER_BYTES = 8_000_000


def publish(preset: str) -> None:
    """Copy the figures, metrics and predictions of runs/<preset>/ and rewrite the tables.

    Raises MarsclfError, and changes nothing, unless the run is whole, of the real data and with
    the preset's own parameters, and its predictions give its metrics.
    """
    run_dir = paths.RUNS / preset
    predictions = run_dir / "predictions.csv"
    result = read_metrics(run_dir / "metrics.json")
    changed = {
        name: (result["parameters"].get(name), value)
        for name, value in json.loads(json.dumps(parameters_of(preset))).items()
        if result["parameters"].get(name) != value
    }
    faults = [
        f"{name} was {was!r}, but the preset says {value!r}"
        for name, (was, value) in changed.items()
    ]
    faults = faults or _faults(run_dir / "metrics.json", result, predictions)
    figures = [
        path
        for path in sorted((run_dir / "figures").glob("*.png"))
        if preset == DEFAULT_PRESET or not path.name.startswith(OF_THE_DATA)
    ]
    if not figures:
        faults.append(f"there is no figure in {run_dir / 'figures'}")
    # mtime=0: the same predictions always give the same file.
    packed = gzip.compress(predictions.read_bytes(), 9, mtime=0) if not faults else b""
    if len(packed) >= MAX_BYTES:
        faults.append(f"the packed predictions have {len(packed):,} bytes, {MAX_BYTES:,} or more")
    classifier = run_dir / paths.CLASSIFIER.name
    if preset == DEFAULT_PRESET:
        faults += _classifier_faults(classifier, result, ("commit",))
    if faults:
        raise MarsclfError(f"The run of {preset} cannot be published: {'; '.join(faults)}.")
    adjusted = _adjustments()
    # What is right already stays, so that publishing twice changes nothing.
    if preset == DEFAULT_PRESET and _adjustments_faults(adjusted, result, predictions):
        adjusted = adjustments.record(result, predictions)
    published = _published() | {preset: result}
    documents = _documents(dict(sorted(published.items())), {preset: predictions}, adjusted)
    with replace_atomically(paths.FIGURES / preset) as temporary:
        temporary.mkdir()
        for figure in figures:
            shutil.copyfile(figure, temporary / figure.name)
    with replace_atomically(paths.RESULTS / preset / "predictions.csv.gz") as temporary:
        temporary.write_bytes(packed)
    write_json(paths.RESULTS / preset / "metrics.json", result)
    if preset == DEFAULT_PRESET:
        with replace_atomically(paths.CLASSIFIER) as temporary:
            shutil.copyfile(classifier, temporary)
        write_json(paths.RESULTS / adjustments.NAME, adjusted)
    _write(documents)
    print(f"Published {preset}: {paths.RESULTS / preset}, {paths.FIGURES / preset} and the tables.")
    if result["commit"] == "unknown" or result["commit"].endswith("-dirty"):
        print(f"Warning: its code is commit {result['commit']!r}, which nobody else can check out.")


def publish_ladder(name: str) -> None:
    """Copy metrics, predictions and figures of runs/<name>/, a ladder; rewrite the tables."""
    run_dir, ladder = paths.RUNS / name, paths.RESULTS / f"{name}.json"
    result = json.loads((run_dir / "ladder.json").read_text(encoding="utf-8"))
    with replace_atomically(paths.FIGURES / name) as temporary:
        shutil.copytree(run_dir / "figures", temporary)
    with replace_atomically(paths.RESULTS / name) as temporary:
        temporary.mkdir()
        for rung in result["rungs"]:
            packed = gzip.compress((run_dir / rung / "predictions.csv").read_bytes(), 9, mtime=0)
            (temporary / f"{rung}.csv.gz").write_bytes(packed)
    write_json(ladder, result)
    rewrite_tables()
    print(f"Published: {ladder}, {paths.RESULTS / name}, {paths.FIGURES / name} and the tables.")


def publish_adjustments() -> None:
    """Measure what adjustments would have done to the published predictions; rewrite the tables.

    Raises MarsclfError where the default preset is not published.
    """
    folder, target = paths.RESULTS / DEFAULT_PRESET, paths.RESULTS / adjustments.NAME
    result = read_metrics(folder / "metrics.json")
    adjusted = adjustments.record(result, folder / "predictions.csv.gz")
    for name, found in adjusted["scores"].items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
        print(f"{name}: {numbers}")
    write_json(target, adjusted)
    rewrite_tables()
    print(f"Published: {target} and the tables of the documents.")


def rewrite_tables() -> None:
    """Make the tables of all documents anew from what results/ holds."""
    _write(_documents(_published(), {}, _adjustments()))


def verify() -> None:
    """Recompute every published number; print one line a preset, raise MarsclfError if one is off.

    So it does where the classifier of the library is not that of the published run. Needs neither
    images nor model nor network.
    """
    faults, published = [], _published()
    for preset, result in published.items():
        folder = paths.RESULTS / preset
        found = _faults(folder / "metrics.json", result, folder / "predictions.csv.gz")
        if preset == DEFAULT_PRESET:
            found += _classifier_faults(paths.CLASSIFIER, result)
            stored = folder / "predictions.csv.gz"
            found += _adjustments_faults(_adjustments(), result, stored)
        faults += found
        test = result["splits"].get("test", {}).get("accuracy")
        print(f"{preset}: {'WRONG' if found else 'ok'}, test accuracy {test}")
    for name in LADDERS:
        if (paths.RESULTS / f"{name}.json").is_file():
            found = _ladder_faults(name)
            faults += found
            print(f"{name}: {'WRONG' if found else 'ok'}")
    if not faults:
        for path, text in _documents(published, {}, _adjustments()).items():
            lines = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
            for number, (is_line, should_be) in enumerate(zip(*lines, strict=False), start=1):
                if is_line != should_be:
                    faults.append(f"{path}, line {number}: is {is_line!r}, must be {should_be!r}")
            if not faults and len(lines[0]) != len(lines[1]):
                faults.append(f"{path}: the tables have lines too many or too few")
    if faults:
        raise MarsclfError("What is published is not right:\n" + "\n".join(faults))
    print(f"{len(published)} published runs and the tables verified.")


def read_metrics(path: Path) -> dict:
    """Read a run's metrics.json; raise MarsclfError where it is not there, or not that of a run."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["parameters"], result["splits"], result["commit"]
    except FileNotFoundError:
        raise MarsclfError(f"There is no {path}: no run of this preset has ended.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MarsclfError(f"{path} is not the metrics file of a run: {error!r}.") from error
    return result


def _published() -> dict[str, dict]:
    return {
        path.parent.name: read_metrics(path)
        for path in sorted(paths.RESULTS.glob("*/metrics.json"))
    }


def _faults(path: Path, result: dict, predictions: Path) -> list[str]:
    """Return what is wrong with a metrics file: its data set, or a number its predictions deny."""
    if (result.get("dataset"), result.get("data_digest")) != ("msl-v1", data.MSL_V1_DIGEST):
        return [f"{path}: its data set is {result.get('dataset')!r}, not the real one, msl-v1"]
    recomputed = metrics.measure(read_predictions(predictions))
    faults = [
        f"{predictions}: {numbers['n']} images of the {split} split instead of {IMAGES[split]}"
        for split, numbers in recomputed.items()
        if numbers["n"] != IMAGES[split]
    ]
    stored, true = _leaves(result["splits"]), _leaves(recomputed)
    for field in true | stored:
        if not _same(stored.get(field), true.get(field)):
            faults.append(
                f"{path}: splits.{field} is {stored.get(field)}, recomputed {true.get(field)}"
            )
    if not faults and ledger.digest_of(predictions) not in ledger.scored():
        faults.append(f"{predictions}: the ledger of test scores, {ledger.NAME}, does not hold it")
    return faults


def _ladder_faults(name: str) -> list[str]:
    """Return what is wrong with the rungs of a published ladder (see `_faults`)."""
    path = paths.RESULTS / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    about = {field: result.get(field) for field in ("dataset", "data_digest")}
    return [
        fault
        for rung, record in result["rungs"].items()
        for fault in _faults(path, about | record, paths.RESULTS / name / f"{rung}.csv.gz")
    ]


def _adjustments() -> dict:
    """Return what results/ holds of adjustments; nothing where the file is missing or damaged."""
    try:
        stored = json.loads((paths.RESULTS / adjustments.NAME).read_text(encoding="utf-8"))
        stored["run"], stored["scores"], stored["images"], stored["commit"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return stored


def _adjustments_faults(stored: dict, result: dict, predictions: Path) -> list[str]:
    """Return what is wrong with the adjustments, beside the default preset's metrics."""
    path, remedy = paths.RESULTS / adjustments.NAME, "make it anew with `make adjust`"
    true = adjustments.measure(result, predictions)
    if stored.get("predictions_sha256") != true["predictions_sha256"]:
        return [f"{path}: it is missing, damaged or of other predictions; {remedy}"]
    is_there, must_be = _leaves({name: stored.get(name) for name in true}), _leaves(true)
    return [
        f"{path}: {field} is {is_there.get(field)}, recomputed {must_be.get(field)}; {remedy}"
        for field in must_be | is_there
        if not _same(is_there.get(field), must_be.get(field))
    ]


def _earlier_recipe(bench: dict, published: dict[str, dict]) -> str:
    """Return a sentence where a benchmark is not of the published recipe, or does not tell its."""
    result = published.get(DEFAULT_PRESET)
    if result is None or bench.get("recipe") == ledger.recipe_digest(result):
        return ""
    since = f"Measured before `{DEFAULT_PRESET}` became what it is"
    return f"\n**{since}; `make bench` measures it anew.**\n"


def _classifier_faults(path: Path, result: dict, also: tuple[str, ...] = ()) -> list[str]:
    """Return what is wrong with the classifier file of a run that has these metrics.

    `also` names what else of the file's `training` must be as in the metrics.
    """
    try:
        _, metadata, _ = classifier_file.read(path)
    except MarsclfError as error:
        return [str(error)]
    size = path.stat().st_size
    if size > MAX_CLASSIFIER_BYTES:
        return [f"{path} has {size:,} bytes, more than {MAX_CLASSIFIER_BYTES:,}"]
    names = ("preset", "seed", "data_digest", *also)
    pairs = {name: (metadata["training"].get(name), result.get(name)) for name in names}
    pairs["zooms"] = metadata["zooms"], result["parameters"].get("test_zooms")
    pairs["temperature"] = metadata["calibration"]["temperature"], result.get("temperature")
    return [
        f"{path} is of another run: its {name} is {found!r}, not {expected!r}"
        for name, (found, expected) in pairs.items()
        if found != expected
    ]


def _leaves(tree: object, name: str = "") -> dict[str, object]:
    """Flatten nested mappings and lists: {"test": {"n": 3}} gives {"test.n": 3}."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        branches = [_leaves(value, f"{name}.{key}" if name else str(key)) for key, value in items]
        return {key: value for branch in branches for key, value in branch.items()}
    return {name: tree}


def _same(stored: object, true: object) -> bool:
    if isinstance(stored, int | float) and isinstance(true, int | float):
        return abs(stored - true) <= TOLERANCE
    return stored == true


def _documents(
    published: dict[str, dict], predictions: dict[str, Path], adjusted: dict
) -> dict[Path, str]:
    """Return the text of each document with its tables between their markers.

    `predictions` names the file of those presets whose own is not in results/ yet, `adjusted` is
    what results/ holds of adjustments, or will hold.
    """
    tables = {"results": results_tables(published)}
    if adjusted:
        tables["adjustments"] = adjustments_table(adjusted)
    if (paths.RESULTS / "bench.json").is_file():
        bench = json.loads((paths.RESULTS / "bench.json").read_text(encoding="utf-8"))
        made = {"costs": cost_table, "archive": archive_table, "first": first_result}
        earlier = _earlier_recipe(bench, published)
        tables |= {name: make(bench) + earlier for name, make in made.items()}
    if (paths.RESULTS / ledger.SELECTION).is_file():
        tables["selection"] = selection_table()
    if any((paths.RESULTS / f"{name}.json").is_file() for name in LADDERS):
        tables["ladder"] = ladder_table(published)
    if (paths.RESULTS / "b7_cost.json").is_file():
        tables["b7"] = b7_cost_line()
    on_gpu = paths.RESULTS / "b7_gpu_cost.json"
    measured = json.loads(on_gpu.read_text(encoding="utf-8")) if on_gpu.is_file() else None
    tables["b7-gpu"] = b7_gpu_table(measured)
    if published:
        tables["seeds"] = seeds_table(published)
    if DEFAULT_PRESET in published:
        stored = paths.RESULTS / DEFAULT_PRESET / "predictions.csv.gz"
        file = predictions.get(DEFAULT_PRESET, stored)
        table = read_predictions(file)
        tables["headline"] = headline(published[DEFAULT_PRESET])
        tables |= {"classes": per_class_table(table), "bursts": bursts_table(table)}
        tables["verdicts"] = verdicts_table(table)
        tables |= {"confusions": confusions_table(table), "drift": drift_table(table)}
    texts = {}
    for path in (paths.PROJECT_ROOT / name for name in (README, RESULTS, MODEL_CARD, ARCHIVE)):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for name, table in tables.items():
            required = path.name == README and name == "results"
            if required or BEGIN.format(name) in text:
                text = _insert(text, name, table, path)
        if text:
            texts[path] = text
    return texts


def _write(documents: dict[Path, str]) -> None:
    for path, text in documents.items():
        with replace_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _insert(text: str, name: str, table: str, path: Path) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = text.partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise MarsclfError(f"{path} lacks the lines {begin} and {end}, between them the tables.")
    return f"{before}{begin}\n{table}{end}{after}"
