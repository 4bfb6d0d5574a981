"""The sample data has the layout and the difficulties of the real data, and its own pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marsclf.data import sample
from marsclf.data.dataset import SPLITS, Dataset
from marsclf.data.msl import MSL_V1
from marsclf.data.open import load_dataset
from marsclf.errors import MarsclfError
from marsclf.files import sha256_of

SPLIT_FILE_DIGEST = "c689cfadb5fda7e02f198c1116bf5177745fa6ead32f36a8dbb811e837f7a10d"


def test_pictures_never_change(sample_dataset: Dataset, tmp_path: Path) -> None:
    again = load_dataset(sample.make_sample(tmp_path / "again"))
    assert again.digest == sample_dataset.digest
    # The split files, which name and label the pictures, depend on every random number.
    content = (again.root / MSL_V1.lists["test"]).read_bytes()
    assert sha256_of(content) == SPLIT_FILE_DIGEST


def test_what_is_there_is_never_replaced(sample_dir: Path, tmp_path: Path) -> None:
    before = sample_dir.stat()
    assert sample.make_sample(sample_dir) == sample_dir and sample_dir.stat() == before
    (tmp_path / "photo.JPG").write_bytes(b"precious")
    with pytest.raises(MarsclfError, match="holds no sample data"):
        sample.make_sample(tmp_path)
    assert (tmp_path / "photo.JPG").read_bytes() == b"precious"


def test_splits_resemble_the_real_data(sample_dataset: Dataset) -> None:
    index = sample_dataset.index
    with Image.open(sample_dataset.root / index.loc[0, "path"]) as image:
        assert tuple(index.loc[0, ["width", "height"]]) == image.size
    keys = [(SPLITS.index(row.split), row.path) for row in index.itertuples()]
    assert keys == sorted(keys)
    assert (index["class_name"] == np.array(MSL_V1.classes)[index["label"]]).all()
    missing = {"train": {22}, "val": {2, 11, 13, 20, 22}, "test": {5, 22, 23}}
    for split, (first, last) in sample.SOLS.items():
        rows = index[index["split"] == split]
        assert set(range(25)) - set(rows["label"]) == missing[split]
        assert rows["sol"].between(first, last).all() and rows["sol"].nunique() > 8
        assert (rows["channels"] == 1).sum() >= 2
    assert (index.groupby("frame")["label"].nunique() == 1).all()
    assert (index.groupby("sequence")["frame"].nunique() > 1).sum() > 50
    assert set(index["camera"]) == {"ML", "MR", "MH"}
    assert index["sha256"].is_unique and 300 <= len(index) <= 450
