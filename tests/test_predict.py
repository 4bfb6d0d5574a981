"""The command `predict`: every file gets a row, and the table appears whole or not at all."""

import csv
import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from marsclf import paths
from marsclf.classify import local as predict
from marsclf.classify.classifier import Classifier
from marsclf.classify.table import COLUMNS, Row, shown
from marsclf.cli import main
from marsclf.data.msl import Dataset

PRODUCT = "0830MR0036510000500684E01_DRCL.JPG"


@pytest.fixture(autouse=True)
def small_classifier(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("marsclf.classify.classifier.load_classifier", lambda _: classifier)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(sample_dataset: Dataset, tmp_path: Path) -> Path:
    """A folder of 40 images, one of them broken."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in sample_dataset.index["path"][:39]:
        content = (sample_dataset.root / path).read_bytes()
        (folder / Path(path).name).write_bytes(content)
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


def test_a_table(images: Path, capsys: pytest.CaptureFixture[str], classifier: Classifier) -> None:
    assert main(["predict", "images", "--output", "t.csv", "--threshold", "0.2"]) == 3
    table = pd.read_csv("t.csv")
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 40 and table["error"].notna().sum() == 1
    assert table["path"].is_unique
    pd.testing.assert_frame_equal(table.astype(COLUMNS), classifier.predict("images", 0.2))
    assert names_in(Path()) == ["images", "t.csv"]
    out, err = capsys.readouterr()
    assert out == ""
    uncertain = (table["confidence"] < 0.2).sum()
    assert f"40 images: {39 - uncertain} certain, {uncertain} uncertain, 1 could not be" in err
    assert "Table: t.csv" in err


def test_parquet_and_standard_output_hold_the_same(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("t.csv", "t.parquet"):
        assert main(["predict", "images", "--output", output]) == 3
    capsys.readouterr()
    assert main(["predict", "images"]) == 3
    out, err = capsys.readouterr()
    assert out == Path("t.csv").read_text()
    assert "40 images" in err
    of_csv, of_parquet = pd.read_csv("t.csv"), pd.read_parquet("t.parquet")
    pd.testing.assert_frame_equal(of_csv.astype(COLUMNS), of_parquet.astype(COLUMNS))


def test_all_read(images: Path) -> None:
    (images / "sub" / "broken.jpg").unlink()
    assert main(["predict", "images", "--output", "t.csv"]) == 0


def test_each_file_once_from_all_sources(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(images.glob("*.JPG"))
    listed = f"images/{first.name}\nimages/sub\nnot there.jpg\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert main(["predict", "images/*.JPG", "-", "images/sub/broken.jpg"]) == 3
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 41 and len({row["path"] for row in rows}) == 41
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert errors["not there.jpg"] == "No such file or directory"


def test_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"a b,c.png", b'quo"te.png', b"line\nbreak\r.png", b"caf\xe9.png", "日本.png".encode()]
    names.append(PRODUCT.replace(".JPG", ".png").encode())
    for name in names:
        Image.new("RGB", (9, 9)).save(os.fsdecode(os.fsencode(folder) + b"/" + name), "PNG")
    expected = {name.decode("utf-8", "surrogateescape") for name in names}
    expected = {shown(name) for name in expected}
    assert {"caf\\udce9.png", "line\nbreak\\r.png"} < expected
    for output in ("t.csv", "t.parquet"):
        assert main(["predict", "odd", "--output", output]) == 0
    with Path("t.csv").open(newline="") as file:
        rows = {row["path"].removeprefix("odd/"): row for row in csv.DictReader(file)}
    assert set(rows) == expected
    product = rows[PRODUCT.replace(".JPG", ".png")]
    assert (product["sol"], product["camera"]) == ("830", "MR")
    assert set(pd.read_parquet("t.parquet")["path"].str.removeprefix("odd/")) == expected


text = st.text(st.characters(exclude_characters="\0"), min_size=1)
rows_of_any_kind = st.lists(
    st.builds(
        Row,
        path=text.map(shown),
        predicted=st.none() | st.just("drill holes"),
        confidence=st.none() | st.floats(0, 1),
        runner_up=st.none(),
        runner_up_confidence=st.none(),
        uncertain=st.none() | st.booleans(),
        sol=st.none() | st.integers(0, 9999),
        camera=st.none(),
        error=st.none() | st.just('a, "b"'),
    ),
    max_size=8,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=rows_of_any_kind)
def test_any_rows_are_stored_as_they_are(tmp_path: Path, rows: list[Row]) -> None:
    journal = predict._Journal(tmp_path / "t.csv", {}, resume=False)
    with journal:
        journal.add(rows)
        journal.finish()
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        stored = list(csv.reader(file))
    expected = [["" if value is None else str(value) for value in row] for row in rows]
    assert stored == [list(COLUMNS), *expected]
    predict._write_parquet(iter(rows), tmp_path / "t.parquet")
    found = predict.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert found == [row._asdict() for row in rows]


def stop_after(
    monkeypatch: pytest.MonkeyPatch, classifier: Classifier, number: int, error: BaseException
) -> Callable[[], int]:
    """Let the classifier fail after so many rows; return how many files it was asked for."""
    original, asked = Classifier.rows, []

    def rows(self: Classifier, items: object, threshold: float) -> object:
        def counted() -> object:
            for item in items:
                asked.append(item)
                yield item

        for done, pair in enumerate(original(self, counted(), threshold)):
            if done == number:
                raise error
            yield pair

    monkeypatch.setattr(Classifier, "rows", rows)
    return lambda: len(asked)


def test_resume_does_nothing_twice(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    classifier: Classifier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", "images", "--output", "whole.csv"]) == 3
    command = ["predict", "images", "--output", "t.csv"]
    with monkeypatch.context() as patch:
        stop_after(patch, classifier, 32, KeyboardInterrupt())
        assert main(command) == 130
    assert "--resume goes on with t.csv.partial" in capsys.readouterr().err
    assert not Path("t.csv").exists()
    partial = Path("t.csv.partial")
    assert len(partial.read_text().splitlines()) == 1 + 32
    with partial.open("a") as file:
        file.write('["cut o')  # as a kill leaves it
    # Not taken for a new run.
    assert "t.csv.partial is left from a run that was stopped" in failure(capsys, *command[1:])
    assert len(partial.read_text().splitlines()) == 1 + 32 + 1
    asked = stop_after(monkeypatch, classifier, 1000, KeyboardInterrupt())
    assert main([*command, "--resume"]) == 3
    assert asked() == 40 - 32
    assert Path("t.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not partial.exists()
    err = capsys.readouterr().err
    assert "40 images" in err and "8 took" in err
    # And once it is whole, nothing is left to do.
    assert main([*command, "--resume"]) == 0
    assert "is whole already" in capsys.readouterr().err


def test_a_killed_process_is_gone_on_with(images: Path) -> None:
    """The real thing: the published classifier, a folder elsewhere, and SIGKILL."""
    command = [sys.executable, "-m", "marsclf", "predict", "images", "--output", "t.csv"]
    code = (
        "import os, sys; from marsclf import predict, __main__\n"
        "add = predict._Journal.add\n"
        "def kill(self, rows): add(self, rows); os.kill(os.getpid(), 9)\n"
        "predict._Journal.add = kill\n"
        "__main__.main(sys.argv[1:])"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", code, *command[3:]], capture_output=True, env=environment
    )
    assert killed.returncode == -9 and not Path("t.csv").exists()
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert ended.returncode == 3, ended.stderr
    lines = ended.stderr.splitlines()
    assert lines[0] == "Loading the classifier ..." and lines[1].startswith("40 images: ")
    assert "24 took" in lines[1]
    table = pd.read_csv("t.csv")
    assert len(table) == 40 and table["path"].is_unique
    assert ended.stdout == "" and "Traceback" not in ended.stderr


def test_resume_needs_the_same_images_classifier_and_threshold(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    classifier: Classifier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["predict", "images", "--output", "t.csv"]
    with monkeypatch.context() as patch:
        stop_after(patch, classifier, 16, KeyboardInterrupt())
        assert main(command) == 130
    before = Path("t.csv.partial").read_bytes()
    for sources in (["images", "--threshold", "0.5"], ["images/sub"], ["images", "images/sub"]):
        error = failure(capsys, *sources, "--output", "t.csv", "--resume")
        assert "is of other images, or of another classifier or threshold" in error
    assert Path("t.csv.partial").read_bytes() == before
    lines = before.splitlines(keepends=True)
    Path("t.csv.partial").write_bytes(lines[0] + b"{damaged\n" + lines[1])
    assert "is damaged: remove it" in failure(capsys, *command[1:], "--resume")


def test_a_foreign_partial_file_is_left_alone(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.csv.partial").write_text("my notes\n")
    failure(capsys, "images", "--output", "t.csv")
    failure(capsys, "images", "--output", "t.csv", "--resume")
    assert Path("t.csv.partial").read_text() == "my notes\n"


def test_two_runs_at_once(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("t.csv.partial").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = failure(capsys, "images", "--output", "t.csv", "--resume")
    assert "Another run is writing t.csv" in error


def test_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "There is no image in empty" in failure(capsys, "empty", "--output", "t.csv")
    assert names_in(tmp_path) == ["empty"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "There is no image in standard input." in failure(capsys, "-")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--output", "t.xlsx"], "must end in .csv or .parquet"),
        (["--output", "folder.csv"], "is a folder"),
        (["--output", "not there/t.csv"], "folder not there of the output is not there"),
        (["--output", f"{'x' * 300}.csv"], "xxx.csv cannot be written (File name too long)"),
        (["--output", f"{'x' * 300}.csv", "--resume"], "(File name too long)"),
        (["--output", f"{'x' * 300}/t.csv"], "of the output is not there: make it first"),
        (["--explain", "x" * 300], "cannot be made (File name too long)"),
        (["--output", "/proc/t.csv"], "/proc/t.csv cannot be written"),
        (["--output", "t.csv", "--threshold", "90"], "between 0 and 1"),
        (["--resume"], "name it with --output"),
        (["--explain", "images/sub/.."], "images/sub/.. holds the images: name another folder"),
        (["--explain", "images/sub/broken.jpg"], "cannot be made"),
        (["images/list.csv", "--output", "images/list.csv"], "is one of the images"),
        (["images/list.csv", "--output", "images/sub/../list.csv"], "is one of the images"),
    ],
)
def test_what_cannot_be(
    images: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    Path("folder.csv").mkdir()
    (images / "list.csv").write_text("precious")
    before = sorted(Path().rglob("*"))
    assert reason in failure(capsys, "images", *arguments)
    assert sorted(Path().rglob("*")) == before
    assert (images / "list.csv").read_text() == "precious"


@pytest.mark.parametrize("most_bytes", [9, 1000])
def test_a_file_that_may_not_grow(images: Path, most_bytes: int) -> None:
    """The system's own refusal, also of what is still buffered when the file is closed."""
    code = (
        "import resource, sys; from pathlib import Path; from marsclf.predict import _Journal\n"
        "from marsclf.errors import MarsclfError; from marsclf.rows import Row\n"
        "most = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "try:\n"
        "    journal = _Journal(Path('t.csv'), {}, False)\n"
        "    with journal:\n"
        "        for _ in range(100): journal.add([Row('a.jpg')])\n"
        "except MarsclfError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(most_bytes)]
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT_ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("t.csv cannot be written (File too large)")
    assert ("t.csv.partial keeps what is done" in said.stdout) == (most_bytes == 1000)
    # Without a row there is nothing to go on with, and so nothing to ask --resume for.
    assert main(["predict", "images", "--output", "t.csv"]) == (1 if most_bytes == 1000 else 3)


def test_a_full_disk(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = predict._Journal.add, []

    def add(self: predict._Journal, rows: list[Row]) -> None:
        calls.append(rows)
        if len(calls) == 2:
            with Path("/dev/full").open("wb", buffering=0) as full, self._failing_clearly():
                full.write(b"x")
        original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(predict._Journal, "add", add)
        error = failure(capsys, "images", "--output", "t.csv")
    assert "t.csv cannot be written (No space left on device); t.csv.partial keeps what" in error
    assert names_in(Path()) == ["images", "t.csv.partial"]

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # and where only the table no longer fits
        patch.setitem(predict.WRITERS, ".csv", no_space)
        assert "No space left" in failure(capsys, "images", "--output", "t.csv", "--resume")
    assert names_in(Path()) == ["images", "t.csv.partial"]
    assert main(["predict", "images", "--output", "t.csv", "--resume"]) == 3
    assert len(pd.read_csv("t.csv")) == 40


def test_an_old_table_stays_until_the_new_one_is_whole(
    images: Path, monkeypatch: pytest.MonkeyPatch, classifier: Classifier
) -> None:
    Path("t.csv").write_text("old")
    with monkeypatch.context() as patch:
        stop_after(patch, classifier, 20, KeyboardInterrupt())
        assert main(["predict", "images", "--output", "t.csv"]) == 130
    assert Path("t.csv").read_text() == "old"
    assert main(["predict", "images", "--output", "t.csv", "--resume"]) == 3
    assert len(pd.read_csv("t.csv")) == 40


def test_standard_output_that_cannot_be_written(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        error = failure(capsys, "images")
        monkeypatch.undo()
        assert "Standard output cannot be written (No space left on device)" in error


def test_a_file_that_vanishes(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = predict.named_images

    def vanishing(*arguments: object) -> object:
        for path in original(*arguments):
            if path.endswith(".JPG") and not gone:
                gone.append(path)
                Path(path).unlink()
            yield path

    gone: list[str] = []
    monkeypatch.setattr(predict, "named_images", vanishing)
    assert main(["predict", "images", "--output", "t.csv"]) == 3
    table = pd.read_csv("t.csv").set_index("path")
    assert table.loc[gone[0], "error"] == "No such file or directory"
    assert table["error"].notna().sum() == 2


def test_overlays(images: Path) -> None:
    arguments = ["predict", "images", "--output", "t.csv", "--explain", "images/overlays"]
    assert main(arguments) == 3
    assert main([*arguments[:3], "again.csv", *arguments[4:]]) == 3
    table = pd.read_csv("t.csv")
    assert len(table) == len(pd.read_csv("again.csv")) == 40  # overlays are not taken for images
    overlays = names_in(images / "overlays")
    assert len(overlays) == 39
    for row in table[table["error"].isna()].itertuples():
        (name,) = [name for name in overlays if name.startswith(Path(row.path).stem + ".")]
        assert name.endswith(f".{row.predicted.replace(' ', '_')}.jpg")
    with Image.open(images / "overlays" / overlays[0]) as overlay:
        assert overlay.size == (64, 64) and np.ptp(np.asarray(overlay)) > 50


def test_memory_does_not_grow_with_the_number_of_files(
    classifier: Classifier, tmp_path: Path
) -> None:
    """Paths are taken as rows are given, about a hundred ahead."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield str(tmp_path / "a.png")

    rows = classifier.rows(endless(), 0.9)
    for _ in range(50):
        next(rows)
    assert taken < 1000
    rows.close()


def test_names_are_not_kept_where_none_can_come_twice(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an archive of millions; where a file can be named twice they must be."""
    monkeypatch.setattr(predict, "_key", lambda path: pytest.fail("kept"))
    assert len(list(predict.named_images(["images"]))) == 40
    with pytest.raises(pytest.fail.Exception):
        list(predict.named_images(["images", "images/sub"]))


def test_a_list_that_is_not_ours_is_never_a_model(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(images.parent)
    Path("model.npz").write_text(json.dumps({"format": "marsclf-classifier"}))
    error = failure(capsys, "images", "--output", "t.csv", "--model", "model.npz")
    assert "model.npz is not a classifier file of marsclf" in error
    assert not list(Path().glob("t.csv*"))
