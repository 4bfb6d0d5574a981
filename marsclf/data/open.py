"""Finding the images: a folder that is named, the download, or the generated sample."""

import os
from pathlib import Path

from marsclf import paths
from marsclf.data import download, sample
from marsclf.data.msl import SAMPLE_NOTICE, Dataset, load_dataset


def locate(data_dir: str | Path | None = None) -> Path | None:
    """Return the data folder: the argument, else $MARSCLF_DATA_DIR, else data/msl-images, or None.

    A folder that was named is returned whether it exists or not: nothing else may stand in for it.
    """
    named = data_dir or os.environ.get("MARSCLF_DATA_DIR")
    if named:
        return paths.resolve(Path(named).expanduser())
    return paths.DATA if paths.DATA.exists() else None


def open_dataset(data_dir: str | Path | None = None) -> Dataset:
    """Find and load the data; download it where no folder was named and none is there.

    Where the network cannot be reached, load the generated sample set instead; whenever sample
    data is loaded, print SAMPLE_NOTICE. Raises MarsclfError on the first fault of the data, or if
    the download fails half-way.
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
