"""Weights drawn at random, brought to the scale of trained ones."""

import keras
import numpy as np

from marsclf.b7_cost import set_scale
from marsclf.backbones import build_backbone


def test_batchnorm_takes_the_statistics_of_the_images() -> None:
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB0", 64, weights=None)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.float32)
    before = network.predict_on_batch(images)
    set_scale(network, images)
    last = keras.Model(network.input, network.get_layer("top_bn").output)
    scaled = last.predict_on_batch(images)
    np.testing.assert_allclose(scaled.mean(axis=(0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(scaled.std(axis=(0, 1, 2)).mean(), 1, atol=0.05)
    assert network.predict_on_batch(images).std() > 10 * before.std()
