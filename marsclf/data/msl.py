"""The published sets of labeled Curiosity images: what they are, and their check.

Each has images named by product id, a file per split with lines "path label", and a class list.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from marsclf.data import dataset
from marsclf.data.dataset import Dataset
from marsclf.data.product_id import EXAMPLE, parse_product_id
from marsclf.data.splits import SPLITS
from marsclf.errors import MarsclfError
from marsclf.files import regular_file, sha256_of

SAMPLE_MARKER = "SAMPLE_DATA.txt"
SAMPLE_NOTICE = (
    "SAMPLE DATA: this run uses generated pictures of geometric shapes, not images from Curiosity. "
    "Its numbers and figures say nothing about Mars. To use the real images, run with a network "
    "connection (they are downloaded once, 61 MB) or set MARSCLF_DATA_DIR to their folder."
)


@dataclass(frozen=True)
class PublishedDataSet:
    """A published data set: where it is, and which files it consists of.

    `lists` are the files of the splits; the paths in them are relative to the folder `images`. The
    digest counts the splits that are `required`; others may be missing.
    """

    name: str
    url: str
    digest: str
    class_file: str
    lists: dict[str, str]
    images: str
    required: tuple[str, ...]
    classes: tuple[str, ...]


MSL_V1 = PublishedDataSet(
    name="msl-v1",
    url="https://zenodo.org/records/1049137/files/msl-images.zip?download=1",
    digest="23a44479ad8e45aff6829a2f95af3a42c87a31e6e6a98aa7ae139414b07d549b",
    class_file="msl_synset_words-indexed.txt",
    lists={split: f"{split}-calibrated-shuffled.txt" for split in SPLITS},
    images="",
    required=SPLITS,
    classes=(
        "apxs", "apxs cal target", "chemcam cal target", "chemin inlet open", "drill",
        "drill holes", "drt front", "drt side", "ground", "horizon", "inlet", "mahli",
        "mahli cal target", "mastcam", "mastcam cal target", "observation tray", "portion box",
        "portion tube", "portion tube opening", "rems uv sensor", "rover rear deck", "scoop", "sun",
        "turret", "wheel",
    ),
)  # fmt: skip
MSL_V2 = PublishedDataSet(
    name="msl-v2.1",
    url="https://zenodo.org/records/4033453/files/msl-labeled-data-set-v2.1.zip?download=1",
    digest="2927934ad3d3ba5d5a6a1e124ebdaca264ecfec1dc0b58b87305297b1d1cc8ab",
    class_file="class_map.csv",
    lists={split: f"{split}-set-v2.1.txt" for split in SPLITS},
    images="images",
    required=("train", "val"),
    classes=(
        "Arm cover", "Other rover part", "Artifact", "Nearby surface", "Close-up rock", "DRT",
        "DRT spot", "Distant landscape", "Drill hole", "Night sky", "Float", "Layers",
        "Light-toned veins", "Mastcam cal target", "Sand", "Sun", "Wheel", "Wheel joint",
        "Wheel tracks",
    ),
)  # fmt: skip
IMAGE_CREDIT = "Images: NASA/JPL-Caltech/MSSS"
PUBLISHED = {published.name: published for published in (MSL_V1, MSL_V2)}

# A path that cannot lead out of its folder on any system, and a label.
_LINE = re.compile(r"((?:[\w-][\w.-]*/)*[\w-]+\.\w+)\s+(\d{1,9})", re.ASCII)
# Version 2.1 also lists flipped and rotated copies of training images.
_COPY = re.compile(r"\S+-(fh|fv|r90|r180|r270)\.jpg\s+\d+", re.ASCII)


def scan(root: Path, published: PublishedDataSet) -> tuple[list[str], Dataset | None]:
    """Return all faults of a published data set in the folder `root`, and the set without any."""
    faults, rows, notes, names = [], [], [], published.classes
    last = len(names) - 1
    form = f"a relative path in this folder, such as calibrated/{EXAMPLE}, and a label, 0 to {last}"
    lines = _read_lines(root / published.class_file, faults)
    classes = [line.replace(",", " ").split() for _, line in lines]
    if classes and classes != [[str(label), *name.split()] for label, name in enumerate(names)]:
        order = f"the classes 0 {names[0]} to {last} {names[-1]} in order"
        faults.append(f"{root / published.class_file} does not list {order}.")
    for split, list_file in published.lists.items():
        is_required = split in published.required
        lines = _read_lines(root / list_file, faults if is_required else [])
        listed = (root / published.images / line.split()[0] for _, line in lines)
        if not (is_required or any(path.exists() for path in listed)):
            notes.append(f"{split}: not at hand")
            continue
        for place, line in lines:
            if _COPY.fullmatch(line):
                continue
            try:
                if (match := _LINE.fullmatch(line)) is None or int(match[2]) > last:
                    raise MarsclfError(f"{line[:120]!r} must be {form}")
                path = (Path(published.images) / match[1]).as_posix()
                product = parse_product_id(path)
            except MarsclfError as error:
                faults.append(f"{place}: {error}.")
            else:
                row = {"place": place, "split": split, "path": path}
                row |= {"class_name": names[int(match[2])], "group": str(product.sol)}
                rows.append(row | product._asdict())
    if not rows:
        return faults, None
    table = dataset.measure(root, pd.DataFrame(rows), faults)
    faults += dataset.find_shared_groups(table)
    if faults:
        return faults, None
    is_counted = table["split"].isin(published.required)
    digests = dict(table.loc[is_counted, ["path", "sha256"]].to_numpy())
    for name in (published.class_file, *map(published.lists.get, published.required)):
        digests[name] = sha256_of((root / name).read_bytes())
    listed = sorted(f"{sha256}  {path}\n" for path, sha256 in digests.items())
    digest = sha256_of("".join(listed).encode())
    name = published.name if digest == published.digest else "other"
    if (root / SAMPLE_MARKER).is_file():
        name, notes = "sample", [SAMPLE_NOTICE]
    table = dataset.without_copies(table, notes)
    return [], dataset.make_dataset(root, name, digest, table, names, notes)


def _read_lines(path: Path, faults: list[str]) -> list[tuple[str, str]]:
    """Return (place, line) for each line of a text file that is not blank; none is a fault."""
    try:
        text = regular_file(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        faults.append(f"The data needs {path}, which cannot be read ({error.strerror}).")
        return []
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    found = [(f"{path}, line {number}", line) for number, line in lines if line]
    if not found:
        faults.append(f"{path} is empty.")
    return found
