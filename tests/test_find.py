"""Which files are meant by names, folders, patterns and lists."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marsclf.classify.find import find_images, read_list


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *sources: str | Path, **options: Path) -> list[str]:
    paths = find_images([folder / source for source in sources], **options)
    return [os.path.relpath(path, folder) for path in paths]


def test_a_folder_gives_the_images_beneath_it(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.jpg", "sub/c.tiff", "sub/deep/d.IMG", "e.png", "f,g h.jpeg")
    touch(tmp_path, "label.lbl", "notes.txt", ".hidden.jpg", ".cache/g.jpg", "._a.jpg")
    expected = ["a.jpg", "b.JPG", "e.png", "f,g h.jpeg", "sub/c.tiff", "sub/deep/d.IMG"]
    assert sorted(found(tmp_path, ".")) == sorted(expected)
    assert found(tmp_path, ".") == found(tmp_path, ".")
    assert found(tmp_path, "sub", "a.jpg") == ["sub/c.tiff", "sub/deep/d.IMG", "a.jpg"]


def test_files_are_taken_as_they_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", ".hidden.jpg", "odd[1].jpg")
    names = ["notes.txt", ".hidden.jpg", "gone.jpg", "odd[1].jpg"]
    assert found(tmp_path, *names) == names


def test_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.png", "sub/c.jpg", "sub/deep/d.jpg", "sub/deep/notes.txt")
    assert found(tmp_path, "*.jpg") == ["a.jpg"]
    assert found(tmp_path, "**/*.jpg") == ["a.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert found(tmp_path, "s*") == ["sub/c.jpg", "sub/deep/d.jpg"]
    assert found(tmp_path, "sub/**") == ["sub/c.jpg", "sub/deep/d.jpg", "sub/deep/notes.txt"]
    assert found(tmp_path, "x*.jpg") == ["x*.jpg"]  # the reader says that it is not there


def test_loops_of_links_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "linked.jpg").symlink_to("a/1.jpg")
    names = [Path(path).name for path in found(tmp_path, ".")]
    assert sorted(names) == ["1.jpg", "2.jpg", "linked.jpg", "self.jpg"]


def test_folders_in_each_other_beyond_pythons_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    Path("deep.jpg").touch()
    os.chdir(tmp_path)
    depths = [path.count("/") for path in find_images(["."])]
    subprocess.run(["rm", "-r", "d"], check=True)  # which is too deep for pytest's own clean-up
    assert depths == [1201]


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg", "z.jpg")
    scandir = os.scandir

    def closed(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert found(tmp_path, ".") == ["a.jpg", "closed", "z.jpg"]


def test_a_folder_can_be_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "overlays/b.jpg")
    assert found(tmp_path, ".", leave_out=tmp_path / "overlays") == ["a.jpg"]
    assert found(tmp_path, "a.jpg", leave_out=tmp_path / "not there") == ["a.jpg"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).touch()
    assert [os.fsencode(path)[-8:] for path in find_images([tmp_path])] == [b"caf\xe9.jpg"]


def test_lists() -> None:
    assert list(read_list(io.BytesIO(b"a b.jpg\r\n\nc.jpg\nd.jpg"))) == [
        "a b.jpg",
        "c.jpg",
        "d.jpg",
    ]
    assert list(read_list(io.BytesIO(b"line\nbreak.jpg\0b.jpg\0"))) == ["line\nbreak.jpg", "b.jpg"]
    assert list(read_list(io.BytesIO(b""))) == []


name = st.binary(min_size=1, max_size=30).filter(lambda text: b"\0" not in text)


@given(st.lists(name, min_size=1, max_size=30), st.integers(1, 7))
def test_any_list_before_nuls(names: list[bytes], chunk: int) -> None:
    import marsclf.find

    # In pieces of any size; the first decides what separates names.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marsclf.find, "CHUNK_BYTES", chunk + max(map(len, names)))
        listed = read_list(io.BytesIO(b"".join(n + b"\0" for n in names)))
        assert [os.fsencode(path) for path in listed] == names
