"""A folder of one's own labeled images: folders of classes, in splits or not, or a labels.csv."""

import csv
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from itertools import chain
from pathlib import Path, PureWindowsPath

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf import paths
from marsclf.data.dataset import SPLITS, Dataset, make_index, read_text
from marsclf.data.msl import PUBLISHED
from marsclf.data.product_id import Product, parse_product_id
from marsclf.data.splits import draw_splits, merge_groups, near_duplicates, normalized, thumbnail
from marsclf.errors import MarsclfError
from marsclf.files import regular_file, replace_atomically, sha256_of
from marsclf.images.decode import IMAGE_SUFFIXES, ignore_decoder_warnings, read_rgb
from marsclf.provenance import cores

LABELS = "labels.csv"
LAYOUT = f"put them in one folder per class, or list them in {LABELS} with columns path and label"
# Two or more of these, or nothing else, are meant as splits; one may be a class, such as trains.
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "dev", "testing"}
MAX_CLASSES = 500  # each is a column of the predictions and a line of the figures


def scan(root: Path, decode: bool) -> tuple[list[str], Dataset | None]:
    """Return all faults of the images in `root`, and the data set if there is none.

    All images are decoded; without `decode`, only those whose thumbnails are not in the cache.
    """
    faults, notes = [], []
    rows = _listed(root, faults) if (root / LABELS).exists() else _in_folders(root, faults)
    rows.sort(key=lambda row: row["path"])
    faults += _faults_of_labels(root, rows)
    measured = _measure(root, rows, faults, decode)
    if faults:
        return faults, None
    classes = tuple(sorted({row["class_name"] for row in rows}))
    for row, (width, height, channels, *_) in zip(rows, measured.tolist(), strict=True):
        row["label"] = classes.index(row["class_name"])
        row |= {"width": width, "height": height, "channels": channels}
    _group(rows, measured[:, 3:], notes)
    columns = ("split", "path", "label", "class_name", "group", "sequence", "width", "height")
    columns += ("channels", "sha256", *Product._fields)
    rows = [{name: row[name] for name in columns if name in row} for row in rows]
    index = make_index(rows, notes)
    for split in SPLITS[1:]:
        if not (index["split"] == split).any():
            notes.append(f"{split}: not at hand")
    contents = index[["split", "path", "class_name", "group", "sha256"]]
    digest = sha256_of(contents.to_csv(index=False, lineterminator="\n").encode())
    # No folder passes for a data set that is recognized by its content.
    name = f"my-{root.name}" if root.name in (*PUBLISHED, "sample", "other") else root.name
    return [], Dataset(root, name, digest, index, classes, tuple(notes))


