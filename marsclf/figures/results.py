"""Charts of predictions and training, and how every figure is styled and saved.

Each chart function returns a `Figure` that pyplot does not know of, so none stays open. All are
9 inches wide and saved 1,800 pixels wide, which keeps the text legible at half that width.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from marsclf.data import msl as data
from marsclf.evaluation import metrics
from marsclf.evaluation.predictions import product_ids
from marsclf.files import replace_atomically

WIDTH_INCHES, WIDTH_PIXELS = 9.0, 1800
BLUE, ORANGE, GREEN, RED, PURPLE = seaborn.color_palette("colorblind").as_hex()[:5]
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_COLOURS = {"train": BLUE, "val": ORANGE, "test": GREEN}
CAMERA_NAMES = {"MH": "MAHLI", "ML": "Mastcam left", "MR": "Mastcam right"}


def set_style() -> None:
    """Set fonts, grid and palette for all charts made afterwards."""
    seaborn.set_theme(
        style="whitegrid",
        palette="colorblind",
        font_scale=0.95,
        rc={"figure.dpi": 80, "axes.titlesize": 12.5, "axes.titlelocation": "left"},
    )


def save_figure(fig: Figure, folder: Path, name: str, sample: bool) -> Path:
    """Save `fig` as the PNG `name` in `folder` and return its path.

    With `sample`, "sample data" is stamped across the figure first.
    """
    path = folder / name
    content = png_of(fig, sample)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content)
    return path


def png_of(fig: Figure, sample: bool) -> bytes:
    """Return `fig` as a PNG file's content; with `sample` "sample data" is stamped across it."""
    if sample:
        # Black with a white rim shows on charts and on photographs.
        stamp = {"ha": "center", "va": "center", "rotation": 25, "fontsize": 60, "alpha": 0.35}
        rim = [patheffects.withStroke(linewidth=4, foreground="white")]
        fig.text(0.5, 0.5, "sample data", path_effects=rim, zorder=10, **stamp)
    drawn, small = BytesIO(), BytesIO()
    fig.savefig(drawn, format="png", dpi=WIDTH_PIXELS / fig.get_figwidth())
    # 256 colours are enough for Mars and halve the size, but photographs need dithering.
    image = Image.open(drawn).convert("RGB")
    reduced = image.quantize(256)
    if image.getcolors(20_000) is None:
        reduced = image.quantize(palette=reduced)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def new_figure(
    height: float, rows: int = 1, columns: int = 1, **options: object
) -> tuple[Figure, Axes | np.ndarray]:
    """Return a figure `height` inches high and its axes (one, or an array as by subplots)."""
    fig = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def _split_of(predictions: pd.DataFrame) -> str:
    """Return the words for the split of `predictions`, such as "Test split, 1,305 images"."""
    name = SPLIT_NAMES[predictions["split"].iloc[0]]
    return f"{name.capitalize()} split, {len(predictions):,} images"


def _absent_classes(table: pd.DataFrame) -> str:
    """Return a line that names the classes without a case in `table` (from metrics.per_class)."""
    names = table.loc[table["support"] == 0, "class_name"]
    return f"\nno image in this split: {', '.join(names)}" if len(names) else ""


def cases_and_errors_per_class(predictions: pd.DataFrame) -> Figure:
    """Chart the cases of each class of one split beside the wrong predictions among them."""
    table = metrics.per_class(predictions)
    shown = table[table["support"] > 0].sort_values("support", kind="stable")
    fig, axes = new_figure(1.5 + 0.33 * len(shown))
    places = np.arange(len(shown))
    for offset, column, colour, label in (
        (0.2, "support", BLUE, "cases"),
        (-0.2, "errors", RED, "wrong predictions"),
    ):
        bars = axes.barh(places + offset, shown[column], height=0.4, color=colour, label=label)
        axes.bar_label(bars, padding=3, fontsize=9)
    axes.set_yticks(places, shown["class_name"])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("images" + _absent_classes(table))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    errors = shown["errors"].sum()
    axes.set_title(f"{_split_of(predictions)}: {errors:,} wrong ({errors / len(predictions):.1%})")
    return fig


