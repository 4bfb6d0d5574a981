"""A folder of one's own labeled images: one folder per class, maybe in splits, or a labels.csv."""

import csv
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import StringIO
from itertools import chain
from pathlib import Path, PureWindowsPath

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf import paths
from marsclf.data.dataset import SPLITS, Dataset, in_order, read_text, without_copies
from marsclf.data.msl import PUBLISHED
from marsclf.data.product_id import parse_product_id
from marsclf.data.splits import draw_splits, merge_groups, near_duplicates, normalized, thumbnail
from marsclf.errors import MarsclfError
from marsclf.files import regular_file, replace_atomically, sha256_of
from marsclf.images.decode import IMAGE_SUFFIXES, ignore_decoder_warnings, read_rgb
from marsclf.provenance import cores

LABELS = "labels.csv"
LAYOUT = f"make one folder of images per class, or a {LABELS} with the columns path and label"
# Several of these, or nothing else, are meant as splits; one of them may be a class.
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "dev", "testing"}
MAX_CLASSES = 500  # each is a column of the predictions and a line of the charts


def scan(root: Path) -> tuple[list[str], Dataset | None]:
    """Return all faults of the images in `root`, and the data set if there are none."""
    faults, notes = [], []
    rows = _listed(root, faults) if (root / LABELS).exists() else _in_folders(root, faults)
    if not rows:
        return faults, None
    table = pd.DataFrame(rows, columns=["place", "path", "given", "split", "group"])
    table = table.sort_values("path", ignore_index=True)
    # Systems encode the accents in names in two ways.
    table["class_name"] = [unicodedata.normalize("NFC", given) for given in table["given"]]
    table["sequence"] = table["path"]
    thumbnails = _measure(root, table, faults)
    table = without_copies(table, notes)
    faults += _faults_of_labels(root, table)
    if faults:
        return faults, None
    classes = tuple(sorted(table["class_name"].unique()))
    table["label"] = table["class_name"].map(classes.index)
    table = _grouped(table, thumbnails, notes)
    if "val" not in set(table["split"]):
        why = "each class has only one group, or images that all look alike"
        return [f"Nothing in {root} can be held out, because {why}: add images."], None
    if "test" not in set(table["split"]):
        notes.append("test: not at hand")
    index = in_order(table.drop(columns=["place", "given"]))
    contents = index[["split", "path", "class_name", "group", "sha256"]]
    digest = sha256_of(contents.to_csv(index=False, lineterminator="\n").encode())
    # No folder's name passes for a data set that is recognized by its content.
    name = f"my-{root.name}" if root.name in (*PUBLISHED, "sample", "other") else root.name
    return [], Dataset(root, name, digest, index, classes, tuple(notes))


