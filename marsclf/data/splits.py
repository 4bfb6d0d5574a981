"""Drawing splits in which the images of a group stay together, and finding near-duplicates."""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")
SHARES = np.array([0.7, 0.15, 0.15])  # of the images of each class, in the order of SPLITS
NEAR_DUPLICATE = 0.98  # from this correlation up, two images look the same to a person


def normalized(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails (n, 256) with mean 0 and length 1: products of two are correlations."""
    thumbnails = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    # An image of uniform brightness stays 0 and correlates with nothing.
    return thumbnails / np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-6)


def near_duplicates(thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each image that has any, the numbers of it and its near-duplicates."""
    for start in range(0, len(thumbnails), 1000):
        for near in thumbnails[start : start + 1000] @ thumbnails.T >= NEAR_DUPLICATE:
            if near.sum() > 1:
                yield np.flatnonzero(near)


def nearest(thumbnails: np.ndarray, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the highest correlation of each of `rows` with one of `others`, and which that is.

    Both are row numbers of normalized `thumbnails`; an image is not compared with itself.
    """
    scores = thumbnails[rows] @ thumbnails[others].T
    scores[rows[:, None] == others] = -1
    return scores.max(axis=1), others[scores.argmax(axis=1)]


def merge_groups(groups: Iterable[str], together: Iterable[np.ndarray]) -> np.ndarray:
    """Return the group of each image, after all groups with an image in a set became one.

    Each set of `together` holds the numbers of images. The first group gives its name.
    """
    numbers, names = pd.factorize(np.asarray(groups, dtype=object))
    for images in together:
        merged = np.unique(numbers[images])
        if len(merged) > 1:
            numbers[np.isin(numbers, merged)] = merged[0]
    return names[numbers]


def draw_splits(labels: Iterable[int], groups: Iterable[str]) -> np.ndarray:
    """Return a split for each image: about 70, 15 and 15% of each class, always the same.

    Each class is in training. One of two groups or more is also in validation if possible, and one
    of three or more in test. Moves one group at a time to where the shares come closest to these.
    """
    codes = pd.factorize(np.asarray(groups, dtype=object), sort=True)[0]
    counts = pd.crosstab(codes, np.asarray(labels)).to_numpy(dtype=float)  # (groups, classes)
    wanted = SHARES[:, None] * counts.sum(axis=0)
    # A class that a split lacks weighs more than all deviations from the shares.
    lack = len(codes) * np.array([1e4, 1e2, 1e2])[:, None] * np.ones(counts.shape[1])
    lack[1:] *= np.count_nonzero(counts, axis=0) >= np.array([[2], [3]])
    place = np.zeros(len(counts), dtype=int)
    totals = np.zeros_like(wanted)
    totals[0] = counts.sum(axis=0)
    for seed in range(5):
        for group in np.random.default_rng(seed).permutation(len(counts)):
            own = np.flatnonzero(counts[group])
            totals[place[group], own] -= counts[group, own]
            # The first axis are the splits to which the group may go.
            found = totals[:, own] + np.eye(3)[..., None] * counts[group, own]
            costs = (found - wanted[:, own]) ** 2 / wanted[:, own] + lack[:, own] * (found == 0)
            place[group] = costs.sum(axis=(1, 2)).argmin()
            totals[place[group], own] += counts[group, own]
    return np.array(SPLITS)[place[codes]]
