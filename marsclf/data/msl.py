"""The labelled Curiosity images as one checked table.

The data set is *Mars surface image (Curiosity rover) labeled data set*, version 1,
doi 10.5281/zenodo.1049137: JPEGs, three split files with lines "path label", and a class list.
"""

import re
import warnings
from collections.abc import Iterator
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
    "apxs",
    "apxs cal target",
    "chemcam cal target",
    "chemin inlet open",
    "drill",
    "drill holes",
    "drt front",
    "drt side",
    "ground",
    "horizon",
    "inlet",
    "mahli",
    "mahli cal target",
    "mastcam",
    "mastcam cal target",
    "observation tray",
    "portion box",
    "portion tube",
    "portion tube opening",
    "rems uv sensor",
    "rover rear deck",
    "scoop",
    "sun",
    "turret",
    "wheel",
)
NUM_CLASSES = len(CLASS_NAMES)
SPLITS = ("train", "val", "test")
CLASS_FILE = "msl_synset_words-indexed.txt"
SAMPLE_MARKER = "SAMPLE_DATA.txt"
MSL_V1_DIGEST = "23a44479ad8e45aff6829a2f95af3a42c87a31e6e6a98aa7ae139414b07d549b"

# The real images are about 256 pixels wide; the cameras' full frames have 1648 x 1200 pixels.
MAX_PIXELS = 20_000_000
MAX_BYTES = 50_000_000
END_OF_JPEG = b"\xff\xd9"

SAMPLE_NOTICE = (
    "SAMPLE DATA: this run uses generated pictures of geometric shapes, not Curiosity's images. "
    "Its numbers and figures say nothing about Mars. For the real images run with a network "
    "connection (they are downloaded once, 61 MB), or set MARSCLF_DATA_DIR to a folder that holds "
    "them."
)

_LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>-?\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Dataset:
    """A checked data set.

    `index` has one row per image, ordered by split and path: split, path (relative to `root`),
    label (0-24), class_name, sol, camera, sequence, product_type, frame, width and height in
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
    """Check every listed file beneath `root` and return the index.

    Reads each image's bytes and header but decodes no pixels. A relative `root` counts from the
    project's root. Raises MarsclfError with the first fault.
    """
    root = paths.resolve(root)
    scan = _Scan(root, decode=False)
    if scan.faults:
        others = len(scan.faults) - 1
        more = f" ({others} more: `make check-data` lists all faults.)" if others else ""
        raise MarsclfError(f"{scan.faults[0]}{more}")
    lines = sorted(f"{sha256}  {path}\n" for path, sha256 in scan.hashes.items())
    digest = sha256_of("".join(lines).encode())
    if (root / SAMPLE_MARKER).is_file():
        name = "sample"
    else:
        name = "msl-v1" if digest == MSL_V1_DIGEST else "other"
    index = pd.DataFrame(scan.rows)
    index.insert(3, "class_name", index["label"].map(dict(enumerate(CLASS_NAMES))))
    index = index.sort_values("path").sort_values(
        "split", key=lambda split: split.map(SPLITS.index), kind="stable", ignore_index=True
    )
    return Dataset(root=root, name=name, digest=digest, index=index)


def find_faults(root: str | Path) -> list[str]:
    """Return every fault of the data beneath `root`, one sentence each; decodes every image."""
    return _Scan(paths.resolve(root), decode=True).faults


class _Scan:
    """One pass over a data folder: the rows of the index, all hashes, and the faults."""

    def __init__(self, root: Path, decode: bool) -> None:
        self.root, self.decode = root, decode
        self.rows: list[dict[str, object]] = []
        self.hashes: dict[str, str] = {}
        self.faults: list[str] = []
        self.places: dict[str, str] = {}
        self.split_of_sol: dict[int, str] = {}
        if not root.is_dir():
            self.faults.append(
                f"The data folder {root} is missing or not a folder: name one that holds the split "
                f"files, such as {split_file('train')}, with --data-dir or MARSCLF_DATA_DIR."
            )
            return
        self._check_classes()
        for split in SPLITS:
            self._read_split(split)

    def _lines(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield (place, line) for each line of a text file that is not blank."""
        path = self.root / name
        try:
            content = path.read_bytes()
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self.faults.append(f"{path}, line {line}: this is not UTF-8 text.")
            return
        except OSError as error:
            self.faults.append(f"{path} cannot be read ({error.strerror}): it belongs to the data.")
            return
        self.hashes[name] = sha256_of(content)
        if not text.strip():
            self.faults.append(f"{path} is empty.")
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()

    def _check_classes(self) -> None:
        found = list(self._lines(CLASS_FILE))
        if not found:
            return
        for class_id, (place, line) in enumerate(found[:NUM_CLASSES]):
            expected = f"{class_id} {CLASS_NAMES[class_id]}"
            if " ".join(line.split()) != expected:
                self.faults.append(f"{place}: expected class {expected!r}, found {line!r}.")
        if len(found) != NUM_CLASSES:
            self.faults.append(
                f"{self.root / CLASS_FILE} lists {len(found)} classes instead of {NUM_CLASSES}."
            )

    def _read_split(self, split: str) -> None:
        for place, line in self._lines(split_file(split)):
            match = _LINE.fullmatch(line)
            if match is None:
                self.faults.append(
                    f"{place}: {line[:80]!r} is not an image's path, a space and a label."
                )
                continue
            try:
                self._read_entry(split, place, match["path"], int(match["label"]))
            except MarsclfError as error:
                self.faults.append(f"{place}: {error}.")

    def _read_entry(self, split: str, place: str, listed: str, label: int) -> None:
        """Check one line of a split file and its image; raises what ends the check of this line."""
        if PurePosixPath(listed).is_absolute() or ".." in listed or re.search(r"[\\:\0]", listed):
            raise MarsclfError(f"the path {listed!r} leads out of the data folder")
        path = str(PurePosixPath(listed))
        product = parse_product_id(path)
        if path in self.places:
            raise MarsclfError(f"{path} is listed already in {self.places[path]}")
        self.places[path] = place
        if not 0 <= label < NUM_CLASSES:
            self.faults.append(f"{place}: label {label} of {path} is outside 0-{NUM_CLASSES - 1}.")
        other = self.split_of_sol.setdefault(product.sol, split)
        if other != split:
            self.faults.append(
                f"{place}: sol {product.sol} of {path} is already in the {other} split."
            )
        content = _read_image(self.root / path)
        width, height, channels = _check_image(path, content, self.decode)
        self.hashes[path] = sha256_of(content)
        size = {"width": width, "height": height, "channels": channels}
        row = {"split": split, "path": path, "label": label} | product._asdict() | size
        self.rows.append(row | {"sha256": self.hashes[path]})


def _read_image(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise MarsclfError(f"the image {path} is not there")
        if path.stat().st_size > MAX_BYTES:
            raise MarsclfError(f"the image {path} is enormous (over {MAX_BYTES:,} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise MarsclfError(f"the image {path} cannot be read ({error.strerror})") from error


def _check_image(path: str, content: bytes, decode: bool) -> tuple[int, int, int]:
    """Return (width, height, channels); raises MarsclfError if this is not a whole JPEG."""
    if not content:
        raise MarsclfError(f"the image {path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=["JPEG"])
    except Image.DecompressionBombError as error:
        raise MarsclfError(f"the image {path} is enormous ({error})") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise MarsclfError(f"the file {path} is not a JPEG image") from error
    width, height = image.size
    channels = len(image.getbands())
    if width * height > MAX_PIXELS:
        raise MarsclfError(f"the image {path} is enormous ({width} x {height} pixels)")
    if channels not in (1, 3):
        raise MarsclfError(f"the image {path} has {channels} channels instead of 1 or 3")
    if not content.endswith(END_OF_JPEG):
        raise MarsclfError(f"the image {path} is truncated: it has no end-of-image marker")
    if decode:
        try:
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise MarsclfError(f"the image {path} cannot be decoded ({error})") from error
    return width, height, channels
