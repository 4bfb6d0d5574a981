"""A checked data set as a value, and the checks that all kinds of data sets share."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf import paths
from marsclf.data.splits import SPLITS, thumbnail
from marsclf.errors import MarsclfError
from marsclf.files import regular_file, replace_atomically, sha256_of
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

    An image that cannot be read is a fault at its place. What is decoded is kept in the cache, by
    the contents of the files.
    """
    files = [root / path for path in table["path"]]
    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        ignore_decoder_warnings()
        digests = list(pool.map(_digest, files))
        stored = paths.CACHE / "thumbnails" / f"{sha256_of(repr(digests).encode())}.npy"
        is_known = stored.is_file()
        found = np.load(stored) if is_known else pool.map(_measure_image, files)
        found = list(tqdm(found, "decoding", len(files), disable=is_known or None))
    table = table.assign(sha256=digests)
    for row, values in zip(table.itertuples(), found, strict=True):
        if isinstance(values, str):
            faults.append(f"{row.place}: the image {row.path} cannot be read: {values}.")
    if any(isinstance(values, str) for values in found):
        return table
    if not is_known:
        with replace_atomically(stored) as temporary:
            np.save(temporary, found)
    measured = np.stack(found)
    table[["width", "height", "channels"]] = measured[:, :3]
    return table.assign(thumbnail=list(measured[:, 3:].astype(np.uint8)))


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, "" if it cannot be read: decoding it tells why."""
    with suppress(OSError):
        return sha256_of(regular_file(path).read_bytes())
    return ""


def _measure_image(path: Path) -> np.ndarray | str:
    """Return width, height, 1 if the image is gray else 3, and its thumbnail, int32 (259,)."""
    try:
        rgb = read_rgb(path)
    except MarsclfError as error:
        return str(error)
    channels = 1 if (rgb == rgb[..., :1]).all() else 3
    small = thumbnail(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    return np.array([rgb.shape[1], rgb.shape[0], channels, *small], dtype=np.int32)


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


def find_repeated(table: pd.DataFrame) -> list[str]:
    """Return a fault for each line that lists an image again."""
    first = dict(zip(table["path"][::-1], table["place"][::-1], strict=True))
    rows = table[table["path"].duplicated()].itertuples()
    return [f"{row.place}: {row.path} is already listed in {first[row.path]}." for row in rows]
