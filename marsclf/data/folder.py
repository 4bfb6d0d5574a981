"""A folder of one's own labeled images: one folder per class, maybe in splits, or a labels.csv."""

import csv
import unicodedata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from itertools import chain
from pathlib import Path, PureWindowsPath

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf import paths
from marsclf.data.dataset import SPLITS, Dataset, make_index, read_text, without_copies
from marsclf.data.msl import PUBLISHED
from marsclf.data.product_id import Product, parse_product_id
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
COLUMNS = ["split", "path", "label", "class_name", "group", "sequence", "width", "height"]
COLUMNS += ["channels", "sha256", *Product._fields]


def scan(root: Path, decode: bool) -> tuple[list[str], Dataset | None]:
    """Return all faults of the images in `root`, and the data set if there are none.

    Without `decode`, images are not decoded whose thumbnails are in the cache.
    """
    faults, notes = [], []
    rows = _listed(root, faults) if (root / LABELS).exists() else _in_folders(root, faults)
    rows.sort(key=lambda row: row["path"])
    _measure(root, rows, faults, decode)
    rows = without_copies(rows, notes)
    faults += _faults_of_labels(root, rows)
    if faults:
        return faults, None
    classes = tuple(sorted({row["class_name"] for row in rows}))
    for row in rows:
        row["label"] = classes.index(row["class_name"])
    _group(rows, notes)
    index = make_index([{name: row[name] for name in COLUMNS if name in row} for row in rows])
    if "val" not in set(index["split"]):
        fault = f"No class in {root} has two {LABELS} groups or images that look different"
        return [f"{fault}, so none can be held out for validation: add images."], None
    contents = index[["split", "path", "class_name", "group", "sha256"]].to_csv(index=False)
    # No folder's name passes for a data set that is recognized by its content.
    name = f"my-{root.name}" if root.name in (*PUBLISHED, "sample", "other") else root.name
    digest = sha256_of(contents.replace("\r\n", "\n").encode())
    return [], Dataset(root, name, digest, index, classes, tuple(notes))


