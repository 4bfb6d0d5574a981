"""Charts of predictions and training, galleries, and how every figure is styled and saved.

All figures are 9 inches wide; charts are saved at 1,800 pixels, so text is legible at half that
width. They are independent of pyplot, so none stays open. `predictions` are rows of one split,
`classes` the names of its classes, by id.
"""

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from marsclf.data.msl import IMAGE_CREDIT, PUBLISHED
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.files import replace_atomically
from marsclf.images.decode import read_rgb

WIDTH_INCHES, WIDTH_PIXELS = 9.0, 1800
PHOTO_PIXELS = 1000  # width of figures with images, whose files grow with the pixels
HEAT, EVIDENCE = "inferno", "evidence for the class, relative"  # colors and scale of heatmaps
BLUE, ORANGE, GREEN, RED = seaborn.color_palette("colorblind").as_hex()[:4]
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_COLORS = {"train": BLUE, "val": ORANGE, "test": GREEN}
BY_SPLIT = {"hue": "split", "hue_order": list(SPLIT_COLORS), "palette": SPLIT_COLORS}
CAMERA_NAMES = {"MH": "MAHLI", "ML": "Mastcam left", "MR": "Mastcam right"}


def set_style() -> None:
    """Set fonts, grid, and palette for all charts made afterwards, ignoring a matplotlibrc."""
    matplotlib.rcdefaults()
    style = {"figure.dpi": 80, "axes.titlesize": 12.5, "axes.titlelocation": "left"}
    style["text.parse_math"] = False  # the name of a class may hold dollar signs
    seaborn.set_theme(style="whitegrid", palette="colorblind", font_scale=0.95, rc=style)


def save_figure(fig: Figure, folder: Path, name: str, dataset: str) -> Path:
    """Save `fig` as the PNG file `name` in `folder` (see `png_of`) and return its path."""
    with replace_atomically(folder / name) as temporary:
        temporary.write_bytes(png_of(fig, dataset))
    return folder / name


def png_of(fig: Figure, dataset: str = "") -> bytes:
    """Return `fig` as PNG, stamped if it is of "sample"; images of a published one get a credit."""
    stamps = max(1, round(fig.get_figheight() / 5))
    # Black letters with a white outline show on charts and on photographs.
    style = {"ha": "center", "va": "center", "rotation": 25, "fontsize": 60, "alpha": 0.35}
    style["path_effects"] = [patheffects.withStroke(linewidth=4, foreground="white")]
    for number in range(stamps if dataset == "sample" else 0):
        fig.text(0.5, (number + 0.5) / stamps, "sample data", zorder=10, **style)
    has_images = any(axes.images for axes in fig.axes)
    if dataset in PUBLISHED and has_images:
        place = {"x": 0.997, "y": 0.03 / fig.get_figheight(), "ha": "right", "va": "bottom"}
        fig.text(s=IMAGE_CREDIT, fontsize=8, color="dimgray", **place)
    drawn, small = BytesIO(), BytesIO()
    width = PHOTO_PIXELS if has_images else WIDTH_PIXELS
    fig.savefig(drawn, dpi=width / fig.get_figwidth(), pil_kwargs={"compress_level": 0})
    Image.open(drawn).convert("RGB").save(small, format="png")  # without the opaque alpha channel
    return small.getvalue()


def new_figure(height: float, **options: object) -> tuple[Figure, Any]:
    """Return a figure `height` inches high, and its axes as `Figure.subplots(**options)` does."""
    fig = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return fig, fig.subplots(**options)


def bars(axes: Axes, **options: object) -> None:
    """Draw `seaborn.barplot(**options)` with its value at each bar's end."""
    seaborn.barplot(ax=axes, saturation=1, errorbar=None, **options)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # lines may pass behind labels
    for container in axes.containers:
        axes.bar_label(container, padding=3, fontsize=9, bbox=behind)


