"""Brightness and near-duplicates of the images."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from marsclf.data.dataset import Dataset
from marsclf.data.splits import normalized, thumbnail
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.provenance import cores


def measure_images(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image once, in the order of the index.

    Returns gray thumbnails (N, 256), each with mean 0 and length 1, so that the dot product of two
    is their correlation, and the mean brightness (N,), 0 for black to 255 for white.
    """

    def measure(path: str) -> tuple[np.ndarray, float]:
        gray = cv2.cvtColor(read_rgb(dataset.root / path), cv2.COLOR_RGB2GRAY)
        return thumbnail(gray), gray.mean()

    paths = dataset.index["path"]
    with ThreadPoolExecutor(cores()) as pool:
        measured = list(tqdm(pool.map(measure, paths), "decoding", len(paths), disable=None))
    thumbnails, brightness = (np.array(values) for values in zip(*measured, strict=True))
    return normalized(thumbnails), brightness


def nearest(thumbnails: np.ndarray, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the highest correlation of each of `rows` with one of `others`, and which that is.

    Both are row numbers of `thumbnails`; an image is not compared with itself.
    """
    highest, places = [], []
    for some in np.array_split(rows, 1 + len(rows) // 1000):  # all at once may not fit in memory
        scores = thumbnails[some] @ thumbnails[others].T
        scores[some[:, None] == others] = -1
        highest.append(scores.max(axis=1))
        places.append(others[scores.argmax(axis=1)])
    return np.concatenate(highest), np.concatenate(places)


def tile(path: str | Path) -> np.ndarray | None:
    """Return an image for a gallery, uint8 (h, w, 3), at most 300 pixels per side; None if bad."""
    with suppress(MarsclfError):
        image = Image.fromarray(read_rgb(path))
        image.thumbnail((300, 300))
        return np.asarray(image)
    return None
