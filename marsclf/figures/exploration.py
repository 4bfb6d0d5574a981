"""Brightness and near-duplicates of the images."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from tqdm import tqdm

from marsclf.data.msl import Dataset
from marsclf.images.decode import read_rgb
from marsclf.provenance import cores

THUMBNAIL = 16  # pixels per side: keeps the layout of the scene, drops texture and noise
NEAR_DUPLICATE = 0.98  # from this correlation up, two images look the same to a person


def measure_images(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image once, in the order of the index.

    Returns gray thumbnails (N, 256), each with mean 0 and length 1, so that the dot product of two
    is their correlation, and the mean brightness (N,), 0 for black to 255 for white.
    """

    def measure(path: str) -> tuple[np.ndarray, float]:
        gray = cv2.cvtColor(read_rgb(dataset.root / path), cv2.COLOR_RGB2GRAY)
        small = cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        return small.reshape(-1).astype(np.float32), gray.mean()

    paths = dataset.index["path"]
    with ThreadPoolExecutor(cores()) as pool:
        measured = list(tqdm(pool.map(measure, paths), "decoding", len(paths), disable=None))
    thumbnails, brightness = (np.array(values) for values in zip(*measured, strict=True))
    thumbnails -= thumbnails.mean(axis=1, keepdims=True)
    # An image of uniform brightness stays 0 and correlates with nothing.
    thumbnails /= np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-6)
    return thumbnails, brightness


def nearest(thumbnails: np.ndarray, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the highest correlation of each of `rows` with one of `others`, and which that is.

    Both are row numbers of `thumbnails`; an image is not compared with itself.
    """
    scores = thumbnails[rows] @ thumbnails[others].T
    scores[rows[:, None] == others] = -1
    return scores.max(axis=1), others[scores.argmax(axis=1)]
