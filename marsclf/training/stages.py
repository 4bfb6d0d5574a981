"""The parts of both training stages: the head, the classifier, and how they learn."""

import math

import numpy as np

from marsclf.networks.engine import has_gpu
from marsclf.networks.pinned import keras
from marsclf.provenance import gpu_memory


def build_head(width: int, hidden: int, dropout: float, classes: int) -> keras.Model:
    """Return an untrained head: features (n, width) to probabilities (n, classes).

    It has one hidden layer of `hidden` units, or is linear where that is 0.
    """
    layers = keras.layers
    stack = [layers.Input((width,), name="features"), layers.Dropout(dropout, name="head_dropout")]
    if hidden:
        stack.append(layers.Dense(hidden, activation="relu", name="head_hidden"))
        stack.append(layers.Dropout(dropout, name="head_hidden_dropout"))
    stack.append(layers.Dense(classes, activation="softmax", name="probabilities"))
    return keras.Sequential(stack, name="head")


def join(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """Return one flat model, images to probabilities, that shares the weights of both parts."""
    tensor = backbone.output
    for layer in head.layers:
        tensor = layer(tensor)
    return keras.Model(backbone.input, tensor, name=f"{backbone.name}_classifier")


def compile_model(
    model: keras.Model,
    learning_rate: float,
    steps: int,
    weight_decay: float,
    label_smoothing: float,
    ema: float = 0.0,
    accumulate: int = 1,
) -> None:
    """Compile a model for a stage of so many steps, as notebook 02 explains.

    Args:
        model: gives probabilities (n, 25).
        learning_rate, weight_decay: of AdamW; the learning rate falls to 0 along a cosine.
        steps: batches of all epochs together.
        label_smoothing: share of the probability that is spread over all classes (0-1).
        ema: momentum per step of the exponential moving average of the weights; 0 for none.
        accumulate: batches whose mean gradient makes one step.
    """
    optimizer = keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(learning_rate, steps),
        weight_decay=weight_decay,
        use_ema=ema > 0,
        # Keras averages after every batch, even where several batches make one step.
        ema_momentum=ema ** (1 / accumulate),
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
    )
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        # Keras does so itself only if the head, too, computes in float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing),
        metrics=["accuracy"],
        # XLA makes TensorFlow's depthwise convolutions twenty times slower on a CPU.
        jit_compile=False,
    )


def images_at_once(model: keras.Model, batch_size: int) -> int:
    """Return how many images of a batch a GPU's memory can train at once; without a GPU, all.

    The result is the batch size, halved as often as necessary. The memory is estimated: what the
    trained layers give is kept for the gradients, with a copy; below them only a few tensors exist
    at a time, up to six as large as the largest.
    """
    # A GPU that TensorFlow does not see must not change how a CPU trains.
    memory = gpu_memory() if has_gpu() else 0
    if not memory:
        return batch_size
    layers = [layer for layer in model.layers if hasattr(layer, "output")]
    sizes = [math.prod(x.output.shape[1:]) * np.dtype(x.compute_dtype).itemsize for x in layers]
    first = next(i for i, layer in enumerate(layers) if layer.trainable_weights)
    per_image = 6 * max(sizes) + 2 * sum(sizes[first:])
    weights = 16 * model.count_params()  # with gradients and the optimizer's averages
    while batch_size > 1 and batch_size * per_image > 0.8 * memory - weights:
        batch_size //= 2
    return batch_size
