"""Ray: the same rows as the local engine, though a worker is killed, and each of them once."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from marsclf.__main__ import main
from marsclf.classifier import load_classifier
from marsclf.rows import COLUMNS

IMAGES = 240


@pytest.fixture(scope="module")
def images(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((sample_dir / "calibrated").iterdir())[: IMAGES - 2]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    shutil.copy(path, os.fsencode(folder) + b"/caf\xe9.jpg")
    return folder


def start(images: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from marsclf.ray_engine import predict_on_ray\n"
        "images, output, *more = sys.argv[1:]\n"
        "sys.exit(predict_on_ray([images], Path(output), 0.5, None, None, 'resume' in more,"
        " workers=2, images_a_part=4))"
    )
    command = [sys.executable, "-c", code, str(images), str(output), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_for_parts(folder: Path, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob("part-*.parquet")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_killed_worker_and_a_killed_run(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(images, output)
    wait_for_parts(partial, process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[0].kill()
    _, said = process.communicate()
    assert process.returncode == 3, said  # one file is broken
    assert f"{IMAGES} images" in said and "Traceback" not in said
    # It was no idle worker: the run ended without it, or with another in its place.
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"part-{number:06d}.parquet" for number in range(IMAGES // 4)]
    assert not partial.exists()
    table = pd.read_parquet(output).astype(COLUMNS)
    assert table["path"].is_unique
    local = load_classifier().predict(images, 0.5)
    pd.testing.assert_frame_equal(table, local, check_exact=True)

    # The same again, as if the whole run had been killed with some parts made.
    output.rename(partial)
    for path in [*partial.iterdir()][::3]:
        path.unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("part-*")}
    refused = start(images, output)
    assert refused.wait() == 1 or "MarsclfError" in refused.stderr.read()


def test_what_ray_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (tmp_path / "there").mkdir()
    source, ray = str(tmp_path), ["--engine", "ray"]
    for arguments, reason in (
        ([source, *ray], "writes a folder of parts"),
        ([source, *ray, "--output", "t.csv"], "writes a folder of parts"),
        ([source, *ray, "--output", str(tmp_path / "there")], "is there already"),
        ([source, *ray, "--output", str(tmp_path / "new")], "There is no image in"),
        ([source, *ray, "--output", "new", "--explain", "x"], "--explain is of the local engine"),
        ([source, "--address", "auto"], "add --engine ray"),
        ([source, *ray, "--output", "new", "--model", "/gone.npz"], "cannot be read"),
    ):
        assert main(["predict", *arguments]) == 1
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["predict", str(tmp_path), "--engine", "ray", "--output", "new"]) == 1
    assert "pip install 'marsclf[ray]'" in capsys.readouterr().err
