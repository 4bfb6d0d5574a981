"""Grad-CAM (Selvaraju et al. 2017): which parts of an image spoke for a class."""

from typing import Any

import keras
import numpy as np

from marsclf.errors import MarsclfError


def gradcam(model: keras.Model, images: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Return heatmaps float32 (N, h, w) in 0 to 1, at the size of the last convolution's map.

    `model` is a flat classifier: images (N, H, W, 3), 0 to 255, then convolutions, one global
    average pooling, a head, and probabilities (N, classes). A map is all 0 where nothing speaks
    for the class. Raises MarsclfError for a model without pooling and for a Keras backend other
    than TensorFlow and JAX.
    """
    pooling = [x for x in model.layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    if not pooling:
        raise MarsclfError(f"Grad-CAM needs global average pooling, and {model.name} has none.")
    # The last one: squeeze-and-excitation blocks pool too, further down.
    pooled, maps = pooling[-1].output, pooling[-1].input
    values = keras.Model(model.input, [maps, pooled])(np.float32(images), training=False)
    activations, features = (keras.ops.convert_to_numpy(value) for value in values)
    # All that lies above sees the maps only through their means, so a channel's weight, the mean
    # gradient over its map, is the gradient by its mean, but for a factor that the scaling removes.
    weights = _gradient(keras.Model(pooled, model.output), features, np.asarray(class_ids))
    heat = np.maximum(np.einsum("nhwc,nc->nhw", activations, weights), 0)
    highest = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, highest, out=np.zeros_like(heat), where=highest > 0)


def _score(probabilities: Any, class_ids: np.ndarray) -> Any:
    """Return the classes' scores before the softmax, less the mean score of all classes, summed.

    Softmax forgets a constant added to all scores, so they can be recovered up to that. The log of
    the probability alone would not do: its gradient fades to rounding noise as it nears 1. Takes
    probabilities (N, classes) and returns a number, both tensors of Keras's backend.
    """
    logs = keras.ops.log(keras.ops.maximum(probabilities, 1e-30))
    chosen = keras.ops.one_hot(class_ids, probabilities.shape[-1])
    return keras.ops.sum(keras.ops.sum(logs * chosen, axis=-1) - keras.ops.mean(logs, axis=-1))


def _gradient(head: keras.Model, features: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Return the gradient (N, channels) of each image's score by its pooled features."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        inputs = tensorflow.convert_to_tensor(features)
        with tensorflow.GradientTape() as tape:
            tape.watch(inputs)
            score = _score(head(inputs, training=False), class_ids)
        return tape.gradient(score, inputs).numpy()
    if backend == "jax":
        import jax

        def score_of(inputs: Any) -> Any:
            return _score(head(inputs, training=False), class_ids)

        return np.asarray(jax.grad(score_of)(features))
    raise MarsclfError(f"Grad-CAM runs on the backends tensorflow and jax of Keras, not {backend}.")
