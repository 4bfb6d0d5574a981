"""Ray: the same rows as the local engine, each once, even if processes are killed."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from marsclf import paths
from marsclf.classify.classifier import load_classifier
from marsclf.classify.table import COLUMNS
from marsclf.cli import main

on_ray = pytest.importorskip("marsclf.classify.on_ray")

IMAGES, PER_PART = 180, 4
PATIENCE = 200  # seconds
PARTS = [f"part-{number:06d}.parquet" for number in range(IMAGES // PER_PART)]
RAY = ["--engine", "ray", "--output"]
CODE = (
    "import sys; from marsclf import cli; from marsclf.classify import local, on_ray\n"
    f"on_ray.cores = lambda: 2; local.IMAGES_PER_PART['ray'] = {PER_PART}\n"
    "sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def images(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((sample_dir / "calibrated").iterdir())[: IMAGES - 2]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    shutil.copy(path, os.fsencode(folder) + b"/caf\xe9.jpg")
    return folder


def start(*arguments: str) -> subprocess.Popen:
    """Start the command on two cores."""
    command = [sys.executable, "-c", CODE, "predict", *arguments]
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def parts_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part-*.parquet"))


def wait_for_parts(process: subprocess.Popen, partial: Path, number: int) -> None:
    started = time.monotonic()
    while len(parts_in(partial)) < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.01)


def kill_a_worker(process: subprocess.Popen) -> None:
    """Kill one of Ray's processes while it makes a part."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "make_part" in " ".join(child.cmdline()):
                    child.kill()
                    return
    pytest.fail("no worker was found")


def test_the_run_and_then_a_worker_is_killed(images, tmp_path, capsys) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = [str(images), "--threshold", "0.5", *RAY, str(output)]
    with start(*arguments) as process:
        try:
            wait_for_parts(process, partial, 3)
        finally:
            process.kill()  # Ray's own processes end with it
    (partial / ".part-000020.parquet.killed").mkdir(exist_ok=True)  # as a killed worker leaves it
    assert not output.exists() and len(done := parts_in(partial)) < len(PARTS)
    assert main(["predict", *arguments]) == 1
    assert f"{partial} is from a run that was stopped" in capsys.readouterr().err
    with start(*arguments, "--resume") as process:
        try:
            wait_for_parts(process, partial, len(done) + 5)
            kill_a_worker(process)
            assert len(parts_in(partial)) < len(PARTS)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 3, said  # one file is broken
    assert f"{IMAGES} images" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in output.iterdir()) == PARTS
    expected = load_classifier().predict(images, 0.5)
    found = pd.read_parquet(output).astype(COLUMNS)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert main(["predict", *arguments, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err


def test_arguments_that_ray_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    source, there, new = str(tmp_path), str(tmp_path / "there"), str(tmp_path / "new")
    for arguments, reason in (
        (["--engine", "ray"], "writes a folder: name one"),
        ([*RAY, "t.csv"], "name one without a dot"),
        ([*RAY, there], "exists already"),
        ([*RAY, new, "--explain", "x"], "--explain and --report do not work with"),
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
def test_ray_does_not_start(error, address, said, images, tmp_path, monkeypatch, capsys) -> None:
    def init(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(on_ray.ray, "init", init)
    output = tmp_path / "out"
    assert main(["predict", str(images), *RAY, str(output), *address]) == 1
    told = capsys.readouterr().err
    assert said in told and f"{output}.partial keeps the finished parts" in told
    assert (tmp_path / "out.partial").is_dir() and not output.exists()


def test_without_ray(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["predict", str(tmp_path), *RAY, "new"]) == 1
    assert "lacks the package ray" in (said := capsys.readouterr().err)
    assert "pip install '.[ray]'" in said
