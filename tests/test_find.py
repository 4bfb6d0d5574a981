"""Which files are meant by names, folders, patterns and lists."""

import io
import os
import sys
from pathlib import Path

import pytest

from marsclf.classify.find import find_images, list_images
from marsclf.errors import MarsclfError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *sources: str | Path, **options: Path) -> list[str]:
    paths = find_images([folder / source for source in sources], **options)
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def test_a_folder_stands_for_the_images_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.jpg", "sub/c.tiff", "sub/deep/d.PNG", "e.png", "f,g h.jpeg")
    touch(tmp_path, "label.lbl", "notes.txt", ".hidden.jpg", ".cache/g.jpg", "._a.jpg")
    expected = ["a.jpg", "b.JPG", "e.png", "f,g h.jpeg", "sub/c.tiff", "sub/deep/d.PNG"]
    assert found(tmp_path, ".") == expected
    assert found(tmp_path, "sub", "a.jpg") == ["sub/c.tiff", "sub/deep/d.PNG", "a.jpg"]
    assert found(tmp_path, ".", leave_out=tmp_path / "sub") == expected[:4]


def test_files_are_taken_as_named_and_patterns_as_what_fits(tmp_path: Path) -> None:
    touch(tmp_path, ".notes.txt", "odd[1].jpg")
    names = [".notes.txt", "gone.jpg", "odd[1].jpg"]
    assert found(tmp_path, *names) == names
    (tmp_path / "odd[1].jpg").unlink()
    touch(tmp_path, "a.jpg", "b.png", "sub/c.jpg", "sub/deep/d.jpg", "sub/deep/notes.txt")
    assert found(tmp_path, "*.jpg") == ["a.jpg"]
    assert found(tmp_path, "**/*.jpg") == ["a.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert found(tmp_path, "s*") == ["sub/c.jpg", "sub/deep/d.jpg"]
    assert found(tmp_path, "sub/**") == ["sub/c.jpg", "sub/deep/d.jpg", "sub/deep/notes.txt"]
    assert found(tmp_path, "x*.jpg") == ["x*.jpg"]  # reading it reports the error


def test_loops_of_links_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "linked.jpg").symlink_to("a/1.jpg")
    names = [Path(path).name for path in found(tmp_path, ".")]
    assert sorted(names) == ["1.jpg", "2.jpg", "linked.jpg", "self.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg", "open/c.jpg")
    scandir = os.scandir

    def closed(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert sorted(found(tmp_path, ".")) == ["a.jpg", "closed", "open/c.jpg"]


def test_a_list_on_standard_input_and_no_image_twice(tmp_path, monkeypatch) -> None:
    touch(tmp_path, "a b.jpg", "c.jpg")
    monkeypatch.chdir(tmp_path)
    listed = b"a b.jpg\r\n\nc.jpg\ncaf\xe9.jpg\na b.jpg"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    expected = ["c.jpg", "a b.jpg", os.fsdecode(b"caf\xe9.jpg")]
    assert list(list_images(["c.jpg", "-", "*.jpg"])) == expected
    for wrong in ("d.jpg", "folder", "*.png"):
        with pytest.raises(MarsclfError, match="check the spelling"):
            list(list_images(["c.jpg", wrong]))
