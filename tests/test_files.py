"""Files that appear complete or not at all."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from marsclf.files import replace_atomically, write_json


def test_leftovers_of_killed_programs_are_removed_after_a_day(tmp_path: Path) -> None:
    leftovers = []
    for _ in range(2):
        with pytest.raises(RuntimeError), replace_atomically(tmp_path / "network") as temporary:
            temporary.mkdir()
            (temporary.parent / "kept").mkdir()
            leftovers.append(temporary.parent)
            raise RuntimeError  # stands for a kill: the folder is made again below
        leftovers[-1].joinpath("network").mkdir(parents=True)
    mine = tmp_path / ".hidden"
    mine.mkdir()
    for folder in (leftovers[0], mine):
        os.utime(folder, (time.time() - 2 * 24 * 3600,) * 2)
    write_json(tmp_path / "another.json", {})
    assert {*tmp_path.iterdir()} == {leftovers[1], mine, tmp_path / "another.json"}


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    path.write_text("old")
    # NumPy reports how many bytes it wrote, but neither the file nor the reason.
    with (
        pytest.raises(OSError) as failure,
        replace_atomically(path),
        Path("/dev/full").open("wb") as full,
    ):
        np.zeros(1000).tofile(full)
    assert "the disk may be full" in failure.value.strerror
    assert failure.value.filename == str(path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
    # Any other reason stays as it is.
    with pytest.raises(IsADirectoryError, match="Is a directory"), replace_atomically(path):
        tmp_path.read_bytes()
