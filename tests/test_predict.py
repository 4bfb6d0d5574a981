"""The command `predict`: one row per file, and the table appears complete or not at all."""

import csv
import errno
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
from pyarrow import parquet

from marsclf import paths
from marsclf.classify import find, partial, predict
from marsclf.classify.classifier import Classifier
from marsclf.classify.table import COLUMNS, Row, printable
from marsclf.cli import main
from marsclf.data.dataset import Dataset

IMAGES, STORED = 40, 32  # the latter are two batches
COMMAND = ["predict", "images", "--output", "t.csv"]
PARTIAL = Path("t.csv.partial")


@pytest.fixture(autouse=True)
def small_classifier(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(predict, "load_classifier", lambda _: classifier)
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


def stop_by(reason: BaseException) -> int:
    """Run the command, which fails after two batches and a few rows; return its exit status."""
    original = Classifier.rows

    def rows(self: Classifier, items: Iterable, threshold: float) -> Iterator:
        yield from islice(original(self, items, threshold), STORED + 3)
        raise reason

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "rows", rows)
        return main(COMMAND)


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
def test_any_rows_are_stored_exactly(rows: list[Row]) -> None:
    for output in (Path("t.csv"), Path("t.parquet")):
        partial.append(PARTIAL, {}, rows[:3])
        partial.append(PARTIAL, {}, rows[3:])
        assert partial.finish(PARTIAL, output).total() == len(rows)
    with Path("t.csv").open(encoding="utf-8", newline="") as file:
        stored = list(csv.reader(file))
    expected = [["" if value is None else str(value) for value in row] for row in rows]
    assert stored == [list(COLUMNS), *expected]
    assert [Row(**row) for row in parquet.read_table("t.parquet").to_pylist()] == rows


def test_a_stopped_run_resumes(
    images: Path, classifier_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "images", "--output", "complete.csv"]) == 3
    Path("t.csv").write_text("old")
    assert stop_by(KeyboardInterrupt()) == 130
    assert "--resume continues from t.csv.partial" in capsys.readouterr().err
    assert Path("t.csv").read_text() == "old"
    before = PARTIAL.read_bytes()
    assert "add --resume to continue it, or remove it" in failure(capsys, *COMMAND[1:])
    for other in (
        ["images/sub", *COMMAND[2:]],
        [*COMMAND[1:], "--threshold", "0.5"],
        [*COMMAND[1:], "--model", classifier_path],
        [*COMMAND[1:], "--explain", "overlays"],
    ):
        said = failure(capsys, *other, "--resume")
        assert "is from other paths, or from another classifier or threshold" in said
    first = min(path for path in images.iterdir() if path.is_file())
    first.rename("another.jpg")
    assert "images have changed" in failure(capsys, *COMMAND[1:], "--resume")
    Path("another.jpg").rename(first)
    first.write_bytes(b"")  # it has its row, so it is not read again
    assert PARTIAL.read_bytes() == before
    with PARTIAL.open("ab") as file:  # as a process leaves it that is killed while it writes
        file.write(b'\n["images/')
    assert main([*COMMAND, "--resume"]) == 3
    assert Path("t.csv").read_bytes() == Path("complete.csv").read_bytes()
    said, done = capsys.readouterr().err, before.count(b"\n")
    assert "40 images" in said and f" {40 - done} took" in said
    assert main([*COMMAND, "--resume"]) == 0
    assert "is complete: there is nothing to resume" in capsys.readouterr().err


def test_a_full_disk(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stop_by(OSError(errno.ENOSPC, "no space")) == 1
    said = "t.csv cannot be written (No space left on device); --resume continues from t.csv.part"
    assert said in capsys.readouterr().err
    PARTIAL.write_text("")  # as where nothing could be written at all
    assert main([*COMMAND, "--resume"]) == 3
    assert names_in(Path()) == ["images", "t.csv"]


def test_a_killed_process_can_be_resumed(images: Path, prepared: Path) -> None:
    """The killed process has no module for POSIX: there is no Windows to test with."""

    def python(*arguments: str) -> subprocess.CompletedProcess:
        """Run Python on the real command, with the published classifier, outside the project."""
        own = {"PYTHONPATH": str(paths.PROJECT_ROOT), "MARSCLF_CACHE_DIR": str(prepared)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | own)

    code = (
        "import os, psutil, sys; sys.modules |= {'fcntl': None, 'resource': None}\n"
        "del os.sched_getaffinity\n"
        "from marsclf import cli; from marsclf.classify import predict\n"
        "append = predict.append\n"
        "def kill(*arguments): append(*arguments); os.kill(os.getpid(), 9)\n"
        "predict.append = kill; sys.exit(cli.main(sys.argv[1:]))"
    )
    assert python("-W", "ignore", "-c", code, *COMMAND).returncode == -9
    assert not Path("t.csv").exists()
    ended = python("-m", "marsclf", *COMMAND, "--resume")
    assert ended.returncode == 3, ended.stderr
    loading, summary, *_ = ended.stderr.splitlines()  # nothing of TensorFlow
    assert loading == "Loading the classifier ..." and summary.startswith("40 images: ")
    assert pd.read_csv("t.csv")["path"].nunique() == IMAGES
    assert names_in(Path()) == ["images", "t.csv"]


def test_what_prevents_a_table(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PARTIAL.write_bytes(b"my notes \xff")
    assert "t.csv.partial is from other paths" in failure(capsys, *COMMAND[1:], "--resume")
    assert PARTIAL.read_bytes() == b"my notes \xff"
    with FileLock(".t.csv.lock"):
        assert "Another process is writing t.csv" in failure(capsys, *COMMAND[1:])
    (images / "sub" / "empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    said = failure(capsys, "images/sub/empty", "-", "--output", "new.csv")
    assert "There is no image in images/sub/empty, standard input" in said
    assert not list(Path().glob("*new.csv*"))


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
    sources = ["images/sub", *map(str, sorted(images.glob("*.JPG"))[:2])]
    for output in ("t.csv", "again.csv"):  # overlays are not taken for images
        arguments = ["--output", output, "--explain", "images/sub/overlays"]
        assert main(["predict", *sources, *arguments]) == 3
    table = pd.read_csv("again.csv")
    overlays = names_in(images / "sub" / "overlays")
    assert len(table) == 3 and len(overlays) == 2
    for row in table[table["error"].isna()].itertuples():
        (name,) = [name for name in overlays if name.startswith(Path(row.path).stem + ".")]
        assert name.endswith(".{}.jpg".format(re.sub("[^a-z]+", "_", row.predicted)))
    with Image.open(images / "sub" / "overlays" / overlays[0]) as overlay:
        assert overlay.width == 900 and np.ptp(np.asarray(overlay)) > 50


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths alone of these images would take 78 MB."""
    number, used = 120_000, []

    def names(*_: object) -> Iterator[str]:
        for count in range(number):
            if count % 10_000 == 0:
                used.append(psutil.Process().memory_info().rss)
            yield f"{'folder' * 100}/{count}.jpg"

    def rows(_: Classifier, items: Iterable[str], threshold: float) -> Iterator:
        return ((path, Row(path, "wheel", 0.9, "sun", 0.1, False)) for path in items)

    Path("images").mkdir()
    monkeypatch.setattr(find, "find_images", names)
    monkeypatch.setattr(Classifier, "rows", rows)
    assert main(["predict", "images", "--output", "t.parquet"]) == 0
    used.append(psutil.Process().memory_info().rss)
    assert max(used) - used[2] < 50e6
