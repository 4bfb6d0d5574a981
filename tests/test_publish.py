"""Publishing refuses what is not a whole run of the real data; verifying finds what is off."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_project import enter_project, make_project, write_predictions

from marsclf import adjustments, paths
from marsclf.classify import classifier_file
from marsclf.cli import main
from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import read_predictions
from marsclf.files import write_json
from marsclf.pipeline.presets import parameters_of
from tools import publish

BEGIN, END = (marker.format("results") for marker in (publish.BEGIN, publish.END))
README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
METADATA = {
    "backbone": "EfficientNetLite0",
    "image_size": 64,
    "zooms": [1.0],
    "head_hidden": 0,
    "first_learning_block": None,
    "classes": list(data.CLASS_NAMES),
    "calibration": {"kind": "temperature", "temperature": 1.0},
    "training": {
        "preset": "laptop",
        "seed": 0,
        "commit": "0" * 40,
        "dataset": "msl-v1",
        "data_digest": data.MSL_V1_DIGEST,
    },
}
HARDWARE = {"cpu": "Some CPU", "cores": 2, "memory_gb": 8.0, "gpu": None}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one whole run, as if of the real data, but with 40 images a split."""
    enter_project(monkeypatch, make_project(tmp_path))
    monkeypatch.setattr(publish, "IMAGES", dict.fromkeys(data.SPLITS, 40))
    (tmp_path / "README.md").write_text(README)
    others = [{"source": "A, B", "url": "https://example.org", "remarks": "old"}]
    others[0] |= {"train": None, "val": 72.8, "test": 66.7, "macro_f1": 0.5}
    write_json(paths.RESULTS / "published.json", others)
    folder = paths.RUNS / "laptop"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "graph.png").write_text("new graph")
    write_predictions(folder / "predictions.csv")
    result = {"dataset": "msl-v1", "data_digest": data.MSL_V1_DIGEST, "preset": "laptop"}
    result |= {"backbone": "EfficientNetLite0", "seed": 0, "commit": "0" * 40}
    parameters = parameters_of("laptop") | {"test_zooms": [1.0]}
    result |= {"settings": {}, "parameters": parameters, "hardware": HARDWARE, "temperature": 1.0}
    result |= {"wall_s": {"total": 600.0}, "peak_rss_mb": 1500}
    result["splits"] = metrics.measure(read_predictions(folder / "predictions.csv"))
    write_json(folder / "metrics.json", result)
    ledger.append(result, folder / "predictions.csv")
    classifier_file.write(folder / "classifier.npz", {"a/kernel": np.ones(3)}, METADATA)
    return tmp_path


def edit(path: Path, *keys: str, value: object) -> None:
    tree = json.loads(path.read_text())
    branch = tree
    for key in keys[:-1]:
        branch = branch[key]
    branch[keys[-1]] = value
    path.write_text(json.dumps(tree))


