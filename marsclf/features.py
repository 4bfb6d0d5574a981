"""What a frozen backbone sees in each image, and in random views of it, cached by content.

A view's features depend on the network, the image's bytes, the view's size, the augmentation and
the seed, and on nothing else; these together name the cache file. So a killed run goes on where it
stopped, and a second run with another head finds everything done.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images import VIEWS_VERSION, Augmentation, decode_rgb, fit_view, random_view
from marsclf.inference import make_predictor, network_digest, predict_each
from marsclf.paths import CACHE

IMAGES_PER_FILE = 128  # one file is a few seconds of work: little is lost by a kill


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
    root: Path, rows: pd.DataFrame, backbone: keras.Model, cache: Path = CACHE
) -> np.ndarray:
    """Return the features of each whole image as float32 (rows, width)."""
    return embed_views(root, rows, np.ones(len(rows), int), backbone, None, 0, cache)


def embed_views(
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    backbone: keras.Model,
    augmentation: Augmentation | None,
    seed: int,
    cache: Path = CACHE,
) -> np.ndarray:
    """Return the features of `counts[i]` random views of each image i.

    Args:
        root: folder that the paths in `rows` count from.
        rows: part of a data set's index (columns path, sha256).
        counts: views an image, (rows,).
        backbone: pixels 0-255 (n, size, size, 3) to features (n, width).
        augmentation: how the views differ; None gives the whole image as it is.
        seed: of the views; view k of an image is the same whatever else is embedded.
        cache: where the features are kept.

    Returns:
        (sum of counts, width), the views of the first image first; float16 for random views, of
        which there are many, float32 for whole images.
    """
    size = backbone.input_shape[1]
    recipe = json.dumps([VIEWS_VERSION, asdict(augmentation) if augmentation else None, seed])
    network = network_digest(backbone)
    files: dict[Path, list[tuple]] = {}
    for start in range(0, len(rows), IMAGES_PER_FILE):
        part = rows.iloc[start : start + IMAGES_PER_FILE]
        views = [
            (root / path, sha256, view)
            for path, sha256, count in zip(
                part["path"], part["sha256"], counts[start : start + IMAGES_PER_FILE], strict=True
            )
            for view in range(count)
        ]
        contents = json.dumps([view[1:] for view in views])
        name = sha256_of(network.encode(), recipe.encode(), contents.encode())
        files[cache / "features" / f"{name[:32]}.npy"] = views
    missing = {path: views for path, views in files.items() if not path.exists()}
    if missing:
        # One stream through all the files, so that no core waits at the end of each.
        outputs = predict_each(
            itertools.chain(*missing.values()),
            view_loader(size, augmentation, seed),
            make_predictor(backbone, cache),
        )
        for path, views in tqdm(missing.items(), desc="embedding", unit="file", disable=None):
            features = np.stack(list(itertools.islice(outputs, len(views))))
            with replace_atomically(path) as temporary:
                np.save(temporary, features.astype(np.float16 if augmentation else np.float32))
    return np.concatenate([np.load(path) for path in files])


def view_loader(
    size: int, augmentation: Augmentation | None, seed: int
) -> Callable[[tuple[Path, str, int]], np.ndarray]:
    """Return a function from path, SHA-256 and number of a view to its pixels (size, size, 3)."""
    decode = lru_cache(maxsize=8)(decode_rgb)  # the views of one image follow each other

    def load(view: tuple[Path, str, int]) -> np.ndarray:
        path, sha256, number = view
        image = decode(path)
        if augmentation is None:
            return fit_view(image, size)
        rng = np.random.default_rng([seed, int(sha256[:16], 16), number])
        return random_view(image, size, augmentation, rng)

    return load
