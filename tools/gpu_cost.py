"""What EfficientNetB7 costs on this machine: python -m tools.gpu_cost [--data-dir D].

With a GPU, both stages of the preset `b7` are measured; without one, only the frozen features are.
Weights and images are random, because the speed does not depend on them.
"""

import functools
import gc
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.open import open_dataset
from marsclf.networks.backbones import build_backbone
from marsclf.networks.engine import CHUNK, has_gpu, make_predictor, predict_each
from marsclf.networks.pinned import keras
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit, hardware, peak_rss_mb
from marsclf.training.features import view_counts
from marsclf.training.later_sols import CONDITIONS, spread_over_sols
from marsclf.training.recipe import Recipe
from tools.command import make_main
from tools.documents import store
from tools.measurements import input_size, prepare_training, spread, take_turns, train

SIDES = (193, 256)  # height and width of the reference's images, pixels
CPU_IMAGES = 96
BATCH_SIZES = (8, CHUNK, 32, 128)  # the preset uses CHUNK for features and 8 for training
STAGES = ("features", "finetune")
PRECISIONS = ("mixed_bfloat16", "float32")  # of the backbone; the head is always float32
REPEATS = 7
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"


def measure_costs(data_dir: str | Path | None) -> dict:
    """Measure time and memory of EfficientNetB7: frozen features, and on a GPU also training.

    The estimates are for the number of images in the data set. With the real data set, also stores
    them in results/ and updates the documents.
    """
    dataset, recipe = open_dataset(data_dir), Recipe(**parameters_of("b7"))
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dataset": dataset.name,
        "hardware": hardware(),
        "backbone": recipe.backbone,
    }
    if has_gpu():
        file = paths.RESULTS / "b7_gpu_cost.json"
        speeds = measure_on_gpu(recipe, (SIDES, (input_size(recipe),) * 2), BATCH_SIZES)
        result |= {"blocks": recipe.finetune_blocks, "accumulate": recipe.finetune_accumulate}
        result |= {"speeds": speeds, "recipe": estimate_recipe(recipe, dataset.index, speeds)}
    else:
        file = paths.RESULTS / "b7_cost.json"
        result |= measure_on_cpu(recipe.backbone) | {"dataset_images": len(dataset.index)}
    print(json.dumps(result, indent=1))
    store(result, file, dataset)
    return result


