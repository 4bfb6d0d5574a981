"""Finding the data set: a given folder, the download, or the generated sample data."""

import os
from itertools import chain
from pathlib import Path

from marsclf import paths
from marsclf.data import download, folder, msl, sample
from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1, PUBLISHED
from marsclf.errors import MarsclfError


def locate(data_dir: str | Path | None = None, wanted: str = MSL_V1.name) -> Path | None:
    """Return the data folder: `data_dir`, else $MARSCLF_DATA_DIR, else a download, else None.

    The download is that of the data set `wanted`. A folder that the user gave is returned even if
    it does not exist: no other data replaces it.
    """
    given = data_dir or os.environ.get("MARSCLF_DATA_DIR")
    if given:
        return paths.resolve(Path(given).expanduser())
    target = _target(wanted)
    return target if target.exists() else None


def open_dataset(data_dir: str | Path | None = None, wanted: str = MSL_V1.name) -> Dataset:
    """Find and load the data set, downloading `wanted` if no folder was given and none exists.

    Without a network connection, the generated sample data replaces the download. Prints the notes
    of the data set. Raises MarsclfError if the data has a fault, if no published data set is called
    `wanted`, or if the download fails after a server answered.
    """
    root = locate(data_dir, wanted)
    if root is None:
        try:
            root = download.fetch(PUBLISHED[wanted], _target(wanted))
        except download.NetworkUnreachable as error:
            print(error)
            root = sample.make_sample(paths.CACHE / "sample")
    dataset = load_dataset(root)
    for note in dataset.notes:
        print(note)
    return dataset


def load_dataset(root: str | Path) -> Dataset:
    """Check and return the data set in the folder `root`, published or one's own.

    A relative `root` is relative to the project folder. Raises MarsclfError with the first fault.
    """
    faults, dataset = scan(root)
    if faults:
        others = f" ({len(faults) - 1} more: `python -m marsclf check-data` lists all faults.)"
        raise MarsclfError(faults[0] + (others if len(faults) > 1 else ""))
    return dataset


def scan(root: str | Path) -> tuple[list[str], Dataset | None]:
    """Return every fault of the data in `root`, one sentence each, and the data set without any."""
    root = paths.resolve(root)
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        fix = "use --data-dir or MARSCLF_DATA_DIR to name the folder of the images"
        return [f"The data folder {root} is missing or not a folder that can be read: {fix}."], None
    for published in PUBLISHED.values():
        if any(os.path.lexists(root / name) for name in published.lists.values()):
            return msl.scan(root, published)
    for list_file in (published.lists["train"] for published in PUBLISHED.values()):
        near = chain(*map(root.glob, (f"../{list_file}", f"*/{list_file}", f"*/*/{list_file}")))
        if found := next(near, None):
            place = found.parent.resolve()
            return [f"The data set is not in {root} but in {place}: name that folder."], None
    return folder.scan(root)


def _target(name: str) -> Path:
    """Return the folder to which a published data set is downloaded."""
    if name not in PUBLISHED:
        raise MarsclfError(f"There is no data set {name!r}: the names are {', '.join(PUBLISHED)}.")
    return paths.DATA if name == MSL_V1.name else paths.DATA.with_name(name)
