"""The labeled Curiosity images as one checked table.

The data set is *Mars surface image (Curiosity rover) labeled data set*, version 1,
doi 10.5281/zenodo.1049137: JPEGs, three split files with lines "path label", and a class list.
"""

import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pandas as pd
from PIL import Image, UnidentifiedImageError

from marsclf import paths
from marsclf.data.product_id import EXAMPLE, parse_product_id
from marsclf.errors import MarsclfError
from marsclf.files import jpeg_damage, regular_file, sha256_of

CLASS_NAMES = (
    "apxs", "apxs cal target", "chemcam cal target", "chemin inlet open", "drill", "drill holes",
    "drt front", "drt side", "ground", "horizon", "inlet", "mahli", "mahli cal target", "mastcam",
    "mastcam cal target", "observation tray", "portion box", "portion tube",
    "portion tube opening", "rems uv sensor", "rover rear deck", "scoop", "sun", "turret", "wheel",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
SPLITS = ("train", "val", "test")
CLASS_FILE = "msl_synset_words-indexed.txt"
SAMPLE_MARKER = "SAMPLE_DATA.txt"
MSL_V1_DIGEST = "23a44479ad8e45aff6829a2f95af3a42c87a31e6e6a98aa7ae139414b07d549b"

MAX_PIXELS = 20_000_000  # a full frame of the cameras has 1648 x 1200
# A path that cannot lead out of its folder on any system, and a label.
_LINE = re.compile(r"((?:[\w-][\w.-]*/)*[\w-]+\.\w+)\s+(-?\d{1,9})", re.ASCII)

SAMPLE_NOTICE = (
    "SAMPLE DATA: this run uses generated pictures of geometric shapes, not images from Curiosity. "
    "Its numbers and figures say nothing about Mars. To use the real images, run with a network "
    "connection (they are downloaded once, 61 MB) or set MARSCLF_DATA_DIR to their folder."
)


@dataclass(frozen=True)
class Dataset:
    """A checked data set.

    `index` has one row per image, ordered by split and path: split, path (relative to `root`),
    label (0-24), class_name, sol, camera, sequence, frame, product_type, width and height in
    pixels, channels (1 or 3), sha256. `name` is "msl-v1", "sample" or "other". `digest` is the
    SHA-256 of all contents (images, split files, class list).
    """

    root: Path
    name: str
    digest: str
    index: pd.DataFrame


def split_file(split: str) -> str:
    """Return the name of the file that lists the images of `split`."""
    return f"{split}-calibrated-shuffled.txt"


def load_dataset(root: str | Path) -> Dataset:
    """Check every listed file in the folder `root` and return the data set; decode no pixels.

    A relative `root` is relative to the project folder. Raises MarsclfError with the first fault.
    """
    root = paths.resolve(root)
    faults, rows, hashes = _scan(root, decode=False)
    if faults:
        others = f" ({len(faults) - 1} more: `python -m marsclf check-data` lists all faults.)"
        raise MarsclfError(faults[0] + (others if len(faults) > 1 else ""))
    lines = sorted(f"{sha256}  {path}\n" for path, sha256 in hashes.items())
    digest = sha256_of("".join(lines).encode())
    name = "msl-v1" if digest == MSL_V1_DIGEST else "other"
    if (root / SAMPLE_MARKER).is_file():
        name = "sample"
    rows.sort(key=lambda row: (SPLITS.index(row["split"]), row["path"]))
    return Dataset(root=root, name=name, digest=digest, index=pd.DataFrame(rows))


def find_faults(root: str | Path) -> list[str]:
    """Return every fault of the data in `root`, one sentence each; decodes every image."""
    return _scan(paths.resolve(root), decode=True)[0]


def _scan(root: Path, decode: bool) -> tuple[list[str], list[dict], dict[str, str]]:
    """Return all faults, one row of the index per image, and the SHA-256 of each file by path."""
    if fault := _fault_of_folder(root):
        return [fault], [], {}
    faults, rows, hashes, places, split_of_sol = [], [], {}, {}, {}
    classes = [line.split() for _, line in _read_lines(root, CLASS_FILE, faults, hashes)]
    if classes and classes != [[str(i), *name.split()] for i, name in enumerate(CLASS_NAMES)]:
        faults.append(f"{root / CLASS_FILE} does not list the classes 0 apxs to 24 wheel in order.")
    for split in SPLITS:
        for place, line in _read_lines(root, split_file(split), faults, hashes):
            try:
                if (match := _LINE.fullmatch(line)) is None:
                    form = f"a relative path in this folder, such as calibrated/{EXAMPLE}"
                    raise MarsclfError(f"{line[:120]!r} must be {form}, and a label")
                path, label, product = match[1], int(match[2]), parse_product_id(match[1])
                if (first := places.setdefault(path, place)) != place:
                    raise MarsclfError(f"{path} is already listed in {first}")
                if not 0 <= label < NUM_CLASSES:
                    raise MarsclfError(f"label {label} of {path} is outside 0-24")
                if (other := split_of_sol.setdefault(product.sol, split)) != split:
                    raise MarsclfError(f"sol {product.sol} is already in the {other} split")
                image = _check_image(root, path, decode)
            except MarsclfError as error:
                faults.append(f"{place}: {error}.")
            else:
                hashes[path] = image["sha256"]
                row = {"split": split, "path": path, "label": label}
                rows.append(row | {"class_name": CLASS_NAMES[label]} | product._asdict() | image)
    return faults, rows, hashes


def _fault_of_folder(root: Path) -> str | None:
    """Return what is wrong with a folder that holds no file of the data set, else None."""
    wanted = split_file("train")
    fix = f"use --data-dir or MARSCLF_DATA_DIR to name the folder with {wanted}"
    if not root.is_dir():
        return f"The data folder {root} is missing or not a folder: {fix}."
    files = [root / name for name in (CLASS_FILE, *map(split_file, SPLITS))]
    if not os.access(root, os.R_OK) or any(map(os.path.lexists, files)):
        return None  # each file that cannot be read is a fault of its own
    near = [*root.parent.glob(wanted), *root.glob(f"*/{wanted}"), *root.glob(f"*/*/{wanted}")]
    if near:
        return f"The data set is not in {root} but in {near[0].parent}: name that folder."
    is_version_2 = any(root.glob("*-set-v2*.txt")) or any(root.glob("*/*-set-v2*.txt"))
    found = "version 2" if is_version_2 else "no version"
    return f"{root} holds {found} of the data set, not 1 (doi 10.5281/zenodo.1049137): {fix}."


def _read_lines(root: Path, name: str, faults: list, hashes: dict) -> list[tuple[str, str]]:
    """Return (place, line) for each line of a text file that is not blank."""
    path = root / name
    try:
        content = regular_file(path).read_bytes()
        lines = enumerate(content.decode("utf-8-sig").splitlines(), start=1)
    except OSError as error:
        faults.append(f"The data needs {path}, which cannot be read ({error.strerror}).")
        return []
    except UnicodeDecodeError:
        faults.append(f"{path} is not UTF-8 text.")
        return []
    hashes[name] = sha256_of(content)
    found = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
    if not found:
        faults.append(f"{path} is empty.")
    return found


def _check_image(root: Path, path: str, decode: bool) -> dict:
    """Return width, height, channels and sha256; raises MarsclfError if it is not a valid JPEG."""
    try:
        content = regular_file(root / path).read_bytes()
        image = Image.open(BytesIO(content), formats=["JPEG"])
        (width, height), channels = image.size, len(image.getbands())
        if width * height > MAX_PIXELS:
            raise MarsclfError(f"the image {path} is too large ({width} x {height} pixels)")
        if channels not in (1, 3):
            raise MarsclfError(f"the image {path} has {channels} channels instead of 1 or 3")
        # Bytes after the marker are harmless, but the one of a thumbnail is before the scan.
        if content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
            raise MarsclfError(f"the image {path} is truncated: it has no end-of-image marker")
        if decode:
            image.load()
            if damage := jpeg_damage(content):
                raise MarsclfError(f"the data of the image {path} is damaged: {damage}")
    except UnidentifiedImageError as error:
        raise MarsclfError(f"the file {path} is not a JPEG image") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MarsclfError(f"the image {path} cannot be read ({reason})") from error
    return {"width": width, "height": height, "channels": channels, "sha256": sha256_of(content)}
