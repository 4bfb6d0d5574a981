"""Ray: the same rows as the local engine, each once, even if a worker is killed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from marsclf import paths
from marsclf.classify import on_ray
from marsclf.classify.classifier import load_classifier
from marsclf.classify.table import COLUMNS
from marsclf.cli import main

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
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


@contextmanager
def killed_at_the_end(process: subprocess.Popen) -> Iterator[None]:
    """Let no process outlive a test that fails; Ray's own end with the one that started them."""
    try:
        yield
    finally:
        process.kill()


def parts_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part-*.parquet"))


def check(output: Path, rows: pd.DataFrame) -> None:
    assert sorted(path.name for path in output.iterdir()) == PARTS
    found = pd.read_parquet(output).astype(COLUMNS)
    pd.testing.assert_frame_equal(found, rows, check_exact=True)


def test_a_worker_is_killed(images: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    code = (
        "import sys; from marsclf import cli; from marsclf.classify import on_ray\n"
        "on_ray.CORES_PER_WORKER, on_ray.cores = 1, lambda: 2  # so there are two workers\n"
        f"on_ray.IMAGES_PER_PART = {PER_PART}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["predict", str(images), "--threshold", "0.5", *RAY, str(output)]
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process,
        killed_at_the_end(process),
    ):
        started = time.monotonic()
        while not parts_in(partial):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - started < PATIENCE
            time.sleep(0.01)
        workers = workers_of(process)
        busiest = max(workers, key=lambda worker: worker.cpu_times().user)
        busiest.kill()
        busiest.wait()
        assert len(workers) == 2 and len(parts_in(partial)) < len(PARTS)
        _, said = process.communicate(timeout=PATIENCE)
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
    pytest.importorskip("ray")
    output, partial, made = tmp_path / "out", tmp_path / "out.partial", []

    def classify_parts(
        folder: Path, missing: list[str], threshold: float, model: Path, _: None
    ) -> None:
        monkeypatch.setattr("marsclf.provenance._limit", None)  # and give it back at the end
        shutil.copy(model, folder / "_list" / on_ray.CLASSIFIER)
        worker = on_ray.Worker(folder, threshold, cores_each=1)
        for part in missing:
            if len(made) == 20:
                made.append("stopped")
                raise KeyboardInterrupt
            worker({"part": np.array([part])})
            made.append(part)

    monkeypatch.setattr(on_ray, "classify_parts", classify_parts)
    monkeypatch.setattr(on_ray, "IMAGES_PER_PART", PER_PART)
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
    pytest.importorskip("ray")
    (tmp_path / "there").mkdir()
    source, there, new = str(tmp_path), str(tmp_path / "there"), str(tmp_path / "new")
    for arguments, reason in (
        (["--engine", "ray"], "writes a folder: name one"),
        ([*RAY, "t.csv"], "name one without a dot"),
        ([*RAY, there], "exists already"),
        ([*RAY, new], "There is no image in"),
        ([*RAY, new, "--explain", "x"], "--explain needs the local engine"),
        ([*RAY, "x" * 300], "cannot be written (File name too long)"),
        ([*RAY, new, "--model", "/gone.safetensors"], "cannot be read"),
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    output = tmp_path / "out"
    assert main(["predict", str(tmp_path), *RAY, str(output), *address]) == 1
    told = capsys.readouterr().err
    assert said in told and f"{output}.partial keeps the finished parts" in told
    assert (tmp_path / "out.partial").is_dir() and not output.exists()


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["predict", str(tmp_path), *RAY, "new"]) == 1
    assert "pip install '.[ray]'" in capsys.readouterr().err