def error_rate_per_class(predictions: pd.DataFrame) -> Figure:
    """Chart the percentage of wrong predictions among the cases of each class of one split."""
    table = metrics.per_class(predictions)
    shown = table[table["support"] > 0].assign(rate=100 * (1 - table["recall"]))
    shown = shown.sort_values("rate", kind="stable")
    fig, axes = new_figure(1.5 + 0.28 * len(shown))
    labels = [
        f"{row.class_name} ({row.errors} of {row.support})" for row in shown.itertuples(index=False)
    ]
    bars = axes.barh(np.arange(len(shown)), shown["rate"], color=RED)
    axes.set_yticks(np.arange(len(shown)), labels)
    # On white, because the line of all images passes through some of them.
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.bar_label(bars, fmt="%.0f%%", padding=3, fontsize=9, bbox=behind)
    overall = 100 * shown["errors"].sum() / len(predictions)
    axes.axvline(overall, color="black", linestyle="--", label=f"all images: {overall:.1f}%")
    axes.set_xlim(0, 108)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("wrong predictions, % of the class" + _absent_classes(table))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    axes.set_title(f"{_split_of(predictions)}: percentage of errors per class")
    return fig


def confusion_matrix(predictions: pd.DataFrame) -> Figure:
    """Chart the confusion matrix of one split: counts, shaded by share of the true class."""
    counts = metrics.confusion_matrix(predictions)
    rows = np.flatnonzero(counts.sum(axis=1))
    columns = np.flatnonzero(counts.sum(axis=1) + counts.sum(axis=0))
    counts = counts[np.ix_(rows, columns)]
    shares = counts / counts.sum(axis=1, keepdims=True)
    fig, axes = new_figure(2.6 + 0.27 * len(rows))
    image = axes.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "black" if shares[row, column] > 0.5 else "white"
        value = str(counts[row, column])
        axes.text(column, row, value, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), [data.CLASS_NAMES[k] for k in columns], rotation=90)
    axes.set_yticks(range(len(rows)), [data.CLASS_NAMES[k] for k in rows])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(visible=False)
    fig.colorbar(image, ax=axes, label="% of the true class", fraction=0.03, pad=0.01)
    accuracy = (predictions["label"] == predictions["predicted"]).mean()
    axes.set_title(f"{_split_of(predictions)}: accuracy {accuracy:.1%}")
    return fig


def commonest_confusions(predictions: pd.DataFrame, limit: int = 12) -> Figure:
    """Chart the commonest pairs of true and wrongly predicted class of one split."""
    table = metrics.commonest_confusions(predictions, limit)
    fig, axes = new_figure(1.4 + 0.3 * max(len(table), 1))
    names = [
        f"{true} → {said}" for true, said in zip(table["true"], table["predicted"], strict=True)
    ]
    bars = axes.barh(names, table["count"], color=RED)
    details = zip(table["count"], table["share"], table["true"], strict=True)
    labels = [f"{count} ({share:.0%} of {name})" for count, share, name in details]
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("images (true class → predicted class)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", visible=False)
    errors = int((predictions["label"] != predictions["predicted"]).sum())
    share = f"{table['count'].sum()} of {errors} errors shown"
    axes.set_title(f"{_split_of(predictions)}: {share}")
    return fig


def reliability_diagram(predictions: pd.DataFrame, note: str = "") -> Figure:
    """Chart accuracy against confidence in 15 bins, above how many images each bin holds.

    `note` is added to the title.
    """
    correct = (predictions["label"] == predictions["predicted"]).to_numpy()
    bins = metrics.calibration_bins(predictions["confidence"].to_numpy(), correct)
    error = metrics.summarize(predictions)["ece"]
    width = 1 / len(bins)
    centres = (bins.index + 0.5) * width
    fig, (upper, lower) = new_figure(6.5, 2, sharex=True, height_ratios=[3, 1])
    upper.bar(centres, bins["accuracy"], width=width, color=BLUE, edgecolor="white", label="bin")
    upper.plot(
        bins["confidence"], bins["accuracy"], "D", color=ORANGE, label="at its mean confidence"
    )
    upper.plot([0, 1], [0, 1], "--", color="black", label="perfectly calibrated")
    upper.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    upper.legend(loc="upper left")
    upper.set_title(f"{_split_of(predictions)}: expected calibration error {error:.3f}{note}")
    lower.bar(centres, bins["count"], width=width, color=BLUE, edgecolor="white")
    lower.set(xlabel="confidence of the prediction", ylabel="images")
    return fig


