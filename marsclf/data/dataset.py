"""A checked data set as a value, and the checks that all kinds of data sets share."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf.data.splits import SPLITS
from marsclf.errors import MarsclfError
from marsclf.files import sha256_of
from marsclf.images.decode import ignore_decoder_warnings, read_rgb
from marsclf.provenance import cores


@dataclass(frozen=True)
class Dataset:
    """A checked data set.

    `index` has one row per image, ordered by split and path: split, path (relative to `root`),
    label (its place in `classes`), class_name, group (what drawn splits never share, such as the
    sol), sequence (the burst, else the path), width and height in pixels, channels (1 if gray, else
    3), sha256. If all names are product ids, it also has sol, camera, frame and product_type.
    `thumbnails` are the images in gray, uint8 (rows, 256).

    `name` is "msl-v1", "msl-v2.1", "sample", "other" for a changed one of these, or the name of
    one's own folder. `digest` is the SHA-256 of its contents. `notes` are sentences for the user.
    """

    root: Path
    name: str
    digest: str
    index: pd.DataFrame
    thumbnails: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def make_dataset(
    root: Path,
    name: str,
    digest: str | None,
    table: pd.DataFrame,
    classes: tuple[str, ...],
    notes: list[str],
) -> Dataset:
    """Return the data set of a table that `measure` returned; by default the digest is its own."""
    order = table["split"].map(SPLITS.index)
    table = table.assign(order=order, label=table["class_name"].map(classes.index))
    table = table.sort_values(["order", "path"], ignore_index=True)
    thumbnails = np.stack(table["thumbnail"])
    index = table.drop(columns=["order", "place", "thumbnail"])
    contents = index[["split", "path", "class_name", "group", "sha256"]]
    digest = digest or sha256_of(contents.to_csv(index=False, lineterminator="\n").encode())
    return Dataset(root, name, digest, index, thumbnails, classes, tuple(notes))


def measure(root: Path, table: pd.DataFrame, faults: list[str]) -> pd.DataFrame:
    """Return a table of images (place, path) with sha256, width, height, channels and thumbnail.

    An image that cannot be read, or is listed again, is a fault at its place; of repeated rows only
    the first is returned.
    """
    first = table.drop_duplicates("path").set_index("path")["place"]
    for row in table[table["path"].duplicated()].itertuples():
        faults.append(f"{row.place}: {row.path} is already listed in {first[row.path]}.")
    table = table.drop_duplicates("path", ignore_index=True)
    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        ignore_decoder_warnings()
        found = pool.map(_measure_image, [root / path for path in table["path"]])
        found = list(tqdm(found, "decoding", len(table), disable=None))
    for row, values in zip(table.itertuples(), found, strict=True):
        if "error" in values:
            faults.append(f"{row.place}: the image {row.path} cannot be read: {values['error']}.")
    return table.join(pd.DataFrame(found))


def _measure_image(path: Path) -> dict[str, object]:
    """Return the columns that `measure` adds, or an error and, for sha256, the path."""
    try:
        rgb = read_rgb(path)
    except MarsclfError as error:
        return {"sha256": str(path), "error": str(error)}
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return {
        "sha256": sha256_of(path.read_bytes()),
        "width": rgb.shape[1],
        "height": rgb.shape[0],
        "channels": 1 if (rgb == rgb[..., :1]).all() else 3,
        "thumbnail": cv2.resize(gray, (16, 16), interpolation=cv2.INTER_AREA).reshape(-1),
    }


def without_copies(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the rows without training images whose files are also held out, and note these."""
    held_out = table.loc[table["split"].isin(SPLITS[1:]), "sha256"]
    copies = table["split"].eq("train") & table["sha256"].isin(held_out)
    if copies.any():
        why = "because validation or test has the same files"
        notes.append(f"Training images left out, {why}: {copies.sum()}.")
    return table[~copies]


def find_shared_groups(table: pd.DataFrame) -> list[str]:
    """Return a fault for each group whose images are in several splits."""
    splits = table[table["group"] != ""].groupby("group")["split"].unique()
    return [
        f"The group {group!r} is in several splits: {', '.join(found)}."
        for group, found in splits.items()
        if len(found) > 1
    ]