def _in_folders(root: Path, faults: list[str]) -> list[tuple]:
    """Return a row for each image in the folders of classes, at any depth."""
    tops, rows = _folders(root), []
    alike = sum(top.name.lower() in LIKE_SPLITS for top in tops)
    has_splits = alike > 1 or 0 < alike == len(tops)
    for place in tops if has_splits else [root]:
        split = place.name if has_splits else ""
        if split not in ("", *SPLITS):
            faults.append(f"The folder {place} is beside splits: name it train, val or test.")
            continue
        if loose := [path.name for path in place.iterdir() if path.is_file() and _is_image(path)]:
            these = f"Images in {place}, {len(loose)} such as {min(loose)},"
            faults.append(f"{these} are in no folder of a class: {LAYOUT}.")
        elif not _folders(place):
            faults.append(f"There are no labeled images in {place}: {LAYOUT}.")
        for folder in _folders(place):
            found = [p.relative_to(root) for p in folder.rglob("*") if _is_image(p)]
            found = [path.as_posix() for path in found if not any(map(_is_hidden, path.parts))]
            rows += [(str(root), path, folder.name, split, "") for path in found]
            if not found:
                faults.append(f"The folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    return rows


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(path.name)


def _listed(root: Path, faults: list[str]) -> list[tuple]:
    """Return a row for each line of labels.csv."""
    reader = csv.DictReader(StringIO(read_text(root / LABELS, faults) or "path,label", newline=""))
    try:
        reader.fieldnames = names = [name.strip().lower() for name in reader.fieldnames]
        lines = [(f"{root / LABELS}, line {reader.line_num}", line) for line in reader]
    except csv.Error as error:
        faults.append(f"{root / LABELS} is not CSV after line {reader.line_num} ({error}).")
        return []
    if not {"path", "label"} <= set(names):
        wanted = "path,label, and perhaps split and group"
        faults.append(f"{root / LABELS}, line 1 must be {wanted}, but is {','.join(names)[:120]}.")
        return []
    rows, places = [], {}
    for place, line in lines:
        path, label, split, group = (
            (line.get(name) or "").strip() for name in ("path", "label", "split", "group")
        )
        parts = PureWindowsPath(path)  # which takes both kinds of slashes
        path = parts.as_posix()
        if parts.anchor or ".." in parts.parts or path == ".":
            faults.append(f"{place}: {path[:120]!r} must be the path of an image in this folder.")
        elif not label:
            faults.append(f"{place}: {path} has no label.")
        elif split not in ("", *SPLITS):
            faults.append(f"{place}: the split {split[:120]!r} must be train, val or test.")
        elif (first := places.setdefault(path, place)) != place:
            faults.append(f"{place}: {path} is already listed in {first}.")
        else:
            rows.append((place, path, label, split, group))
    if not (rows or faults):
        faults.append(f"{root / LABELS} lists no images.")
    return rows


def _faults_of_labels(root: Path, table: pd.DataFrame) -> list[str]:
    """Return what is wrong with the classes, splits and groups as a whole."""
    faults, counts, splits = [], table["class_name"].value_counts(), set(table["split"])
    for names in table.groupby(table["class_name"].str.casefold())["given"].unique():
        if len(names) > 1:
            names = " and ".join(map(ascii, sorted(names)))
            faults.append(f"The labels {names} differ only by case or encoding: make them one.")
    for name in counts.index:
        if not (name.isprintable() and name.strip()):  # the classifier file refuses it too
            faults.append(f"The label {name!a} cannot be printed: give the class another name.")
    if len(counts) == 1:
        faults.append(f"All images in {root} have the label {counts.index[0]!r}: add another.")
    if len(counts) > MAX_CLASSES:
        faults.append(f"{root} has {len(counts):,} classes, of which {MAX_CLASSES} are possible.")
    for name in sorted(counts.index[counts == 1]):
        faults.append(f"The class {name!r} has 1 image, but one must be held out: add another.")
    if "" in splits and len(splits) > 1:
        first = table.loc[table["split"].eq("").idxmax()]
        faults.append(f"{first['place']}: {first['path']} has no split, but others have one.")
    elif "" not in splits:
        if missing := {"train", "val"} - splits:
            faults.append(f"{root} has splits, but no images in {' and '.join(sorted(missing))}.")
        trained = set(table.loc[table["split"] == "train", "class_name"])
        for name in sorted(set(counts.index) - trained if trained else ()):
            faults.append(f"The class {name!r} is in val or test but not in train.")
        for group, found in table[table["group"] != ""].groupby("group")["split"].unique().items():
            if len(found) > 1:
                faults.append(f"The group {group!r} is in several splits: {', '.join(found)}.")
    return faults


def _measure(root: Path, table: pd.DataFrame, faults: list[str]) -> np.ndarray:
    """Add sha256, width, height and channels to the table; return thumbnails, int32 (N, 256).

    What is decoded is kept in the cache, by the contents of the files.
    """
    files = [root / path for path in table["path"]]
    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        ignore_decoder_warnings()
        table["sha256"] = digests = list(pool.map(_digest, files))
        stored = paths.CACHE / "thumbnails" / f"{sha256_of(repr(digests).encode())}.npy"
        is_known = stored.is_file()
        found = np.load(stored) if is_known else pool.map(_measure_image, files)
        found = list(tqdm(found, "decoding", len(files), disable=is_known or None))
    for row, values in zip(table.itertuples(), found, strict=True):
        if isinstance(values, str):
            faults.append(f"{row.place}: the image {row.path} cannot be read: {values}.")
    for _, same in table[table["sha256"] != ""].groupby("sha256", sort=False):
        if len(named := same.drop_duplicates("class_name")) > 1:
            places, names = (" and ".join(named[name]) for name in ("path", "class_name"))
            faults.append(f"The same image has several labels ({names}): {places}.")
    if faults:
        return np.empty(0)
    if not is_known:
        with replace_atomically(stored) as temporary:
            np.save(temporary, found)
    measured = np.reshape(found, (len(files), -1))
    table[["width", "height", "channels"]] = measured[:, :3]
    return measured[:, 3:]


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


def _grouped(table: pd.DataFrame, thumbnails: np.ndarray, notes: list[str]) -> pd.DataFrame:
    """Return the table with groups, and with the parts of product ids; draw missing splits."""
    is_drawn, has_groups = not table["split"].any(), table["group"].any()
    with suppress(MarsclfError):
        products = pd.DataFrame(map(parse_product_id, table["path"]), table.index)
        table = table.assign(**products)
    same_files = table.groupby("sha256").indices.values()
    what, groups = "of a group", table["group"].where(table["group"] != "", table["path"])
    if "sol" in table and not has_groups:
        what, groups = "of a sol", table["sol"].astype(str)
    elif is_drawn and not has_groups:
        alike = chain(same_files, near_duplicates(normalized(thumbnails)))
        what, groups = "that look alike", merge_groups(groups, alike)
        table = table.assign(sequence=groups)
    if not is_drawn:
        return table.assign(group=groups)
    groups = merge_groups(groups, same_files)
    splits = draw_splits(table["label"], groups)
    counts = ", ".join(f"{split} {(splits == split).sum():,}" for split in SPLITS)
    notes.append(
        f"No splits are given, so they were drawn ({counts}). Images {what} stay together: a test "
        "image that resembles one in training says little about new images."
    )
    return table.assign(group=groups, split=splits)
