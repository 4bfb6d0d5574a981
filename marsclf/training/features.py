"""Features that a frozen network computes from images, cached on disk by content.

The name of a cache file is a digest of everything its features depend on: the network, the images'
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
from marsclf.images import views
from marsclf.images.decode import read_rgb
from marsclf.images.views import Augmentation, Condition
from marsclf.networks.engine import make_predictor, network_digest, predict_each
from marsclf.networks.pinned import keras

VIEWS_PER_FILE = 512  # a few seconds of work: little is lost when a run is killed

Render = Callable[[np.ndarray, np.random.Generator], np.ndarray]


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


def read_image(path: Path) -> np.ndarray:
    """Return an image of the data set, uint8 RGB; raise MarsclfError if it cannot be read."""
    try:
        return read_rgb(path)
    except MarsclfError as error:
        advice = "restore the file, or run `make check-data`."
        raise MarsclfError(f"{path} cannot be read: {error}; {advice}") from None


def image_features(
    root: Path, rows: pd.DataFrame, network: keras.Model, *conditions: Condition
) -> Features:
    """Return the features of each image under each condition, kept as float32."""

    def render(image: np.ndarray, number: int, _: np.random.Generator) -> np.ndarray:
        return views.fit_view(image, network.input_shape[1], conditions[number])

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
        return views.random_view(image, network.input_shape[1], augmentation, rng)

    by = {"augmentation": asdict(augmentation)}
    return compute_features(root, rows, counts, network, render, by, seed, np.float16)


def compute_features(
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    network: keras.Model,
    render: Render,
    rendered_by: dict,
    seed: int = 0,
    dtype: type = np.float32,
) -> Features:
    """Return the features of `counts[i]` views of each image i, those of the first image first.

    Args:
        root: folder that the paths in `rows` are relative to.
        rows: part of a data set's index (columns path and sha256).
        counts: views per image, (rows,).
        network: pixels 0-255 (n, height, width, 3) to features (n, ...).
        render: an image, uint8 RGB, the number of the view (from 0) and a random generator to the
            pixels of that view. The generator depends on seed, image and number only.
        rendered_by: what `render` does, as JSON; a different view needs a different description.
        seed: of random views.
        dtype: in which features are kept on disk.

    Raises MarsclfError for an image that cannot be read.
    """
    recipe = json.dumps([views.VIEWS_VERSION, rendered_by, network.input_shape[1:3], seed])
    start = sha256_of(network_digest(network).encode(), recipe.encode())
    items = [
        (root / path, sha256, view)
        for path, sha256, count in zip(rows["path"], rows["sha256"], counts, strict=True)
        for view in range(count)
    ]
    parts = (items[i : i + VIEWS_PER_FILE] for i in range(0, len(items), VIEWS_PER_FILE))
    files = {_file(start, json.dumps([item[1:] for item in part])): part for part in parts}
    decode = lru_cache(maxsize=8)(read_image)  # the views of one image follow one another

    def load(item: tuple[Path, str, int]) -> np.ndarray:
        path, sha256, number = item
        rng = np.random.default_rng([seed, int(sha256[:16], 16), number])
        return render(decode(path), number, rng)

    _fill(files, load, network, dtype)
    return Features(tuple(files), len(items))


def apply_network(features: Features, network: keras.Model) -> Features:
    """Return the outputs of `network` for features (n, ...), cached in the same precision."""
    digest, files = network_digest(network), {}
    for number, source in enumerate(features.files):
        count = min(VIEWS_PER_FILE, features.count - number * VIEWS_PER_FILE)
        files[_file(digest, source.name)] = [(source, row) for row in range(count)]
    # Mapped, because every thread would otherwise read the complete file.
    opened = lru_cache(maxsize=4)(lambda file: np.load(file, mmap_mode="r"))

    def load(item: tuple[Path, int]) -> np.ndarray:
        return opened(item[0])[item[1]].astype(np.float32)

    _fill(files, load, network, opened(features.files[0]).dtype)
    return Features(tuple(files), features.count)


def _file(*described: str) -> Path:
    digest = sha256_of(*(text.encode() for text in described))
    return paths.CACHE / "features" / f"{digest[:32]}.npy"


def _fill(
    files: dict[Path, list], load: Callable[..., np.ndarray], network: keras.Model, dtype: type
) -> None:
    """Write the network's outputs for the items of each file that does not exist."""
    missing = {path: items for path, items in files.items() if not path.exists()}
    if not missing:
        return
    # One stream through all files, so that no core waits at the end of each.
    sample = np.stack([load(item) for item in next(iter(missing.values()))[:4]])
    predict = make_predictor(network, paths.CACHE, sample)
    outputs = predict_each(chain(*missing.values()), load, predict)
    for path, part in tqdm(missing.items(), desc=network.name, unit="file", disable=None):
        features = np.stack([row.astype(dtype) for row in islice(outputs, len(part))])
        with replace_atomically(path) as temporary:
            np.save(temporary, features)
