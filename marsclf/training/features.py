"""Features, which a frozen network computes from images, in a cache.

The name of a cache file is a digest of everything the features depend on: the network, the images'
bytes, the view and its size, and the seed. A run that was killed therefore continues where it
stopped, and a run with another head finds all features computed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images.decode import read_rgb
from marsclf.images.views import VIEWS_VERSION, Augmentation, Condition, fit_view, random_view
from marsclf.networks.engine import make_predictor, network_digest, predict_each
from marsclf.networks.pinned import keras

VIEWS_PER_FILE = 512  # a few seconds of work: little is lost when a run is killed


@dataclass(frozen=True)
class Features:
    """Features of many views, read from cache files on demand.

    `features[rows]` returns those rows as float32 (rows, ...), so that training can draw from more
    features than memory holds. `files` are named by their content.
    """

    files: tuple[Path, ...]
    count: int

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        # Opened for each call, because everything that a process maps counts as its memory.
        opened = {n: np.load(self.files[n], mmap_mode="r") for n in set(rows // VIEWS_PER_FILE)}
        places = zip(rows // VIEWS_PER_FILE, rows % VIEWS_PER_FILE, strict=True)
        return np.stack([opened[file][place] for file, place in places]).astype(np.float32)

    def read(self) -> np.ndarray:
        """Return all rows at once."""
        return self[np.arange(self.count)]

    def digest(self) -> str:
        """Return a SHA-256 of the features, from the names of their files."""
        return sha256_of("".join(file.name for file in self.files).encode())


def image_features(
    root: Path, rows: pd.DataFrame, network: keras.Model, *conditions: Condition
) -> Features:
    """Return the features of each image under each condition, kept as float32."""

    def render(image: np.ndarray, number: int, _: np.random.Generator) -> np.ndarray:
        return fit_view(image, network.input_shape[1], conditions[number])

    by = {"conditions": [asdict(condition) for condition in conditions]}
    counts = np.full(len(rows), len(conditions))
    return compute_features(root, rows, counts, network, render, by)


def view_features(
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    network: keras.Model,
    augmentation: Augmentation,
    seed: int,
) -> Features:
    """Return the features of `counts[i]` random views of each image i, kept as float16."""

    def render(image: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
        return random_view(image, network.input_shape[1], augmentation, rng)

    by = {"augmentation": asdict(augmentation)}
    return compute_features(root, rows, counts, network, render, by, seed, np.float16)


def compute_features(
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    network: keras.Model,
    render: Callable[[np.ndarray, int, np.random.Generator], np.ndarray],
    rendered_by: dict,
    seed: int = 0,
    dtype: type = np.float32,
) -> Features:
    """Return the features of `counts[i]` views of each image i, those of the first image first.

    Args:
        rows: part of a data set's index (columns sha256, and path, which is relative to `root`).
        counts: views per image, (rows,).
        network: pixels 0-255 (n, height, width, 3) to features (n, ...).
        render: an image, uint8 RGB, the number of the view (from 0) and a random generator to the
            pixels of that view. The generator depends on seed, image and number only.
        rendered_by: what `render` does, as JSON; a different view needs a different description.
        dtype: in which features are kept on disk.

    Raises MarsclfError for an image that cannot be read.
    """
    items = [
        (root / path, sha256, view)
        for path, sha256, count in zip(rows["path"], rows["sha256"], counts, strict=True)
        for view in range(count)
    ]
    parts = (items[i : i + VIEWS_PER_FILE] for i in range(0, len(items), VIEWS_PER_FILE))
    described = {json.dumps([item[1:] for item in part]): part for part in parts}
    decode = lru_cache(maxsize=8)(read_rgb)  # the views of one image follow one another

    def load(item: tuple[Path, str, int]) -> np.ndarray:
        path, sha256, number = item
        rng = np.random.default_rng([seed, int(sha256[:16], 16), number])
        try:
            return render(decode(path), number, rng)
        except MarsclfError as error:
            advice = "restore the file, or run `make check-data`."
            raise MarsclfError(f"{path} cannot be read: {error}; {advice}") from None

    recipe = json.dumps([VIEWS_VERSION, rendered_by, network.input_shape[1:3], seed])
    start = sha256_of(network_digest(network).encode(), recipe.encode())
    return _cached(start, described, load, network, dtype)


def apply_network(features: Features, network: keras.Model) -> Features:
    """Return the outputs of `network` for features (n, ...), cached in the same precision."""
    # Mapped, because every thread would otherwise read the complete file.
    opened = lru_cache(maxsize=4)(lambda file: np.load(file, mmap_mode="r"))

    def load(item: tuple[Path, int]) -> np.ndarray:
        return opened(item[0])[item[1]].astype(np.float32)

    described = {f.name: [(f, row) for row in range(len(opened(f)))] for f in features.files}
    dtype = opened(features.files[0]).dtype
    return _cached(network_digest(network), described, load, network, dtype)


def _cached(
    start: str, described: dict[str, list], load: Callable, network: keras.Model, dtype: type
) -> Features:
    """Return the network's outputs for `load(item)` of the items of each file, by description."""
    files = {}
    for description, items in described.items():
        digest = sha256_of(start.encode(), description.encode())
        files[paths.CACHE / "features" / f"{digest[:32]}.npy"] = items
    if missing := {path: items for path, items in files.items() if not path.exists()}:
        # One stream through all files, so that no core waits at the end of each.
        sample = np.stack([load(item) for item in next(iter(missing.values()))[:4]])
        predict = make_predictor(network, paths.CACHE, sample)
        outputs = predict_each(chain(*missing.values()), load, predict)
        for path, part in tqdm(missing.items(), desc=network.name, unit="file", disable=None):
            features = np.stack([row.astype(dtype) for row in islice(outputs, len(part))])
            with replace_atomically(path) as temporary:
                np.save(temporary, features)
    return Features(tuple(files), sum(map(len, files.values())))
