"""The command `run`: results, failures, interruptions, and two runs at once."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from tiny_project import (
    PARAMETERS,
    PREDICT,
    enter_project,
    environment_of,
    execute_here,
    make_project,
    write_notebook,
)

import marsclf
from marsclf import paths
from marsclf.cli import main
from marsclf.data import download, sample
from marsclf.data.dataset import Dataset
from marsclf.data.msl import SAMPLE_NOTICE
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.pipeline import presets, run
from marsclf.provenance import commit

SLEEP = """
import os, time
from pathlib import Path
(Path(run_dir) / "kernel.tmp").write_text(str(os.getpid()))
(Path(run_dir) / "kernel.tmp").rename(Path(run_dir) / "kernel.pid")
time.sleep(120)
"""
ROOT = Path(marsclf.__file__).parents[1]
OLD = ("metrics.json", "predictions.csv", "model.keras", "03_error_analysis.ipynb")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, make_project(tmp_path))
    return tmp_path


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "execute", execute_here)


def leave_old_run(root: Path) -> Path:
    folder = root / "runs" / "laptop"
    folder.mkdir(parents=True)
    for name in OLD:
        (folder / name).write_text("old")
    return folder


def assert_old_run_is_untouched(folder: Path) -> None:
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(OLD, "old")


def run_command(root: Path, sample_dir: Path, code: str) -> list[str]:
    """Make a project with `code` in notebook 01; return the command that runs it there."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "marsclf", make_project(root) / "marsclf", ignore=without)
    write_notebook(root / "notebooks", "01_data_exploration", PARAMETERS[0], code)
    return [sys.executable, "-m", "marsclf", "run", "--data-dir", str(sample_dir)]


def test_a_run_without_data_and_network(
    project, sample_dir, without_kernels, monkeypatch, capsys
) -> None:
    def unreachable(*_: object) -> None:
        raise download.NetworkUnreachable("no network")

    monkeypatch.delenv("MARSCLF_DATA_DIR", raising=False)
    monkeypatch.setattr(download, "fetch", unreachable)
    monkeypatch.setattr(sample, "make_sample", lambda _: sample_dir)
    folder, variables = leave_old_run(project), dict(os.environ)
    run.run("laptop", settings={"seed": 3})
    assert dict(os.environ) == variables
    assert {path.name for path in paths.RUNS.iterdir()} == {"laptop", "unfinished"}
    files = {"predictions.csv", "training.json", "model.keras", "metrics.json"}
    files |= {f"{name}.ipynb" for name in presets.NOTEBOOKS}
    assert {path.name for path in folder.iterdir()} == files | {"figures"}
    result = json.loads((folder / "metrics.json").read_text())
    assert result["settings"] == {"seed": 3} and result["dataset"] == "sample"
    assert result["parameters"]["rate"] == 0.001  # the preset's 1e-3, which YAML reads as text
    printed = capsys.readouterr().out
    assert printed.count(SAMPLE_NOTICE) == 2 and printed.endswith(f"{SAMPLE_NOTICE}\n")
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("test "))
    assert f"{result['splits']['test']['accuracy']:.1%}" in row


def test_a_ladder(project, sample_dir, without_kernels, capsys) -> None:
    run.run("ladder", sample_dir, {"seed": 1})
    folder = paths.RUNS / "ladder"
    result = json.loads((folder / "ladder.json").read_text())
    assert (result["preset"], result["seed"], result["settings"]) == ("ladder", 1, {"seed": 1})
    assert result["rungs"] == json.loads((folder / "rungs.json").read_text())
    assert result["wall_s"] > 0 and result["peak_rss_mb"] > 0
    assert "original, test " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "from marsclf.errors import MarsclfError\nraise MarsclfError('Fix it.')",
            r"in cell \[3\] `from marsclf.errors import MarsclfError`: Fix it\.",
        ),
        (
            "import os\nos.kill(os.getpid(), 9)",
            r"in cell \[3\] `import os`: its Python process .*: perhaps the memory ran out",
        ),
        (
            "import ctypes\nctypes.string_at(0)",
            r"in cell \[3\] .*did not start: Fatal Python error: Segmentation fault",
        ),
    ],
)
def test_a_failing_notebook(project: Path, code: str, reason: str, monkeypatch) -> None:
    # A kernel of the user's own, which must not be taken for that of the package.
    monkeypatch.setenv("JUPYTER_PATH", str(project / "personal"))
    write_kernel(project / "personal", "exit 3")
    write_notebook(paths.NOTEBOOKS, "01_data_exploration", PARAMETERS[0], code)
    with pytest.raises(MarsclfError, match=reason) as failure:
        run.execute("01_data_exploration", project / "out.ipynb", {})
    failed = project / "out.partial.ipynb"
    assert str(failure.value).endswith(f" {failed}") and not (project / "out.ipynb").exists()
    cells = nbformat.read(failed, as_version=4).cells
    executed = [cell.source for cell in cells if cell.get("execution_count")]
    assert "first = 1" in executed


