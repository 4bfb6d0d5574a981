"""Ray: the same rows as the local engine, each once, even if a worker is killed."""

import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from marsclf import paths
from marsclf.classify import local
from marsclf.classify.classifier import load_classifier
from marsclf.classify.table import COLUMNS
from marsclf.cli import main

on_ray = pytest.importorskip("marsclf.classify.on_ray")

IMAGES, PER_PART = 180, 4
PATIENCE = 200  # seconds
PARTS = [f"part-{number:06d}.parquet" for number in range(IMAGES // PER_PART)]
RAY = ["--engine", "ray", "--output"]


@pytest.fixture(scope="module")
def images(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((sample_dir / "calibrated").iterdir())[: IMAGES - 2]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    shutil.copy(path, os.fsencode(folder) + b"/caf\xe9.jpg")
    return folder


@pytest.fixture(scope="module")
def rows(images: Path) -> pd.DataFrame:
    """The rows of the local engine."""
    return load_classifier().predict(images, 0.5)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "make_part" in " ".join(child.cmdline()):
                found.append(child)
    return found


def parts_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part-*.parquet"))


def check(output: Path, rows: pd.DataFrame) -> None:
    assert sorted(path.name for path in output.iterdir()) == PARTS
    found = pd.read_parquet(output).astype(COLUMNS)
    pd.testing.assert_frame_equal(found, rows, check_exact=True)


def test_a_worker_is_killed(images: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    code = (
        "import sys; from marsclf import cli; from marsclf.classify import local, on_ray\n"
        f"on_ray.cores = lambda: 2; local.IMAGES_PER_PART['ray'] = {PER_PART}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["predict", str(images), "--threshold", "0.5", *RAY, str(output)]
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with process:
        try:
            started = time.monotonic()
            while len(parts_in(partial)) < 2:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() - started < PATIENCE
                time.sleep(0.01)
            workers = workers_of(process)
            busiest = max(workers, key=lambda worker: worker.cpu_times().user)
            busiest.kill()
            busiest.wait()
            assert len(workers) == 2 and len(parts_in(partial)) < len(PARTS)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # Ray's own processes end with it
    assert process.returncode == 3, said  # one file is broken
    assert f"{IMAGES} images" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check(output, rows)


def test_resume_continues_with_the_missing_parts(
    images: Path,
    rows: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The parts are made in this process, without Ray's."""
    output, partial, made = tmp_path / "out", tmp_path / "out.partial", []

    def classify_parts(folder: Path, missing: list[str], options: Namespace) -> None:
        monkeypatch.setattr("marsclf.provenance._limit", None)  # and give it back at the end
        shutil.copy(options.model, folder / "_list" / on_ray.CLASSIFIER)
        for part in missing:
            if len(made) == 20:
                made.append("stopped")
                raise KeyboardInterrupt
            on_ray.make_part(folder, part, options.threshold)
            made.append(part)

    monkeypatch.setattr(on_ray, "classify_parts", classify_parts)
    monkeypatch.setitem(local.IMAGES_PER_PART, "ray", PER_PART)
    command = ["predict", str(images), *RAY, str(output), "--threshold"]
    assert main([*command, "0.5"]) == 130
    assert f"interrupted; --resume continues from {partial}." in capsys.readouterr().err
    assert parts_in(partial) == PARTS[:20] and not output.exists()
    (partial / ".part-000020.parquet.killed").mkdir()  # as a killed worker leaves it
    for arguments in (["0.5"], ["0.9", "--resume"]):
        assert main([*command, *arguments]) == 1
        assert f"{partial} is from " in capsys.readouterr().err
    assert main([*command, "0.5", "--resume"]) == 3
    assert made == [*PARTS[:20], "stopped", *PARTS[20:]]
    check(output, rows)
    assert main([*command, "0.5", "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err


def test_arguments_that_ray_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    source, there, new = str(tmp_path), str(tmp_path / "there"), str(tmp_path / "new")
    for arguments, reason in (
        (["--engine", "ray"], "writes a folder: name one"),
        ([*RAY, "t.csv"], "name one without a dot"),
        ([*RAY, there], "exists already"),
        ([*RAY, new], "There is no image in"),
        ([*RAY, new, "--explain", "x"], "--explain needs the local engine"),
    ):
        assert main(["predict", source, *arguments]) == 1
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("error", "address", "said"),
    [
        (Exception("The node timed out.\nMore."), [], "does not start (The node timed out.)"),
        (ConnectionError("Refused."), ["--address", "a:1"], "answers at 'a:1' (Refused.)"),
    ],
)
def test_ray_does_not_start(
    error: Exception,
    address: list[str],
    said: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(on_ray.ray, "init", init)
    output = tmp_path / "out"
    assert main(["predict", str(images), *RAY, str(output), *address]) == 1
    told = capsys.readouterr().err
    assert said in told and f"{output}.partial keeps the finished parts" in told
    assert (tmp_path / "out.partial").is_dir() and not output.exists()


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["predict", str(tmp_path), *RAY, "new"]) == 1
    assert "lacks the package ray" in (said := capsys.readouterr().err)
    assert "pip install '.[ray]'" in said
