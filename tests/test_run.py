"""The pipeline around the notebooks: presets, settings, failures, interruptions, results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score
from tiny_project import PARAMETERS, enter_project, make_project, write_notebook, write_predictions

import marsclf
from marsclf import paths
from marsclf.cli import main
from marsclf.data import download
from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import PROBABILITY_COLUMNS, read_predictions
from marsclf.pipeline import presets, run
from marsclf.provenance import commit

SLEEP = """
import os, time
from pathlib import Path
(Path(run_dir) / "kernel.tmp").write_text(str(os.getpid()))
(Path(run_dir) / "kernel.tmp").rename(Path(run_dir) / "kernel.pid")
time.sleep(120)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, make_project(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the tiny notebooks without data or network: the run's folder, and what it printed."""
    root = make_project(tmp_path_factory.mktemp("project"))

    def unreachable(*_: object, **__: object) -> None:
        raise download.NetworkUnreachable("no network")

    with pytest.MonkeyPatch.context() as patch:
        enter_project(patch, root)
        patch.delenv("MARSCLF_DATA_DIR", raising=False)
        patch.setattr(download, "fetch_msl_images", unreachable)
        write_predictions(paths.RESULTS / "laptop" / "predictions.csv.gz")
        left_over = paths.RUNS / "laptop" / "02_fine_tuning.failed.ipynb"
        left_over.parent.mkdir(parents=True)
        left_over.touch()
        with redirect_stdout(StringIO()) as printed:
            run.run("laptop", settings={"seed": 3})
    return root / "runs" / "laptop", printed.getvalue()


def test_a_run_leaves_whole_notebooks_and_metrics(offline_run: tuple[Path, str]) -> None:
    folder, _ = offline_run
    names = {path.name for path in folder.glob("*.ipynb")}
    assert names == {f"{name}.ipynb" for name in (*presets.NOTEBOOKS, "03_published_results")}
    result = json.loads((folder / "metrics.json").read_text())
    assert result["dataset"] == "sample"
    assert (result["preset"], result["backbone"]) == ("laptop", "EfficientNetLite0")
    assert (result["seed"], result["settings"]) == (3, {"seed": 3})
    assert result["parameters"]["rate"] == 0.001  # the preset's 1e-3, which YAML reads as text
    assert result["commit"] == "unknown"
    assert set(result["wall_s"]) == {"total", "data", *presets.NOTEBOOKS, "head"}
    assert sum(result["wall_s"][name] for name in presets.NOTEBOOKS) <= result["wall_s"]["total"]
    assert 30 < result["peak_rss_mb"] < 30_000  # of the process that runs all tests
    assert result["hardware"]["cores"] >= 1
    assert result["hardware"]["python"].startswith("3.")


def test_the_kernel_is_this_python(offline_run: tuple[Path, str]) -> None:
    notebook = nbformat.read(offline_run[0] / "01_data_exploration.ipynb", as_version=4)
    printed = [output.text for cell in notebook.cells for output in cell.get("outputs", [])]
    assert printed == [f"{sys.executable}\n"]


def test_metrics_agree_with_scikit_learn(offline_run: tuple[Path, str]) -> None:
    folder, _ = offline_run
    stored = json.loads((folder / "metrics.json").read_text())["splits"]
    table = pd.read_csv(folder / "predictions.csv")
    assert list(stored) == ["train", "val", "test"]
    for split, rows in table.groupby("split"):
        label, predicted = rows["label"], rows["predicted"]
        f1 = f1_score(label, predicted, labels=label.unique(), average="macro", zero_division=0)
        probabilities = rows[PROBABILITY_COLUMNS]
        top3 = top_k_accuracy_score(label, probabilities, k=3, labels=range(25))
        assert stored[split]["n"] == len(rows)
        assert stored[split]["accuracy"] == pytest.approx(
            accuracy_score(label, predicted), abs=1e-6
        )
        assert stored[split]["macro_f1"] == pytest.approx(f1, abs=1e-6)
        assert stored[split]["top3"] == pytest.approx(top3, abs=1e-6)
        assert 0.9 in [float(key.rpartition("_")[2]) for key in stored[split] if "at" in key]


def test_a_run_says_first_and_last_that_the_data_is_a_sample(
    offline_run: tuple[Path, str],
) -> None:
    folder, printed = offline_run
    assert data.SAMPLE_NOTICE in printed.partition("01_data_exploration")[0]
    assert printed.endswith(f"{data.SAMPLE_NOTICE}\n")
    table = [line.split() for line in printed.splitlines() if line.strip().startswith("test ")]
    assert len(table) == 1
    assert str(folder / "figures") in printed


def test_an_offline_run_shows_the_published_results(offline_run: tuple[Path, str]) -> None:
    folder, _ = offline_run
    source = folder.parents[1] / "results" / "laptop" / "predictions.csv.gz"
    assert (folder / "published" / "figures" / "graph.png").read_text() == str(source)
    own = folder / "predictions.csv"
    assert (folder / "figures" / "graph.png").read_text() == str(own)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("line = 1\nline / 0", r"in cell \[4\] `line = 1`: ZeroDivisionError: division by zero"),
        (
            "from marsclf.errors import MarsclfError\nraise MarsclfError('Mend it.')",
            r"in cell \[4\] `from marsclf.errors import MarsclfError`: Mend it\.",
        ),
        ("import os\nos.kill(os.getpid(), 9)", r"in cell \[4\] `import os`: its Python process"),
        ("pass", r"did not write .*predictions\.csv"),
    ],
)
def test_a_failing_notebook(project: Path, sample_dir: Path, code: str, reason: str) -> None:
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", PARAMETERS[1], code)
    folder = paths.RUNS / "laptop"
    folder.mkdir(parents=True)
    for old in ("metrics.json", "predictions.csv", "model.keras", "03_error_analysis.ipynb"):
        (folder / old).write_text("old")
    with pytest.raises(MarsclfError, match=reason):
        run.run("laptop", sample_dir)
    left = {path.name for path in folder.iterdir() if path.is_file()}
    if code == "pass":
        assert left == {f"{name}.ipynb" for name in presets.NOTEBOOKS}
    else:
        assert left == {"01_data_exploration.ipynb", "02_fine_tuning.failed.ipynb"}
        notebook = nbformat.read(folder / "02_fine_tuning.failed.ipynb", as_version=4)
        executed = [cell for cell in notebook.cells if cell.get("execution_count")]
        assert any(cell.source == "first = 1" for cell in executed)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """In the background of a script Ctrl-C is ignored, also by the processes one starts there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_looks_unfinished(
    tmp_path: Path, sample_dir: Path, number: signal.Signals
) -> None:
    make_project(tmp_path, training=SLEEP)
    package = Path(marsclf.__file__).parent
    shutil.copytree(package, tmp_path / "marsclf", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "runs" / "laptop"
    command = [sys.executable, "-m", "marsclf", "run", "--data-dir", str(sample_dir)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (folder / "kernel.pid").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        kernel = psutil.Process(int((folder / "kernel.pid").read_text()))
        process.send_signal(number)
        _, message = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert message == "error: interrupted; the same command starts it again.\n"
    left = {path.name for path in folder.iterdir()}
    last = "failed" if number == signal.SIGINT else "partial"
    assert left == {"01_data_exploration.ipynb", f"02_fine_tuning.{last}.ipynb", "kernel.pid"}
    deadline = time.monotonic() + 10
    while kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the kernel outlives the run"
        time.sleep(0.1)


def test_an_unknown_preset(project: Path) -> None:
    with pytest.raises(MarsclfError, match=r"no preset 'desktop'; those here are laptop\."):
        run.run("desktop")


@pytest.mark.parametrize("text", ["- a list", "description: x\nexpected: {}", "a: [", "\0"])
def test_a_preset_that_is_none(project: Path, text: str) -> None:
    (paths.PRESETS / "odd.yaml").write_text(text)
    with pytest.raises(MarsclfError, match=r"odd\.yaml"):
        presets.load_preset("odd")


def test_a_preset_extends_another(project: Path) -> None:
    text = "description: d\nexpected: {}\nextends: laptop\nparameters: {seed: 7}\n"
    (project / "presets" / "more.yaml").write_text(text)
    laptop = presets.load_preset("laptop")["parameters"]
    assert presets.load_preset("more")["parameters"] == laptop | {"seed": 7} != laptop


def test_settings_are_read_as_yaml(project: Path) -> None:
    settings = presets.parse_settings(["seed=5", "rate=1e-4", "blocks=[a, b]", "backbone=B0"])
    values = presets.parameters_of("laptop", settings)
    expected = {"seed": 5, "rate": 0.0001, "blocks": ["a", "b"], "backbone": "B0", "epochs": 1}
    assert values == expected


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("epoch=3", r"^--set: .*'epoch'; did you mean epochs\?"),
        ("zzz=3", r"did you mean backbone, blocks, epochs, rate, seed\?"),
        ("data_dir=x", "--data-dir"),
        ("run_dir=x", "set by the run itself"),
        ("predictions_file=x", "set by the run itself"),
        ("preset=x", "the preset with --preset"),
        ("epochs=ten", "must be of type int"),
        ("epochs=true", "must be of type int"),
        ("rate=high", "must be of type float"),
        ("blocks=a", "must be of type list"),
        ("blocks=null", "must be of type list"),
        ("seed=", "--set: seed must be of type int, like its default 0, but is None"),
        ("rate=~", "must be of type float"),
        ("seed", "form name=value"),
        ("=3", "form name=value"),
        ("seed=[", "cannot be read as YAML"),
    ],
)
def test_a_wrong_setting(project: Path, setting: str, reason: str) -> None:
    with pytest.raises(MarsclfError, match=reason):
        presets.parameters_of("laptop", presets.parse_settings([setting]))


def test_what_is_none_by_default_may_be_anything(project: Path) -> None:
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", f"{PARAMETERS[1]}\nsize = None", "pass")
    for text, value in (("size=", None), ("size=64", 64), ("size=[1, 2]", [1, 2])):
        assert presets.parameters_of("laptop", presets.parse_settings([text]))["size"] == value


def test_a_wrong_name_in_a_preset(project: Path) -> None:
    preset = {"description": "x", "expected": {}, "parameters": {"epoch": 3}}
    (paths.PRESETS / "odd.yaml").write_text(yaml.safe_dump(preset))
    with pytest.raises(MarsclfError, match=r"presets/odd\.yaml: no notebook has a parameter"):
        presets.parameters_of("odd")


@pytest.mark.parametrize(
    ("parameters", "tagged", "reason"),
    [
        ("seed = 0", 0, "has 0 cells tagged"),
        ("seed = 0", 2, "has 2 cells tagged"),
        ("import os", 1, "nothing but lines like"),
        ("seed = int('3')", 1, "nothing but lines like"),
        ("seed =", 1, "nothing but lines like"),
    ],
)
def test_a_notebook_that_settings_would_not_reach(
    project: Path, parameters: str, tagged: int, reason: str
) -> None:
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", parameters, "pass", tagged)
    with pytest.raises(MarsclfError, match=rf"02_fine_tuning\.ipynb.*{reason}"):
        run.run("laptop")


def test_a_file_that_is_no_notebook(project: Path) -> None:
    (paths.NOTEBOOKS / "02_fine_tuning.ipynb").write_text("{}")
    with pytest.raises(MarsclfError, match="cannot be read as a notebook"):
        presets.parameters_of("laptop")


def test_predictions_without_a_split(tmp_path: Path) -> None:
    write_predictions(tmp_path / "predictions.csv")
    table = read_predictions(tmp_path / "predictions.csv")
    with pytest.raises(MarsclfError, match="no image of the val split"):
        metrics.measure(table[table["split"] != "val"])


def test_commit_tells_changed_code_but_not_changed_figures(project: Path) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> str:
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=project, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert commit() == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    head = git("rev-parse", "HEAD")
    (project / "README.md").write_text("new tables")
    assert commit() == head
    (paths.PRESETS / "laptop.yaml").write_text("changed")
    assert commit() == f"{head}-dirty"


def test_the_command_line_reports_an_error_in_one_line() -> None:
    command = [sys.executable, "-m", "marsclf", "run", "--preset", "nowhere"]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    ended = subprocess.run(
        command, cwd=paths.PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: There is no preset 'nowhere'")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run", "--colour"], ["run", "--sample", "--data-dir", "x"]]
)
def test_unknown_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_another_python_gets_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
    assert main(["verify"]) == 1
    assert "needs Python 3.11 to 3.13" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "publish", "html"])
@pytest.mark.parametrize("preset", presets.LADDERS)
def test_a_ladder_is_no_single_recipe(
    command: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--preset", preset]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: The preset {preset} is a ladder of recipes, which `make run PR")
    assert said.count("\n") == 1


def test_a_python_without_the_packages_gets_a_sentence() -> None:
    # Without site-packages there is the standard library alone.
    command = [sys.executable, "-S", "-E", "-m", "marsclf", "predict", "image.jpg"]
    ended = subprocess.run(command, cwd=paths.PROJECT_ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.match(r"error: .* lacks the package \w+: make the environment with", ended.stderr)
    assert ended.stderr.count("\n") == 1


def test_the_help_of_run_holds_for_ladders_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "run a preset's notebooks" in " ".join(capsys.readouterr().out.split())


def test_check_data(sample_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check-data", "--data-dir", str(sample_dir)]) == 0
    assert capsys.readouterr().out == f"{sample_dir}: 0 faults\n"
    assert main(["check-data", "--data-dir", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().out


def test_the_library_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Installed from a wheel, without the repository's notebooks and presets."""
    monkeypatch.setattr("marsclf.paths.NOTEBOOKS", tmp_path / "not there")
    for command in ("run", "verify", "publish"):
        assert main([command]) == 1
        assert "This is the library alone, which can predict" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
