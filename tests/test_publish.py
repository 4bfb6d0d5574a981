"""Publishing refuses all but complete runs of the real data; verifying finds what is wrong."""

import gzip
import json
import shutil
from functools import reduce
from pathlib import Path

import pytest
from tiny_project import enter_project, write_predictions

from marsclf import paths
from marsclf.data.dataset import SPLITS
from marsclf.data.msl import MSL_V1, MSL_V2
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger, metrics
from marsclf.evaluation.predictions import read_predictions
from marsclf.files import write_json
from tools import publish, results, verify

PARAMETERS = {"seed": 0, "test_zooms": [1.0]}
TRAINING = {"preset": "laptop", "seed": 0, "commit": "0" * 40, "data_digest": MSL_V1.digest}
HARDWARE = {"cpu": "Some CPU", "cores": 2, "memory_gb": 8.0, "gpu": None}
NAMES = [f"rock {number}" for number in range(25)]
RESAMPLES = 50  # of the bootstrap, which takes most of the time
TABLES = ("headline", "results", "runs", "seeds", "classes", "confusions")


def page(*names: str) -> str:
    markers = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in names]
    return "\n\n".join(["# Title", *markers, "The end.\n"])


def read_classifier(path: Path) -> tuple[dict, dict, str]:
    if not path.is_file():
        raise MarsclfError(f"The classifier {path} cannot be read.")
    return {}, json.loads(path.read_text()), "digest"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one complete run, as if of the real data, but with 40 images per split."""
    root = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        enter_project(patch, root)
        patch.setattr(metrics, "RESAMPLES", RESAMPLES)
        (root / "README.md").write_text(page("results"))
        others = {"source": "A, B", "url": "https://example.org", "remarks": "old"}
        write_json(paths.RESULTS / "published.json", [others | {"test": 66.7, "macro_f1": None}])
        make_run("laptop")
        metadata = {"zooms": [1.0], "classes": NAMES, "training": TRAINING}
        metadata |= {"calibration": {"temperature": 0.5}}
        record = TRAINING | {"parameters": PARAMETERS, "temperature": 0.5, "classes": NAMES}
        for labels, file in paths.CLASSIFIERS.items():
            folder = paths.RESULTS / "classifiers" / labels
            write_predictions(folder / "predictions.csv.gz")
            measured = metrics.summarize(read_predictions(folder / "predictions.csv.gz"))
            write_json(folder / "metrics.json", record | {"out_of_fold": measured})
            write_json(file, metadata)
    return root


@pytest.fixture
def project(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, shutil.copytree(complete, tmp_path, dirs_exist_ok=True))
    monkeypatch.setattr(metrics, "RESAMPLES", RESAMPLES)
    monkeypatch.setattr(results, "IMAGES", {"msl-v1": dict.fromkeys(SPLITS, 40), "msl-v2.1": {}})
    monkeypatch.setattr(results.classifier_file, "read", read_classifier)
    monkeypatch.setattr(publish, "parameters_of", lambda _: PARAMETERS | {"test_zooms": (1.0,)})
    monkeypatch.setattr(publish, "data_of", lambda _: "msl-v1")
    return tmp_path


def make_run(preset: str, splits: tuple = SPLITS, **changes: object) -> None:
    folder = paths.RUNS / preset
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "graph.png").write_text("new graph")
    (folder / "figures" / "01_counts.png").write_text("counts")
    write_predictions(folder / "predictions.csv", 40, splits)
    record = TRAINING | {"dataset": "msl-v1", "preset": preset, "parameters": PARAMETERS}
    record |= {"backbone": "Lite0", "hardware": HARDWARE, "temperature": 0.5, "settings": {}}
    record |= {"wall_s": {"total": 600.0}, "peak_rss_mb": 1500} | changes
    write_json(folder / "metrics.json", record)
    splits = ledger.score(folder / "predictions.csv")
    write_json(folder / "metrics.json", record | {"splits": splits})


def edit(path: Path, keys: str, value: object) -> None:
    tree = json.loads(path.read_text())
    *parents, last = keys.split()
    reduce(dict.__getitem__, parents, tree)[last] = value
    write_json(path, tree)


def everything_in(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(project: Path, reason: str, preset: str = "laptop") -> None:
    """Publishing refuses for this reason and changes nothing."""
    before = everything_in(project)
    with pytest.raises(MarsclfError, match=reason):
        publish.publish(preset)
    assert everything_in(project) == before


def unverified(reason: str) -> None:
    with pytest.raises(MarsclfError, match=reason):
        verify.verify()


def test_publish(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.FIGURES / "laptop").mkdir(parents=True)
    (paths.FIGURES / "laptop" / "old.png").touch()
    assert publish.main(["--preset", "laptop"]) == 0
    run_dir = paths.RUNS / "laptop"
    packed = paths.RESULTS / "laptop" / "predictions.csv.gz"
    assert gzip.decompress(packed.read_bytes()) == (run_dir / "predictions.csv").read_bytes()
    test = json.loads((paths.RESULTS / "laptop" / "metrics.json").read_text())["splits"]["test"]
    readme = (project / "README.md").read_text()
    assert readme.startswith("# Title\n\n") and readme.endswith("\n\nThe end.\n")
    assert "| [A, B](https://example.org) | 66.7% | – | old |" in readme
    assert f"| **{test['accuracy']:.1%}** | **{test['macro_f1']:.3f}** | mean over 1 seed" in readme
    assert "Warning" not in capsys.readouterr().out
    assert verify.main([]) == 0
    assert "laptop: ok" in capsys.readouterr().out
    # A second time nothing changes; figures of the data belong to the default preset alone.
    before = everything_in(project)
    publish.publish("laptop")
    assert everything_in(project) == before
    make_run("other")
    publish.publish("other")
    found = {path.relative_to(paths.FIGURES).as_posix() for path in paths.FIGURES.rglob("*.png")}
    assert found == {"laptop/01_counts.png", "laptop/graph.png", "other/graph.png"}


def test_a_run_without_a_test_split_on_another_data_set(project: Path, monkeypatch) -> None:
    (project / "RESULTS.md").write_text(page(*TABLES))
    publish.publish("laptop")
    about = {"dataset": "msl-v2.1", "data_digest": MSL_V2.digest, "classes": NAMES}
    make_run("atlas", ("train", "val"), **about)
    refused(project, "dataset was 'msl-v2.1', but the preset says 'msl-v1'", "atlas")
    monkeypatch.setattr(publish, "data_of", lambda _: "msl-v2.1")
    publish.publish("atlas")
    text = (project / "RESULTS.md").read_text()
    assert "| [`laptop`](results/laptop/metrics.json) | msl-v1 | 0 | " in text
    assert "| [`atlas`](results/atlas/metrics.json) | msl-v2.1 | 0 | " in text
    assert "| `laptop` | msl-v1 | 0 | " in text and "| `atlas` | msl-v2.1 | 0 | " not in text
    assert "| ground |" in text and "| rock 8 |" not in text
    verify.verify()


def test_tables_show_what_the_predictions_give(project: Path) -> None:
    (project / "RESULTS.md").write_text(page(*TABLES, "selection", "comparisons", "costs"))
    (paths.RESULTS / "selection.csv").write_text(
        "time,commit,preset,settings,criterion,early,grey,log loss,wall_s\n"
        "now,abc,laptop,{},0.8,0.7,0.9,,120\n"
        'now,abc,laptop,"{""seed"": 1}",0.85,0.8,0.9,0.51,60\n'
    )
    (paths.RESULTS / "comparisons.csv").write_text(
        "commit,preset,settings,seeds,difference,low,high,criterion,early,log loss,wall_s\n"
        "abc,laptop,{},3,,,,0.8,0.7,0.5,120\n"
        'abc,laptop,"{""balance"": 0}",3,-0.01,-0.03,0.012,0.79,0.8,0.51,60\n'
    )
    run = paths.RUNS / "laptop" / "predictions.csv"
    test = json.loads(run.with_name("metrics.json").read_text())["splits"]["test"]
    (line,) = ledger.rows()
    another = line | {"seed": 1, "accuracy": test["accuracy"] + 0.1}
    ledger.append_row(paths.RESULTS / ledger.NAME, another)
    publish.publish("laptop")
    mean = f"{test['accuracy'] + 0.05:.1%} ± {0.1 / 2**0.5:.1%}"
    rows = read_predictions(run).query("split == 'test'")
    ground = rows.query("label == 8")
    pairs = metrics.errors(rows, MSL_V1.classes).groupby(["true", "said"]).size()
    (true, said), count = pairs.idxmax(), pairs.max()
    share = count / (rows["label"] == MSL_V1.classes.index(true)).sum()
    low, high = test["accuracy_ci95"]
    lines = [
        f"**{mean} accuracy on the test set of msl-v1** (mean ± standard deviation over 2 seeds)",
        f"| {test['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {test['macro_f1']:.3f} | ",
        "| 10.0 min | 1.5 GB | 2 cores of Some CPU, no GPU, 8 GB | 000000000000 |",
        f"| `laptop` | msl-v1 | 0, 1 | {mean} |",
        f"| ground | {len(ground)} | {(ground['predicted'] == 8).mean():.1%} |",
        f"| {true} | {said} | {count} | {share:.1%} |",
        "| `laptop`: seed 1 | 85.0% | 80.0% | 90.0% | 0.510 | 1 | abc |\n"
        "| `laptop`: none | 80.0% | 70.0% | 90.0% | – | 2 | abc |",
        "| `laptop`: none | 3 | – | 80.0% | 70.0% | 0.500 | 2 | abc |\n"
        "| `laptop`: balance 0 | 3 | -1.0% (-3.0% to +1.2%) | 79.0% | 80.0% | 0.510 | 1 | abc |",
        "**Not measured**: run `make bench`.\n",
    ]
    text = (project / "RESULTS.md").read_text()
    assert [line for line in lines if line not in text] == []
    verify.verify()


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        ("dataset", "sample", "dataset was 'sample', but the preset says 'msl-v1'"),
        ("data_digest", "f" * 64, "not the real msl-v1"),
        ("parameters seed", 1, "seed was 1, but the preset says 0"),
        ("splits test accuracy", 0.99, "test.accuracy is 0.99, recomputed 0"),
        ("splits val", {}, "val.n is None, recomputed 40"),
        ("splits extra", {"n": 3}, "extra.n is 3, recomputed None"),
    ],
)
def test_publish_refuses_metrics(project: Path, keys: str, value: object, reason: str) -> None:
    edit(paths.RUNS / "laptop" / "metrics.json", keys, value)
    refused(project, f"laptop cannot be published: .*{reason}")


def test_publish_refuses_predictions(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paths.RUNS / "laptop" / "predictions.csv"
    text = path.read_text()
    _, name, label, _ = text.splitlines()[1].split(",", 3)
    path.write_text(text.replace(f"{name},{label},", f"{name},{(int(label) + 1) % 25},"))
    refused(project, "train.accuracy is .*the ledger of test scores, does not list it")
    path.write_text(text)
    monkeypatch.setitem(results.IMAGES, "msl-v1", {"train": 40, "val": 40, "test": 41})
    refused(project, "40 images in the test split instead of 41")


def test_publish_refuses_an_incomplete_run(project, capsys) -> None:
    shutil.rmtree(paths.RUNS / "laptop" / "figures")
    refused(project, "there are no figures in")
    file = paths.RUNS / "laptop" / "metrics.json"
    for text, reason in (("{}", "is not the result of a run"), ("{", "cannot be read as JSON")):
        file.write_text(text)
        refused(project, f"{reason} .*`make run PRESET=laptop`")
    file.unlink()
    assert publish.main([]) == 1
    assert capsys.readouterr().err.startswith(f"error: There is no {file}: run `make run")


def test_verify_finds_what_is_missing_or_changed(project: Path) -> None:
    (project / "MODEL_CARD.md").write_text(page("results"))
    publish.publish("laptop")
    folder, card = paths.RESULTS / "laptop", project / "MODEL_CARD.md"
    promised = paths.RESULTS / "classifiers" / "parts" / "metrics.json"
    unmeasured = paths.CLASSIFIERS["content"]
    accuracy = json.loads((folder / "metrics.json").read_text())["splits"]["train"]["accuracy"]
    stored = f'"accuracy": {accuracy}'
    faults = [
        (folder / "metrics.json", stored, f"{stored}01", r"train\.accuracy is "),
        (card, "66.7%", "66.8%", r"MODEL_CARD\.md, line 6: is .*66.8%.*must be .*66.7%"),
        (paths.RESULTS / ledger.NAME, "predictions_sha256", None, "does not list it"),
        (folder / "predictions.csv.gz", "", None, r"predictions\.csv\.gz"),
        (paths.CLASSIFIERS["parts"], "", None, "cannot be read"),
        (unmeasured, '"seed": 0', '"seed": 1', "its seed is 1, not 0"),
        (unmeasured, '"laptop"', '"b7"', "its preset is 'b7', not 'laptop'"),
        (unmeasured, "1.0", "0.5", r"its zooms is \[0\.5\], not \[1\.0\]"),
        (unmeasured, '"temperature": 0.5', '"temperature": 0.7', r"temperature is 0\.7, not 0\.5"),
        (promised, '"ece": 0', '"ece": 1', r"parts\.ece is 1"),
    ]
    for file, old, new, reason in faults:
        before = file.read_bytes()
        if new is None:
            file.unlink()
        else:
            file.write_text(file.read_text().replace(old, new, 1))
        unverified(reason)
        file.write_bytes(before)
    verify.verify()


def test_markers_come_in_pairs_and_have_templates(project: Path) -> None:
    for text, reason in (
        ("<!-- results:begin -->\n<!-- seeds:end -->\n", "no end marker follows"),
        ("<!-- other:begin -->\n<!-- other:end -->\n", "no template for <!-- other:begin -->"),
    ):
        (project / "README.md").write_text(text)
        refused(project, rf"README\.md: .*{reason}")


def test_a_ladder_is_published_and_verified(project: Path) -> None:
    (project / "RESULTS.md").write_text(page("ladder"))
    run_dir, rungs = paths.RUNS / "ladder", {}
    for rung in ("original", "rgb"):
        write_predictions(run_dir / rung / "predictions.csv")
        splits = metrics.measure(read_predictions(run_dir / rung / "predictions.csv"))
        rungs[rung] = {"name": rung.upper(), "splits": splits, "wall_s": 90.0}
    record = TRAINING | {"dataset": "msl-v1", "backbone": "Lite0", "parameters": PARAMETERS}
    write_json(run_dir / "ladder.json", record | {"rungs": rungs})
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "04_ladder.png").write_text("chart")
    publish.publish("laptop")
    publish.publish("ladder")
    accuracy = rungs["rgb"]["splits"]["test"]["accuracy"]
    lines = (project / "RESULTS.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| + RGB |"))
    assert f" {accuracy:.1%} (" in line and line.endswith("| 1.5 |")
    assert any(line.startswith("| Preset `laptop`, as published |") for line in lines)
    assert (paths.FIGURES / "ladder" / "04_ladder.png").read_text() == "chart"
    verify.verify()
    for folder in (run_dir, paths.RESULTS / "ladder"):
        edit(folder / "ladder.json", "rungs rgb splits test accuracy", 0.99)
    unverified(fault := r"rgb\.test\.accuracy is 0\.99, recomputed")
    refused(project, fault, "ladder")
