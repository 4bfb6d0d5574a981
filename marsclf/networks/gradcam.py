"""Grad-CAM (Selvaraju et al. 2017): which parts of an image support a class."""

import numpy as np
import tensorflow as tf

from marsclf.errors import MarsclfError
from marsclf.networks.pinned import keras


def gradcam(model: keras.Model, images: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Return heatmaps, float32 (n, h, w), 0 to 1, at the size of the last feature maps.

    `model` is a flat classifier of any precision: images (n, height, width, 3), 0 to 255, then
    convolutions, one global average pooling, a head, and probabilities (n, classes). A heatmap is
    all 0 where nothing supports the class. Raises MarsclfError for a model without pooling.
    """
    pooling = [x for x in model.layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    if not pooling:
        raise MarsclfError(f"Grad-CAM needs global average pooling, and {model.name} has none.")
    # The last one: squeeze-and-excitation blocks contain others.
    pooled = pooling[-1].output
    backbone = keras.Model(model.input, [pooling[-1].input, pooled])
    maps, features = backbone(np.float32(images), training=False)
    # The layers above use only the means of the maps. So the weight of a channel, the mean gradient
    # over its map, is the gradient with respect to its mean, up to a factor that scaling removes.
    with tf.GradientTape() as tape:
        tape.watch(features)
        probabilities = keras.Model(pooled, model.output)(features, training=False)
        # The gradient of the class's log-probability fades to rounding noise as the probability
        # nears 1. So the score is the logit of the class less the mean logit, which the
        # probabilities determine, because softmax ignores a constant added to all logits.
        logs = tf.math.log(tf.maximum(tf.cast(probabilities, tf.float32), 1e-30))
        scores = tf.gather(logs, class_ids, batch_dims=1) - tf.reduce_mean(logs, axis=-1)
    weights = tf.cast(tape.gradient(scores, features), tf.float32)
    heat = tf.nn.relu(tf.einsum("nhwc,nc->nhw", tf.cast(maps, tf.float32), weights)).numpy()
    highest = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, highest, out=np.zeros_like(heat), where=highest > 0)
