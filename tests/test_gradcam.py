"""Grad-CAM against the gradient of the complete network, and its errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from marsclf.errors import MarsclfError
from marsclf.networks.gradcam import gradcam

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 20, 3), np.uint8)
CLASSES = np.array([0, 3, 4, 4])


def make_model(policy: str = "float32") -> keras.Model:
    """A small classifier with a squeeze-and-excitation block, whose pooling must not be taken."""
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((16, 20, 3))
    x = keras.layers.Rescaling(1 / 127, -1)(inputs)
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(x)
    squeezed = keras.layers.GlobalAveragePooling2D()(x)
    squeezed = keras.layers.Dense(6, activation="sigmoid")(squeezed)
    x = keras.layers.Multiply()([x, keras.layers.Reshape((1, 1, 6))(squeezed)])
    x = keras.layers.Conv2D(8, 3, activation="relu", name="last")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.5)(x)
    x = keras.layers.Dense(10, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))
    keras.config.set_dtype_policy(before)
    return model


def test_equals_the_gradient_of_the_complete_network() -> None:
    model = make_model()
    maps = keras.Model(model.input, model.get_layer("last").output)(IMAGES.astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        x = tf.reduce_mean(maps, axis=(1, 2))
        hidden, final = model.layers[-2], model.layers[-1]
        logits = hidden(x) @ final.kernel + final.bias
        chosen = tf.gather(logits, CLASSES, batch_dims=1)
        score = tf.reduce_sum(chosen - tf.reduce_mean(logits, axis=1))
    alpha = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2)).numpy()
    expected = np.maximum((maps.numpy() * alpha[:, None, None]).sum(axis=-1), 0)
    expected /= expected.max(axis=(1, 2), keepdims=True)
    heatmaps = gradcam(model, IMAGES, CLASSES)
    assert heatmaps.shape == (4, 5, 7) and heatmaps.dtype == np.float32
    assert (heatmaps.min(), heatmaps.max()) == (0, 1)
    np.testing.assert_allclose(heatmaps, expected, atol=1e-5)


def test_mixed_precision_gives_nearly_the_same() -> None:
    heatmaps = gradcam(make_model("mixed_bfloat16"), IMAGES, CLASSES)
    assert heatmaps.dtype == np.float32
    np.testing.assert_allclose(heatmaps, gradcam(make_model(), IMAGES, CLASSES), atol=0.1)


def test_finds_what_speaks_for_a_class_even_when_the_probability_is_1() -> None:
    """Class 0 is told by red, class 1 by blue."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("linear")(inputs))
    scores = keras.layers.Dense(2, activation="softmax")
    model = keras.Model(inputs, scores(x))
    scores.set_weights([np.array([[0.4, 0], [0, 0], [0, 0.4]], "float32"), np.zeros(2)])
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, :4, :4, 0] = 250
    image[0, 7, 7, 2] = 250
    assert model.predict_on_batch(image)[0, 0] == 1
    for_red, for_blue = gradcam(model, np.concatenate([image] * 2), np.array([0, 1]))
    np.testing.assert_array_equal(for_red > 0.5, image[0, ..., 0] > 0)
    np.testing.assert_array_equal(for_blue > 0.5, image[0, ..., 2] > 0)
    assert not gradcam(model, np.zeros((1, 8, 8, 3)), np.array([1])).any()


def test_a_model_without_pooling() -> None:
    inputs = keras.Input((16, 20, 3))
    outputs = keras.layers.Dense(5, activation="softmax")(keras.layers.Flatten()(inputs))
    with pytest.raises(MarsclfError, match="needs global average pooling"):
        gradcam(keras.Model(inputs, outputs), IMAGES, CLASSES)
