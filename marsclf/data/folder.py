"""A folder of one's own labeled images: one folder per class, maybe in splits, or a labels.csv."""

import unicodedata
from contextlib import suppress
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from marsclf.data import dataset
from marsclf.data.dataset import Dataset
from marsclf.data.msl import PUBLISHED
from marsclf.data.product_id import parse_product_id
from marsclf.data.splits import SPLITS, draw_splits, merge_groups, near_duplicates, normalized
from marsclf.errors import MarsclfError
from marsclf.files import regular_file
from marsclf.images.decode import IMAGE_SUFFIXES

LABELS = "labels.csv"
LAYOUT = f"make one folder of images per class, or a {LABELS} with the columns path and label"
COLUMNS = ["path", "label", "split", "group"]
# Several of these, or nothing else, are meant as splits; one of them may be a class.
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "dev", "testing"}
MAX_CLASSES = 40  # each is a column of the predictions and a line of the charts


def scan(root: Path) -> tuple[list[str], Dataset | None]:
    """Return all faults of the images in `root`, and the data set if there are none."""
    faults, notes = [], []
    rows = (_listed if (root / LABELS).exists() else _in_folders)(root, faults)
    if not rows:
        return faults, None
    table = pd.DataFrame(rows, columns=["place", *COLUMNS]).sort_values("path", kind="stable")
    # Systems encode the accents in names in two ways.
    table["class_name"] = [unicodedata.normalize("NFC", label) for label in table.pop("label")]
    table = dataset.measure(root, table.assign(sequence=table["path"]), faults)
    for _, same in table.groupby("sha256", sort=False):
        if len(named := same.drop_duplicates("class_name")) > 1:
            places, names = (" and ".join(named[name]) for name in ("path", "class_name"))
            faults.append(f"The same image has several labels ({names}): {places}.")
    table = dataset.without_copies(table, notes)
    faults += [*_faults_of_classes(root, table), *_faults_of_splits(root, table)]
    if faults:
        return faults, None
    table = _grouped(table, notes)
    if "val" not in set(table["split"]):
        why = "each class has only one group, or images that all look alike"
        return [f"Nothing in {root} can be held out, because {why}: add images."], None
    if "test" not in set(table["split"]):
        notes.append("test: not at hand")
    # No folder's name passes for a data set that is recognized by its content.
    name = f"my-{root.name}" if root.name in (*PUBLISHED, "sample", "other") else root.name
    classes = tuple(sorted(table["class_name"].unique()))
    return [], dataset.make_dataset(root, name, None, table, classes, notes)


