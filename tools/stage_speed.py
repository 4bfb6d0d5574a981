"""How fast a network goes through both stages of a recipe here: frozen features, training steps.

Both are called as `features` and `training` call them, and each call ends with its result in main
memory: what a processor has only been told to do is not taken for done.
"""

import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np

from marsclf.data.msl import NUM_CLASSES
from marsclf.networks.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import has_gpu
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, compile_stage, join, one_hot
from tools.bench import count_flops, spread

PRECISIONS = ("mixed_bfloat16", "float32")  # of the backbone; the head is always float32
MATRIX = 8192  # large enough to keep any GPU busy
PRODUCTS = 10  # of matrices, a turn
TURNS = 7
MEASURED, OUT_OF_MEMORY = "measured", "out-of-memory"


class Stage(NamedTuple):
    """One stage of a recipe, ready to run.

    Attributes:
        inputs: of a few images, (n, ...); batches repeat them.
        turn: runs one batch of inputs through the stage; of training one step, which may take
            several batches.
        batches: that a turn takes.
        flops: additions and multiplications, an image.
    """

    inputs: np.ndarray
    turn: Callable[[np.ndarray], object]
    batches: int
    flops: int


def measure_stages(
    recipe: Recipe,
    weights: list[np.ndarray],
    images: np.ndarray,
    precision: str,
    batch_sizes: Sequence[int],
    matrix_rate: float,
) -> list[dict]:
    """Return how fast the recipe's two stages run, a record a stage and batch size.

    Args:
        recipe: whose backbone, blocks, head and optimizer are measured.
        weights: of the backbone, as its `get_weights` gives them.
        images: a few, (n, height, width, 3), 0-255; their sides are those of the network.
        precision: one of PRECISIONS.
        batch_sizes: images a batch, each measured by itself.
        matrix_rate: FLOP a second of a matrix product in this precision (see
            `matrix_product_rate`).

    Returns:
        Records with stage ("features" or "finetune"), sides (height, width), precision, batch and
        outcome. Where that is MEASURED also images_a_s (median, min, max of TURNS turns),
        share_of_matrix_product, peak_memory_mb of the device (10^6 bytes, with the weights; None
        where the backend does not tell) and ready_s, the seconds that the first turn took, mostly
        for compiling. A batch that does not fit in memory has the outcome OUT_OF_MEMORY.
    """
    records = []
    for name, prepare in {"features": _features, "finetune": _finetune}.items():
        stage = None
        for batch in batch_sizes:
            about = {"stage": name, "sides": list(images.shape[1:3])}
            about |= {"precision": precision, "batch": batch}
            try:
                if stage is None:
                    stage = prepare(recipe, _backbone(recipe, weights, images, precision), images)
                record = about | _measure(stage, batch, matrix_rate)
            except Exception as error:  # each backend has its own kind
                if not is_out_of_memory(error):
                    raise
                record = about | {"outcome": OUT_OF_MEMORY}
                stage = None  # JAX has taken the weights of a step that failed
            gc.collect()  # networks hold each other, and the device's memory, in circles
            print(", ".join(f"{k} {v}" for k, v in record.items()), file=sys.stderr, flush=True)
            records.append(record)
    return records


def matrix_product_rate(dtype: str, size: int = MATRIX) -> float:
    """Return the FLOP a second of products of square matrices, `size` rows, median of TURNS turns.

    A product counts 2 size^3. The backend multiplies float32 as it does by default, which on some
    GPUs is in fewer bits (TF32).
    """
    # Scaled so that products of products stay at the size of the factors.
    values = np.random.default_rng(0).standard_normal((size, size), np.float32) / np.sqrt(size)
    matrix = keras.ops.convert_to_tensor(values, dtype)

    def turn() -> np.ndarray:
        product = matrix
        for _ in range(PRODUCTS):  # each needs the one before, so the last one's result needs all
            product = keras.ops.matmul(product, matrix)
        return keras.ops.convert_to_numpy(product[:1, :1])

    turn()
    return 2 * size**3 * PRODUCTS / float(np.median(_seconds(turn)))


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a backend's error says that a device, or this machine, has no memory left."""
    said = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or bool(
        re.search(r"resource_?exhausted|out.of.memory|\bOOM\b", said, re.IGNORECASE)
    )


def _backbone(
    recipe: Recipe, weights: list[np.ndarray], images: np.ndarray, precision: str
) -> keras.Model:
    """Build the recipe's backbone at the size of the images, as recipe.build does."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        network = build_backbone(recipe.backbone, images.shape[1:3], weights=None)
    finally:
        keras.config.set_dtype_policy(policy)
    network.set_weights(weights)
    return network


def _features(recipe: Recipe, network: keras.Model, images: np.ndarray) -> Stage:
    """Stage 1: images through the frozen network, as inference does it on a GPU."""
    return Stage(images, network.predict_on_batch, 1, count_flops(network))


def _finetune(recipe: Recipe, network: keras.Model, images: np.ndarray) -> Stage:
    """Stage 2: a step of the blocks that learn, from what the frozen ones gave.

    It counts three times the forward pass of what learns: once forward, and as much again for the
    gradient of each layer's inputs and for that of its weights.
    """
    frozen, upper = split_frozen(network, recipe.finetune_blocks)
    inputs = frozen.predict_on_batch(images).astype(np.float32)
    head = build_head(network.output_shape[1], recipe.head_hidden, recipe.head_dropout)
    classifier = join(upper, head)
    unfreeze_blocks(classifier, recipe.finetune_blocks)
    compile_stage(classifier, recipe.schedule("finetune", len(images)), steps=1000)

    def turn(batch: np.ndarray) -> None:
        targets = one_hot(np.arange(len(batch)) % NUM_CLASSES)
        for _ in range(recipe.finetune_accumulate):
            classifier.train_on_batch(batch, targets)

    return Stage(inputs, turn, recipe.finetune_accumulate, 3 * count_flops(classifier))


def _measure(stage: Stage, batch: int, matrix_rate: float) -> dict:
    inputs = stage.inputs.take(range(batch), axis=0, mode="wrap")
    held = _begin_peak()
    started = time.perf_counter()
    stage.turn(inputs)
    ready = time.perf_counter() - started
    rates = [batch * stage.batches / seconds for seconds in _seconds(lambda: stage.turn(inputs))]
    peak = _peak()
    return {
        "outcome": MEASURED,
        "images_a_s": spread(rates),
        "share_of_matrix_product": float(f"{np.median(rates) * stage.flops / matrix_rate:.3g}"),
        # JAX's peak is that of the whole process: one that has not grown is of something before.
        "peak_memory_mb": round(peak / 1e6) if peak is not None and peak > held else None,
        "ready_s": round(ready, 1),
    }


def _seconds(turn: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - started)
    return seconds


def _begin_peak() -> int | None:
    """Begin the account of peak memory anew, where the backend can; return what it holds now."""
    if keras.backend.backend() == "tensorflow" and has_gpu():
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")
    return _peak()


def _peak() -> int | None:
    """Return the most memory (bytes) of the first GPU that was in use, None if not told."""
    if not has_gpu():
        return None
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if keras.backend.backend() == "jax":
        import jax

        return (jax.devices("gpu")[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None
