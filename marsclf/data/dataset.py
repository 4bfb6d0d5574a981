"""A checked data set as a value, and what all kinds of data sets share."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from marsclf.files import regular_file

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """A checked data set.

    `index` has one row per image, ordered by split and path: split, path (relative to `root`),
    label (its place in `classes`), class_name, group (what drawn splits never share, such as the
    sol), sequence (the burst, else the path), width and height in pixels, channels (1 or 3),
    sha256. If all names are product ids, it also has sol, camera, frame and product_type.

    `name` is "msl-v1", "msl-v2.1", "sample", "other" for a changed one of these, or the name of
    one's own folder. `digest` is the SHA-256 of its contents. `notes` are sentences for the user.
    """

    root: Path
    name: str
    digest: str
    index: pd.DataFrame
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def without_copies(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the rows without training images whose files are also held out, and note these."""
    held_out = table.loc[table["split"].isin(SPLITS[1:]), "sha256"]
    copies = table["split"].eq("train") & table["sha256"].isin(held_out)
    if copies.any():
        why = "because validation or test has the same files"
        notes.append(f"Training images left out, {why}: {copies.sum()}.")
    return table[~copies]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows ordered by split and path."""
    places = table["split"].map(SPLITS.index)
    return table.assign(place=places).sort_values(["place", "path"], ignore_index=True)[[*table]]


def read_text(path: Path, faults: list[str]) -> str | None:
    """Return the content of a UTF-8 file that is not blank, with its line ends, or add a fault."""
    try:
        text = regular_file(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        faults.append(f"The data needs {path}, which cannot be read ({error.strerror}).")
    except UnicodeDecodeError:
        faults.append(f"{path} is not UTF-8 text.")
    else:
        if text.strip():
            return text
        faults.append(f"{path} is empty.")
    return None