def everything_in(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_publish(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = paths.FIGURES / "laptop" / "old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    publish.publish("laptop")
    assert [path.name for path in (paths.FIGURES / "laptop").iterdir()] == ["graph.png"]
    packed = paths.RESULTS / "laptop" / "predictions.csv.gz"
    run_dir = paths.RUNS / "laptop"
    stored = (run_dir / "predictions.csv").read_bytes()
    assert gzip.decompress(packed.read_bytes()) == stored
    readme = (project / "README.md").read_text()
    assert readme.startswith("# Title\n\n") and readme.endswith("\n\nThe end.\n")
    test = json.loads((paths.RESULTS / "laptop" / "metrics.json").read_text())["splits"]["test"]
    assert f"**{test['accuracy']:.1%}**" in readme
    assert "| [A, B](https://example.org) | – | 72.8 % | 66.7 % | 0.5 | old |" in readme
    assert "10.0 min | 1.5 GB | 2 cores of Some CPU, 8 GB, no GPU | 000000000000 |" in readme
    assert f"| {test['burst']['accuracy']:.1%} |" in readme
    assert paths.CLASSIFIER.read_bytes() == (run_dir / "classifier.npz").read_bytes()
    assert "Warning" not in capsys.readouterr().out
    publish.verify()
    assert "laptop: ok" in capsys.readouterr().out
    before = everything_in(project)
    publish.publish("laptop")
    assert everything_in(project) == before


def test_tables_of_seeds_classes_and_compared_recipes(project: Path) -> None:
    markers = [publish.BEGIN, publish.END]
    names = ("headline", "seeds", "classes", "bursts", "selection", "confusions", "drift")
    text = "\n".join(marker.format(name) for name in names for marker in markers)
    (project / "RESULTS.md").write_text(f"# Results\n{text}\n")
    (paths.RESULTS / "selection.csv").write_text(
        "time,commit,preset,settings,criterion,early,late,as it is,grey,log loss,wall_s\n"
        "now,abc,laptop,{},0.8,0.7,0.9,0.81,0.79,,120\n"
        'now,abc,laptop,"{""seed"": 1}",0.85,0.8,0.9,0.9,0.8,0.51,60\n'
    )
    result = json.loads((paths.RUNS / "laptop" / "metrics.json").read_text())
    result["splits"]["test"]["accuracy"] += 0.1  # the ledger's line of another seed
    result |= {"seed": 1, "parameters": result["parameters"] | {"seed": 1}}
    ledger.append(result, paths.RUNS / "laptop" / "predictions.csv")
    publish.publish("laptop")
    lines = (project / "RESULTS.md").read_text().splitlines()
    first, second = (line for line in lines if line.startswith("| `laptop`: "))
    assert first == "| `laptop`: seed 1 | 85.0% | 80.0% | 90.0% | 90.0% | 80.0% | 0.510 | 1 | abc |"
    assert second.startswith("| `laptop`: nothing | 80.0% |")
    mean = result["splits"]["test"]["accuracy"] - 0.05
    (seeds,) = (line for line in lines if line.startswith("| `laptop` | 0, 1 |"))
    assert f"| {mean:.1%} ± {0.1 / 2**0.5:.1%} |" in seeds
    mean_and_spread = f"seed 0; 2 seeds: {mean:.1%} ± {0.1 / 2**0.5:.1%} of test |"
    assert mean_and_spread in (project / "README.md").read_text()
    (first,) = (line for line in lines if line.startswith("**"))
    spread = f"**{mean:.1%} ± {0.1 / 2**0.5:.1%} of the test images right**, the mean of 2 seeds"
    assert first.startswith(spread) and f"seed 0: {mean - 0.05:.1%} (95 % interval" in first
    predictions = read_predictions(paths.RUNS / "laptop" / "predictions.csv")
    ground = predictions.query("split == 'test' and label == 8")
    recall = (ground["predicted"] == 8).mean()
    assert any(line.startswith(f"| ground | {len(ground)} | {recall:.1%} |") for line in lines)
    worst = metrics.errors_by_burst(predictions.query("split == 'test'")).iloc[0]
    assert (
        f"| {worst.true} | {worst.said} | {worst.errors} | {worst.confidence:.2f} |"
        in "\n".join(lines)
    )
    wrong = metrics.commonest_confusions(predictions.query("split == 'test'")).iloc[0]
    pair = f"| {wrong['true']} | {wrong['predicted']} | {wrong['count']} | {wrong['share']:.1%} |"
    period = metrics.calibration_over_sols(predictions.query("split == 'test'")).iloc[0]
    sols = f"| {period['first_sol']:.0f} to {period['last_sol']:.0f} | {period['images']:.0f} "
    assert pair in lines
    assert any(line.startswith(f"{sols}| {period['accuracy']:.1%} |") for line in lines)
    publish.verify()
    edited = (project / "RESULTS.md").read_text().replace("85.0%", "95.0%")
    (project / "RESULTS.md").write_text(edited)
    with pytest.raises(MarsclfError, match=r"RESULTS\.md, line \d+: is .*95\.0%"):
        publish.verify()


def test_code_that_is_not_committed_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = "0" * 40 + "-dirty"
    edit(paths.RUNS / "laptop" / "metrics.json", "commit", value=commit)
    metadata = METADATA | {"training": METADATA["training"] | {"commit": commit}}
    path = paths.RUNS / "laptop" / "classifier.npz"
    classifier_file.write(path, {"a/kernel": np.ones(3)}, metadata)
    publish.publish("laptop")
    assert "Warning: its code is commit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (["dataset"], "sample", "its data set is 'sample', not the real one"),
        (["data_digest"], "f" * 64, "not the real one"),
        (["parameters", "seed"], 1, "seed was 1, but the preset says 0"),
        (["splits", "test", "accuracy"], 0.99, "splits.test.accuracy is 0.99, recomputed 0"),
        (["splits", "val", "accuracy_ci95"], [0, 1], "splits.val.accuracy_ci95.1 is 1, recomputed"),
        (["splits", "val"], {}, "splits.val.n is None, recomputed 40"),
        (["splits", "extra"], {"n": 3}, "splits.extra.n is 3, recomputed None"),
    ],
)
def test_publish_refuses(project: Path, keys: list[str], value: object, reason: str) -> None:
    edit(paths.RUNS / "laptop" / "metrics.json", *keys, value=value)
    before = everything_in(project)
    with pytest.raises(MarsclfError, match=f"laptop cannot be published: .*{reason}"):
        publish.publish("laptop")
    assert everything_in(project) == before


