"""The labeled Curiosity images as one checked table.

The data set is *Mars surface image (Curiosity rover) labeled data set*, version 1,
doi 10.5281/zenodo.1049137: JPEGs, three split files with lines "path label", and a class list.
"""

import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import pandas as pd
from PIL import Image, UnidentifiedImageError

from marsclf import paths
from marsclf.data.product_id import parse_product_id
from marsclf.errors import MarsclfError
from marsclf.files import sha256_of

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

# The images are about 256 pixels wide; a full frame of the cameras has 1648 x 1200 pixels.
MAX_PIXELS = 20_000_000
MAX_BYTES = 50_000_000

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
    """Check every listed file in the folder `root` and return the data set.

    Reads the bytes and the header of each image but decodes no pixels. A relative `root` counts
    from the project folder. Raises MarsclfError with the first fault.
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
    index = pd.DataFrame(rows)
    index.insert(3, "class_name", [CLASS_NAMES[label] for label in index["label"]])
    return Dataset(root=root, name=name, digest=digest, index=index)


def find_faults(root: str | Path) -> list[str]:
    """Return every fault of the data in `root`, one sentence each; decodes every image."""
    return _scan(paths.resolve(root), decode=True)[0]


def leaves_folder(path: str) -> bool:
    """Tell whether a relative path in POSIX style could lead out of its folder on any system."""
    posix = PurePosixPath(path)
    return posix.is_absolute() or ".." in posix.parts or bool(re.search(r"[\\:\0]", path))


def _scan(root: Path, decode: bool) -> tuple[list[str], list[dict], dict[str, str]]:
    """Return all faults, one row of the index per image, and the SHA-256 of each file by path."""
    if not root.is_dir():
        fix = f"use --data-dir or MARSCLF_DATA_DIR to name the folder with {split_file('train')}"
        return [f"The data folder {root} is missing or not a folder: {fix}."], [], {}
    faults, rows, hashes, places, split_of_sol = [], [], {}, {}, {}
    classes = _read_lines(root, CLASS_FILE, faults, hashes)
    for (place, line), (label, name) in zip(classes, enumerate(CLASS_NAMES), strict=False):
        if line.split() != [str(label), *name.split()]:
            faults.append(f"{place}: expected class '{label} {name}', found {line!r}.")
    if classes and len(classes) != NUM_CLASSES:
        faults.append(f"{root / CLASS_FILE} lists {len(classes)} classes instead of 25.")
    for split in SPLITS:
        for place, line in _read_lines(root, split_file(split), faults, hashes):
            try:
                path, label = _parse_line(line)
                product = parse_product_id(path)
                if path in places:
                    raise MarsclfError(f"{path} is already listed in {places[path]}")
                places[path] = place
                if not 0 <= label < NUM_CLASSES:
                    faults.append(f"{place}: label {label} of {path} is outside 0-24.")
                other = split_of_sol.setdefault(product.sol, split)
                if other != split:
                    faults.append(f"{place}: sol {product.sol} is already in the {other} split.")
                image = _check_image(root, path, decode)
            except MarsclfError as error:
                faults.append(f"{place}: {error}.")
            else:
                hashes[path] = image["sha256"]
                row = {"split": split, "path": path, "label": label}
                rows.append(row | product._asdict() | image)
    return faults, rows, hashes


def _read_lines(root: Path, name: str, faults: list, hashes: dict) -> list[tuple[str, str]]:
    """Return (place, line) for each line of a text file that is not blank."""
    path = root / name
    try:
        content = path.read_bytes()
        lines = enumerate(content.decode("utf-8-sig").split("\n"), start=1)
    except OSError as error:
        faults.append(f"The data needs {path}, which cannot be read ({error.strerror}).")
        return []
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}, line {number}: this is not UTF-8 text.")
        return []
    hashes[name] = sha256_of(content)
    found = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
    if not found:
        faults.append(f"{path} is empty.")
    return found


def _parse_line(line: str) -> tuple[str, int]:
    """Return the normalized path and the label of a split file's line."""
    match = re.fullmatch(r"(\S.*?)\s+(-?\d{1,9})", line, re.ASCII)
    if match is None:
        raise MarsclfError(f"{line[:80]!r} is not an image path, a space and a label")
    if leaves_folder(match[1]):
        raise MarsclfError(f"the path {match[1]!r} leads out of the data folder")
    return str(PurePosixPath(match[1])), int(match[2])


def _check_image(root: Path, path: str, decode: bool) -> dict:
    """Return width, height, channels and sha256; raises MarsclfError if it is not a valid JPEG."""
    try:
        if (root / path).stat().st_size > MAX_BYTES:
            raise MarsclfError(f"the image {path} is too large (over {MAX_BYTES:,} bytes)")
        content = (root / path).read_bytes()
        image = Image.open(BytesIO(content), formats=["JPEG"])
        (width, height), channels = image.size, len(image.getbands())
        if width * height > MAX_PIXELS:
            raise MarsclfError(f"the image {path} is too large ({width} x {height} pixels)")
        if channels not in (1, 3):
            raise MarsclfError(f"the image {path} has {channels} channels instead of 1 or 3")
        if not content.endswith(b"\xff\xd9"):
            raise MarsclfError(f"the image {path} is truncated: it has no end-of-image marker")
        if decode:
            image.load()
    except UnidentifiedImageError as error:
        raise MarsclfError(f"the file {path} is not a JPEG image") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise MarsclfError(f"the image {path} cannot be read ({error})") from error
    return {"width": width, "height": height, "channels": channels, "sha256": sha256_of(content)}
