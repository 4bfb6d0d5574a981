"""Grad-CAM against the gradient of the whole network, and its errors."""

import keras
import numpy as np
import pytest

from marsclf.errors import MarsclfError
from marsclf.networks import gradcam


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """A small classifier with a squeeze-and-excitation block, whose pooling must not be taken."""
    keras.utils.set_random_seed(0)
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
    return keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 16, 20, 3), np.uint8)


def test_equals_the_gradient_of_the_whole_network(model: keras.Model, images: np.ndarray) -> None:
    tf = pytest.importorskip("tensorflow")
    classes = np.array([0, 3, 4, 4])
    maps = keras.Model(model.input, model.get_layer("last").output)(images.astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        x = tf.reduce_mean(maps, axis=(1, 2))
        hidden, final = model.layers[-2], model.layers[-1]
        logits = hidden(x) @ final.kernel + final.bias
        chosen = tf.gather(logits, classes, batch_dims=1)
        score = tf.reduce_sum(chosen - tf.reduce_mean(logits, axis=1))
    alpha = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2)).numpy()
    expected = np.maximum((maps.numpy() * alpha[:, None, None]).sum(axis=-1), 0)
    expected /= expected.max(axis=(1, 2), keepdims=True)
    heatmaps = gradcam.gradcam(model, images, classes)
    assert heatmaps.shape == (4, 5, 7)
    assert heatmaps.dtype == np.float32
    assert (heatmaps.min(), heatmaps.max()) == (0, 1)
    np.testing.assert_allclose(heatmaps, expected, atol=1e-5)


def test_finds_the_part_that_speaks_for_the_class_even_when_certain() -> None:
    """Class 0 is told by red, class 1 by blue, with a probability of 1 to the last bit."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Activation("linear")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(2, activation="softmax", name="scores")(x)
    model = keras.Model(inputs, outputs)
    model.get_layer("scores").set_weights(
        [np.array([[0.4, 0], [0, 0], [0, 0.4]], "float32"), np.zeros(2)]
    )
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, :4, :4, 0] = 250
    image[0, 7, 7, 2] = 250
    assert model.predict_on_batch(image)[0, 0] == 1
    for_red, for_blue = gradcam.gradcam(model, np.concatenate([image] * 2), np.array([0, 1]))
    np.testing.assert_array_equal(for_red > 0.5, image[0, ..., 0] > 0)
    np.testing.assert_array_equal(for_blue > 0.5, image[0, ..., 2] > 0)


def test_nothing_speaks_for_a_class_in_a_black_image() -> None:
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(2, activation="softmax")(
        keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("linear")(inputs))
    )
    heatmap = gradcam.gradcam(keras.Model(inputs, outputs), np.zeros((1, 8, 8, 3)), np.array([1]))
    assert (heatmap == 0).all()


def test_model_without_pooling_is_refused(images: np.ndarray) -> None:
    inputs = keras.Input((16, 20, 3))
    outputs = keras.layers.Dense(5, activation="softmax")(keras.layers.Flatten()(inputs))
    with pytest.raises(MarsclfError, match="needs global average pooling"):
        gradcam.gradcam(keras.Model(inputs, outputs), images, np.zeros(4, int))


def test_other_backends_are_refused(
    model: keras.Model, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(MarsclfError, match="not torch"):
        gradcam.gradcam(model, images, np.zeros(4, int))