def coverage_accuracy(predictions: pd.DataFrame, threshold: float = metrics.THRESHOLD) -> Figure:
    """Chart coverage and accuracy of the images whose confidence reaches a threshold.

    One threshold (0 to 1) is marked, and the title tells what it gives.
    """
    correct = (predictions["label"] == predictions["predicted"]).to_numpy()
    confidence = predictions["confidence"].to_numpy()
    thresholds = np.linspace(0, 1, 201)
    covered = confidence >= thresholds[:, None]
    count = covered.sum(axis=1)
    accuracy = np.divide(
        (covered & correct).sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0
    )
    fig, axes = new_figure(5)
    axes.plot(thresholds, 100 * accuracy, color=BLUE, label="accuracy of the covered images")
    axes.plot(thresholds, 100 * count / len(correct), "--", color=ORANGE, label="coverage")
    axes.axvline(threshold, color="black", linewidth=1, linestyle=":")
    shown = confidence >= threshold
    text = f"at {threshold:g}: {shown.mean():.1%} of the images covered"
    if shown.any():
        text += f", {correct[shown].mean():.1%} of them right"
    axes.set(xlabel="confidence threshold", ylabel="%", xlim=(0, 1), ylim=(0, 102))
    axes.legend(loc="lower left")
    axes.set_title(f"{_split_of(predictions)}: {text}")
    return fig