def _in_folders(root: Path, faults: list[str]) -> list[tuple[str, ...]]:
    """Return place, path, label, split and group of each image in the folders of classes."""
    tops, rows = _folders(root), []
    alike = sum(top.name.lower() in LIKE_SPLITS for top in tops)
    has_splits = alike > 1 or 0 < alike == len(tops)
    for place in tops if has_splits else [root]:
        split = place.name if has_splits else ""
        if split not in ("", *SPLITS):
            faults.append(f"The folder {place} is beside splits: name it train, val or test.")
            continue
        classes, loose = _folders(place), _images(root, place, "*")
        if loose:
            these = f"Images in {place}, {len(loose)} such as {Path(loose[0]).name},"
            faults.append(f"{these} are in no folder of a class: {LAYOUT}.")
        elif not classes:
            faults.append(f"There are no labeled images in {place}: {LAYOUT}.")
        for folder in classes:
            found = _images(root, folder, "**/*")
            rows += [(str(root), path, folder.name, split, "") for path in found]
            if not found:
                faults.append(f"The folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    return rows


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _images(root: Path, folder: Path, pattern: str) -> list[str]:
    """Return the paths of the images in a folder that match a pattern, relative to `root`."""
    found = sorted(path.relative_to(root) for path in folder.glob(pattern))
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    return [path.as_posix() for path in images if not any(map(_is_hidden, path.parts))]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _listed(root: Path, faults: list[str]) -> list[tuple[str, ...]]:
    """Return place, path, label, split and group of each valid line of labels.csv."""
    file, rows = root / LABELS, []
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(regular_file(file), skip_blank_lines=False, **options)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        faults.append(f"{file} cannot be read as a CSV file ({reason[:200]}).")
        return []
    table.columns = [str(name).strip().lower() for name in table.columns]
    if not {"path", "label"} <= set(table.columns) or table.columns.has_duplicates:
        wanted = "path,label, and perhaps split and group"
        faults.append(f"{file}, line 1 must be {wanted}, but is {','.join(table.columns)[:120]}.")
        return []
    table = table.reindex(columns=COLUMNS, fill_value="").fillna("").map(str.strip)
    for number, row in enumerate(table.itertuples(index=False), start=2):
        place = f"{file}, line {number}"
        if not any(row):  # a blank line
            continue
        if not row.label:
            faults.append(f"{place}: {row.path} has no label.")
        elif row.split not in ("", *SPLITS):
            faults.append(f"{place}: the split {row.split!r:.120} must be train, val or test.")
        else:  # paths may have either kind of slashes
            rows.append((place, PureWindowsPath(row.path).as_posix(), *row[1:]))
    if not (rows or faults):
        faults.append(f"{file} lists no images.")
    return rows


def _faults_of_classes(root: Path, table: pd.DataFrame) -> list[str]:
    faults, counts = [], table["class_name"].value_counts().sort_index()
    for names in counts.index.groupby(counts.index.str.casefold()).values():
        if len(names) > 1:
            names = " and ".join(map(repr, names))
            faults.append(f"The labels {names} differ only by case: make them one.")
    for name, count in counts.items():
        if not (name.isprintable() and name.strip()):  # the classifier file refuses it too
            faults.append(f"The label {name!a} cannot be printed: give the class another name.")
        if count == 1:
            faults.append(f"The class {name!r} has 1 image, but one must be held out: add another.")
    if len(counts) == 1:
        faults.append(f"All images in {root} have the label {counts.index[0]!r}: add another.")
    if len(counts) > MAX_CLASSES:
        faults.append(f"{root} has {len(counts):,} classes, of which {MAX_CLASSES} are possible.")
    return faults


def _faults_of_splits(root: Path, table: pd.DataFrame) -> list[str]:
    splits = set(table["split"])
    if splits == {""}:
        return []
    if "" in splits:
        first = table.loc[table["split"].eq("").idxmax()]
        return [f"{first['place']}: {first['path']} has no split, but others have one."]
    faults = dataset.find_shared_groups(table)
    if missing := {"train", "val"} - splits:
        faults.append(f"{root} has splits, but no images in {' and '.join(sorted(missing))}.")
    trained = set(table.loc[table["split"] == "train", "class_name"])
    for name in sorted(set(table["class_name"]) - trained if trained else ()):
        faults.append(f"The class {name!r} is in val or test but not in train.")
    return faults


def _grouped(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the table with groups, and with the parts of product ids; draw missing splits."""
    is_drawn, has_groups = not table["split"].any(), table["group"].any()
    with suppress(MarsclfError):
        table = table.assign(**pd.DataFrame(map(parse_product_id, table["path"]), table.index))
    same = [*table.groupby("sha256").indices.values()]
    what, groups = "of a group", table["group"].where(table["group"] != "", table["path"])
    if "sol" in table and not has_groups:
        what, groups = "of a sol", table["sol"].astype(str)
    elif is_drawn and not has_groups:
        alike = near_duplicates(normalized(np.stack(table["thumbnail"])))
        what, groups = "that look alike", merge_groups(groups, chain(same, alike))
        table["sequence"] = groups
    if is_drawn:
        groups = merge_groups(groups, same)
        table["split"] = splits = draw_splits(table["class_name"], groups)
        counts = ", ".join(f"{split} {(splits == split).sum():,}" for split in SPLITS)
        notes.append(
            f"No splits are given, so they were drawn ({counts}). Images {what} stay together: a "
            "test image that resembles one in training says little about new images."
        )
    return table.assign(group=groups)