def _in_folders(root: Path, faults: list[str]) -> list[dict]:
    """Return a row for each image in the folders of the classes."""
    tops, rows = _folders(root), []
    alike = [top for top in tops if top.name.lower() in LIKE_SPLITS]
    if len(alike) > 1 or 0 < len(alike) == len(tops):
        for top in tops:
            if top.name not in SPLITS:
                faults.append(f"The folder {top} is beside splits: name it train, val or test.")
        places = [(top.name, top) for top in tops if top.name in SPLITS]
    else:
        places = [("", root)]
    for split, place in places:
        if loose := [path for path in place.iterdir() if path.is_file() and _is_image(path)]:
            first = f"such as {min(loose).name}"
            faults.append(f"Images in {place}, {first}, have no label ({len(loose)}): {LAYOUT}.")
        elif not _folders(place):
            faults.append(f"There are no labeled images in {place}: {LAYOUT}.")
        for folder in _folders(place):
            inside = (path.relative_to(folder).parts for path in folder.rglob("*"))
            visible = [Path(*parts) for parts in inside if not any(map(_is_hidden, parts))]
            if not (images := list(filter(_is_image, visible))):
                faults.append(f"The folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
            for image in images:
                path = (folder / image).relative_to(root).as_posix()
                row = {"place": str(root), "path": path, "given": folder.name, "split": split}
                rows.append(row | {"group": ""})
    return rows


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(path.name)


def _listed(root: Path, faults: list[str]) -> list[dict]:
    """Return a row for each line of labels.csv."""
    if (text := read_text(root / LABELS, faults)) is None:
        return []
    reader, rows, places = csv.DictReader(StringIO(text, newline="")), [], {}
    names = [name.strip().lower() for name in reader.fieldnames]
    reader.fieldnames = names
    if missing := " and ".join(name for name in ("path", "label") if name not in names):
        lacks = f"{root / LABELS} lacks the column {missing}"
        faults.append(f"{lacks}: its first line must name path and label, but is {names}.")
        return []
    for line in reader:
        place = f"{root / LABELS}, line {reader.line_num}"
        path, label, split, group = (
            (line.get(name) or "").strip() for name in ("path", "label", "split", "group")
        )
        windows = PureWindowsPath(path)
        path = windows.as_posix()
        if windows.anchor or ".." in windows.parts or not windows.parts:
            faults.append(f"{place}: {path[:120]!r} must be the path of an image in this folder.")
        elif not label:
            faults.append(f"{place}: {path} has no label.")
        elif split not in ("", *SPLITS):
            faults.append(f"{place}: the split {split[:120]!r} must be train, val or test.")
        elif (first := places.setdefault(path, place)) != place:
            faults.append(f"{place}: {path} is already listed in {first}.")
        else:
            row = {"place": place, "path": path, "given": label, "split": split}
            rows.append(row | {"group": group})
    if not (rows or faults):
        faults.append(f"{root / LABELS} lists no images.")
    return rows


def _faults_of_labels(root: Path, rows: list[dict]) -> list[str]:
    """Return what is wrong with the labels, splits and groups; add class_name to the rows."""
    faults, spellings, splits_of, splits_of_group = [], {}, {}, {}
    for row in rows:
        # Systems encode accents in file names in two ways.
        row["class_name"] = name = unicodedata.normalize("NFC", row["given"])
        spellings.setdefault(name.casefold(), set()).add(row["given"])
        splits_of.setdefault(name, []).append(row["split"])
        if row["group"]:
            splits_of_group.setdefault(row["group"], set()).add(row["split"])
    for alike in spellings.values():
        if len(alike) > 1:
            names = " and ".join(map(ascii, sorted(alike)))
            faults.append(f"The labels {names} differ only by case or encoding: make them one.")
    if len(splits_of) == 1:
        faults.append(f"All images in {root} are of the class {rows[0]['given']!r}: add another.")
    if len(splits_of) > MAX_CLASSES:
        faults.append(f"{root} has {len(splits_of):,} classes: at most {MAX_CLASSES} are possible.")
    for name, splits in splits_of.items():
        if len(splits) == 1:
            faults.append(f"The class {name!r} has 1 image: one to train with and one to test with "
                          "are the least.")  # fmt: skip
        elif any(splits) and "train" not in splits:
            faults.append(f"The class {name!r} is in {splits[0]} but not in train.")
    for group, splits in splits_of_group.items():
        if len(splits) > 1:
            faults.append(f"The group {group!r} is in the splits {' and '.join(sorted(splits))}.")
    found = {row["split"] for row in rows}
    if "" in found and len(found) > 1:
        first = next(row for row in rows if not row["split"])
        faults.append(f"{first['place']}: {first['path']} has no split, but others have one.")
    elif found and "" not in found and not {"train", "val"} <= found:
        needed = "splits need images in train and val"
        faults.append(f"{root} has only {' and '.join(sorted(found))}: {needed}, or name no split.")
    return faults


def _measure(root: Path, rows: list[dict], faults: list[str], decode: bool) -> np.ndarray:
    """Return width, height, channels and thumbnail of each image, int32 (N, 259).

    Adds sha256 to the rows. The values are kept in the cache by the images' contents.
    """

    def read(row: dict, function) -> object:
        try:
            row["path"].encode()
            return function(root / row["path"])
        except UnicodeEncodeError:
            return f"{row['place']}: rename {row['path']!a}, which is not valid text."
        except OSError as error:
            reason = error.strerror
        except MarsclfError as error:
            reason = error
        return f"{row['place']}: the image {row['path']} cannot be read ({reason})."

    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        ignore_decoder_warnings()
        digests = list(pool.map(lambda row: read(row, _digest), rows))
        stored = paths.CACHE / "thumbnails" / f"{sha256_of(repr(digests).encode())}.npy"
        if stored.is_file() and not decode:
            measured = list(np.load(stored))
        else:
            found = pool.map(lambda row: read(row, _measure_image), rows)
            measured = list(tqdm(found, "decoding", len(rows), disable=None))
    owners = {}
    for row, digest, values in zip(rows, digests, measured, strict=True):
        row["sha256"] = digest
        other = owners.setdefault(digest, row)
        if isinstance(values, str):
            faults.append(values)
        elif other["class_name"] != row["class_name"]:
            labels = f"{other['class_name']!r} and {row['class_name']!r}"
            faults.append(f"{other['path']} and {row['path']} are one image with labels {labels}.")
    if faults:
        return np.empty(0)
    if not stored.is_file():
        with replace_atomically(stored) as temporary:
            np.save(temporary, measured)
    return np.array(measured)


def _digest(path: Path) -> str:
    return sha256_of(regular_file(path).read_bytes())


def _measure_image(path: Path) -> np.ndarray:
    """Return width, height, 1 if the image is gray else 3, and its thumbnail, int32 (259,)."""
    rgb = read_rgb(path)
    channels = 1 if (rgb == rgb[..., :1]).all() else 3
    small = thumbnail(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    return np.array([rgb.shape[1], rgb.shape[0], channels, *small], dtype=np.int32)


def _group(rows: list[dict], thumbnails: np.ndarray, notes: list[str]) -> None:
    """Add group and sequence, and the parts of product ids; draw the splits if none are given."""
    try:
        products = [parse_product_id(row["path"])._asdict() for row in rows]
    except MarsclfError:
        products = [{}] * len(rows)
    together = [np.array(of) for of in pd.DataFrame(rows).groupby("sha256").indices.values()]
    if any(row["group"] for row in rows):
        what, groups = "of a group", [row["group"] or row["path"] for row in rows]
    elif all(products):
        what, groups = "of a sol", [str(product["sol"]) for product in products]
    else:
        what, groups = "that look alike", [row["path"] for row in rows]
        if not rows[0]["split"]:
            together = chain(together, near_duplicates(normalized(thumbnails)))
    is_drawn = not rows[0]["split"]
    groups = merge_groups(groups, together) if is_drawn else groups
    if is_drawn:
        splits = draw_splits([row["label"] for row in rows], groups)
        for row, split in zip(rows, splits.tolist(), strict=True):
            row["split"] = split
        counts = ", ".join(f"{split} {(splits == split).sum():,}" for split in SPLITS)
        notes.append(
            f"No splits are given, so they were drawn class by class ({counts}). Images {what} "
            "stay together: the score on a test image like one in training would be too high."
        )
    for row, group, product in zip(rows, groups, products, strict=True):
        sequence = group if what == "that look alike" else row["path"]
        row |= {"group": group, "sequence": sequence} | product