def errors_by_camera_and_sol(predictions: pd.DataFrame) -> Figure:
    """Chart right and wrong predictions of one split by camera and over the sols."""
    table = product_ids(predictions)[["camera", "sol"]]
    table["wrong"] = predictions["label"] != predictions["predicted"]
    fig, (upper, lower) = new_figure(7, 2, height_ratios=[1, 1.6])
    cameras = table.groupby("camera")["wrong"].agg(["size", "sum"])
    names = [CAMERA_NAMES[camera] for camera in cameras.index]
    _right_wrong(upper.barh, names, cameras)
    ends = cameras["sum"].to_numpy()
    for place, (size, wrong) in enumerate(zip(cameras["size"], ends, strict=True)):
        upper.annotate(
            f"{wrong} of {size} wrong ({wrong / size:.0%})",
            (size, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    upper.margins(x=0.25)
    upper.set_xlabel("images")
    upper.grid(axis="y", visible=False)
    edges = np.linspace(table["sol"].min(), table["sol"].max() + 1, 31)
    bins = table.groupby(np.digitize(table["sol"], edges) - 1)["wrong"].agg(["size", "sum"])
    bins = bins.reindex(range(30), fill_value=0)
    _right_wrong(lower.bar, edges[:-1], bins, width=0.95 * np.diff(edges)[0], align="edge")
    lower.set(xlabel="sol (Martian day since landing)", ylabel="images")
    lower.legend(loc="upper right")
    per_sol = table.groupby("sol")["wrong"].sum().sort_values(ascending=False)
    half = int((per_sol.cumsum() < per_sol.sum() / 2).sum()) + 1
    upper.set_title(
        f"{_split_of(predictions)}: half of the {per_sol.sum()} errors fall on {half} of "
        f"{len(per_sol)} sols"
    )
    return fig


def _right_wrong(
    bar: Callable, places: Sequence | np.ndarray, table: pd.DataFrame, **options: object
) -> None:
    """Draw wrong ("sum") and right ("size" - "sum") stacked with `bar` (axes.bar or .barh)."""
    base = "left" if bar.__name__ == "barh" else "bottom"
    bar(places, table["sum"], color=RED, label="wrong", **options)
    right = table["size"] - table["sum"]
    bar(places, right, color=BLUE, label="right", **{base: table["sum"]}, **options)


def learning_curves(history: Sequence[dict]) -> Figure:
    """Chart loss and accuracy by epoch, from training.json's "history".

    Each epoch is a dict with stage, loss, accuracy, val_loss and val_accuracy.
    """
    table = pd.DataFrame(history)
    epochs = np.arange(1, len(table) + 1)
    fig, panels = new_figure(4.2, 1, 2)
    for axes, name, label in zip(
        panels, ("loss", "accuracy"), ("loss (nats)", "accuracy"), strict=True
    ):
        axes.plot(epochs, table[name], color=BLUE, label="training", marker=".")
        axes.plot(epochs, table[f"val_{name}"], "--", color=ORANGE, label="validation", marker=".")
        for start in np.flatnonzero(
            table["stage"].to_numpy()[1:] != table["stage"].to_numpy()[:-1]
        ):
            axes.axvline(start + 1.5, color="black", linestyle=":", label="fine-tuning starts")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend()
    best = table["val_accuracy"].max()
    panels[0].set_title(f"{len(table)} epochs, best validation accuracy {best:.1%}")
    return fig


def ladder(rungs: Sequence[tuple[str, dict]]) -> Figure:
    """Chart accuracy and macro-F1 of the three splits over rungs, each a name and its splits.

    Bars at the test accuracy are its 95 % interval over sols.
    """
    fig, panels = new_figure(1.8 + 0.42 * len(rungs), 1, 2, sharey=True)
    places = np.arange(len(rungs))
    labels = {"accuracy": "accuracy, %", "macro_f1": "macro-F1, %"}
    for axes, (number, label) in zip(panels, labels.items(), strict=True):
        for split, name in SPLIT_NAMES.items():
            values = [100 * splits[split][number] for _, splits in rungs]
            axes.plot(values, places, marker="o", color=SPLIT_COLOURS[split], label=name)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    intervals = 100 * np.array([splits["test"]["accuracy_ci95"] for _, splits in rungs])
    panels[0].hlines(places, *intervals.T, color=SPLIT_COLOURS["test"], alpha=0.35, linewidth=5)
    panels[0].set_yticks(places, [f"+ {name}" if n else name for n, (name, _) in enumerate(rungs)])
    panels[0].invert_yaxis()
    fig.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle("Each step puts one more thing right", x=0.01, ha="left", fontsize=12.5)
    return fig


def gallery(
    images: Sequence[np.ndarray | None], titles: Sequence[str], columns: int, title: str
) -> Figure:
    """Lay out RGB images (H, W, 3; uint8) in rows of `columns` tiles, each under its title.

    Titles are set left, so a long one may run on over tiles with an empty title. A None leaves
    its tile empty.
    """
    tile = WIDTH_PIXELS // columns
    line = 26  # pixels, for 8-point text at 200 dots an inch
    above = line * (1 + max(text.count("\n") for text in titles)) + 10
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (tile + above), columns * tile, 3), 255, np.uint8)
    head = 80  # pixels for the figure's title
    height = canvas.shape[0] + head
    fig = Figure(figsize=(WIDTH_INCHES, height * WIDTH_INCHES / WIDTH_PIXELS))
    axes = fig.add_axes((0, 0, 1, canvas.shape[0] / height))
    for place, (image, text) in enumerate(zip(images, titles, strict=True)):
        top, left = place // columns * (tile + above) + above, place % columns * tile
        axes.text(left + 4, top - 6, text, fontsize=8, va="bottom", linespacing=1.1)
        if image is not None:
            scale = (tile - 8) / max(image.shape[:2])
            size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
            canvas[top : top + size[1], left + 4 : left + 4 + size[0]] = Image.fromarray(
                image
            ).resize(size, Image.Resampling.BILINEAR)
    axes.imshow(canvas)
    axes.set_axis_off()
    fig.suptitle(title, x=0.005, y=1 - 12 / height, ha="left", va="top", fontsize=12.5)
    return fig


def heatmap_overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Blend a heatmap (h, w; 0 to 1), enlarged, half and half into `image` (H, W, 3; uint8)."""
    size = image.shape[1::-1]
    larger = np.asarray(
        Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    )
    colours = matplotlib.colormaps["inferno"](larger, bytes=True)[..., :3]
    return (image // 2 + colours // 2).astype(np.uint8)
