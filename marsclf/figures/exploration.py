"""What the data look like before any training: charts of the index, near-duplicates, galleries."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.figures import results as figures
from marsclf.figures.results import CAMERA_NAMES, SPLIT_COLOURS, SPLIT_NAMES
from marsclf.images.decode import read_rgb
from marsclf.provenance import cores

THUMBNAIL = 16  # pixels a side: keeps the scene's layout, drops texture and compression noise
# Pairs from this correlation up look the same to a person; nearly all have the same label.
NEAR_DUPLICATE = 0.98
EACH = 3  # images that the gallery shows of a class in a split
PAIRS = 6  # of look-alikes that theirs shows


def _read(path: Path) -> np.ndarray:
    try:
        return read_rgb(path)
    except MarsclfError as error:
        raise MarsclfError(
            f"{path}: {error}; restore the file, or run `make check-data`."
        ) from None


def measure_images(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image once, in the order of the index.

    Returns grey thumbnails (N, 256), each with mean 0 and length 1, so that the dot product of two
    is their correlation; and the mean brightness (N,), 0 for black to 255 for white.
    """
    thumbnails = np.empty((len(dataset.index), THUMBNAIL**2), np.float32)
    brightness = np.empty(len(dataset.index))

    def measure(place: int) -> None:
        path = dataset.root / dataset.index["path"].iloc[place]
        grey = cv2.cvtColor(_read(path), cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        thumbnails[place] = small.reshape(-1)
        brightness[place] = grey.mean()

    places = range(len(dataset.index))
    with ThreadPoolExecutor(cores()) as pool:
        for _ in tqdm(pool.map(measure, places), "decoding", len(places), disable=None):
            pass
    thumbnails -= thumbnails.mean(axis=1, keepdims=True)
    # An image of one brightness has no layout: it stays 0 and resembles nothing.
    thumbnails /= np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-6)
    return thumbnails, brightness