def measure_on_cpu(backbone: str) -> dict:
    """Measure the frozen features of a backbone on the engine, at the reference's image size."""
    images = _make_images(SIDES, CPU_IMAGES)
    keras.utils.set_random_seed(0)
    network = build_backbone(backbone, SIDES, weights=None)
    set_scale(network, images[:CHUNK])
    predict = make_predictor(network, paths.CACHE, images[:2])
    predict(images[:CHUNK])
    started = time.monotonic()
    list(predict_each(range(CPU_IMAGES), images.__getitem__, predict))
    seconds = time.monotonic() - started
    return {
        "sides": SIDES,
        "images": CPU_IMAGES,
        "ms_per_image": round(1000 * seconds / CPU_IMAGES, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


def set_scale(network: keras.Model, images: np.ndarray) -> None:
    """Give every BatchNorm of a network the statistics of images (n, height, width, 3), 0-255.

    Without this, random weights give such small numbers that processors compute them slowly.
    """
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # only the new statistics count
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    network(images, training=True)


def measure_on_gpu(
    recipe: Recipe, sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int]
) -> list[dict]:
    """Return the records of `measure_stage` for heights and widths (pixels) and batch sizes."""
    speeds = []
    for sides, precision, stage, batch in product(sizes, PRECISIONS, STAGES, batch_sizes):
        speeds.append(measure_stage(stage, recipe, sides, precision, batch))
        print(speeds[-1], file=sys.stderr, flush=True)
    return speeds


def measure_stage(
    stage: str, recipe: Recipe, sides: tuple[int, int], precision: str, batch: int
) -> dict:
    """Measure images through the frozen network ("features") or training steps ("finetune").

    Returns:
        The arguments; outcome, MEASURED or OUT_OF_MEMORY; and where it was measured images_per_s
        (median, min, max) and peak_memory_mb of the GPU, None where there is none.
    """
    record = {"stage": stage, "sides": [*sides], "precision": precision, "batch": batch}
    try:
        network, images = _build(recipe.backbone, sides, precision), _make_images(sides, batch)
        batches, work = 1, functools.partial(network.predict_on_batch, images)
        if stage == "finetune":
            frozen, model = prepare_training(recipe, network, recipe.finetune_blocks)
            features = frozen.predict_on_batch(images[:1]).astype(np.float32)
            batches = recipe.finetune_accumulate
            work = functools.partial(train, model, features.repeat(batch * batches, 0), batches)
        _gpu_memory("reset_memory_stats")
        seconds = take_turns({stage: work}, REPEATS)[stage]
        memory = _gpu_memory("get_memory_info")
    except Exception as error:  # TensorFlow has several kinds
        if not re.search(r"exhausted|out.of.memory|OOM|MemoryError", repr(error), re.IGNORECASE):
            raise
        return record | {"outcome": OUT_OF_MEMORY}
    finally:
        gc.collect()  # networks hold each other, and the GPU's memory, in cycles
    return record | {
        "outcome": MEASURED,
        "images_per_s": spread(batch * batches / seconds),
        "peak_memory_mb": memory and round(memory["peak"] / 1e6),
    }


def estimate_recipe(recipe: Recipe, index: pd.DataFrame, speeds: list[dict]) -> dict:
    """Return the minutes that a recipe takes on a data set at these speeds of `measure_on_gpu`.

    Every view goes through the complete network once: random views for training, one for
    validation, all images at each zoom for the predictions, and the images that the temperature is
    fitted on under each condition. Then all epochs of the second stage count, with validation at
    the rate of training, which is an upper bound. Reading images, training the head and compiling
    are not counted. The minutes are None where the recipe's batches do not fit in memory. `index`
    is that of the data set, with columns split, label and sol.
    """
    train_rows, validation = (index[index["split"] == split] for split in ("train", "val"))
    views = view_counts(train_rows["label"].to_numpy(), recipe.views, recipe.views_rare).sum()
    predicted = len(index) + len(CONDITIONS) * len(spread_over_sols(validation))
    images = {
        "features": int(views) + len(validation) + len(recipe.test_zooms) * predicted,
        "finetune": recipe.finetune_epochs * (len(train_rows) + len(validation)),
    }
    batches = {"features": CHUNK, "finetune": recipe.finetune_batch_size}
    precision = "mixed_bfloat16" if recipe.mixed_precision else "float32"
    own = {"sides": [input_size(recipe)] * 2, "precision": precision, "outcome": MEASURED}
    seconds = [
        images[record["stage"]] / record["images_per_s"]["median"]
        for record in speeds
        if own.items() <= record.items() and record["batch"] == batches[record["stage"]]
    ]
    minutes = round(sum(seconds) / 60, 1) if len(seconds) == len(STAGES) else None
    return {"images": images, "batches": batches, "minutes": minutes}


def _build(backbone: str, sides: tuple[int, int], precision: str) -> keras.Model:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        return build_backbone(backbone, sides, weights=None)
    finally:
        keras.config.set_dtype_policy(policy)


def _make_images(sides: tuple[int, int], count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *sides, 3), np.uint8)


def _gpu_memory(function: str) -> dict | None:
    """Call one of TensorFlow's functions for GPU memory, if there is a GPU."""
    if not has_gpu():
        return None
    import tensorflow as tf

    return getattr(tf.config.experimental, function)("GPU:0")


main = make_main(measure_costs, "data_dir")

if __name__ == "__main__":
    sys.exit(main())
