"""Finding the data set: a given folder, the download, or the generated sample data."""

import os
from pathlib import Path

from marsclf import paths
from marsclf.data import download, sample
from marsclf.data.msl import SAMPLE_NOTICE, Dataset, load_dataset


def locate(data_dir: str | Path | None = None) -> Path | None:
    """Return the data folder: `data_dir`, else $MARSCLF_DATA_DIR, else data/msl-images, else None.

    A folder that the user gave is returned even if it does not exist: no other data replaces it.
    """
    given = data_dir or os.environ.get("MARSCLF_DATA_DIR")
    if given:
        return paths.resolve(Path(given).expanduser())
    return paths.DATA if paths.DATA.exists() else None


def open_dataset(data_dir: str | Path | None = None) -> Dataset:
    """Find and load the data set, downloading it if no folder was given and none exists.

    Without a network connection, the generated sample data replaces the download. Prints
    SAMPLE_NOTICE whenever it loads sample data. Raises MarsclfError if the data has a fault or
    the download fails after a server answered.
    """
    root = locate(data_dir)
    if root is None:
        try:
            root = download.fetch_msl_images(paths.DATA)
        except download.NetworkUnreachable as error:
            print(error)
            root = sample.make_sample(paths.CACHE / "sample")
    dataset = load_dataset(root)
    if dataset.name == "sample":
        print(SAMPLE_NOTICE)
    return dataset