def test_a_kernel_that_does_not_start(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "JUPYTER", project / "jupyter")
    write_kernel(paths.JUPYTER, "echo It lacks a module. >&2; exit 3")
    with pytest.raises(MarsclfError, match=r"did not start: It lacks a modu"):
        run.execute("01_data_exploration", project / "out.ipynb", {})


def write_kernel(folder: Path, script: str) -> None:
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = ["/bin/sh", "-c", script, "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))


def test_a_refused_run_leaves_the_old_one(project, sample_dir, without_kernels) -> None:
    old = leave_old_run(project)
    with pytest.raises(MarsclfError, match="'sed' is not a parameter"):
        run.run("laptop", sample_dir, {"sed": 1})
    with pytest.raises(MarsclfError, match="typo"):
        run.run("laptop", project / "typo")
    with pytest.raises(MarsclfError, match="head_epochs is 0; it must be above 0"):
        run.run("laptop", sample_dir, {"head_epochs": 0})
    (paths.PRESETS / "huge.yaml").write_text("expected: {disk_gb: 1.0e+9}\nparameters: {}")
    with pytest.raises(MarsclfError, match="The preset huge needs 1000000000.0 GB of disk"):
        run.run("huge", sample_dir)
    assert list(paths.RUNS.iterdir()) == [old]
    lock = paths.RUNS / "unfinished" / "laptop.lock"
    lock.parent.mkdir()
    reason = "Another process is running the preset laptop: wait until it ends, or stop it"
    with FileLock(lock), pytest.raises(MarsclfError, match=reason):
        run.run("laptop", sample_dir)
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", PARAMETERS[1], "pass")
    with pytest.raises(MarsclfError, match=r"did not write .*training\.json"):
        run.run("laptop", sample_dir)
    assert_old_run_is_untouched(old)


def test_test_figures_are_in_the_ledger_before_they_are_shown(
    project: Path, sample_dataset: Dataset, without_kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, old = replace(sample_dataset, name="msl-v1"), leave_old_run(project)
    monkeypatch.setattr(run, "open_dataset", lambda *_: real)
    training = PREDICT.replace('"sample"', '"msl-v1"')
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", PARAMETERS[1], training)
    write_notebook(paths.NOTEBOOKS, "03_error_analysis", PARAMETERS[2], "1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run.run("laptop", settings={"seed": 5})
    assert_old_run_is_untouched(old)
    (row,) = ledger.rows()
    assert (row["preset"], row["seed"], row["settings"]) == ("laptop", "5", '{"seed": 5}')
    parameters = presets.parameters_of("laptop", {"seed": 5})
    assert row["recipe"] == ledger.recipe_digest({"parameters": parameters})


def test_the_kernel_imports_the_package_of_the_run(tmp_path: Path, sample_dir: Path) -> None:
    """Not another checkout, which the environment may name or have installed."""
    command = run_command(tmp_path, sample_dir, "import marsclf.figures.results")
    broken = tmp_path / "marsclf" / "figures" / "results.py"
    broken.write_text("import sys\nraise ImportError(sys.executable)")
    options = {"env": environment_of(ROOT), "capture_output": True, "text": True}
    ended = subprocess.run(command, cwd=tmp_path, **options)
    assert ended.returncode == 1
    assert "01_data_exploration failed in cell [4]" in ended.stderr
    assert f"ImportError: {sys.executable}" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended(tmp_path: Path, sample_dir: Path, number: signal.Signals) -> None:
    command, old = run_command(tmp_path, sample_dir, SLEEP), leave_old_run(tmp_path)
    pid = old.parent / "unfinished" / "laptop" / "kernel.pid"
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A script in the background ignores Ctrl-C, and so do the processes that it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, preexec_fn=heed, **output) as process:
        deadline = time.monotonic() + 60
        while not pid.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        kernel = psutil.Process(int(pid.read_text()))
        process.send_signal(number)
        _, message = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert message == "error: interrupted; the same command starts it again.\n"
    assert_old_run_is_untouched(old)
    deadline = time.monotonic() + 10
    while kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the kernel outlives the run"
        time.sleep(0.1)
    FileLock(pid.parent.with_name("laptop.lock")).acquire(timeout=0).lock.release()


def test_commit_tells_changed_code_but_not_changed_figures(project: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.check_output(command, cwd=project, text=True).strip()

    assert commit() == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    head = git("rev-parse", "HEAD")
    (project / "README.md").write_text("new tables")
    notebook = paths.NOTEBOOKS / "01_data_exploration.ipynb"
    stored = json.loads(notebook.read_text())
    code = next(cell for cell in stored["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"name": "stdout", "output_type": "stream", "text": "saved with outputs"}]
    notebook.write_text(json.dumps(stored))
    assert commit() == head
    code["source"] = "seed = 1"
    notebook.write_text(json.dumps(stored))
    assert commit() == f"{head}-dirty"
    git("checkout", "--", "notebooks")
    assert commit() == head
    (paths.PRESETS / "laptop.yaml").write_text("changed")
    assert commit() == f"{head}-dirty"


def test_check_data(sample_dir, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["check-data", "--data-dir", str(sample_dir)]) == 0
    assert capsys.readouterr().out == f"{sample_dir}: 0 faults\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["check-data", "--data-dir", "~/none"]) == 1
    assert f"{tmp_path / 'none'} is missing or not a folder" in capsys.readouterr().out


def test_the_library_alone(monkeypatch, capsys) -> None:
    """Installed from a wheel, without the repository's notebooks and presets."""
    monkeypatch.setattr(paths, "NOTEBOOKS", Path("missing"))
    assert main(["run"]) == 1
    assert "the library alone, which can only predict" in capsys.readouterr().err


def test_an_unsuitable_python_gets_a_sentence() -> None:
    # Without site-packages there is the standard library alone.
    bare = ["-S", "-E", "-m", "marsclf", "predict", "image.jpg"]
    old = "import runpy, sys; sys.version_info = (3, 9, 6, 'final', 0); "
    old += "runpy.run_module({!r}, run_name='__main__')"
    version = r"error: marsclf needs Python 3.11 to 3.13, not .*\n"
    for arguments, reason in (
        (bare, r"error: .* lacks the package \w+: make the environment with.*\n"),
        (["-c", old.format("marsclf")], version),
        (["-c", old.format("tools.verify")], version),
    ):
        command = [sys.executable, *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert re.fullmatch(reason, ended.stderr)
    # What is imported before must be in the syntax of that version.
    for file in ("marsclf/__init__.py", "marsclf/__main__.py", "tools/__init__.py"):
        ast.parse((ROOT / file).read_text(), feature_version=9)


def test_errors_of_the_system_are_sentences(project: Path, sample_dir: Path, capsys) -> None:
    command = f"{sys.executable} -m marsclf check-data --data-dir {sample_dir}"
    full = r"error: standard output .* \(No space left.*\n"
    # The program `true` has ended before anything is printed.
    for output, status, message in (("> /dev/full", 1, full), ("| true", 141, "")):
        shell = ["bash", "-c", f"set -o pipefail; {command} {output}"]
        ended = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == status and re.fullmatch(message, ended.stderr)
    paths.CACHE.write_text("")  # where a folder should be: as for one that cannot be written
    assert main(["run", "--sample"]) == 1
    message = rf"error: {paths.CACHE}.* cannot be read or written .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
