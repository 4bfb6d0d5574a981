"""Ray: the same rows as the local engine, though a worker is killed, and each of them once."""

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
from marsclf.classify import on_ray as ray_engine
from marsclf.classify.classifier import load_classifier
from marsclf.classify.table import COLUMNS
from marsclf.cli import main
from marsclf.errors import MarsclfError

IMAGES, A_PART = 180, 4
PATIENCE = 200  # seconds, after which it hangs
PARTS = [f"part-{number:06d}.parquet" for number in range(IMAGES // A_PART)]


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


def test_a_worker_is_killed_in_mid_run(images: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    code = (
        "import sys; from pathlib import Path; from marsclf import ray_engine\n"
        "ray_engine.CORES_A_WORKER, ray_engine.cores = 1, lambda: 2  # so there are two workers\n"
        "sys.exit(ray_engine.predict_on_ray([sys.argv[1]], Path(sys.argv[2]), 0.5, None, None,"
        f" False, images_a_part={A_PART}))"
    )
    command = [sys.executable, "-c", code, str(images), str(output)]
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
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
    assert not partial.exists()
    check(output, rows)


def test_a_run_that_was_stopped(
    images: Path,
    rows: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The parts are made here, without Ray's processes."""
    pytest.importorskip("ray")
    output, partial, made = tmp_path / "out", tmp_path / "out.partial", []

    def work(_ray: object, _address: None, parts: list[str], *rest: object) -> None:
        monkeypatch.setattr("marsclf.provenance._limit", None)  # and give it back at the end
        worker = ray_engine.Worker(*rest, cores_each=1)
        for part in parts:
            if len(made) == 20:
                made.append("stopped")
                raise KeyboardInterrupt
            worker({"part": np.array([part])})
            made.append(part)

    monkeypatch.setattr(ray_engine, "_work", work)

    def run(resume: bool, threshold: float = 0.5, source: Path = images) -> int:
        return ray_engine.predict_on_ray(
            [str(source)], output, threshold, None, None, resume, images_a_part=A_PART
        )

    assert run(resume=False) == 130
    assert f"interrupted; --resume goes on with {partial}." in capsys.readouterr().err
    assert parts_in(partial) == PARTS[:20] and not output.exists()
    with pytest.raises(MarsclfError, match="go on with it by --resume"):
        run(resume=False)
    for other in ({"threshold": 0.9}, {"source": tmp_path}):
        with pytest.raises(MarsclfError, match="other images, or of another classifier or thresh"):
            run(resume=True, **other)
    assert run(resume=True) == 3
    assert made == [*PARTS[:20], "stopped", *PARTS[20:]]
    check(output, rows)
    assert run(resume=True) == 0  # whole already


def test_what_ray_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "there").mkdir()
    source, ray = str(tmp_path), ["--engine", "ray"]
    for arguments, reason in (
        ([source, *ray], "writes a folder of parts"),
        ([source, *ray, "--output", "t.csv"], "'t.csv' looks like one: name a folder without"),
        ([source, *ray, "--output", str(tmp_path / "there")], "is there already"),
        ([source, *ray, "--output", str(tmp_path / "new")], "There is no image in"),
        ([source, *ray, "--output", "new", "--explain", "x"], "--explain is of the local engine"),
        ([source, *ray, "--output", "x" * 300], "cannot be written (File name too long)"),
        ([source, "--address", "auto"], "add --engine ray"),
        ([source, *ray, "--output", "new", "--model", "/gone.npz"], "cannot be read"),
    ):
        assert main(["predict", *arguments]) == 1
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("error", "address", "said"),
    [
        (
            Exception("The node timed out.\nMore."),
            [],
            "Ray does not start here (The node timed out.)",
        ),
        (TimeoutError(), [], "Ray does not start here (TimeoutError)"),
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
    command = ["predict", str(tmp_path), "--engine", "ray", "--output", str(output), *address]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert said in told and f"{output}.partial keeps the list" in told
    assert (tmp_path / "out.partial").is_dir() and not output.exists()


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["predict", str(tmp_path), "--engine", "ray", "--output", "new"]) == 1
    assert "pip install '.[ray]'" in capsys.readouterr().err
