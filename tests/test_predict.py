"""The command `predict`: one row per file, and the table appears complete or not at all."""

import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from marsclf import paths
from marsclf.classify import find, local
from marsclf.classify.classifier import Classifier
from marsclf.classify.table import COLUMNS, WRITERS, Row, printable, read_parquet
from marsclf.cli import main
from marsclf.data.dataset import Dataset

IMAGES, PER_PART = 40, 16
COMMAND = ["predict", "images", "--output", "t.csv"]


@pytest.fixture(autouse=True)
def small_classifier(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local, "load_classifier", lambda _: classifier)
    monkeypatch.setattr(local, "IMAGES_PER_PART", PER_PART)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(sample_dataset: Dataset, tmp_path: Path) -> Path:
    """A folder of 40 images, one of them broken."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in sample_dataset.index["path"][: IMAGES - 1]:
        (folder / Path(path).name).write_bytes((sample_dataset.root / path).read_bytes())
    (folder / "sub" / "broken.jpg").write_bytes(b"no image")
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with one sentence, and return that."""
    capsys.readouterr()
    assert main(["predict", *map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert lines[-1] == error
    return error


def interrupt_after(number: int, *arguments: str) -> None:
    """Run the command, and interrupt it after so many rows."""
    original = Classifier.rows

    def rows(self: Classifier, items: Iterable, threshold: float) -> Iterator:
        yield from islice(original(self, items, threshold), number)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "rows", rows)
        assert main([*COMMAND, *arguments]) == 130


def test_a_table(images: Path, capsys: pytest.CaptureFixture[str], classifier: Classifier) -> None:
    assert main([*COMMAND, "--threshold", "0.2"]) == 3
    table = pd.read_csv("t.csv")
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == IMAGES and table["error"].notna().sum() == 1
    pd.testing.assert_frame_equal(table.astype(COLUMNS), classifier.predict("images", 0.2))
    assert names_in(Path()) == ["images", "t.csv"]
    out, err = capsys.readouterr()
    uncertain = (table["confidence"] < 0.2).sum()
    assert out == "" and "Table: t.csv" in err
    assert f"40 images: {39 - uncertain} certain, {uncertain} uncertain, 1 could not be" in err
    for name, number in table["predicted"].value_counts().items():
        assert f"\n{number:>12}  {name}\n" in err


def test_parquet_and_standard_output_hold_the_same(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [b"a b,c.png", b'quo"te.png', b"line\nbreak\r.png", b"caf\xe9.png", "日本.png".encode()]
    for name in names:
        Image.new("RGB", (9, 9)).save(os.fsdecode(b"images/" + name), "PNG")
    for output in ("t.csv", "t.parquet"):
        assert main(["predict", "images", "--output", output]) == 3
    capsys.readouterr()
    assert main(["predict", "images"]) == 3
    out, err = capsys.readouterr()
    assert out == Path("t.csv").read_bytes().decode() and "45 images" in err
    of_csv, of_parquet = pd.read_csv("t.csv"), pd.read_parquet("t.parquet")
    pd.testing.assert_frame_equal(of_csv.astype(COLUMNS), of_parquet.astype(COLUMNS))
    expected = {f"images/{printable(os.fsdecode(name))}" for name in names}
    assert {"images/caf\\udce9.png", "images/line\nbreak\\r.png"} < expected < {*of_csv["path"]}


text = st.none() | st.text(st.characters(exclude_characters="\0")).map(printable)
number = st.none() | st.floats(0, 1)
flag, sol = st.none() | st.booleans(), st.none() | st.integers(0, 9999)
any_row = st.builds(Row, text, text, number, text, number, flag, number, flag, sol, text, text)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(any_row, max_size=8))
def test_any_rows_are_stored_exactly(tmp_path: Path, rows: list[Row]) -> None:
    WRITERS[".csv"](iter([rows[:3], rows[3:]]), tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        stored = list(csv.reader(file))
    expected = [["" if value is None else str(value) for value in row] for row in rows]
    assert stored == [list(COLUMNS), *expected]
    WRITERS[".parquet"](iter([rows[:3], rows[3:]]), tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet") == rows


def test_resume_continues_with_the_missing_parts(
    images: Path, classifier_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "images", "--output", "complete.csv"]) == 3
    Path("t.csv").write_text("old")
    interrupt_after(2 * PER_PART + 1)
    assert "--resume continues from t.csv.partial" in capsys.readouterr().err
    assert Path("t.csv").read_text() == "old"
    before = {path.name: path.read_bytes() for path in Path("t.csv.partial").glob("*.parquet")}
    assert sorted(before) == ["part-000000.parquet", "part-000001.parquet"]
    # Other images, threshold or classifier, and a new run, are refused.
    for other in (["images"], ["images/sub", "--resume"], ["images", "images/sub", "--resume"]):
        assert "t.csv.partial is from " in failure(capsys, *other, "--output", "t.csv")
    for other in (["--threshold", "0.5"], ["--model", classifier_path]):
        said = failure(capsys, *COMMAND[1:], "--resume", *other)
        assert "is from other images, or from another classifier or threshold" in said
    for name, content in before.items():
        assert (Path("t.csv.partial") / name).read_bytes() == content
    assert main([*COMMAND, "--resume"]) == 3
    assert Path("t.csv").read_bytes() == Path("complete.csv").read_bytes()
    assert "40 images" in (said := capsys.readouterr().err) and "8 took" in said
    assert main([*COMMAND, "--resume"]) == 0
    assert "is complete: there is nothing to resume" in capsys.readouterr().err


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python on the real command, with the published classifier, outside the project."""
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_killed_process_can_be_resumed(images: Path) -> None:
    code = (
        "import os, sys; from marsclf import cli; from marsclf.classify import local, parts\n"
        f"local.IMAGES_PER_PART = {PER_PART}; write_part = parts.write_part\n"
        "def kill(*arguments): write_part(*arguments); os.kill(os.getpid(), 9)\n"
        "parts.write_part = kill; sys.exit(cli.main(sys.argv[1:]))"
    )
    assert run_python("-c", code, *COMMAND).returncode == -9 and not Path("t.csv").exists()
    ended = run_python("-m", "marsclf", *COMMAND, "--resume")
    assert ended.returncode == 3, ended.stderr
    loading, report, *_ = ended.stderr.splitlines()  # nothing of TensorFlow
    assert loading == "Loading the classifier ..." and report.startswith("40 images: ")
    assert "24 took" in report and pd.read_csv("t.csv")["path"].nunique() == IMAGES
    assert names_in(Path()) == ["images", "t.csv"]


def test_a_platform_without_posix_modules(images: Path) -> None:
    """As on Windows; there is no such machine to test with."""
    code = (
        "import os, psutil, sys; sys.modules |= {'fcntl': None, 'resource': None}\n"
        "del os.sched_getaffinity\n"
        "from marsclf import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    ended = run_python("-W", "ignore", "-c", code, *COMMAND)
    assert ended.returncode == 3 and len(pd.read_csv("t.csv")) == IMAGES, ended.stderr


def test_damaged_and_foreign_partial_results(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = Path("t.csv.partial")
    partial.write_text("my notes")
    assert "t.csv.partial holds something else" in failure(capsys, *COMMAND[1:])
    assert partial.read_text() == "my notes"
    partial.unlink()
    interrupt_after(PER_PART - 1)  # without a finished part a run may start again
    interrupt_after(PER_PART + 1)
    damaged = partial / "part-000000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert f"{damaged} is damaged: remove it" in failure(capsys, *COMMAND[1:], "--resume")
    damaged.unlink()
    assert main([*COMMAND, "--resume"]) == 3
    partial.mkdir()
    (partial / "notes").write_text("mine")
    assert "t.csv.partial holds something else" in failure(capsys, *COMMAND[1:], "--resume")


def test_two_runs_at_once(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(".t.csv.lock"):
        assert "Another process is writing t.csv" in failure(capsys, *COMMAND[1:])


def test_no_image(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    said = failure(capsys, "empty", "-", "--output", "t.csv")
    assert "There is no image in empty, standard input" in said
    assert names_in(Path()) == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--output", "t.xlsx"], "must be a .csv or .parquet file"),
        (["--output", "not there/t.csv"], "not there/t.csv cannot be written (No such file"),
        (["--output", "/proc/t.csv"], "/proc/t.csv cannot be written"),
        (["--output", "t.csv", "--threshold", "90"], "between 0 and 1"),
        (["--output", "t.csv", "--model", "images"], "cannot be read"),
        (["--resume"], "name it with --output"),
        (["--explain", "x" * 300], "cannot be read or written (File name too long)"),
        (["--explain", "images/sub/.."], "images/sub/.. is one of the paths to classify"),
        (["images/list.csv", "--output", "images/sub/../list.csv"], "is one of the paths"),
    ],
)
def test_arguments_that_cannot_be_used(
    images: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    (images / "list.csv").write_text("precious")
    before = sorted(Path().rglob("*"))
    assert reason in failure(capsys, "images", *arguments)
    assert sorted(Path().rglob("*")) == before
    assert (images / "list.csv").read_text() == "precious"


def test_overlays(images: Path) -> None:
    for output in ("t.csv", "again.csv"):  # overlays are not taken for images
        arguments = ["--output", output, "--explain", "images/overlays"]
        assert main(["predict", "images", *arguments]) == 3
    table = pd.read_csv("again.csv")
    overlays = names_in(images / "overlays")
    assert len(table) == IMAGES and len(overlays) == IMAGES - 1
    for row in table[table["error"].isna()].itertuples():
        (name,) = [name for name in overlays if name.startswith(Path(row.path).stem + ".")]
        assert name.endswith(".{}.jpg".format(re.sub("[^a-z]+", "_", row.predicted)))
    with Image.open(images / "overlays" / overlays[0]) as overlay:
        assert overlay.width == 900 and np.ptp(np.asarray(overlay)) > 50


@pytest.mark.parametrize("output", ["t.csv", "t.parquet"])
def test_memory_does_not_grow_with_the_number_of_images(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths alone of these images would take 50 MB."""
    number, used = 300_000, []

    def names(*_: object) -> Iterator[str]:
        for count in range(number):
            if count % 10_000 == 0:
                used.append(psutil.Process().memory_info().rss)
            yield f"{'folder' * 10}/{count}.jpg"

    def rows(_: Classifier, items: Iterable[str], threshold: float) -> Iterator:
        return ((path, Row(path, "wheel", 0.9, "sun", 0.1, False)) for path in items)

    Path("images").mkdir()
    monkeypatch.setattr(local, "IMAGES_PER_PART", 1000)
    monkeypatch.setattr(find, "find_images", names)
    monkeypatch.setattr(Classifier, "rows", rows)
    assert main(["predict", "images", "--output", output]) == 0
    used.append(psutil.Process().memory_info().rss)
    assert max(used) - used[2] < 30e6
