"""Files that appear complete or not at all."""

from pathlib import Path

import numpy as np
import pytest

from marsclf.files import replace_atomically


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
