"""What all tests share: the sample data, made once, and the real data where it is at hand."""

import os
from pathlib import Path

import pytest

from marsclf import data, sample


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.make_sample(tmp_path_factory.mktemp("data") / "sample")


@pytest.fixture(scope="session")
def sample_dataset(sample_dir: Path) -> data.Dataset:
    return data.load_dataset(sample_dir)


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    folder = os.environ.get("MARSCLF_DATA_DIR")
    if not folder:
        pytest.skip("the real images are not at hand: set MARSCLF_DATA_DIR to test with them")
    return Path(folder)
