"""What a frozen network sees in each image, and in random views of it, cached by content.

A view's features depend on the network, the image's bytes, the view's size, the augmentation and
the seed, and on nothing else; these together name the cache file. So a killed run goes on where it
stopped, and a second run with another head, or another seed of it, finds everything done.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images.decode import read_rgb
from marsclf.images.views import (
    VIEWS_VERSION,
    WHOLE_IMAGE,
    AsRead,
    Augmentation,
    Condition,
    fit_view,
    random_view,
    read_view,
)
from marsclf.networks.engine import make_predictor, network_digest, predict_each
from marsclf.paths import CACHE

VIEWS_PER_FILE = 512  # one file is a few seconds of work: little is lost by a kill


@dataclass(frozen=True)
class Features:
    """What a network gave for many views, read from the cache's files as it is asked for.

    `features[rows]` gives the rows with those numbers as float32 (rows, ...); so features of
    more views than memory holds can be drawn from.
    """

    files: tuple[Path, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        # Opened anew each time, because what a process has mapped counts as its memory.
        opened = {n: np.load(self.files[n], mmap_mode="r") for n in set(rows // VIEWS_PER_FILE)}
        places = zip(rows // VIEWS_PER_FILE, rows % VIEWS_PER_FILE, strict=True)
        return np.stack([opened[file][place] for file, place in places]).astype(np.float32)

    def read(self) -> np.ndarray:
        """Return all rows at once."""
        return self[np.arange(self.count)]


def view_counts(labels: np.ndarray, views: int, views_rare: int) -> np.ndarray:
    """Return how many views each training image gets: more, the rarer its class.

    The commonest class gets `views` an image; others up to `views_rare`, growing as the square
    root of how much rarer they are.
    """
    if not 1 <= views <= views_rare:
        raise MarsclfError(
            f"views is {views} and views_rare {views_rare}; they must be 1 or more, and ascend"
        )
    sizes = np.bincount(labels)
    rarity = np.sqrt(sizes.max() / np.maximum(sizes, 1))
    return np.clip(np.round(views * rarity), views, views_rare).astype(int)[labels]


def embed_images(
    root: Path,
    rows: pd.DataFrame,
    network: keras.Model,
    cache: Path = CACHE,
    condition: Condition = WHOLE_IMAGE,
) -> Features:
    """Return what `network` sees in each whole image, or in one changed as `condition` says."""
    return embed_views(root, rows, np.ones(len(rows), int), network, condition, 0, cache)


def embed_views(
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    network: keras.Model,
    kind: Augmentation | Condition | AsRead,
    seed: int,
    cache: Path = CACHE,
) -> Features:
    """Return what `network` sees in `counts[i]` random views of each image i.

    Args:
        root: folder that the paths in `rows` count from.
        rows: part of a data set's index (columns path, sha256).
        counts: views an image, (rows,).
        network: pixels 0-255 (n, height, width, 3) to features (n, ...).
        kind: how far random views differ from the image, or the condition of the one fixed view,
            or how another notebook reads images; only the last may have sides that differ.
        seed: of random views; view k of an image is the same whatever else is embedded.
        cache: where the features are kept.

    Returns:
        Features of (sum of counts) views, those of the first image first. They are kept as float16
        for random views, of which there are many, and as float32 for whole images.
    """
    recipe = json.dumps([VIEWS_VERSION, type(kind).__name__, asdict(kind), seed])
    start = sha256_of(network_digest(network).encode(), recipe.encode())
    views = [
        (root / path, sha256, view)
        for path, sha256, count in zip(rows["path"], rows["sha256"], counts, strict=True)
        for view in range(count)
    ]
    files = {}
    for part in (views[i : i + VIEWS_PER_FILE] for i in range(0, len(views), VIEWS_PER_FILE)):
        contents = json.dumps([view[1:] for view in part])
        files[_place(cache, start, contents)] = part
    many = isinstance(kind, Augmentation) or (isinstance(kind, AsRead) and kind.augmentation)
    dtype = np.float16 if many else np.float32
    _fill(files, view_loader(network.input_shape[1:3], kind, seed), network, dtype, cache)
    return Features(tuple(files), len(views))


def pass_on(features: Features, network: keras.Model, cache: Path = CACHE) -> Features:
    """Return what `network` makes of features (n, ...), cached as they are."""
    digest = network_digest(network)
    files = {}
    for number, source in enumerate(features.files):
        count = min(VIEWS_PER_FILE, len(features) - number * VIEWS_PER_FILE)
        files[_place(cache, digest, source.name)] = [(source, row) for row in range(count)]
    read = lru_cache(maxsize=4)(np.load)

    def load(item: tuple[Path, int]) -> np.ndarray:
        return read(item[0])[item[1]].astype(np.float32)

    _fill(files, load, network, np.load(features.files[0], mmap_mode="r").dtype, cache)
    return Features(tuple(files), len(features))


def _place(cache: Path, *described: str) -> Path:
    return cache / "features" / f"{sha256_of(*(text.encode() for text in described))[:32]}.npy"


def _fill(
    files: dict[Path, list],
    load: Callable[..., np.ndarray],
    network: keras.Model,
    dtype: type,
    cache: Path,
) -> None:
    """Write each file that is missing: the network's outputs for its items."""
    missing = {path: items for path, items in files.items() if not path.exists()}
    if not missing:
        return
    # One stream through all the files, so that no core waits at the end of each.
    sample = np.stack([load(item) for item in next(iter(missing.values()))[:4]])
    predict = make_predictor(network, cache, sample)
    outputs = predict_each(chain(*missing.values()), load, predict)
    for path, part in tqdm(missing.items(), desc=network.name, unit="file", disable=None):
        features = np.stack([row.astype(dtype) for row in islice(outputs, len(part))])
        with replace_atomically(path) as temporary:
            np.save(temporary, features)


def _read(path: Path) -> np.ndarray:
    try:
        return read_rgb(path)
    except MarsclfError as error:
        raise MarsclfError(
            f"{path}: {error}; restore the file, or run `make check-data`."
        ) from None


def view_loader(
    shape: tuple[int, int], kind: Augmentation | Condition | AsRead, seed: int
) -> Callable[[tuple[Path, str, int]], np.ndarray]:
    """Return a function from path, SHA-256 and number of a view to its pixels (height, width, 3).

    `shape` is height and width.
    """
    decode = lru_cache(maxsize=8)(_read)  # the views of one image follow each other

    def load(view: tuple[Path, str, int]) -> np.ndarray:
        path, sha256, number = view
        image = decode(path)
        if isinstance(kind, Condition):
            return fit_view(image, shape[0], kind)
        rng = np.random.default_rng([seed, int(sha256[:16], 16), number])
        if isinstance(kind, AsRead):
            return read_view(image, shape, kind, rng)
        return random_view(image, shape[0], kind, rng)

    return load