def _title(predictions: pd.DataFrame, finding: str) -> str:
    """Return a title such as "Test split, 1,305 images: <finding>"."""
    name = SPLIT_NAMES[predictions["split"].iloc[0]].capitalize()
    return f"{name} split, {len(predictions):,} images: {finding}"


def _interval(predictions: pd.DataFrame) -> str:
    """Return the name of an interval, with what is resampled for it."""
    return f"95% interval over {'sols' if 'sol' in predictions else 'groups'}"


def _present_classes(
    predictions: pd.DataFrame, classes: Sequence[str], by: str, ascending: bool
) -> tuple[pd.DataFrame, str]:
    """Return `metrics.per_class`, sorted, of the classes with images, and a line on the others."""
    table = metrics.per_class(predictions, [fill(name, 40) for name in classes])
    absent = ", ".join(table.loc[table["support"] == 0, "class_name"])
    note = "\n" + shorten(f"no images in this split: {absent}", 120) if absent else ""
    table = table[table["support"] > 0].sort_values(by, ascending=ascending, kind="stable")
    return table, note


def cases_and_errors_per_class(predictions: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Chart the number of images of each class beside the number of wrong predictions."""
    table, note = _present_classes(predictions, classes, "support", ascending=False)
    counts = table.melt("class_name", ["support", "errors"])
    fig, axes = new_figure(1.5 + 0.33 * len(table))
    bars(axes, data=counts, x="value", y="class_name", hue="variable", palette=[BLUE, RED])
    if table["support"].min() > 0.7 * table["support"].max():
        axes.margins(x=0.3)  # room for the legend
    axes.legend(axes.containers, ["images", "wrong predictions"], loc="lower right")
    errors = (predictions["label"] != predictions["predicted"]).sum()
    title = _title(predictions, f"{errors:,} wrong ({errors / len(predictions):.1%})")
    axes.set(xlabel=f"images{note}", ylabel="", title=title)
    return fig


def error_rate_per_class(predictions: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Chart the percentage of wrong predictions in each class, with its 95 % interval."""
    table, note = _present_classes(predictions, classes, "recall", ascending=True)
    wrong = (predictions["label"] != predictions["predicted"]).to_numpy()
    rates, overall = 100 * (1 - table["recall"]), 100 * wrong.mean()
    names = [
        f"{row.class_name}: {100 * (1 - row.recall):.0f}% ({row.errors} of {row.support})"
        for row in table.itertuples()
    ]
    of_class = predictions["label"].to_numpy()[:, None] == table.index.to_numpy()
    low, high = 100 * metrics.bootstrap_over_groups(wrong, predictions["group"], of_class)
    several = predictions.groupby("label")["group"].nunique().loc[table.index] > 1
    fig, axes = new_figure(1.7 + 0.28 * len(table))
    seaborn.barplot(x=rates, y=names, color=RED, saturation=1, errorbar=None, ax=axes)
    if len(place := np.flatnonzero(several)):
        over = f"{_interval(predictions)}, where there are several"
        axes.hlines(place, low[place], high[place], color="black", label=over)
    axes.axvline(overall, color="black", linestyle="--", label=f"all images: {overall:.1f}%")
    axes.legend(loc="lower right")
    axes.set(xlabel=f"wrong predictions, % of the class{note}", ylabel="", xlim=(0, 101))
    axes.set(ylim=(len(table) - 0.5, -0.5), title=_title(predictions, "error rate per class"))
    return fig


def confusion_matrix(predictions: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Chart the confusion matrix: its counts, colored by their share of the true class."""
    counts = metrics.confusion_matrix(predictions)
    true = counts.any(axis=1)
    either = true | counts.any(axis=0)
    counts = counts[true][:, either]
    names = np.array([name if len(name) <= 24 else f"{name[:23]}…" for name in classes])
    fig, axes = new_figure(2.6 + 0.27 * len(counts))
    look = {"cmap": "Blues", "vmin": 0, "vmax": 100, "linewidths": 0.5, "linecolor": "lightgray"}
    look["cbar_kws"] = {"label": "% of the true class", "fraction": 0.03, "pad": 0.01}
    look |= {"annot": np.where(counts, counts.astype(str), ""), "fmt": ""}
    look |= {"annot_kws": {"fontsize": 8}, "xticklabels": names[either], "yticklabels": names[true]}
    seaborn.heatmap(100 * counts / counts.sum(axis=1, keepdims=True), ax=axes, **look)
    axes.tick_params("x", rotation=90)
    axes.tick_params("y", rotation=0)
    right = (predictions["label"] == predictions["predicted"]).mean()
    title = _title(predictions, f"accuracy {right:.1%}")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return fig


def reliability_diagram(predictions: pd.DataFrame, note: str = "") -> Figure:
    """Chart accuracy and number of images in 15 bins of confidence; `note` joins the title."""
    correct = (predictions["label"] == predictions["predicted"]).to_numpy()
    confidence = predictions["confidence"].to_numpy()
    table = metrics.calibration_bins(confidence, correct)
    edges = np.linspace(0, 1, len(table) + 1)
    filled = np.flatnonzero(table["count"])
    inside = (confidence[:, None] > edges[filled]) & (confidence[:, None] <= edges[filled + 1])
    interval = metrics.bootstrap_over_groups(correct, predictions["group"].to_numpy(), inside)
    fig, (upper, lower) = new_figure(6.5, nrows=2, sharex=True, height_ratios=[3, 1])
    options = {"x": edges[:-1], "bins": edges.tolist(), "color": BLUE, "alpha": 1}
    seaborn.histplot(weights=table["accuracy"].fillna(0), ax=upper, **options)
    seaborn.histplot(weights=table["count"], ax=lower, **options)
    upper.axline((0, 0), slope=1, ls="--", color="black", label="perfectly calibrated")
    style = {"color": ORANGE, "marker": "D", "s": 50, "zorder": 3, "clip_on": False}
    style["label"] = f"bin, at its mean confidence, with {_interval(predictions)}"
    seaborn.scatterplot(table, x="confidence", y="accuracy", ax=upper, **style)
    upper.vlines(table["confidence"].iloc[filled], *interval, color="black", zorder=2.5)
    upper.legend(loc="upper left")
    finding = f"expected calibration error {metrics.summarize(predictions)['ece']:.3f}{note}"
    upper.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    upper.set_title("(a) " + _title(predictions, finding))
    lower.set(xlabel="confidence of the prediction", ylabel="images", title="(b)")
    return fig


def coverage_accuracy(predictions: pd.DataFrame, threshold: float = metrics.THRESHOLD) -> Figure:
    """Chart coverage and accuracy of the covered images by threshold, with 95% intervals."""
    correct = (predictions["label"] == predictions["predicted"]).to_numpy()
    confidence = predictions["confidence"].to_numpy()
    levels = np.linspace(0, confidence.max(), 101)
    covered = confidence[:, None] >= levels
    fig, axes = new_figure(5)
    for name, color, line, right, counted in (
        ("accuracy of the covered images", BLUE, "-", correct[:, None], covered),
        ("coverage", ORANGE, "--", covered, np.ones_like(covered)),
    ):
        shares = 100 * (right & counted).sum(axis=0) / counted.sum(axis=0)
        axes.plot(levels, shares, color=color, linestyle=line, label=name)
        band = 100 * metrics.bootstrap_over_groups(right, predictions["group"], counted)
        axes.fill_between(levels, *band, color=color, alpha=0.2, linewidth=0)
    axes.axvline(threshold, color="black", linewidth=1, linestyle=":")
    axes.legend(loc="lower left", title=f"with {_interval(predictions)}")
    shown = confidence >= threshold
    finding = f"at {threshold:g}, {shown.mean():.1%} covered"
    finding += f", {correct[shown].mean():.1%} of them right" if shown.any() else ""
    axes.set(xlabel="confidence threshold", ylabel="%", xlim=(0, 1), ylim=(0, 102))
    axes.set_title(_title(predictions, finding))
    return fig


def errors_by_camera_and_sol(predictions: pd.DataFrame) -> Figure:
    """Chart right and wrong predictions, with columns sol and camera, by camera and over sols."""
    wrong = (predictions["label"] != predictions["predicted"]).rename("wrong")
    table = predictions[["sol", "camera"]].join(wrong)
    names = {
        camera: f"{CAMERA_NAMES[camera]}\n{of.sum()} of {len(of)} wrong ({of.mean():.0%})"
        for camera, of in table.groupby("camera")["wrong"]
    }
    fig, (upper, lower) = new_figure(7, nrows=2, height_ratios=[1, 1.6])
    stacked = {"hue": wrong.map({True: "wrong", False: "right"}), "hue_order": ["right", "wrong"]}
    stacked |= {"palette": [BLUE, RED], "multiple": "stack", "alpha": 1}
    seaborn.histplot(y=table["camera"].map(names), shrink=0.8, legend=False, ax=upper, **stacked)
    seaborn.histplot(x=table["sol"], bins=30, ax=lower, **stacked)
    seaborn.move_legend(lower, "upper right", title=None)
    per_sol = table.groupby("sol")["wrong"].sum().sort_values(ascending=False)
    half = (per_sol.cumsum().shift(fill_value=0) < per_sol.sum() / 2).sum()
    finding = f"half of the {per_sol.sum()} errors fall on {half} of {len(per_sol)} sols"
    upper.set(xlabel="images", ylabel="", title="(a) " + _title(predictions, finding))
    lower.set(xlabel="sol (Martian day since landing)", ylabel="images", title="(b) by sol")
    return fig


def familiarity(images: pd.DataFrame) -> Figure:
    """Chart the familiarity of images, `known` those of the classes, others by their own class."""
    kinds = {"images of the classes": images[images["known"]]}
    kinds |= dict(iter(images[~images["known"]].groupby("class_name", sort=False)))
    fig, panels = new_figure(0.6 + 1.1 * len(kinds), nrows=len(kinds), sharex=True, squeeze=False)
    for axes, (name, rows) in zip(panels.flat, kinds.items(), strict=True):
        values, color = rows["familiarity"], BLUE if axes is panels[0, 0] else RED
        seaborn.histplot(x=values, bins=40, binrange=(0, 1), color=color, alpha=1, ax=axes)
        axes.axvline(0.5, color="black", linestyle="--")
        axes.set_title(f"{name}: {np.mean(values < 0.5):.1%} of {len(values):,} unfamiliar")
        axes.set(ylabel="images", xlim=(0, 1), xlabel="familiarity, flagged below the dashed line")
    return fig


def learning_curves(history: Sequence[dict]) -> Figure:
    """Chart loss and accuracy by epoch, from "history" in training.json."""
    table = pd.DataFrame(history, index=range(1, len(history) + 1))
    fig, panels = new_figure(4.2, ncols=2)
    for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
        curves = table[[name, f"val_{name}"]].set_axis(["training", "validation"], axis=1)
        seaborn.lineplot(curves, palette=[BLUE, ORANGE], markers=["o", "o"], ax=axes)
        for start in np.flatnonzero(table["stage"].ne(table["stage"].shift())[1:]):
            axes.axvline(start + 1.5, color="black", linestyle=":", label="fine-tuning starts")
        axes.set(xlabel="epoch", ylabel="loss (nats)" if name == "loss" else name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    best = table["val_accuracy"].max()
    panels[0].set_title(f"(a) {len(table)} epochs, best validation accuracy {best:.1%}")
    panels[1].set_title("(b) both are judged on random views")
    return fig


def ladder(rungs: Sequence[tuple[str, dict]]) -> Figure:
    """Chart accuracy and macro-F1, with the last split's 95% interval; a rung is (name, splits)."""
    names = [f"+ {name}" if place else name for place, (name, _) in enumerate(rungs)]
    table = pd.concat([pd.DataFrame(splits).T for _, splits in rungs], keys=names)
    table = table.rename_axis(["rung", "split"]).reset_index()
    fig, panels = new_figure(1.8 + 0.42 * len(rungs), ncols=2, sharey=True)
    last = [*rungs[0][1]][-1]  # test, else val
    intervals = 100 * np.array([splits[last]["accuracy_ci95"] for _, splits in rungs])
    panels[0].hlines(names, *intervals.T, color=SPLIT_COLORS[last], alpha=0.35, linewidth=5)
    for axes, column in zip(panels, ("accuracy", "macro_f1"), strict=True):
        options = {"errorbar": None, "linewidth": 2, "legend": column == "macro_f1"}
        values = 100 * table[column].astype(float)
        seaborn.pointplot(table, x=values, y="rung", ax=axes, **BY_SPLIT, **options)
        axes.set(xlabel=f"{column.replace('_f', '-F')}, %", ylabel="")
    seaborn.move_legend(panels[1], "center left", bbox_to_anchor=(1, 0.5), title=None)
    panels[0].set_title("(a) Each step fixes one more fault of the original recipe")
    panels[1].set_title("(b)")
    return fig


def tile(path: str | Path) -> np.ndarray | None:
    """Return an image for a gallery, uint8 (h, w, 3), at most 300 pixels per side; None if bad."""
    with suppress(MarsclfError):
        image = Image.fromarray(read_rgb(path))
        image.thumbnail((300, 300))
        return np.asarray(image)
    return None


def gallery(
    images: Sequence[np.ndarray | None],
    titles: Sequence[str],
    columns: int,
    title: str,
    together: int = 0,
    scale: str = "",
) -> Figure:
    """Lay out RGB images (H, W, 3; uint8) in rows of `columns` tiles, each under its title.

    None leaves a tile empty. A long title may extend over neighbors without a title. A wider gap
    follows every `together` columns. `scale` is the name of what `heatmap_overlay` shows.
    """
    together = together or columns
    edge, gap, wider = 0.03, 0.05, 0.25  # inches
    gaps = gap * (columns - 1) + wider * ((columns - 1) // together)
    tile = (WIDTH_INCHES - 2 * edge - gaps) / columns
    head, foot = 0.4, 0.2  # inches; room for the figure's title, and for the image credit
    above = 0.1 + 0.13 * (1 + max(text.count("\n") for text in titles))  # room for tile titles
    rows = -(-len(images) // columns)
    height = head + rows * (tile + above) + foot
    fig = Figure(figsize=(WIDTH_INCHES, height))
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        left = edge + column * (tile + gap) + column // together * wider
        bottom = height - head - (row + 1) * (tile + above)
        place = left / WIDTH_INCHES, bottom / height, tile / WIDTH_INCHES, tile / height
        axes = fig.add_axes(place, anchor="NW")
        axes.set_axis_off()
        axes.set_title(text, loc="left", fontsize=8, pad=4)
        if image is not None:
            axes.imshow(image)
    fig.suptitle(title, x=0.005, y=1 - 0.06 / height, ha="left", va="top", fontsize=12.5)
    if scale:
        bar = fig.add_axes((0.03, 0.05 / height, 0.2, 0.1 / height))
        bar.imshow(np.linspace(0, 1, 256)[np.newaxis], cmap=HEAT, aspect="auto")
        bar.set_axis_off()
        style = {"va": "center", "fontsize": 8, "transform": bar.transAxes}
        bar.text(-0.02, 0.5, "0", ha="right", **style)
        bar.text(1.02, 0.5, f"1  {scale}", ha="left", **style)
    return fig


def heatmap_overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Blend a heatmap (h, w; 0 to 1), enlarged, half and half into `image` (H, W, 3; uint8)."""
    larger = cv2.resize(heatmap, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colors = matplotlib.colormaps[HEAT](larger, bytes=True)[..., :3]
    return cv2.addWeighted(image, 0.5, np.ascontiguousarray(colors), 0.5, 0)
