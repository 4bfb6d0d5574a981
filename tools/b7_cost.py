"""What EfficientNetB7 costs on this machine: its features on processors, both stages on a GPU.

Measured with weights drawn at random, because speed does not depend on what they are, as long as
what flows is of a usual size: freshly drawn they make numbers so small that processors are slow
with them. So each BatchNorm takes the statistics of real images first.
"""

import functools
import importlib.metadata
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.open import open_dataset
from marsclf.files import write_json
from marsclf.images.decode import read_rgb
from marsclf.images.views import AsRead, read_view
from marsclf.networks.backbones import SPECS, build_backbone
from marsclf.networks.engine import CHUNK, has_gpu, make_predictor, predict_each
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit, cores, hardware, peak_rss_mb
from marsclf.training import later_sols as selection
from marsclf.training.features import view_counts
from marsclf.training.recipe import Recipe
from tools.publish import rewrite_tables
from tools.stage_speed import (
    MATRIX,
    MEASURED,
    PRECISIONS,
    matrix_product_rate,
    measure_stages,
)
from tools.tables import b7_gpu_table

NAME, GPU_NAME = "b7_cost.json", "b7_gpu_cost.json"
BACKBONE, PRESET = "EfficientNetB7", "b7"
SIDES = (193, 256)  # height and width of the reference's images, pixels
SEEN, TIMED = 16, 96  # images that set the scale, and that are timed
# On a GPU these set the scale and, repeated, fill the batches; for more a small one has no memory.
SEEN_ON_GPU = 4
# Among them what the preset itself takes: CHUNK of frozen networks, and 8 of training.
BATCH_SIZES = (8, CHUNK, 32, 128)
# An assumption, about what a GPU of a data centre is rented for; measured is the time alone.
DOLLARS_A_GPU_HOUR = 3.0