def test_publish_refuses_a_score_that_the_ledger_does_not_hold(project: Path) -> None:
    (paths.RESULTS / ledger.NAME).unlink()
    with pytest.raises(MarsclfError, match=r"the ledger of test scores.*does not hold it"):
        publish.publish("laptop")


def test_publish_refuses_changed_predictions(project: Path) -> None:
    path = paths.RUNS / "laptop" / "predictions.csv"
    lines = path.read_text().splitlines(keepends=True)
    swapped = lines[1].split(",")
    swapped[2] = str((int(swapped[2]) + 1) % 25)
    path.write_text("".join([lines[0], ",".join(swapped), *lines[2:]]))
    with pytest.raises(MarsclfError, match="splits.train.accuracy is"):
        publish.publish("laptop")


def test_publish_refuses_too_few_images(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "IMAGES", {"train": 40, "val": 40, "test": 41})
    with pytest.raises(MarsclfError, match="40 images of the test split instead of 41"):
        publish.publish("laptop")


def test_publish_refuses_large_predictions(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_BYTES", 1000)
    with pytest.raises(MarsclfError, match="bytes, 1,000 or more"):
        publish.publish("laptop")


def test_publish_refuses_a_run_without_end_or_figures(project: Path) -> None:
    (paths.RUNS / "laptop" / "figures" / "graph.png").unlink()
    with pytest.raises(MarsclfError, match="there is no figure in"):
        publish.publish("laptop")
    (paths.RUNS / "laptop" / "metrics.json").unlink()
    with pytest.raises(MarsclfError, match="no run of this preset has ended"):
        publish.publish("laptop")
    (paths.RUNS / "laptop" / "metrics.json").write_text("{}")
    with pytest.raises(MarsclfError, match="is not the metrics file of a run"):
        publish.publish("laptop")


OTHERS = {
    "its seed is 1, not 0": {"training": METADATA["training"] | {"seed": 1}},
    "its preset is 'b7', not 'laptop'": {"training": METADATA["training"] | {"preset": "b7"}},
    "its zooms is [1.0, 0.5], not [1.0]": {"zooms": [1.0, 0.5]},
    "its temperature is 0.5, not 1.0": {"calibration": {"kind": "temperature", "temperature": 0.5}},
}
OTHER_COMMIT = {"training": METADATA["training"] | {"commit": "1" * 40}}


@pytest.mark.parametrize(
    ("reason", "other"), [*OTHERS.items(), (f"its commit is '{'1' * 40}'", OTHER_COMMIT)]
)
def test_publish_refuses_a_classifier_of_another_run(
    project: Path, reason: str, other: dict
) -> None:
    path = paths.RUNS / "laptop" / "classifier.npz"
    classifier_file.write(path, {"a/kernel": np.ones(3)}, METADATA | other)
    before = everything_in(project)
    with pytest.raises(MarsclfError, match=re.escape(f"is of another run: {reason}")):
        publish.publish("laptop")
    path.unlink()
    with pytest.raises(MarsclfError, match=r"classifier\.npz cannot be read"):
        publish.publish("laptop")
    assert {name: before[name] for name in everything_in(project)} == everything_in(project)


@pytest.mark.parametrize(("reason", "other"), OTHERS.items())
def test_verify_finds_a_classifier_of_another_run(project: Path, reason: str, other: dict) -> None:
    publish.publish("laptop")
    publish.verify()
    classifier_file.write(paths.CLASSIFIER, {"a/kernel": np.ones(3)}, METADATA | other)
    with pytest.raises(MarsclfError, match=re.escape(f"is of another run: {reason}")):
        publish.verify()


def test_verify_needs_the_classifier(project: Path) -> None:
    publish.publish("laptop")
    paths.CLASSIFIER.unlink()
    with pytest.raises(MarsclfError, match=r"classifier\.npz cannot be read"):
        publish.verify()


def test_costs_of_another_recipe_say_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cost_table", "archive_table", "first_result"):
        monkeypatch.setattr(publish, name, lambda bench: "COSTS\n")
    text = (project / "README.md").read_text()
    markers = f"{publish.BEGIN.format('costs')}\n{publish.END.format('costs')}\n"
    (project / "README.md").write_text(text + markers)
    publish.publish("laptop")
    result = publish.read_metrics(paths.RESULTS / "laptop" / "metrics.json")
    for recipe, earlier in ((ledger.recipe_digest(result), False), ("0" * 16, True), (None, True)):
        write_json(paths.RESULTS / "bench.json", {"recipe": recipe} if recipe else {})
        publish.rewrite_tables()
        publish.verify()
        readme = (project / "README.md").read_text()
        assert "COSTS\n" in readme
        assert ("Measured before `laptop` became what it is; `make bench`" in readme) is earlier


def test_adjustments_are_published_and_verified(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    markers = "\n".join(marker.format("adjustments") for marker in (publish.BEGIN, publish.END))
    (project / "RESULTS.md").write_text(f"# Results\n{markers}\n")
    publish.publish("laptop")
    path = paths.RESULTS / adjustments.NAME
    stored = json.loads(path.read_text())
    result = json.loads((paths.RESULTS / "laptop" / "metrics.json").read_text())
    assert stored["run"] == {"preset": "laptop", "seed": 0, "commit": "0" * 40}
    assert stored["predictions_sha256"] in ledger.scored()
    assert stored["images"] == 40
    numbers = stored["scores"]["nothing"]
    val = result["splits"]["val"]
    assert (numbers["accuracy"], numbers["macro_f1"]) == (val["accuracy"], val["macro_f1"])
    row = f"| nothing | {numbers['accuracy']:.1%} | {numbers['mean_recall']:.1%} | "
    assert f"\n{row}{numbers['macro_f1']:.3f} |\n" in (project / "RESULTS.md").read_text()
    publish.verify()

    name = "camera, pseudo-count 20"
    edit(path, "scores", name, "mean_recall", value=0.999)
    fault = rf"adjustments\.json: scores\.{name}\.mean_recall is 0\.999, .*`make adjust`"
    with pytest.raises(MarsclfError, match=fault):
        publish.verify()
    publish.rewrite_tables()
    assert f"| {name} | " in (project / "RESULTS.md").read_text()
    assert "| 99.9% |" in (project / "RESULTS.md").read_text()
    assert main(["adjust"]) == 0
    assert json.loads(path.read_text())["scores"] == stored["scores"]
    assert "99.9%" not in (project / "RESULTS.md").read_text()
    assert f"{name}: accuracy " in capsys.readouterr().out
    publish.verify()

    edit(path, "run", "seed", value=1)
    with pytest.raises(MarsclfError, match=r"run\.seed is 1, recomputed 0; .*`make adjust`"):
        publish.verify()
    publish.publish("laptop")
    publish.verify()
    for damaged in ("{", "[]", "{}", json.dumps(stored | {"predictions_sha256": "0" * 64})):
        path.write_text(damaged)
        with pytest.raises(MarsclfError, match="missing, damaged or of other predictions; .*adj"):
            publish.verify()
    path.unlink()
    with pytest.raises(MarsclfError, match="missing, damaged or of other predictions"):
        publish.verify()


def test_adjustments_do_not_depend_on_test(project: Path) -> None:
    publish.publish("laptop")
    path = paths.RESULTS / adjustments.NAME
    stored = json.loads(path.read_text())
    packed = paths.RESULTS / "laptop" / "predictions.csv.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    cells = [line.split(",") for line in lines]
    for row in cells:
        if row[0] == "test":
            row[2] = str((int(row[2]) + 1) % 25)
    packed.write_bytes(gzip.compress("\n".join(map(",".join, cells)).encode()))
    assert main(["adjust"]) == 0
    changed = json.loads(path.read_text())
    assert changed["predictions_sha256"] != stored["predictions_sha256"]
    assert changed["scores"] == stored["scores"]


def test_adjustments_need_a_published_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adjust"]) == 1
    assert "no run of this preset has ended" in capsys.readouterr().err
    assert not (paths.RESULTS / adjustments.NAME).exists()


def test_figures_of_the_data_are_published_once(project: Path) -> None:
    (paths.RUNS / "laptop" / "figures" / "01_counts.png").write_text("counts")
    publish.publish("laptop")
    preset = (paths.PRESETS / "laptop.yaml").read_text()
    (paths.PRESETS / "other.yaml").write_text(preset)
    shutil.copytree(paths.RUNS / "laptop", paths.RUNS / "other")
    publish.publish("other")
    found = {path.relative_to(paths.FIGURES).as_posix() for path in paths.FIGURES.rglob("*.png")}
    assert found == {"laptop/01_counts.png", "laptop/graph.png", "other/graph.png"}


def test_publish_refuses_a_large_classifier(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_CLASSIFIER_BYTES", 100)
    with pytest.raises(MarsclfError, match="bytes, more than 100"):
        publish.publish("laptop")


def test_the_readme_needs_the_markers(project: Path) -> None:
    (project / "README.md").write_text(README.replace(END, ""))
    before = everything_in(project)
    with pytest.raises(MarsclfError, match=r"README\.md lacks the lines"):
        publish.publish("laptop")
    assert everything_in(project) == before


def test_verify_finds_a_changed_number_in_the_metrics(project: Path) -> None:
    publish.publish("laptop")
    path = paths.RESULTS / "laptop" / "metrics.json"
    accuracy = json.loads(path.read_text())["splits"]["test"]["accuracy"]
    edit(path, "splits", "test", "accuracy", value=accuracy + 0.00001)
    with pytest.raises(
        MarsclfError, match=rf"metrics\.json: splits\.test\.accuracy is .*{accuracy}"
    ):
        publish.verify()


@pytest.mark.parametrize("document", ["README.md", "MODEL_CARD.md"])
def test_verify_finds_a_changed_number_in_a_document(project: Path, document: str) -> None:
    (project / "MODEL_CARD.md").write_text(README)
    publish.publish("laptop")
    publish.verify()
    path = project / document
    path.write_text(path.read_text().replace("66.7 %", "66.8 %"))
    with pytest.raises(MarsclfError, match=rf"{document}, line 6: is .*66.8 %.*must be .*66.7 %"):
        publish.verify()


def test_verify_finds_a_line_too_many(project: Path) -> None:
    publish.publish("laptop")
    path = project / "README.md"
    path.write_text(path.read_text().replace(END, f"| more |\n{END}"))
    with pytest.raises(MarsclfError, match="README"):
        publish.verify()


def test_verify_needs_the_predictions(project: Path) -> None:
    publish.publish("laptop")
    (paths.RESULTS / "laptop" / "predictions.csv.gz").unlink()
    with pytest.raises(MarsclfError, match=r"predictions\.csv\.gz"):
        publish.verify()


def test_verify_loads_no_network_code() -> None:
    code = (
        "import sys, marsclf.publish; print({'keras', 'tensorflow', 'papermill'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_a_ladder_is_published_and_verified(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, rungs = paths.RUNS / "ladder", {}
    for rung, name in (("original", "original"), ("rgb", "RGB")):
        write_predictions(run_dir / rung / "predictions.csv")
        splits = metrics.measure(read_predictions(run_dir / rung / "predictions.csv"))
        rungs[rung] = {"name": name, "splits": splits, "wall_s": 90.0}
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "04_ladder.png").write_text("chart")
    result = {"dataset": "msl-v1", "data_digest": data.MSL_V1_DIGEST, "rungs": rungs}
    write_json(run_dir / "ladder.json", result | {"backbone": "EfficientNetLite0"})
    markers = [marker.format("ladder") for marker in (publish.BEGIN, publish.END)]
    (project / "RESULTS.md").write_text("# Results\n" + "\n".join(markers) + "\n")
    publish.publish("laptop")
    publish.publish_ladder("ladder")
    test = rungs["rgb"]["splits"]["test"]
    lines = (project / "RESULTS.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| + RGB |"))
    assert f" {test['accuracy']:.1%} |" in line and line.endswith("| 1.5 |")
    assert any("`make run PRESET=b7-reference` | not measured here |" in line for line in lines)
    assert any(line.startswith("| Preset `laptop`, as published |") for line in lines)
    publish.verify()
    assert "ladder: ok" in capsys.readouterr().out
    assert (paths.FIGURES / "ladder" / "04_ladder.png").read_text() == "chart"

    shutil.copytree(run_dir, paths.RUNS / "b7-reference")
    edit(paths.RUNS / "b7-reference" / "ladder.json", "backbone", value="EfficientNetB7")
    publish.publish_ladder("b7-reference")
    lines = (project / "RESULTS.md").read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names == [
        "| Recipe",
        "| ---",
        "| The original's, with EfficientNetLite0",
        "| + RGB",
        "| The original's, with EfficientNetB7",
        "| + RGB",
        "| Preset `laptop`, as published",
    ]
    assert not any("not measured" in line for line in lines)

    stored = paths.RESULTS / "ladder.json"
    before = stored.read_text()
    edit(stored, "rungs", "rgb", "splits", "test", "accuracy", value=0.99)
    with pytest.raises(MarsclfError, match=r"splits\.test\.accuracy is 0\.99, recomputed"):
        publish.verify()
    stored.write_text(before)
    # A score of the test split that the ledger does not hold.
    (paths.RESULTS / "test_ledger.csv").unlink()
    with pytest.raises(MarsclfError, match="does not hold it"):
        publish.verify()