def _in_folders(root: Path, faults: list[str]) -> list[dict]:
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
            about = {"place": str(root), "given": folder.name, "split": split, "group": ""}
            rows += [about | {"path": path} for path in found]
            if not found:
                faults.append(f"The folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    return rows


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(path.name)


def _listed(root: Path, faults: list[str]) -> list[dict]:
    """Return a row for each line of labels.csv."""
    reader = csv.DictReader(StringIO(read_text(root / LABELS, faults) or "path,label", newline=""))
    reader.fieldnames = names = [name.strip().lower() for name in reader.fieldnames]
    if not {"path", "label"} <= set(names):
        wanted = "path,label, and perhaps split and group"
        faults.append(f"{root / LABELS}, line 1 must be {wanted}, but is {','.join(names)[:120]}.")
        return []
    rows, places = [], {}
    for line in reader:
        place = f"{root / LABELS}, line {reader.line_num}"
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
            about = {"place": place, "given": label, "split": split, "group": group}
            rows.append(about | {"path": path})
    if not (rows or faults):
        faults.append(f"{root / LABELS} lists no images.")
    return rows


def _faults_of_labels(root: Path, rows: list[dict]) -> list[str]:
    """Return what is wrong with the classes, splits and groups as a whole."""
    faults, table = [], pd.DataFrame(rows, columns=["given", "class_name", "split", "group"])
    keys = table["class_name"].str.casefold()
    for names in table.groupby(keys)["given"].unique():
        if len(names) > 1:
            names = " and ".join(map(ascii, sorted(names)))
            faults.append(f"The labels {names} differ only by case or encoding: make them one.")
    counts, splits = table["class_name"].value_counts(), set(table["split"])
    if len(counts) == 1:
        faults.append(f"All images in {root} have the label {counts.index[0]!r}: add another.")
    if len(counts) > MAX_CLASSES:
        faults.append(f"{root} has {len(counts):,} classes, of which {MAX_CLASSES} are possible.")
    for name in sorted(counts.index[counts == 1]):
        faults.append(f"The class {name!r} has 1 image, but one must be held out: add another.")
    if "" in splits and len(splits) > 1:
        first = rows[table["split"].eq("").argmax()]
        faults.append(f"{first['place']}: {first['path']} has no split, but others have one.")
    elif splits and "" not in splits:
        if missing := {"train", "val"} - splits:
            faults.append(f"{root} has splits, but no images in {' and '.join(sorted(missing))}.")
        trained = set(table.loc[table["split"] == "train", "class_name"])
        for name in sorted(set(counts.index) - trained if "train" in splits else ()):
            faults.append(f"The class {name!r} is in val or test but not in train.")
        for group, found in table[table["group"] != ""].groupby("group")["split"].unique().items():
            if len(found) > 1:
                faults.append(f"The group {group!r} is in several splits: {', '.join(found)}.")
    return faults


def _measure(root: Path, rows: list[dict], faults: list[str], decode: bool) -> None:
    """Add class_name, sha256, width, height, channels and thumbnail to each row.

    What is decoded is kept in the cache, by the contents of the files.
    """

    def on_each(function: Callable[[Path], object], pool: ThreadPoolExecutor) -> list:
        def call(row: dict) -> object:
            try:
                return function(root / row["path"])
            except (OSError, MarsclfError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                path = row["path"].encode(errors="backslashreplace").decode()
                return MarsclfError(f"{row['place']}: the image {path} cannot be read: {reason}.")

        return list(tqdm(pool.map(call, rows), "checking", len(rows), disable=None))

    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        ignore_decoder_warnings()
        digests = on_each(_digest, pool)
        stored = paths.CACHE / "thumbnails" / f"{sha256_of(repr(digests).encode())}.npy"
        is_known = stored.is_file() and not decode
        measured = np.load(stored) if is_known else on_each(_measure_image, pool)
    owners: dict[object, dict] = {}
    for row, row["sha256"], values in zip(rows, digests, measured, strict=True):
        # Systems encode the accents in names in two ways.
        row["class_name"] = unicodedata.normalize("NFC", row["given"])
        owner = owners.setdefault(row["sha256"], row)
        if isinstance(values, MarsclfError):
            faults.append(str(values))
            continue
        *sizes, row["thumbnail"] = *values[:3].tolist(), values[3:]
        row |= zip(("width", "height", "channels"), sizes, strict=True)
        if owner["class_name"] != row["class_name"]:
            labels = f"the labels {owner['class_name']!r} and {row['class_name']!r}"
            faults.append(f"{owner['path']} and {row['path']} are the same image with {labels}.")
    if rows and not (faults or is_known):
        with replace_atomically(stored) as temporary:
            np.save(temporary, measured)


def _digest(path: Path) -> str:
    str(path).encode()  # UnicodeError: tables hold names in UTF-8 only
    return sha256_of(regular_file(path).read_bytes())


def _measure_image(path: Path) -> np.ndarray:
    """Return width, height, 1 if the image is gray else 3, and its thumbnail, int32 (259,)."""
    rgb = read_rgb(path)
    channels = 1 if (rgb == rgb[..., :1]).all() else 3
    small = thumbnail(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    return np.array([rgb.shape[1], rgb.shape[0], channels, *small], dtype=np.int32)


def _group(rows: list[dict], notes: list[str]) -> None:
    """Add group, sequence and the parts of product ids; draw the splits unless they are given."""
    try:
        products = [parse_product_id(row["path"])._asdict() for row in rows]
    except MarsclfError:
        products = [{} for _ in rows]
    groups = sequences = [row["path"] for row in rows]
    what, is_drawn = "that look alike", not rows[0]["split"]
    same_files = pd.DataFrame(rows).groupby("sha256").indices.values()
    if any(row["group"] for row in rows):
        what, groups = "of a group", [row["group"] or row["path"] for row in rows]
    elif products[0]:
        what, groups = "of a sol", [str(product["sol"]) for product in products]
    elif is_drawn:
        thumbnails = normalized(np.array([row["thumbnail"] for row in rows]))
        groups = sequences = merge_groups(groups, chain(same_files, near_duplicates(thumbnails)))
    splits = [row["split"] for row in rows]
    if is_drawn:
        groups = merge_groups(groups, same_files)
        splits = draw_splits([row["label"] for row in rows], groups).tolist()
        counts = ", ".join(f"{split} {splits.count(split):,}" for split in SPLITS)
        notes.append(
            f"No splits are given, so they were drawn ({counts}). Images {what} stay together: "
            "a test image that resembles one in training says little about new images."
        )
    elif "test" not in splits:
        notes.append("test: not at hand")
    columns = zip(rows, splits, groups, sequences, products, strict=True)
    for row, split, group, sequence, product in columns:
        row |= {"split": split, "group": group, "sequence": sequence} | product