def nearest(
    thumbnails: np.ndarray, queries: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each query, the highest correlation with another image, and which that is.

    `queries` and `candidates` are row numbers of `thumbnails`; an image is never its own partner.
    """
    correlation, partner = np.empty(len(queries)), np.empty(len(queries), int)
    for start in range(0, len(queries), 512):  # a block at a time, so memory stays small
        block = slice(start, start + 512)
        scores = thumbnails[queries[block]] @ thumbnails[candidates].T
        scores[queries[block][:, None] == candidates] = -1
        best = scores.argmax(axis=1)
        correlation[block] = scores[np.arange(len(best)), best]
        partner[block] = candidates[best]
    return correlation, partner


def resemblances(index: pd.DataFrame, thumbnails: np.ndarray) -> dict[str, np.ndarray]:
    """Return, by a name for each comparison, every image's highest correlation with another.

    Within each split; of validation and test with training; and of a random fifth of all images
    with the rest, which is what a random re-split would train and test on.
    """
    rows = {split: np.flatnonzero(index["split"] == split) for split in data.SPLITS}
    shuffled = np.random.default_rng(0).permutation(len(index))
    fifth, rest = np.split(shuffled, [len(index) // 5])
    pairs = {f"within {SPLIT_NAMES[split]}": (rows[split], rows[split]) for split in data.SPLITS}
    pairs |= {f"{SPLIT_NAMES[s]} with training": (rows[s], rows["train"]) for s in ("val", "test")}
    pairs["a random fifth with the rest"] = fifth, rest
    return {name: nearest(thumbnails, *pair)[0] for name, pair in pairs.items()}


def near_duplicates(resemblance: dict[str, np.ndarray]) -> Figure:
    """Chart the share of images that have a look-alike, against how alike (from resemblances)."""
    fig, axes = figures.new_figure(5.5)
    thresholds = np.linspace(0.8, 1, 201)
    colours = [*SPLIT_COLOURS.values(), SPLIT_COLOURS["val"], SPLIT_COLOURS["test"], "black"]
    for (name, highest), colour in zip(resemblance.items(), colours, strict=True):
        share = 100 * (highest >= thresholds[:, None]).mean(axis=1)
        style = "-" if name.startswith("within") else "--"
        axes.plot(thresholds, share, style, color=colour, label=name)
    axes.axvline(NEAR_DUPLICATE, color="black", linewidth=1, linestyle=":")
    axes.set(xlim=(0.8, 1), ylim=(0, 100), ylabel="images with such a look-alike, %")
    axes.set_xlabel("correlation of 16 × 16 grey thumbnails (1: the same picture)")
    fig.legend(loc="outside lower center", ncols=3)
    shares = {name: (highest >= NEAR_DUPLICATE).mean() for name, highest in resemblance.items()}
    axes.set_title(
        f"Correlation ≥ {NEAR_DUPLICATE}: {shares['within test']:.0%} of test have a look-alike in "
        f"test, {shares['test with training']:.1%} in training"
    )
    return fig


def class_counts(index: pd.DataFrame) -> Figure:
    """Chart the number of images of each class in each split, on a logarithmic axis."""
    counts = pd.crosstab(index["label"], index["split"])
    counts = counts.reindex(index=range(data.NUM_CLASSES), columns=data.SPLITS, fill_value=0)
    fig, panels = figures.new_figure(8, 1, 3, sharey=True, sharex=True)
    for axes, split in zip(panels, data.SPLITS, strict=True):
        bars = axes.barh(data.CLASS_NAMES, counts[split], color=SPLIT_COLOURS[split], log=True)
        axes.bar_label(bars, padding=3, fontsize=9)
        axes.set_title(f"{SPLIT_NAMES[split]}: {counts[split].sum():,}")
        axes.set(xlabel="images", xlim=(0.7, counts.to_numpy().max() * 8), ylim=(24.6, -0.6))
        axes.grid(axis="y", visible=False)
    return fig


def class_shift(index: pd.DataFrame) -> Figure:
    """Chart each class's share of each split, classes in the order of their share of training."""
    shares = 100 * pd.crosstab(index["class_name"], index["split"], normalize="columns")
    shares = shares.sort_values("train")
    fig, axes = figures.new_figure(7.5)
    axes.hlines(shares.index, shares.min(axis=1), shares.max(axis=1), color="lightgrey", zorder=1)
    for split, marker in zip(data.SPLITS, "osD", strict=True):
        colour, label = SPLIT_COLOURS[split], SPLIT_NAMES[split]
        axes.scatter(shares[split], shares.index, color=colour, marker=marker, label=label)
    axes.set(xlabel="share of the split, %", xlim=(-1, None))
    axes.legend(loc="lower right")
    commonest = shares["train"].idxmax()
    numbers = ", ".join(f"{shares.at[commonest, s]:.1f}% of {SPLIT_NAMES[s]}" for s in data.SPLITS)
    axes.set_title(f"The class mix shifts: {commonest} is {numbers}")
    return fig


def sols_and_cameras(index: pd.DataFrame) -> Figure:
    """Chart the number of images over the sols, by camera, with the range of each split."""
    fig, axes = figures.new_figure(4.5)
    cameras = [camera for camera in CAMERA_NAMES if (index["camera"] == camera).any()]
    sols = [index.loc[index["camera"] == camera, "sol"] for camera in cameras]
    labels = [f"{CAMERA_NAMES[c]} ({len(s):,})" for c, s in zip(cameras, sols, strict=True)]
    colours = [figures.BLUE, figures.ORANGE, figures.PURPLE][: len(cameras)]
    axes.hist(sols, bins=54, stacked=True, color=colours, label=labels)
    for split, rows in index.groupby("split", sort=False):
        first, last = rows["sol"].min(), rows["sol"].max()
        axes.axvline(first, color="black", linewidth=1, linestyle=":")
        text = f" {SPLIT_NAMES[split]}\n sols {first}–{last}"
        axes.text(first, 0.98, text, va="top", transform=axes.get_xaxis_transform())
    axes.set(xlabel="sol (Martian day since landing)", ylabel="images")
    axes.margins(y=0.2)
    axes.legend(loc="center right")
    axes.set_title(f"{len(index):,} images from {index['sol'].nunique()} sols")
    return fig


def sizes_and_brightness(index: pd.DataFrame, brightness: np.ndarray) -> Figure:
    """Chart the images' heights and mean brightness (N,; 0 to 255) by split."""
    fig, panels = figures.new_figure(4.2, 1, 2)
    for axes, values, stop in zip(
        panels, (index["height"].to_numpy(), brightness), (index["height"].max(), 255), strict=True
    ):
        for split in data.SPLITS:
            of_split, name = values[index["split"] == split], SPLIT_NAMES[split]
            label = f"{name}, mean {of_split.mean():.0f}"
            weights = np.full(len(of_split), 100 / len(of_split))
            options = {"bins": np.linspace(0, stop, 41), "histtype": "step", "linewidth": 2}
            axes.hist(of_split, weights=weights, color=SPLIT_COLOURS[split], label=label, **options)
        axes.legend(loc="upper left", fontsize=9)
        axes.margins(y=0.2)
    narrow, wide = index["width"].min(), index["width"].max()
    panels[0].set(xlabel="height, pixels", ylabel="images of the split, %")
    panels[0].set_title(f"All {narrow} to {wide} pixels wide")
    panels[1].set_xlabel("mean brightness (0 black, 255 white)")
    panels[1].set_title(f"{(index['channels'] == 1).sum()} files have a single channel")
    return fig


def bursts(index: pd.DataFrame) -> Figure:
    """Chart how few sols, sequences and frames the images of each split come from."""
    fig, (left, right) = figures.new_figure(4.5, 1, 2)
    columns = ("path", "frame", "sequence", "sol")
    for place, split in enumerate(data.SPLITS):
        rows, colour = index[index["split"] == split], SPLIT_COLOURS[split]
        places = np.arange(4) + 0.27 * (place - 1)
        counts = [rows[column].nunique() for column in columns]
        bars = left.bar(places, counts, 0.25, color=colour, label=SPLIT_NAMES[split])
        left.bar_label(bars, fontsize=7.5)
        longest = np.sort(rows["sequence"].value_counts())[::-1]
        share = 100 * np.cumsum(longest) / len(rows)
        right.plot(np.arange(1, len(share) + 1), share, color=colour, label=SPLIT_NAMES[split])
    left.set_xticks(range(4), ["images", "frames", "sequences", "sols"])
    left.set_ylabel("number in the split")
    left.grid(axis="x", visible=False)
    left.set_title("Images are not independent")
    right.set(xlabel="sequences, the longest first", ylabel="share of the split's images, %")
    right.set(xscale="log", ylim=(0, 102))
    right.legend()
    return fig


def class_gallery(dataset: data.Dataset) -> Figure:
    """Show up to three training and test images of every class, no two of one sequence."""
    tiles, titles = [], []
    for name, of_class in dataset.index.groupby("class_name"):
        for split in ("train", "test"):
            rows = of_class[of_class["split"] == split]
            chosen = rows.drop_duplicates("sequence")
            chosen = chosen.sample(min(EACH, len(chosen)), random_state=0)
            decoded = [_read(dataset.root / path) for path in chosen["path"]]
            tiles += decoded + [None] * (EACH - len(decoded))
            what = f"{name}\ntraining" if split == "train" else "\ntest"
            titles += [f"{what}: {len(rows):,}"] + [""] * (EACH - 1)
    return figures.gallery(
        tiles, titles, 4 * EACH, "Each class in training (left) and test (right), with its count"
    )


def look_alike_gallery(dataset: data.Dataset, thumbnails: np.ndarray) -> Figure:
    """Show the six test images that most resemble a training image, each before that image."""
    test = np.flatnonzero(dataset.index["split"] == "test")
    train = np.flatnonzero(dataset.index["split"] == "train")
    correlation, partner = nearest(thumbnails, test, train)
    best = np.argsort(-correlation, kind="stable")
    # One pair a test sequence, or a single burst would fill the gallery.
    best = best[~dataset.index["sequence"].iloc[test[best]].duplicated().to_numpy()][:PAIRS]
    rows = np.stack([test[best], partner[best]], axis=1).reshape(-1)
    chosen = dataset.index.iloc[rows]
    tiles = [_read(dataset.root / path) for path in chosen["path"]]
    titles = [
        f"{SPLIT_NAMES[row.split]}, sol {row.sol}\n{row.class_name}"
        + (f", r = {correlation[best[place // 2]]:.3f}" if place % 2 == 0 else "")
        for place, row in enumerate(chosen.itertuples())
    ]
    return figures.gallery(tiles, titles, 6, "Test images that most resemble a training image")
