"""Time measurements of the network, images, training steps and the reference's prediction.

Times are medians over repeats, each of which runs all contestants in turn; the smallest and largest
values come with them. Ratios are computed within each repeat, because a machine's speed drifts.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from marsclf.images.decode import read_rgb
from marsclf.images.views import Augmentation, fit_view, random_view
from marsclf.networks.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import make_predictor, predict_each
from marsclf.networks.pinned import keras
from marsclf.networks.specs import BLOCKS, SPECS
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, compile_model, join

REPEATS = 5
CLASSES = 25  # of the head
BATCH = 32  # Keras's own default
IMAGES = 256  # in one repeat
STEPS = 4  # of training, in one repeat
REFERENCE_IMAGES = 200
REFERENCE_SIZE = (193, 256)  # height and width in the reference's notebook, pixels


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest value with four significant digits."""
    numbers = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def take_turns(contestants: dict[str, Callable[[], object]]) -> dict[str, np.ndarray]:
    """Return the seconds (repeats,) of each contestant; all run once before the next repeat.

    One more run of each comes first, to compile and to fill caches; it is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 + REPEATS):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ms_per_image(seconds: dict[str, np.ndarray], images: int) -> dict[str, dict[str, float]]:
    """Return the spread of what `take_turns` measured, in milliseconds for one of the images."""
    return {name: spread(1e3 * values / images) for name, values in seconds.items()}


def measure_network(files: list[Path], cache: Path) -> dict:
    """Measure Lite0 on the engine and in Keras."""
    network = build_backbone("EfficientNetLite0")
    views = _load_views(files, network.input_shape[1])
    predict = make_predictor(network, cache)
    work = {
        "engine": lambda: list(predict_each(range(len(views)), views.__getitem__, predict)),
        "keras_predict": lambda: network.predict(views, batch_size=BATCH, verbose=0),
        "keras_one_by_one": lambda: [network.predict_on_batch(view[None]) for view in views],
    }
    seconds = take_turns(work)
    engine = seconds["engine"]
    return {
        "backbone": "EfficientNetLite0",
        "ms_per_image": ms_per_image(seconds, len(views)),
        "engine_against_keras_predict": spread(seconds["keras_predict"] / engine),
        "engine_against_keras_one_by_one": spread(seconds["keras_one_by_one"] / engine),
    }


def measure_images(files: list[Path], augmentation: Augmentation) -> dict:
    """Measure decoding, fitting the complete image and a random view, in one thread."""
    chosen = _choose(files, IMAGES)
    decoded = [read_rgb(path) for path in chosen]
    rng = np.random.default_rng(0)
    work = {
        "decode": lambda: [read_rgb(path) for path in chosen],
        "whole_image": lambda: [fit_view(image, 224) for image in decoded],
        "random_view": lambda: [random_view(image, 224, augmentation, rng) for image in decoded],
    }
    return {"ms_per_image": ms_per_image(take_turns(work), len(chosen))}


def measure_training(files: list[Path], parameters: dict, cache: Path) -> dict:
    """Measure training steps from pixels, and from stored features of the frozen blocks."""
    recipe = Recipe(**parameters)
    size = input_size(recipe)
    contestants = {
        "all_blocks_224": (224, list(BLOCKS), False),
        "all_blocks": (size, list(BLOCKS), False),
        "preset_blocks": (size, recipe.finetune_blocks, False),
        "preset_blocks_stored": (size, recipe.finetune_blocks, True),
    }
    steps = {}
    for name, (pixels, blocks, is_stored) in contestants.items():
        backbone, inputs = build_backbone(recipe.backbone, pixels), _load_views(files, pixels)
        frozen, model = prepare_training(recipe, backbone, blocks, is_stored)
        inputs = make_predictor(frozen, cache)(inputs) if is_stored else inputs
        steps[name] = functools.partial(train, model, inputs[: STEPS * BATCH], STEPS)
    times = {"ms_per_image": ms_per_image(take_turns(steps), STEPS * BATCH)}
    return {"image_size": size, "blocks": recipe.finetune_blocks} | times


def input_size(recipe: Recipe) -> int:
    """Return the side (pixels) of a recipe's images."""
    return recipe.image_size or SPECS[recipe.backbone].input_size


def prepare_training(
    recipe: Recipe, backbone: keras.Model, blocks: list[str], is_split: bool = True
) -> tuple[keras.Model | None, keras.Model]:
    """Return the frozen and the trainable part, compiled for the second stage of a recipe.

    If `is_split` is false, the frozen part is None and the other is the complete classifier.
    """
    head = build_head(backbone.output_shape[1], recipe.head_hidden, recipe.head_dropout, CLASSES)
    frozen, model = None, join(backbone, head)
    unfreeze_blocks(model, blocks)
    if is_split:
        frozen, model = split_frozen(model, blocks)
    compile_model(
        model,
        recipe.finetune_learning_rate,
        steps=1000,
        weight_decay=recipe.weight_decay,
        label_smoothing=recipe.label_smoothing,
        ema=recipe.finetune_ema,
    )
    return frozen, model


def train(model: keras.Model, inputs: np.ndarray, steps: int) -> None:
    """Train on `steps` equal batches of the inputs (n, ...); the labels are arbitrary."""
    for batch in np.array_split(inputs, steps):
        model.train_on_batch(batch, np.eye(CLASSES)[np.arange(len(batch)) % CLASSES])


def measure_reference(files: list[Path], cache: Path) -> dict:
    """Measure prediction as in E. Orsini's notebook and by this library, both with Lite0.

    That notebook reads all images into one array of float64 and predicts them one by one.
    """
    network = build_backbone("EfficientNetLite0", REFERENCE_SIZE)
    predict = make_predictor(network, cache)
    chosen = _choose(files, REFERENCE_IMAGES)

    def read(path: Path) -> np.ndarray:
        return cv2.resize(cv2.imread(str(path)), REFERENCE_SIZE[::-1])

    def reference() -> None:
        images = np.array([read(path) for path in chosen], dtype=np.float64)
        for image in images:
            network.predict_on_batch(image[np.newaxis])

    work = {"reference": reference, "library": lambda: list(predict_each(chosen, read, predict))}
    return {"images": len(chosen), "ms_per_image": ms_per_image(take_turns(work), len(chosen))}


def _choose(files: list[Path], count: int) -> list[Path]:
    """Return at most `count` of the files, spread over the list."""
    return files[:: max(1, len(files) // count)][:count]


def _load_views(files: list[Path], size: int) -> np.ndarray:
    return np.stack([fit_view(read_rgb(path), size) for path in _choose(files, IMAGES)])
