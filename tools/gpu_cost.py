"""What EfficientNetB7 costs on this machine: python -m tools.gpu_cost [--data-dir D].

With a GPU, both stages of the preset `b7` are measured; without one, only the frozen features are.
Weights and images are random, because the speed does not depend on them.
"""

import gc
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from marsclf import paths
from marsclf.data.open import open_dataset
from marsclf.networks.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import CHUNK, has_gpu, make_predictor, predict_each
from marsclf.networks.pinned import keras
from marsclf.networks.specs import SPECS
from marsclf.pipeline.machine import count_images
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit, hardware, peak_rss_mb
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, compile_model, join
from marsclf.training.train import load_backbone
from tools.bench import REFERENCE_SIZE, ms_per_image, spread, take_turns
from tools.command import make_main
from tools.documents import store

CLASSES = 25  # of the head
CPU_IMAGES = 96
BATCH_SIZES = (8, 16, 32, 64)
STAGES = ("head", "finetune")


def measure_costs(data_dir: Path | None) -> dict:
    """Measure time and memory of EfficientNetB7, and store them in results/."""
    dataset, parameters = open_dataset(data_dir), parameters_of("b7")
    result = {"commit": commit(), "dataset": dataset.name, "hardware": hardware()}
    if has_gpu():
        file, recipe = paths.RESULTS / "b7_gpu_cost.json", Recipe(**parameters)
        speeds = measure_on_gpu(recipe, (recipe.image_size, SPECS[recipe.backbone].input_size))
        result |= {"blocks": recipe.trained_blocks, "speeds": speeds}
        result["recipe"] = estimate_recipe(parameters, dataset.index, speeds)
    else:
        file = paths.RESULTS / "b7_cost.json"
        result |= measure_on_cpu(parameters["backbone"]) | {"dataset_images": len(dataset.index)}
    print(json.dumps(result, indent=1))
    store(result, file, dataset)
    return result


def measure_on_cpu(backbone: str) -> dict:
    """Measure the frozen features of a backbone on the engine, at the reference's image size."""
    images = _make_images(CPU_IMAGES, REFERENCE_SIZE)
    network = build_backbone(backbone, REFERENCE_SIZE, weights=None)
    # Random weights give such small numbers that processors compute them slowly, unless every
    # BatchNorm has the statistics of the images.
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # only the new statistics count
    network(images[:CHUNK], training=True)
    predict = make_predictor(network, paths.CACHE, images[:2])
    work = {"all": lambda: list(predict_each(range(CPU_IMAGES), images.__getitem__, predict))}
    ms = ms_per_image(take_turns(work), CPU_IMAGES)["all"]["median"]
    measured = {"sides": REFERENCE_SIZE, "images": CPU_IMAGES, "ms_per_image": ms}
    return measured | {"peak_rss_mb": peak_rss_mb()}


def measure_on_gpu(recipe: Recipe, sizes: Sequence[int]) -> list[dict]:
    """Return `measure_stage` at each size, in the recipe's precision and in float32."""
    speeds = []
    for pixels, mixed in product(sizes, (recipe.mixed_precision, False)):
        backbone = load_backbone(recipe.backbone, pixels, mixed, weights=None)
        of = {"pixels": pixels, "mixed_precision": mixed}
        of["precision"] = backbone.layers[-1].compute_dtype
        for stage, batch in product(STAGES, BATCH_SIZES):
            speeds.append(of | measure_stage(stage, recipe, backbone, batch))
            print(speeds[-1], file=sys.stderr, flush=True)
    return speeds


def measure_stage(stage: str, recipe: Recipe, backbone: keras.Model, batch: int) -> dict:
    """Return the speed of training steps of a stage and their peak memory on the GPU.

    The outcome is "measured", or "out of memory" without the two.
    """
    gc.collect()  # earlier classifiers hold the GPU's memory in cycles
    record = {"stage": stage, "batch": batch}
    if stage == "head":
        recipe = replace(recipe, finetune_blocks=[], finetune_ema=0.0)
    images = _make_images(batch, backbone.input_shape[1:3])
    try:
        _, model = prepare_training(recipe, backbone, recipe.finetune_blocks, is_split=False)
        tf.config.experimental.reset_memory_stats("GPU:0")
        seconds = take_turns({stage: partial(train, model, images, steps=1)})[stage]
    except Exception as error:  # TensorFlow has several kinds
        if not re.search(r"exhausted|out.of.memory|OOM|MemoryError", repr(error), re.IGNORECASE):
            raise
        return record | {"outcome": "out of memory"}
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    record |= {"outcome": "measured", "images_per_s": spread(batch / seconds)}
    return record | {"peak_memory_mb": round(peak / 1e6)}


def prepare_training(
    recipe: Recipe, backbone: keras.Model, blocks: list[str], is_split: bool
) -> tuple[keras.Model | None, keras.Model]:
    """Return the frozen and the trainable part, compiled for the second stage of a recipe.

    Unless `is_split`, the frozen part is None and the other is the complete classifier.
    """
    head = build_head(backbone.output_shape[1], recipe.head_hidden, recipe.head_dropout, CLASSES)
    model = join(backbone, head)
    unfreeze_blocks(model, blocks)
    frozen, model = split_frozen(model, blocks) if is_split else (None, model)
    how = recipe.weight_decay, recipe.label_smoothing, recipe.finetune_ema
    compile_model(model, recipe.finetune_learning_rate, 1000, *how)
    return frozen, model


def train(model: keras.Model, inputs: np.ndarray, steps: int) -> None:
    """Train on `steps` equal batches of the inputs (n, ...); the labels are arbitrary."""
    for batch in np.array_split(inputs, steps):
        model.train_on_batch(batch, np.eye(CLASSES)[np.arange(len(batch)) % CLASSES])


def estimate_recipe(parameters: dict, index: pd.DataFrame, speeds: list[dict]) -> dict:
    """Return the minutes that notebook 02 takes on a data set at the speeds of `measure_on_gpu`.

    They are an upper bound: all epochs count, and classifying an image counts as training the head
    on it. Reading images and compiling are not counted. A stage has the largest batch that fits, up
    to the recipe's; the minutes are None if none does.
    """
    recipe = Recipe(**parameters)
    images = dict(zip(STAGES, count_images(parameters, index), strict=True))
    own = {"pixels": recipe.image_size, "mixed_precision": recipe.mixed_precision}
    own |= {"outcome": "measured"}
    batches, seconds = {}, {}
    for record in sorted(speeds, key=lambda record: record["batch"]):
        if own.items() <= record.items() and record["batch"] <= recipe.finetune_batch_size:
            stage = record["stage"]
            batches[stage] = record["batch"]
            seconds[stage] = images[stage] / record["images_per_s"]["median"]
    minutes = round(sum(seconds.values()) / 60, 1) if len(seconds) == len(STAGES) else None
    return {"images": images, "batches": batches, "minutes": minutes}


def _make_images(count: int, sides: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *sides, 3), np.uint8)


main = make_main(measure_costs, "data_dir")

if __name__ == "__main__":
    sys.exit(main())