def set_scale(network: keras.Model, images: np.ndarray) -> None:
    """Give every BatchNorm of a network the statistics of images (n, height, width, 3), 0-255."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the new statistics alone count
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    network(images, training=True)


def measure_b7(data_dir: str | Path | None) -> dict:
    """Measure what B7 costs on some images of the data, print and, for the real ones, store it.

    Without a GPU that is the time of its frozen features, with one that of both stages.
    """
    dataset = open_dataset(data_dir)
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dataset": dataset.name,
    }
    if has_gpu():
        recipe = Recipe.of(parameters_of(PRESET))
        sizes = (SIDES, own_sides(recipe))
        result |= measure_on_gpu(dataset, recipe, sizes, BATCH_SIZES) | {"hardware": hardware()}
        name = GPU_NAME
        print(b7_gpu_table(result))
    else:
        result |= measure_on_cpu(dataset) | {"hardware": hardware()}
        name = NAME
        print(f"{result['ms_an_image']} ms an image, {result['peak_rss_mb'] / 1000:.1f} GB at most")
    if dataset.name == "msl-v1":
        write_json(paths.RESULTS / name, result)
        rewrite_tables()
    return result


def measure_on_cpu(dataset: data.Dataset) -> dict:
    """Return what B7's frozen features take at the reference's size, in time and memory."""
    chosen = _choose(dataset, SEEN + TIMED)
    started = time.monotonic()
    keras.utils.set_random_seed(0)
    network = build_backbone(BACKBONE, SIDES, weights=None)
    images = np.stack([_load(path, SIDES) for path in chosen[:SEEN]])
    set_scale(network, images)
    predict = make_predictor(network, paths.CACHE, images[:2])
    predict(images[: cores()])
    ready = time.monotonic()
    load = functools.partial(_load, sides=SIDES)
    features = np.stack(list(predict_each(chosen[SEEN:], load, predict)))
    seconds = time.monotonic() - ready
    return {
        "sides": SIDES,
        "weights": "random, BatchNorm scaled on real images",
        "images": TIMED,
        "features_std": round(float(features.std()), 3),
        "ready_s": round(ready - started, 1),
        "ms_an_image": round(1000 * seconds / TIMED, 1),
        "minutes_for_all": round(seconds / TIMED * len(dataset.index) / 60, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


def measure_on_gpu(
    dataset: data.Dataset,
    recipe: Recipe,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    matrix: int = MATRIX,
) -> dict:
    """Return how fast both stages of a recipe run where Keras computes, and what all of it costs.

    Args:
        dataset: whose images are taken, and counted.
        recipe: what is measured.
        sizes: heights and widths; the recipe's own must be among them for its whole cost.
        batch_sizes: images a batch; those that the recipe takes must be among them likewise.
        matrix: rows of the square matrices whose product tells the possible rate.
    """
    chosen = _choose(dataset, SEEN_ON_GPU)
    keras.utils.set_random_seed(0)
    network = build_backbone(recipe.backbone, sizes[0], weights=None)
    set_scale(network, np.stack([_load(path, sizes[0]) for path in chosen]))
    weights = network.get_weights()
    del network  # or its memory would count as that of what is measured
    dtypes = {precision: keras.DTypePolicy(precision).compute_dtype for precision in PRECISIONS}
    rates = {name: matrix_product_rate(dtype, matrix) for name, dtype in dtypes.items()}
    speeds = [
        record
        for sides in sizes
        for precision in PRECISIONS
        for record in measure_stages(
            recipe,
            weights,
            np.stack([_load(path, sides) for path in chosen]),
            precision,
            batch_sizes,
            rates[precision],
        )
    ]
    backend = keras.backend.backend()
    return {
        "weights": "random, seed 0, BatchNorm scaled on real images",
        "backend": f"{backend} {importlib.metadata.version(backend)}",
        "backbone": recipe.backbone,
        "blocks": recipe.finetune_blocks,
        "accumulate": recipe.finetune_accumulate,
        "matrix": matrix,
        "matrix_product_tflop_a_s": {k: float(f"{v / 1e12:.4g}") for k, v in rates.items()},
        "speeds": speeds,
        "recipe": whole_recipe(recipe, dataset.index, speeds),
    }


def own_sides(recipe: Recipe) -> tuple[int, int]:
    """Return height and width (pixels) of the images that a recipe learns from."""
    side = recipe.image_size or SPECS[recipe.backbone].input_size
    return side, side


def whole_recipe(recipe: Recipe, index: pd.DataFrame, speeds: list[dict]) -> dict:
    """Return what a recipe takes on a data set, from the speeds of its stages.

    Every image that any of its steps looks at goes through the whole network once: the random views
    of training, those of validation, all images at each zoom for the predictions, and those that
    the temperature is fitted on under each condition. Then all epochs of the second stage go over
    training, and over validation at the same rate, which is more than that takes. Reading images,
    the head's training and compiling are not counted.

    Args:
        recipe: which learns from the split train alone.
        index: of the data set, with columns split, label and sol.
        speeds: as from `measure_stages`.

    Returns:
        features_images and finetune_images, their numbers; minutes and dollars, None where its
        batches do not fit or were not measured; dollars_an_hour, the assumed price.
    """
    train, validation = (index[index["split"] == split] for split in ("train", "val"))
    views = view_counts(train["label"].to_numpy(), recipe.views, recipe.views_rare).sum()
    judged = len(selection.CONDITIONS) * len(selection.spread_over_sols(validation))
    looks = len(recipe.test_zooms) * (len(index) + judged)
    images = {
        "features": int(views) + len(validation) + looks,
        "finetune": recipe.finetune_epochs * (len(train) + len(validation)),
    }
    about = {
        "sides": list(own_sides(recipe)),
        "precision": "mixed_bfloat16" if recipe.mixed_precision else "float32",
        "outcome": MEASURED,
    }
    batches = {"features": CHUNK, "finetune": recipe.finetune_batch_size}
    rates = {
        record["stage"]: record["images_a_s"]["median"]
        for record in speeds
        if about.items() <= record.items() and record["batch"] == batches[record["stage"]]
    }
    minutes = None
    if rates.keys() == images.keys():
        minutes = sum(images[stage] / rate for stage, rate in rates.items()) / 60
    return {
        **{f"{stage}_images": number for stage, number in images.items()},
        **{f"{stage}_batch": batch for stage, batch in batches.items()},
        "minutes": minutes and round(minutes, 1),
        "dollars": minutes and round(minutes / 60 * DOLLARS_A_GPU_HOUR, 2),
        "dollars_an_hour": DOLLARS_A_GPU_HOUR,
    }


def _choose(dataset: data.Dataset, count: int) -> list[Path]:
    """Return the files of so many images of the data, drawn at random, always the same."""
    drawn = np.random.default_rng(0).choice(dataset.index["path"], count, replace=False)
    return [dataset.root / path for path in drawn]


def _load(path: Path, sides: tuple[int, int]) -> np.ndarray:
    reading = AsRead(squashed=True, bgr=False)
    return read_view(read_rgb(path), sides, reading, np.random.default_rng(0))
